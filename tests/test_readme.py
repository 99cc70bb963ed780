"""What the README says is so: its commands and code run, its specs load, its tables are complete."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import typer
import yaml
from needs import need

from actdump import errors, spec
from actdump.cli import app

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = [(found[1], found[2]) for found in re.finditer(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)]
FRAGMENT = "# part of a spec\n"
REST_OF_A_SPEC = {"model": "some/model", "prompts": ["Hello"], "save": ["output"], "output": "out"}
MODELS = ["SmolLM2-135M-Instruct", "all-MiniLM-L6-v2"]
TIME = re.compile(r"\d+\.\d s\b")


@dataclass(frozen=True)
class Command:
    """A command of a console block, and the output shown under it."""

    text: str
    shown: tuple[str, ...]


def blocks(language: str) -> list[str]:
    return [text for kind, text in BLOCKS if kind == language]


def commands(block: str) -> Iterator[Command]:
    for piece in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
        text, *shown = piece.splitlines()
        yield Command(text, tuple(shown))


def skipped(command: Command) -> bool:
    return command.text.startswith(("scripts/", "pip "))


CONSOLE = [[command for command in commands(block) if not skipped(command)] for block in blocks("console")]
COMMANDS = [command for block in CONSOLE for command in block]


def plain(line: str) -> str:
    """A line of output without what differs between two runs or machines: widths of columns, seconds, what an audit found."""
    found = re.sub(r"\d+ vectors exact, \d+ with drift; worst relative error \S+", "vectors", line)
    return TIME.sub("N s", " ".join(found.split()))


def need_models():
    missing = [name for name in MODELS if not (ROOT / "models" / name).is_dir()]
    need(not missing, f"{', '.join(missing)} not there: run scripts/fetch_model")


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """A working folder with the README's specs, and models and configs linked in."""
    need_models()
    folder = tmp_path_factory.mktemp("readme")
    for name in ("models", "configs"):
        (folder / name).symlink_to(ROOT / name, target_is_directory=True)
    for block in blocks("yaml"):
        if named := re.match(r"# (\S+\.yaml)\n", block):
            (folder / named[1]).write_text(block)
    for block in blocks("make"):
        (folder / "Makefile").write_text(block)
    return folder


def shell(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "COLUMNS": "200"}
    return subprocess.run(
        command,
        shell=True,
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
    )


@pytest.fixture(scope="module")
def done(desk):
    """All commands, run once: those of a block in order, and two blocks at a time, because no block needs another."""
    with ThreadPoolExecutor(2) as threads:
        results = list(threads.map(lambda block: [shell(command.text, desk) for command in block], CONSOLE))
    return [result for block in results for result in block]


def rows(first: str) -> list[list[str]]:
    """The cells of the table whose head begins with these words."""
    found = re.search(rf"^\| {re.escape(first)} \|.*\n\|[-|]+\n((?:\|.*\n)+)", README, re.MULTILINE)
    assert found is not None, first
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in found[1].splitlines()]


def test_there_is_something_to_test():
    assert len(COMMANDS) >= 7
    for language in ("python", "yaml", "console", "sh", "make"):
        assert blocks(language), language
    assert README.count("\n```") == 2 * len(BLOCKS)


@pytest.mark.parametrize("number", range(len(COMMANDS)), ids=lambda number: COMMANDS[number].text)
def test_command_runs_and_says_what_is_shown(done, number):
    command, result = COMMANDS[number], done[number]
    assert result.returncode == 0, result.stdout
    assert not command.shown or shows(command.shown, told(result.stdout)), result.stdout


def told(output):
    """The lines of an output, but for what it says of this machine's CPU."""
    return [line for line in output.splitlines() if not line.startswith("warning: this CPU takes")]


def shows(shown, said):
    """Whether what is shown is what was said, line by line; `…` stands for any lines."""
    if not shown:
        return not said
    if shown[0] == "…":
        return any(shows(shown[1:], said[start:]) for start in range(len(said) + 1))
    return bool(said) and plain(shown[0]) == plain(said[0]) and shows(shown[1:], said[1:])


def test_code_runs_and_prints_what_its_comments_say(done, desk, monkeypatch, capsys):
    """In order, in one namespace, as a reader would paste it. A comment after `print` begins with what is printed."""
    monkeypatch.chdir(desk)
    assert [result.returncode for result in done] == [0] * len(done)
    namespace: dict[str, object] = {}
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), namespace)
        printed = capsys.readouterr().out.splitlines()
        comments = [line.partition("  # ")[2] for line in block.splitlines() if line.startswith("print(")]
        assert len(printed) == len(comments)
        for line, comment in zip(printed, comments, strict=True):
            exact = re.search(r"(torch\.Size\(.*\)|\(\d+, \d+\)$|^\d+$|^\[.*\]$|^\{.*\}$|^'.*'$)", comment)
            assert exact is None or exact[1] in (line, f"[{line}]"), (line, comment)


def test_similarities_are_those_shown(done, desk):
    import torch

    import actdump

    assert [result.returncode for result in done] == [0] * len(done)
    sentences = torch.nn.functional.normalize(actdump.open(desk / "out" / "minilm")["sentence"].rows[:], dim=-1)
    shown = [float(number) for number in re.findall(r"-?\d\.\d\d", README.partition("# two meals:")[2].partition("\n")[0])]
    assert shown == pytest.approx((sentences @ sentences.T)[0, 1:4].tolist(), abs=0.006)


def test_shell_scripts_end_well(done, desk):
    """Those of the batch job and of make, on a dump that is up to date; what pip would do is left out."""
    assert [result.returncode for result in done] == [0] * len(done)
    scripts = [block for block in blocks("sh") if not block.startswith("pip ")]
    assert scripts
    for script in scripts:
        result = shell(script, desk)
        assert result.returncode == 0, result.stdout
        assert "up to date" in result.stdout
    need(shell("command -v make", desk).returncode == 0, "there is no make")
    result = shell("make -B", desk)
    assert result.returncode == 0, result.stdout
    assert "up to date" in result.stdout


@pytest.mark.parametrize("block", blocks("yaml"), ids=lambda block: block.partition("\n")[0])
def test_spec_loads(block, tmp_path):
    assert block.startswith("# ")
    if block.startswith(FRAGMENT):
        block = yaml.safe_dump({**REST_OF_A_SPEC, **yaml.safe_load(block)})
    path = tmp_path / "spec.yaml"
    path.write_text(block)
    assert spec.load(path).output


SECTIONS = {
    "model": (spec.ModelSpec, {"name": "some/model"}),
    "prompts": (spec.PromptsSpec, {"file": "prompts.txt"}),
    "tokenizer": (spec.TokenizerSpec, {}),
    "save": (spec.SaveSpec, {"address": "output"}),
    "batch": (spec.BatchSpec, {}),
    "shard": (spec.ShardSpec, {}),
}


def test_table_of_keys_is_complete():
    wanted = []
    for name in spec.Spec.model_fields:
        section = SECTIONS[name][0].model_fields if name in SECTIONS else [None]
        wanted += [name if key is None else f"{name}.{key}" for key in section if key != "rows"]
    assert [key.strip("`") for key, *_ in rows("key")] == wanted


@pytest.mark.parametrize(("key", "default"), [row[:2] for row in rows("key")])
def test_default_is_the_one_in_the_table(key, default):
    section, _, name = key.strip("`").rpartition(".")
    model, least = SECTIONS[section] if section else (spec.Spec, REST_OF_A_SPEC)
    field = model.model_fields[name]
    if field.is_required():
        assert default == "required"
    elif default == "":
        assert field.default is None
    else:
        given = model.model_validate({**least, name: yaml.safe_load(default.strip("`"))})
        assert getattr(given, name) == field.default


def every_error(root=errors.ActdumpError):
    yield root
    for kind in root.__subclasses__():
        yield from every_error(kind)


def test_table_of_exit_codes_is_complete():
    """Besides those of the errors there are 0, and 130 for Ctrl-C twice."""
    ours = {kind.code for kind in every_error() if kind.__module__ == errors.__name__}
    assert [int(code) for code, *_ in rows("code")] == sorted(ours | {0, 130})


def test_table_of_commands_is_complete():
    said = re.findall(r"^\| `actdump (\w+)", README, re.MULTILINE)
    assert said == list(typer.main.get_command(app).commands)


def test_options_in_the_table_are_those_of_the_commands():
    """Each of them, by one of its spellings."""
    known = typer.main.get_command(app).commands
    for line in re.findall(r"^\| `actdump .*", README, re.MULTILINE):
        name = re.match(r"\| `actdump (\w+)", line)[1]
        options = [set(each.opts) for each in known[name].params if each.param_type_name == "option"]
        said = set(re.findall(r"`(--?[\w-]+)", line))
        assert said <= set().union(*options)
        assert all(spellings & said for spellings in options), name


def test_scripts_named_are_there():
    for name in re.findall(r"`(scripts/\w+)`", README):
        assert os.access(ROOT / name, os.X_OK)
