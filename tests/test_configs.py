"""Every spec in configs/ is a working example."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from needs import need
from typer.testing import CliRunner

from actdump.cli import app

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


def actdump(*arguments: str) -> subprocess.CompletedProcess[str]:
    program = Path(sys.executable).parent / "actdump"
    return subprocess.run(
        [program, *arguments], cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300
    )


def need_models_of(config: Path) -> None:
    """The spec's local model has to be fetched."""
    model = yaml.safe_load(config.read_text())["model"]
    name = model if isinstance(model, str) else model.get("name")
    need(name is None or (ROOT / name).is_dir(), f"{name} is not there: run scripts/fetch_model")


def test_there_are_examples():
    names = [config.name for config in CONFIGS]
    assert names
    assert "quickstart.yaml" in names


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.name)
def test_begins_with_the_command_that_runs_it(config):
    assert config.read_text().startswith(f"# actdump run configs/{config.name}\n")


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.name)
def test_writes_to_the_folder_that_git_ignores(config):
    assert yaml.safe_load(config.read_text())["output"] == f"out/{config.stem}"


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.name)
def test_passes_check(config, monkeypatch):
    need_models_of(config)
    monkeypatch.chdir(ROOT)
    done = CliRunner().invoke(app, ["check", f"configs/{config.name}"])
    assert done.exit_code == 0, done.output


def test_quickstart_has_a_dozen_prompts_of_different_lengths():
    prompts = yaml.safe_load((ROOT / "configs" / "quickstart.yaml").read_text())["prompts"]
    words = [len(re.findall(r"\S+", prompt if isinstance(prompt, str) else prompt["text"])) for prompt in prompts]
    assert len(prompts) == 12
    assert max(words) > 100 * min(words)


def test_random_runs(tmp_path):
    """To the end, and again: the second time there is nothing to do."""
    out = tmp_path / "a dump"
    first = actdump("run", "configs/random.yaml", "-o", str(out))
    assert first.returncode == 0, first.stdout + first.stderr
    assert (out / "manifest.json").is_file()
    before = (out / "manifest.json").stat().st_mtime_ns
    second = actdump("run", "configs/random.yaml", "-o", str(out))
    assert second.returncode == 0, second.stdout + second.stderr
    assert "up to date" in second.stdout + second.stderr
    assert (out / "manifest.json").stat().st_mtime_ns == before
