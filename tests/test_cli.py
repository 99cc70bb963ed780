"""The command line: what it imports, what it prints where, and that every command explains itself."""

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from actdump.cli import app

SPEC = """\
model: {config: {model_type: gpt2, n_layer: 2, n_embd: 32, n_head: 2, vocab_size: 100, n_positions: 64}, seed: 0}
prompts:
  - input_ids: [1, 2, 3]
  - input_ids: [4, 5]
  - {input_ids: [6], id: last, label: x}
save:
  final: transformer.h[-1].output[0]
output: out
"""
COMMANDS = sorted(get_command(app).commands)


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("spec.yaml").write_text(SPEC)
    return tmp_path


def actdump(*words: str, code: int = 0, stdin: str | None = None):
    result = CliRunner().invoke(app, list(words), input=stdin)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    print(result.stdout, result.stderr, sep="\n")
    assert result.exit_code == code
    return result


def heavy(words: Sequence[str], code: int) -> set[str]:
    """Which of the heavy libraries a command imports, in a process of its own."""
    program = (
        "import sys\nfrom actdump.cli import app\n"
        f"try:\n    app({list(words)!r})\nexcept SystemExit as end:\n    assert end.code == {code}, end.code\n"
        "print('HEAVY', *({'torch', 'transformers', 'numpy', 'safetensors'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split()[1:])


# -------------------------------------------------------------------------------------------------------- fast where it can be


@pytest.mark.parametrize("words", [["--help"], ["run", "--help"], ["schema"]])
def test_help_imports_nothing_heavy(words: list[str]) -> None:
    assert heavy(words, 0) == set()


def test_the_version_is_that_of_the_package() -> None:
    assert actdump("--version").stdout == f"actdump {version('actdump')}\n"


def test_help_imports_no_spec_either() -> None:
    program = "import sys, actdump.cli\nprint(*({'yaml', 'pydantic', 'rich.progress', 'actdump.spec'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == []


@pytest.mark.parametrize("command", ["check", "run"])
def test_a_bad_spec_is_told_without_torch(command: str) -> None:
    Path("spec.yaml").write_text(SPEC.replace("output:", "outptu:"))
    assert heavy([command, "spec.yaml"], 2) & {"torch", "transformers"} == set()


def test_an_up_to_date_dump_is_told_without_torch_and_without_a_touch() -> None:
    actdump("run", "spec.yaml")
    before = {path: path.stat().st_mtime_ns for path in Path("out").rglob("*")}
    assert heavy(["run", "spec.yaml"], 0) & {"torch", "transformers"} == set()
    assert heavy(["run", "spec.yaml", "--overwrite"], 0) & {"torch", "transformers"} == set()
    assert {path: path.stat().st_mtime_ns for path in Path("out").rglob("*")} == before


def test_another_dump_in_the_folder_is_told_without_torch() -> None:
    actdump("run", "spec.yaml")
    assert heavy(["run", "spec.yaml", "--set", "dtype=float16"], 73) & {"torch", "transformers"} == set()


# ------------------------------------------------------------------------------------------------------------------------- help


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str) -> None:
    said = actdump(command, "--help")
    assert "Usage" in said.stdout
    for option in get_command(app).commands[command].params:
        assert getattr(option, "help", None), f"{command} {option.name} has no help"


def test_the_commands() -> None:
    assert {"run", "check", "tree", "show", "verify", "schema"} <= set(COMMANDS)
    said = actdump("--help")
    assert all(command in said.stdout for command in COMMANDS)


# ------------------------------------------------------------------------------------------------------------------------- run


def test_run_prints_the_manifest_on_stdout_and_all_else_on_stderr() -> None:
    said = actdump("run", "spec.yaml")
    assert said.stdout == "out/manifest.json\n"
    assert "3 prompts, 6 tokens" in said.stderr
    again = actdump("run", "spec.yaml")
    assert again.stdout == "out/manifest.json\n"
    assert "up to date" in again.stderr


def test_quiet_says_only_the_result() -> None:
    said = actdump("run", "-q", "spec.yaml")
    assert (said.stdout, said.stderr) == ("out/manifest.json\n", "")
    said = actdump("run", "-q", "spec.yaml")
    assert (said.stdout, said.stderr) == ("out/manifest.json\n", "")
    said = actdump("run", "-q", "spec.yaml", "--set", "dtype=float16", code=73)
    assert said.stdout == ""
    assert said.stderr.startswith("error: ")


def test_run_as_json() -> None:
    value = json.loads(actdump("run", "spec.yaml", "--json").stdout)
    assert (value["state"], value["manifest"], value["prompts"], value["tokens"]) == ("done", "out/manifest.json", 3, 6)
    assert json.loads(actdump("run", "spec.yaml", "--json").stdout)["state"] == "up to date"


def test_another_output() -> None:
    assert actdump("run", "spec.yaml", "-o", "else/where").stdout == "else/where/manifest.json\n"
    assert not Path("out").exists()


def test_what_transformers_says_stays_out_of_the_log() -> None:
    """It warns of padding without a mask wherever the pad id is among the tokens."""
    Path("spec.yaml").write_text(SPEC.replace("model_type: gpt2", "model_type: gpt2, pad_token_id: 3"))
    done = in_bash("actdump run spec.yaml --log-json && actdump run spec.yaml -o quiet -q >&2")
    *lines, quiet = done.stderr.splitlines()
    assert [json.loads(line) for line in lines]
    assert quiet == "quiet/manifest.json"


def test_an_empty_output_is_not_the_working_folder() -> None:
    """As from a variable of a shell that was never set."""
    for command in ("run", "check", "explain"):
        assert "`output` is empty" in actdump(command, "spec.yaml", "-o", "", code=2).stderr
    assert "`output` is empty" in actdump("run", "spec.yaml", "--set", "output=''", code=2).stderr
    assert not Path("plan.json").exists()


def test_a_limit_takes_the_first_prompts() -> None:
    assert json.loads(actdump("run", "spec.yaml", "--limit", "2", "--json").stdout)["prompts"] == 2
    assert len(Path("out/prompts.jsonl").read_text().splitlines()) == 2
    actdump("run", "spec.yaml", "--limit", "0", code=2)


def test_standard_input() -> None:
    Path("spec.yaml").write_text(
        SPEC.partition("prompts:")[0] + "prompts: {file: '-', format: jsonl}\nsave: [transformer.wte.output]\n"
    )
    lines = '{"input_ids": [1, 2]}\n{"input_ids": [3]}\n'
    said = actdump("run", "spec.yaml", "-o", "out", "--json", stdin=lines)
    assert json.loads(said.stdout)["tokens"] == 3
    again = actdump("run", "spec.yaml", "-o", "out", "--json", stdin=lines)
    assert json.loads(again.stdout)["state"] == "up to date"
    actdump("run", "spec.yaml", "-o", "out", stdin=lines + lines, code=73)


def test_dry_run_writes_nothing() -> None:
    before = set(Path().rglob("*"))
    said = actdump("run", "spec.yaml", "--dry-run")
    assert "final" in said.stdout
    assert "(batch, token, 32)" in said.stdout
    assert set(Path().rglob("*")) == before


# ------------------------------------------------------------------------------------------------------------- the other commands


def test_check_foretells_the_exact_bytes() -> None:
    foretold = json.loads(actdump("check", "spec.yaml", "--json").stdout)
    made = json.loads(actdump("run", "spec.yaml", "--json").stdout)
    assert foretold["bytes"] == made["bytes"] == Path("out/shards/00000.safetensors").stat().st_size
    assert (foretold["prompts"], foretold["tokens"], foretold["parts"], foretold["weights_loaded"]) == (3, 6, 1, False)
    assert foretold["taps"] == [{
        "name": "final", "address": "transformer.h[-1].output[0]", "resolved": "transformer.h[1].output[0]", "module": "GPT2Block",
        "axes": ["batch", "token", "32"], "value": "(tokens, 32)", "dtype": "float32", "rows": 6, "bytes": 6 * 32 * 4,
    }]  # fmt: skip


def test_check_in_words() -> None:
    said = actdump("check", "spec.yaml")
    for word in ("GPT2Block", "(batch, token, 32)", "768", "3, 6 tokens", "are free"):
        assert word in said.stdout
    assert not Path("out").exists()


@pytest.mark.parametrize(("tokens", "told"), [(16, True), (262_144, False)])
def test_check_says_where_larger_shards_would_spare_padding(tokens: int, told: bool) -> None:
    """Short and long prompts in turn: in shards of two, each short one has a long one beside it."""
    Path("prompts.jsonl").write_text("".join(f'{{"input_ids": {[1] * length}}}\n' for length in (2, 13, 3, 12)))
    given = f"shard.tokens={tokens}", "prompts={file: prompts.jsonl}"
    said = actdump("check", "spec.yaml", *(word for each in given for word in ("--set", each))).stdout
    assert ("less in larger shards" in " ".join(said.split())) is told


def test_check_says_what_a_run_would_find() -> None:
    def folder(*words: str, code: int = 0) -> dict[str, object]:
        return json.loads(actdump("check", "spec.yaml", "--json", *words, code=code).stdout)["folder"]

    assert folder() == {"state": "new", "reasons": []}
    actdump("run", "spec.yaml")
    assert folder() == {"state": "up to date", "reasons": []}
    stale = "`dtype` was not given and is float16"
    assert folder("--set", "dtype=float16") == {"state": "stale", "reasons": [stale]}
    said = actdump("run", "spec.yaml", "--dry-run", "--set", "dtype=float16").stdout
    assert f"stale: a run would refuse it, and with --overwrite replace it ({stale})" in said
    Path("other").mkdir()
    Path("other/mine").touch()
    assert folder("-o", "other", code=73)["state"] == "refused"
    said = actdump("check", "spec.yaml", "-o", "other", code=73)
    assert "refused: a run would end with the error that follows" in said.stdout
    assert "error: other holds other things (mine)" in said.stderr
    lines = '{"input_ids": [1, 2]}\n'
    words = ("--set", "prompts={file: '-', format: jsonl}", "-o", "piped")
    actdump("run", "spec.yaml", *words, stdin=lines)
    said = actdump("check", "spec.yaml", *words, "--json", stdin=lines)
    assert json.loads(said.stdout)["folder"]["state"] == "up to date"


def test_check_without_a_folder() -> None:
    assert json.loads(actdump("check", "spec.yaml", "--json", "--set", "output=null").stdout)["folder"] is None


def test_tree() -> None:
    said = actdump("tree", "spec.yaml", "--grep", "attn", "--depth", "9")
    assert "transformer.h[0].attn" in said.stdout
    assert "GPT2Attention" in said.stdout
    assert "wte" not in said.stdout
    assert "h[0]" not in actdump("tree", "spec.yaml", "--depth", "1").stdout
    assert "--set changes a spec" in actdump("tree", "models/x", "--set", "model.task=base", code=2).stderr


def test_tree_of_a_file_of_a_model(tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes(b"{\xff}")
        said = actdump("tree", str(tmp_path / name), code=2).stderr
        assert f"is a file of a model; name the folder that holds it: `{tmp_path}`" in said.replace("\n", "")


def test_show_and_verify() -> None:
    actdump("run", "spec.yaml")
    said = actdump("show", "out")
    for word in ("final", "GPT2LMHeadModel", "float32", "3, 6 tokens"):
        assert word in said.stdout
    assert json.loads(actdump("show", "out", "--json").stdout)["prompts"] == 3
    said = actdump("verify", "out")
    assert "whole" in said.stdout
    assert said.stderr == ""


def test_schema() -> None:
    schema = json.loads(actdump("schema").stdout)
    assert {"model", "prompts", "save", "output"} <= set(schema["properties"])
    assert schema["additionalProperties"] is False


def in_bash(script: str) -> subprocess.CompletedProcess[str]:
    script = f"actdump() {{ '{sys.executable}' -m actdump \"$@\"; }}; {script}"
    return subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize(
    ("words", "code"),
    [
        ("schema", 0), ("show out", 0), ("show out --json", 0), ("status out", 0), ("status part", 75), ("verify out", 0),
        ("explain spec.yaml", 0), ("check spec.yaml", 0), ("diff out out", 0), ("diff out other", 65), ("diff out other --json", 65),
    ],
)  # fmt: skip
def test_a_reader_that_stops_reading_does_not_change_the_exit_code(words: str, code: int) -> None:
    actdump("run", "spec.yaml")
    actdump("run", "spec.yaml", "-o", "other", "--set", "model.seed=1")
    actdump("run", "spec.yaml", "-o", "part")
    Path("part/manifest.json").unlink()
    done = in_bash(f"actdump {words} | true; exit ${{PIPESTATUS[0]}}")
    assert done.returncode == code, done.stderr
    assert "Broken pipe" not in done.stderr


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_terminal_of_few_characters(encoding: str, unbuffered: str) -> None:
    actdump("run", "spec.yaml")
    done = in_bash(f"PYTHONIOENCODING={encoding} PYTHONUNBUFFERED={unbuffered} actdump show out")
    assert done.returncode == 0, done.stderr
    assert "tokens 0, 1, 2 \\u2026" in done.stdout


def test_a_log_that_nobody_reads_any_more_does_not_end_a_run() -> None:
    done = in_bash("actdump run spec.yaml --log-json 2> >(true) && actdump verify out")
    assert done.returncode == 0
    assert "whole" in done.stdout


def test_check_counts_what_is_there_as_room(monkeypatch) -> None:
    actdump("run", "spec.yaml")
    for place in ("actdump.store.free_space", "actdump.store.checks.free_space"):
        monkeypatch.setattr(place, lambda _: 10)
    actdump("check", "spec.yaml", "--set", "dtype=float16")  # another dump, half as large, which would replace it
    said = actdump("check", "spec.yaml", "-o", "other", code=74)
    assert "10 are free at other" in said.stdout
    assert re.search(r"error: other: the dump needs [\d,]+ bytes, and 10 are free", said.stderr)


# -------------------------------------------------------------------------------------------------------------------- progress


def test_what_is_written_is_counted_from_where_a_run_goes_on(capsys, monkeypatch) -> None:
    """Of three parts one was done before, and one by another worker."""
    from actdump import console
    from actdump.plan import Budget, Part, Span, make

    sizes = ((2, 10, 1000), (1, 20, 300), (1, 30, 500))
    parts = [Part(number, (Span(number, 0, *size),)) for number, size in enumerate(sizes)]
    monkeypatch.setattr(console, "EVERY", 0.0)
    monkeypatch.setattr(console, "_form", "json")
    bar = console.Bar()
    bar.planned(make({}, (), parts, Budget(10)), parts[:1])
    bar.elsewhere(parts[1])
    bar.batch(1, 30)
    said = json.loads(capsys.readouterr().err.splitlines()[-1])
    assert (said["prompts"], said["tokens"], said["bytes"], said["seconds_left"]) == (1, 30, 500, 0)
