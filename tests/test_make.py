"""Dumps in a Makefile: what is made again and what is not, with GNU make itself; and the commands that say why."""

import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from threading import Thread

import pytest
from needs import lacking
from typer.testing import CliRunner

from actdump import dependencies, store
from actdump.cli import app
from actdump.errors import UsageError

ROOT = Path(__file__).resolve().parent.parent
CONFIG = {"model_type": "gpt2", "n_layer": 2, "n_embd": 32, "n_head": 2, "vocab_size": 100, "n_positions": 64}
ODD = 'it\'s a "b" $HOME #1: c;d=e&f|g \\ [i] (j) *k ~ü\t'
LONG_AGO = 1_000_000_000


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a spec on a prompt file; its times are long ago, so that whatever is written is newer."""
    monkeypatch.chdir(tmp_path)
    Path("prompts.jsonl").write_text("".join(json.dumps({"input_ids": [number, 2, 3]}) + "\n" for number in range(6)))
    write_spec(Path("spec.yaml"))
    for path in (Path("prompts.jsonl"), Path("spec.yaml")):
        os.utime(path, (LONG_AGO, LONG_AGO))
    return tmp_path


def write_spec(path: Path, **other) -> None:
    spec = {
        "model": {"config": CONFIG},
        "prompts": {"file": "prompts.jsonl"},
        "save": {"final": "transformer.h[-1].output[0]"},
        "shard": {"tokens": 6},
        "output": "out",
    }
    path.write_text(json.dumps(spec | other, indent=1))


def actdump(*words: str, code: int = 0):
    result = CliRunner().invoke(app, list(words))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    print(result.stdout, result.stderr, sep="\n")
    assert result.exit_code == code
    return result


def run(*words: str) -> str:
    """Run the spec, and tell what became of it."""
    return json.loads(actdump("run", "spec.yaml", "--json", *words).stdout)["state"]


def times(folder: str = "out") -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in sorted(Path(folder).rglob("*"))}


def touched(name: str) -> int:
    """Give a file the present time; it is newer than any manifest so far."""
    time.sleep(0.01)
    os.utime(name)
    return Path(name).stat().st_mtime_ns


def make(*words: str, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([need_make(), *words], cwd=folder, env=environment(), capture_output=True, text=True, timeout=120)
    print(done.stdout, done.stderr, sep="\n")
    return done


def need_make() -> str:
    if (found := shutil.which("make")) is None:
        lacking("GNU make is not there")
    return found


def environment() -> dict[str, str]:
    """With `actdump` on the path, and nothing of a make that may be running these tests."""
    rest = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    return rest | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


# ------------------------------------------------------------------------------------------------------------ the manifest's time


def test_a_cosmetic_edit_gives_the_manifest_its_time_once_and_makes_nothing():
    assert run() == "done"
    before = times()
    assert run() == "up to date"
    assert times() == before
    Path("spec.yaml").write_text("# a remark\n" + Path("spec.yaml").read_text())
    newest = touched("spec.yaml")
    assert run() == "up to date"
    assert times() == before | {"out/manifest.json": newest}
    assert run("--overwrite") == "up to date"
    assert times() == before | {"out/manifest.json": newest}


def test_a_touched_prompt_file_is_read_once_more_and_never_again(monkeypatch):
    assert run() == "done"
    before = times()
    newest = touched("prompts.jsonl")
    assert run() == "up to date"
    after = times()
    assert {name for name in before if before[name] != after[name]} == {"out/manifest.json", "out/plan.json"}
    assert after["out/manifest.json"] == newest
    monkeypatch.setattr("actdump.inputs.sha256", None)
    assert run() == "up to date"
    assert times() == after
    actdump("audit", "out", "-n", "1")  # with the very plan


@pytest.mark.parametrize(("state", "moment"), [("done", "seal"), ("up to date", "complete")])
def test_what_changes_during_a_run_makes_make_ask_again(state, moment, monkeypatch):
    """Be it while the dump is made, or while it is found to be up to date."""
    if state == "up to date":
        assert run() == "done"
        touched("prompts.jsonl")
    doing = getattr(store, moment)

    def edited(*given):
        touched("spec.yaml")
        return doing(*given)

    monkeypatch.setattr(store, moment, edited)
    assert run() == state
    assert Path("out/manifest.json").stat().st_mtime_ns < Path("spec.yaml").stat().st_mtime_ns


def test_a_time_in_the_future_is_asked_about_once():
    assert run() == "done"
    later = time.time_ns() + 10**12
    os.utime("spec.yaml", ns=(later, later))
    assert run() == "up to date"
    assert Path("out/manifest.json").stat().st_mtime_ns == later


def test_a_manifest_of_somebody_else_is_told_and_no_error(monkeypatch):
    def refused(*_, **__):
        raise PermissionError(1, "Operation not permitted")

    assert run() == "done"
    touched("spec.yaml")
    monkeypatch.setattr(os, "utime", refused)
    said = " ".join(actdump("run", "spec.yaml").stderr.split())
    assert "make will ask again: Operation not permitted" in said


# ----------------------------------------------------------------------------------------------------------------- dependencies


def test_the_depfile_names_target_and_files_and_is_written_when_it_changed(tmp_path):
    """A model and a tokenizer in folders are named by their files."""
    from transformers import AutoConfig, AutoModelForCausalLM

    AutoModelForCausalLM.from_config(AutoConfig.for_model(**CONFIG)).save_pretrained("a model")
    Path("words").mkdir()
    Path("words/tokenizer.json").write_text("{}")
    prompts = [{"input_ids": [1, 2]}]  # that need no tokenizer
    write_spec(Path("spec.yaml"), model="./a model", tokenizer={"name": "./words"}, prompts=prompts)
    assert run("--depfile", "new/out.d") == "done"
    files = ["spec.yaml", *sorted(f"a\\ model/{path.name}" for path in Path("a model").iterdir())]
    assert "a\\ model/model.safetensors" in files
    files.append("words/tokenizer.json")
    rule, *phony = Path("new/out.d").read_text().splitlines()
    assert rule == "out/manifest.json: " + " ".join(files)
    assert [line for line in phony if line] == [f"{file}:" for file in files]
    before = times("new")
    assert run("--depfile", "new/out.d") == "up to date"
    assert times("new") == before
    Path("new/out.d").unlink()
    assert run("--depfile", "new/out.d") == "up to date"
    assert Path("new/out.d").read_text().startswith("out/manifest.json: spec.yaml ")


def test_what_is_no_file_is_no_dependency():
    spec = {"prompts": {"file": "-", "format": "jsonl"}}
    write_spec(Path("spec.yaml"), **spec)
    result = CliRunner().invoke(app, ["run", "spec.yaml", "--depfile", "d"], input='{"input_ids": [1]}\n')
    assert result.exit_code == 0
    assert Path("d").read_text() == "out/manifest.json: spec.yaml\n\nspec.yaml:\n"


def test_a_depfile_that_is_a_link_or_a_pipe_stays_one():
    write_spec(Path("spec.yaml"))
    os.mkfifo("pipe")
    Path("link").symlink_to("target.d")
    read = []
    reader = Thread(target=lambda: read.append(Path("pipe").read_text()))
    reader.start()
    assert run("--depfile", "pipe") == "done"
    reader.join()
    assert run("--depfile", "link") == "up to date"
    assert Path("pipe").is_fifo() and Path("link").is_symlink()
    assert read == [Path("target.d").read_text()]


@pytest.mark.parametrize("taken", ["out/manifest.json", "out/../out/plan.json", "spec.yaml", "prompts.jsonl"])
def test_a_depfile_is_never_written_over_what_the_dump_needs(taken):
    """As by `$@` in a recipe, where another name was meant."""
    run()
    before = Path(taken).read_bytes()
    result = CliRunner().invoke(app, ["run", "spec.yaml", "--depfile", taken])
    assert (result.exit_code, "name another" in result.stderr) == (2, True)
    assert Path(taken).read_bytes() == before


@pytest.mark.parametrize("words", [["--depfile", "."], ["--depfile", "prompts.jsonl/d"]])
def test_a_depfile_that_cannot_be(words):
    said = actdump("run", "spec.yaml", *words, code=2 if words[1] == "." else 74)
    assert words[1].partition("/")[0] in said.stderr


@pytest.mark.parametrize(
    "name", [ODD, *"%;=|&\\~([*?:#$ '\"", "a\nb", "~root", "a\\ b", "a\\", "lib(x)", "a\\:b", "..a", "+=b"]
)
def test_make_understands_the_names_in_a_depfile(name):
    """Asked when the file is newer and when it is gone, and not otherwise."""
    folder = Path(f"the {name} folder")
    folder.mkdir()
    (file := folder / f"{name} prompts").touch()
    (target := folder / "manifest.json").touch()
    os.utime(file, (LONG_AGO, LONG_AGO))
    dependencies.write(Path("names.d"), dependencies.Dependencies({file: LONG_AGO}).rules(target))
    rule = f"all: {dependencies.escaped(target)}\n{dependencies.as_target(target)}:\n\t@echo MADE\n"
    Path("Makefile").write_text(rule + "include names.d\n")
    assert "MADE" not in make("-s").stdout
    os.utime(file, (time.time() + 1, time.time() + 1))
    assert "MADE" in make("-s").stdout
    file.unlink()
    assert "MADE" in make("-s").stdout


def test_a_name_that_make_cannot_read_is_refused():
    with pytest.raises(UsageError, match="rename it"):
        dependencies.escaped(Path("50% (half)"))


# --------------------------------------------------------------------------------------------------------------- explain, status


def test_explain_names_every_difference(tmp_path):
    def explained(*words: str) -> dict[str, object]:
        return json.loads(actdump("explain", "spec.yaml", "--json", *words).stdout)

    assert explained() == {"state": "new", "reasons": []}
    assert not Path("out").exists()
    assert run() == "done"
    before = times()
    assert explained() == {"state": "up to date", "reasons": []}
    assert explained("--set", "dtype=float16", "--set", "model.seed=3") == {
        "state": "stale",
        "reasons": ["`model.seed` was not given and is 3", "`dtype` was not given and is float16"],
    }
    many = explained(
        "--set", f"model.config={json.dumps({'model_type': 'gpt2', **{f'key{number}': 1 for number in range(30)}})}"
    )
    assert len(many["reasons"]) == 21
    assert many["reasons"][-1] == "and more"
    with Path("prompts.jsonl").open("a") as file:
        file.write('{"input_ids": [1]}\n')
    assert explained() == {"state": "stale", "reasons": ["the prompt file has changed"]}
    assert "  the prompt file has changed\n" in actdump("explain", "spec.yaml").stdout
    assert times() == before
    assert run("--overwrite") == "done"
    Path("out/shards/00001.safetensors").unlink()
    assert explained()["state"] == "unfinished"


def test_explain_tells_files_of_the_model():
    from transformers import AutoConfig, AutoModelForCausalLM

    AutoModelForCausalLM.from_config(AutoConfig.for_model(**CONFIG)).save_pretrained("model")
    write_spec(Path("spec.yaml"), model="./model")
    assert run() == "done"
    Path("model/generation_config.json").unlink()
    Path("model/chat_template.jinja").write_text("{{ messages }}")
    config = json.loads(Path("model/config.json").read_text())
    Path("model/config.json").write_text(json.dumps(config | {"bos_token_id": 7}))
    said = actdump("explain", "spec.yaml").stdout
    assert said.splitlines()[1:] == [
        "  the model's file `config.json` has changed",
        "  the model's file `generation_config.json` is gone",
        "  the model's file `chat_template.jinja` is new",
    ]


def test_explain_of_what_is_no_dump():
    Path("out").mkdir()
    Path("out/mine").touch()
    assert "holds other things (mine)" in actdump("explain", "spec.yaml", code=73).stderr
    Path("out/mine").unlink()
    Path("out/plan.json").write_text("{")
    for command in ("explain", "run"):
        assert "(plan.json), but a plan.json that is not actdump's" in actdump(command, "spec.yaml", code=73).stderr
    Path("prompts.jsonl").unlink()
    actdump("explain", "spec.yaml", "-o", "new", code=66)
    actdump("explain", "nowhere.yaml", code=66)


def test_status_counts_parts_done_and_missing():
    assert "no such folder" in actdump("status", "out", code=66).stderr
    assert run() == "done"
    said = actdump("status", "out").stdout
    assert "complete" in said
    assert "3: 0-2" in said
    Path("out/shards/00001.safetensors").unlink()
    said = actdump("status", "out", code=75).stdout
    for words in ("unfinished", "4 of 6", "2: 0, 2", "1: 1"):
        assert words in said
    value = json.loads(actdump("status", "out", "--json", code=75).stdout)
    assert (value["complete"], value["parts"], value["done"], value["missing"], value["working"]) == (False, 3, [0, 2], [1], [])
    assert run() == "done"
    Path("out/manifest.json").unlink()
    assert "all parts are done" in actdump("status", "out", code=75).stdout
    assert run() == "done"
    Path("out/shards/00001.json").write_text("")
    said = actdump("status", "out", code=65).stdout
    for words in ("damaged", "--repair", "4 of 6", "1: 1"):
        assert words in said
    Path("out/plan.json").unlink()
    assert "its plan.json is gone" in actdump("status", "out", code=65).stderr
    Path("empty").mkdir()
    assert "no plan.json" in actdump("status", "empty", code=66).stderr


PLANNING = """
from pathlib import Path
from actdump import store
from actdump.format import Folder
with store.Crew(Folder(Path("out"))) as crew, crew.deciding(lambda: None):
    print("planning", flush=True)
    input()
"""


def test_status_while_the_plan_is_made():
    with subprocess.Popen([sys.executable, "-c", PLANNING], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as worker:
        assert worker.stdout is not None
        assert worker.stdout.readline() == "planning\n"
        said = actdump("status", "out", code=75).stderr
        worker.communicate("\n", timeout=60)
    assert "its plan is still being made" in said


WORKING = """
from pathlib import Path
from threading import Thread
from actdump import store
from actdump.format import Folder
folder = Folder(Path("out"))
plan, _ = store.load_plan(folder)
with store.Crew(folder) as crew:
    crew.claim(plan.parts[1])
    print("working", flush=True)
    input()
"""


def test_status_tells_who_works_on_what():
    assert run() == "done"
    for number in (1, 2):
        Path(f"out/shards/0000{number}.safetensors").unlink()
    with subprocess.Popen([sys.executable, "-c", WORKING], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as worker:
        assert worker.stdout is not None
        assert worker.stdout.readline() == "working\n"
        value = json.loads(actdump("status", "out", "--json", code=75).stdout)
        said = actdump("status", "out", code=75).stdout
        worker.communicate("\n", timeout=60)
    assert (value["done"], value["missing"]) == ([0], [2])
    assert value["working"] == [{"part": 1, "process": worker.pid, "host": platform.node()}]
    assert f"1 (process {worker.pid} on {platform.node()})" in said
    assert json.loads(actdump("status", "out", "--json", code=75).stdout)["missing"] == [1, 2]


def test_status_and_explain_need_no_torch():
    assert run() == "done"
    for words in (["status", "out"], ["explain", "spec.yaml"]):
        program = (
            f"import sys\nfrom actdump.cli import app\ntry:\n    app({words!r})\nexcept SystemExit as end:\n    assert not end.code\n"
            "print(*({'torch', 'transformers', 'numpy'} & sys.modules.keys()))"
        )
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
        assert done.stdout.splitlines()[-1] == ""


# ----------------------------------------------------------------------------------------------------------------- the pipeline

MODELS, FILES = ("eager", "sdpa"), ("counting", "repeats")
DUMPS = [f"{model}-{prompts}" for model in MODELS for prompts in FILES]
RESULTS = [*(f"{dump}.txt" for dump in DUMPS), *(f"{prompts}.json" for prompts in FILES)]


@pytest.fixture
def project(tmp_path) -> Path:
    """A copy of configs/ in a folder with an awkward name."""
    folder = tmp_path / ODD
    shutil.copytree(ROOT / "configs", folder / "configs")
    return folder


def pipeline(project: Path) -> set[str]:
    """Make it, and tell which dumps and results were made."""
    before = inodes(project)
    done = make("-f", "configs/Makefile", "-j2", folder=project)
    assert done.returncode == 0
    assert make("-f", "configs/Makefile", "-q", folder=project).returncode == 0  # nothing is left to do
    return {name for name, number in inodes(project).items() if before.get(name) != number}


def inodes(project: Path) -> dict[str, tuple[int, int]]:
    """What shows whether a dump's first record, or a result, was written anew."""
    out = project / "out/make"
    files = {**{dump: out / dump / "shards/00000.json" for dump in DUMPS}, **{name: out / name for name in RESULTS}}
    found = {name: path.stat() for name, path in files.items() if path.exists()}
    return {name: (status.st_ino, status.st_mtime_ns) for name, status in found.items()}


def interrupted(project: Path) -> None:
    """Ctrl-C, as a terminal sends it to make and all that it started, when the first part is done."""
    words = [need_make(), "-f", "configs/Makefile", "-j2"]
    started = subprocess.Popen(words, cwd=project, env=environment(), start_new_session=True, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 100
    while not list(project.glob("out/make/*/shards/00000.json")) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(started.pid, signal.SIGINT)
    _, said = started.communicate(timeout=60)
    assert started.returncode != 0, said


def test_a_pipeline_makes_what_depends_on_a_change_and_nothing_else(project):
    interrupted(project)
    records = {path: path.stat().st_mtime_ns for path in project.glob("out/make/*/shards/*.json")}
    assert records
    assert len(list(project.glob("out/make/*/manifest.json"))) < 4
    pipeline(project)
    assert {path: path.stat().st_mtime_ns for path in records} == records  # what was done stayed
    assert sorted(path.name for path in project.glob("out/make/*.[tj]*")) == sorted(RESULTS)
    assert json.loads((project / "out/make/repeats.json").read_text())["same"] is True
    assert "GPT2LMHeadModel, float32" in (project / "out/make/sdpa-repeats.txt").read_text()
    assert pipeline(project) == set()

    spec = project / "configs/eager.yaml"
    spec.write_text("# a remark\n" + spec.read_text())
    (project / "configs/repeats.jsonl").touch()
    remade = pipeline(project)
    assert not remade & set(DUMPS)
    assert "sdpa-counting.txt" not in remade

    with (project / "configs/counting.jsonl").open("a") as file:
        file.write('{"id": "more", "input_ids": [1, 2, 3]}\n')
    counting = {"eager-counting", "sdpa-counting"}
    assert pipeline(project) == counting | {f"{dump}.txt" for dump in counting} | {"counting.json"}
    assert json.loads((project / "out/make/counting.json").read_text())["prompts"] == 13
