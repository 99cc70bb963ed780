"""What goes wrong around a run, caused for real: damaged files, full disks, odd clocks and names, memory that runs out."""

import json
import os
import random
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import pytest
import torch
from needs import need
from test_job import CONFIG, SAVE, contents, forks, make_spec, prompts, same, snapshot, states, stop_after, temporary
from test_mistakes import mounted
from transformers import AutoConfig, AutoModelForCausalLM
from typer.testing import CliRunner

import actdump
from actdump import job, model, reader, store, verify
from actdump.cli import app
from actdump.errors import ActdumpError, DataError, OccupiedError, Stopped, StorageError
from actdump.job import lanes, loop, planning
from actdump.job.memory import Room
from actdump.plan import Batch
from actdump.spec import Spec

__all__ = ["forks"]

MANY = {"shard": {"tokens": 120, "size": 4600}, "batch": {"tokens": 40}}  # parts of two shards


def many(count=30, **other):
    return make_spec(count, **{**MANY, **other})


@pytest.fixture(scope="module")
def sealed(tmp_path_factory):
    """A finished dump of several parts."""
    root = tmp_path_factory.mktemp("sealed") / "out"
    job.run(many(), root)
    assert 4 <= len(list(root.glob("shards/*.safetensors"))) <= 10
    return root


@pytest.fixture
def dump(sealed, tmp_path):
    """A copy of it, to be damaged."""
    return shutil.copytree(sealed, tmp_path / "out")


@pytest.fixture
def spec_file(tmp_path):
    path = tmp_path / "spec.yaml"
    path.write_text(json.dumps({"model": {"config": CONFIG}, "prompts": prompts(30), "save": SAVE, **MANY}))
    return path


def command(*words, code):
    """Run the command in this process; what it said on stderr."""
    result = CliRunner().invoke(app, list(map(str, words)))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    print(result.exit_code, result.stderr, result.stdout, sep="\n")
    assert "Traceback" not in result.stderr
    assert result.exit_code == code
    assert code == 0 or result.stdout == ""
    return result.stderr


def files(root):
    return {path: seen for path, seen in snapshot(root).items() if path.is_file()}


# -------------------------------------------------------------------------------------------------- what verify and --repair find


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path):
    os.truncate(path, path.stat().st_size - 8)


def empty(path):
    path.write_bytes(b"")


def lose(path):
    path.unlink()


def forge(**values):
    """Change values of a JSON file."""

    def change(path):
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return change


def rename_rows(path):
    """A bit flips in the name of a tap, in what the manifest says of the shard of a record."""
    manifest = path.parent.parent / "manifest.json"
    value = json.loads(manifest.read_text())
    rows = value["shards"][1]["rows"]
    rows[next(iter(rows)) + "x"] = rows.pop(next(iter(rows)))
    manifest.write_text(json.dumps(value))


def become_a_folder(path):
    path.unlink()
    path.mkdir()


DAMAGE = {
    "a flipped bit": ("shards/00001.safetensors", flip, "the bytes changed since it was written (sha256 differs)"),
    "a cut-off shard": ("shards/00001.safetensors", cut, "bytes, but it had"),
    "a missing shard, whose record is there": ("shards/00001.safetensors", lose, "missing"),
    "an empty shard": ("shards/00001.safetensors", empty, "0 bytes, but it had"),
    "a missing record": ("shards/00001.json", lose, "missing"),
    "an empty record": ("shards/00001.json", empty, "broken: the file is empty"),
    "a cut-off record": ("shards/00001.json", cut, "broken: "),
    "a record of something else": ("shards/00001.json", forge(sha256="0"), "`sha256`: not what manifest.json says"),
    "a record that is a list": ("shards/00001.json", lambda path: path.write_text("[]"), "broken: "),
    "a flipped bit in the prompts": ("prompts.jsonl", flip, "the bytes changed since it was written (sha256 differs)"),
    "cut-off prompts": ("prompts.jsonl", cut, "bytes, but it had"),
    "missing prompts": ("prompts.jsonl", lose, "missing"),
    "an empty manifest": ("manifest.json", empty, "not a manifest"),
    "a manifest of fewer tokens": ("manifest.json", forge(tokens=1), "`tokens`: not what plan.json says"),
    "a manifest of another digest": ("manifest.json", forge(digest="0" * 64), "`digest`: not what plan.json says"),
    "a manifest without facts": ("manifest.json", forge(facts={}), "`facts`: not what plan.json says"),
    "a manifest of other rows": ("shards/00001.json", rename_rows, "`rows`: not what manifest.json says"),
    "a manifest of fewer shards": ("manifest.json", forge(shards=[]), "`shards`, `bytes`: not what plan.json says"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_found_and_repaired_and_nothing_else_is_touched(name, dump, sealed, spec_file):
    file, damage, words = DAMAGE[name]
    before = files(dump)
    damage(dump / file)
    said = command("verify", dump, code=65)
    assert f"{dump / file}: " in said.replace("\n", "")
    assert words in said
    said = command("run", spec_file, "-o", dump, "--repair", code=0)
    assert "".join(words.split()) in "".join(said.split())  # warnings are wrapped
    assert command("verify", dump, code=0) == ""
    assert contents(dump) == contents(sealed)
    after = files(dump)
    shard = "00001" in file
    again = {dump / "shards/00001.safetensors", dump / "shards/00001.json"} if shard else {dump / "prompts.jsonl"}
    assert {path for path in before if after[path] != before[path]} <= {*again, dump / "prompts.jsonl", dump / "manifest.json"}
    assert not shard or after[dump / "shards/00001.json"] != before[dump / "shards/00001.json"]
    assert temporary(dump) == []
    assert not (dump / "plan.tokens").exists()


def test_all_damage_is_told_at_once_and_repaired_together(dump, sealed):
    flip(dump / "shards/00000.safetensors")
    lose(dump / "shards/00002.safetensors")
    lose(dump / "shards/00002.json")
    empty(dump / "shards/00003.safetensors")
    flip(dump / "prompts.jsonl")
    assert len(verify.faults(actdump.open(dump))) == 5
    assert states(many(), dump, repair=True) == "done"
    assert verify.faults(actdump.open(dump)) == []
    assert contents(dump) == contents(sealed)


def test_a_whole_dump_is_not_touched_by_a_repair(dump, spec_file):
    os.utime(spec_file, (1, 1))  # it is no newer than the manifest, whose time would be renewed
    before = snapshot(dump)
    said = command("run", spec_file, "-o", dump, "--repair", code=0)
    assert "out: nothing to repair: 30 prompts" in said
    assert snapshot(dump) == before


def test_a_repair_where_nothing_is_makes_the_dump(sealed, tmp_path, spec_file):
    command("run", spec_file, "-o", tmp_path / "new", "--repair", code=0)
    assert contents(tmp_path / "new") == contents(sealed)


@pytest.mark.parametrize(
    "other", [{"tokens": "last"}, {"prompts": prompts(31)}, {"prompts": prompts(30, seed=1)}], ids=[0, 1, 2]
)
def test_another_dump_is_not_repaired(other, dump):
    flip(dump / "shards/00001.safetensors")
    flip(dump / "prompts.jsonl")
    before = snapshot(dump)
    with pytest.raises(OccupiedError, match="holds another dump"):
        job.run(many(**other), dump, repair=True)
    assert snapshot(dump) == before


def test_a_repair_from_a_prompt_file_that_changed_is_refused(tmp_path):
    path = tmp_path / "prompts.jsonl"
    lines = [json.dumps(row) + "\n" for row in prompts(30)]
    path.write_text("".join(lines))
    spec = many(prompts={"file": str(path)})
    job.run(spec, tmp_path / "out")
    lose(tmp_path / "out/prompts.jsonl")
    path.write_text("".join([*lines[:-1], '{"input_ids": [7, 7]}\n']))
    with pytest.raises(OccupiedError, match="the prompt file has changed"):
        job.run(spec, tmp_path / "out", repair=True)


def test_a_repair_that_cannot_be_done_leaves_the_dump_readable(dump, monkeypatch):
    flip(dump / "shards/00001.safetensors")
    before = files(dump)

    def load(source):
        raise DataError("the weights are broken")

    monkeypatch.setattr(model, "load", load)
    with pytest.raises(DataError, match="the weights are broken"):
        job.run(many(), dump, repair=True)
    after = files(dump)
    assert {path: after[path] for path in before} == before
    assert actdump.open(dump)["block"][0].shape[-1] == 16


@pytest.mark.parametrize("answers", range(0, 12, 2))
def test_a_repair_that_was_stopped_takes_nothing_broken_into_a_new_manifest(answers, dump, sealed):
    for number in (1, 3):
        flip(dump / f"shards/0000{number}.safetensors")
    asked = iter(range(answers))
    try:
        job.run(many(), dump, repair=True, stopping=lambda: next(asked, None) is None)
    except Stopped:
        if (dump / "manifest.json").exists():  # nothing was given up yet: it is still known to be broken
            assert len(verify.faults(actdump.open(dump))) == 2
            return
        assert states(many(), dump) == "done"
    assert verify.faults(actdump.open(dump)) == []
    assert contents(dump) == contents(sealed)


def test_a_finished_dump_is_repaired_where_the_model_is_run_in_another_way(dump, sealed, monkeypatch):
    """The mask depends on the CPU too, and it decides no value."""
    lose(dump / "shards/00001.safetensors")
    real = planning.facts_of

    def otherwise(*args):
        facts = real(*args)
        return {**facts, "model": {**facts["model"], "masked": not facts["model"]["masked"], "attn_implementation": "eager"}}

    monkeypatch.setattr(planning, "facts_of", otherwise)
    job.run(many(), dump, repair=True)
    assert contents(dump) == contents(sealed)


def test_an_unfinished_dump_is_repaired_and_gone_on_with(sealed, tmp_path, spec_file):
    root = tmp_path / "out"
    with pytest.raises(Stopped):
        job.run(many(), root, **stop_after(9, root))
    assert (root / "shards/00001.json").exists()
    flip(root / "shards/00001.safetensors")
    kept = files(root / "shards")[root / "shards/00000.json"]
    said = command("run", spec_file, "-o", root, "--repair", code=0)
    assert "00001.safetensors:thebyteschanged" in "".join(said.split())
    assert contents(root) == contents(sealed)
    assert files(root / "shards")[root / "shards/00000.json"] == kept


@pytest.mark.parametrize("name", ["plan.tokens", "prompts.jsonl"])
def test_spooled_tokens_that_changed_are_never_used(name, sealed, tmp_path):
    root = tmp_path / "out"
    with pytest.raises(Stopped):
        job.run(many(), root, **stop_after(5, root))
    flip(root / name)
    assert states(many(), root) == "done"
    assert contents(root) == contents(sealed)


def test_a_dump_that_lost_a_part_is_open_until_it_is_whole_again(dump):
    """Otherwise a part made anew elsewhere, with other last bits, would stand under the sha256 of the old one."""
    lose(dump / "shards/00001.safetensors")
    lose(dump / "shards/00003.safetensors")
    with pytest.raises(Stopped):
        job.run(many(), dump, **stop_after(3, dump))
    if (dump / "shards/00001.safetensors").exists():
        assert not (dump / "manifest.json").exists()


def test_files_that_cannot_be_read_are_faults_with_their_names(dump):
    for name in ("shards/00000.safetensors", "shards/00001.json", "prompts.jsonl"):
        become_a_folder(dump / name)
    faults = verify.faults(actdump.open(dump))
    assert len(faults) == 3
    assert all(name in fault for name, fault in zip(("00000.safetensors", "00001.json", "prompts.jsonl"), faults, strict=True))


PLANS = {
    "lost": (lose, "missing"),
    "empty": (empty, "broken: the file is empty"),
    "cut off": (cut, "broken: "),
    "changed": (forge(budget={"tokens": 41, "prompts": None}), "broken: it changed since it was written"),
}


@pytest.mark.parametrize("name", PLANS)
def test_a_broken_plan_is_found_and_made_again_and_the_parts_are_kept(name, dump, sealed, spec_file):
    damage, words = PLANS[name]
    before = files(dump / "shards")
    damage(dump / "plan.json")
    assert f"plan.json: {words}" in command("verify", dump, code=65)
    said = command("run", spec_file, "-o", dump, code=73 if name == "lost" else 65)
    assert "--repair" in said
    flip(dump / "shards/00002.safetensors")
    command("run", spec_file, "-o", dump, "--repair", code=0)
    assert contents(dump) == contents(sealed)
    after = files(dump / "shards")
    assert [path.stem for path in before if after[path][:2] != before[path][:2]] == ["00002", "00002"]


@pytest.mark.parametrize("damage", [lose, empty])
def test_another_dump_without_its_plan_is_not_repaired_but_refused(damage, dump):
    damage(dump / "plan.json")
    before = files(dump)
    with pytest.raises(OccupiedError, match="holds another dump, or one that was made on another kind of device"):
        job.run(many(tokens="last"), dump, repair=True)
    assert files(dump) == before


def test_a_folder_of_foreign_files_with_our_names_is_not_repaired(tmp_path):
    (tmp_path / "shards").mkdir()
    (tmp_path / "manifest.json").write_text('{"of": "something else"}')
    (tmp_path / "shards/00000.json").write_text("[]")
    before = snapshot(tmp_path)
    with pytest.raises(OccupiedError, match=r"no plan\.json"):
        job.run(many(), tmp_path, repair=True)
    assert snapshot(tmp_path) == before


# ------------------------------------------------------------------------------------------------------- rows that are missing


def test_rows_that_never_came_end_in_65(tmp_path, spec_file, monkeypatch):
    complete = store.Pending.complete

    def forgetful(self, places):
        if self.part.number != 1:
            complete(self, places)

    monkeypatch.setattr(store.Pending, "complete", forgetful)
    assert "never came" in command("run", spec_file, "-o", tmp_path / "out", code=65)
    assert not (tmp_path / "out/manifest.json").exists()
    assert not {"00002.safetensors", "00003.safetensors"} & {path.name for path in (tmp_path / "out/shards").iterdir()}


@pytest.mark.parametrize("name", ["00001.safetensors", "00001.json"])
def test_a_part_that_vanishes_is_made_again_and_at_last_the_run_fails(name, tmp_path, sealed, spec_file, monkeypatch):
    seal_part, seal_dump = store.Pending.seal, loop.seal

    def during(self, *words):
        if self.part.number == 3:
            (self.folder.shards / name).unlink(missing_ok=True)
        return seal_part(self, *words)

    def at_the_end(times):
        left = iter(range(times))

        def remove(job, *words):
            if next(left, None) is not None:
                (job.folder.shards / name).unlink()
            return seal_dump(job, *words)

        return remove

    with monkeypatch.context() as patch:
        patch.setattr(store.Pending, "seal", during)
        command("run", spec_file, "-o", tmp_path / "during", code=0)
    assert contents(tmp_path / "during") == contents(sealed)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "seal", at_the_end(times=2))
        command("run", spec_file, "-o", tmp_path / "end", code=0)
    assert contents(tmp_path / "end") == contents(sealed)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "seal", at_the_end(times=9))
        said = command("run", spec_file, "-o", tmp_path / "out", code=65)
    assert "gone, again and again" in said
    assert not (tmp_path / "out/manifest.json").exists()
    command("run", spec_file, "-o", tmp_path / "out", code=0)
    assert contents(tmp_path / "out") == contents(sealed)


def test_a_folder_removed_during_the_run_is_no_success(tmp_path, spec_file, monkeypatch):
    put = store.Pending.put

    def removed(self, *words):
        shutil.rmtree(self.folder.root, ignore_errors=True)
        put(self, *words)

    monkeypatch.setattr(store.Pending, "put", removed)
    assert "No such file" in command("run", spec_file, "-o", tmp_path / "out", code=74)


def test_a_prompt_file_that_grows_while_it_is_read_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in prompts(30)))
    load = model.load

    def late(source):
        with path.open("a") as file:
            file.write('{"input_ids": [1]}\n')
        return load(source)

    with monkeypatch.context() as patch:
        patch.setattr(model, "load", late)
        with pytest.raises(DataError, match="changed while it was read"):
            job.run(many(prompts={"file": str(path)}), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert job.run(many(prompts={"file": str(path)}), tmp_path / "out").manifest.prompts == 31


# -------------------------------------------------------------------------------------------------------- the disk and the folder


@contextmanager
def small_disk(place, size):
    need(os.geteuid() == 0, "only root can mount a small file system")
    with mounted(place, f"size={size}k") as disk:
        yield disk


def test_a_disk_that_fills_up_in_the_middle(tmp_path, sealed):
    with small_disk(tmp_path / "disk", 1024) as disk:
        root, hog = disk / "out", disk / "hog"

        def fill():
            if not hog.exists() and len(list(root.glob("shards/*.json"))) >= 2:
                free = shutil.disk_usage(disk).free
                hog.write_bytes(bytes(free - 4096))
            return False

        with pytest.raises(StorageError, match="No space left") as error:
            job.run(many(), root, stopping=fill)
        assert error.value.code == 74
        assert temporary(root) == []
        assert not (root / "manifest.json").exists()
        done = records(root)
        assert len(done) >= 4
        with hog.open("ab") as file:
            file.write(bytes(shutil.disk_usage(disk).free - 4096))
        with pytest.raises(StorageError, match="make room"):
            job.run(many(), root)
        hog.unlink()
        assert states(many(), root) == "done"
        after = records(root)
        assert {path: after[path] for path in done} == done
        assert contents(root) == contents(sealed)


def test_however_little_room_there_is(tmp_path, sealed, monkeypatch):
    """At every step of a run the disk is full once: it ends in 74, and the folder can be gone on with."""
    monkeypatch.setattr(store, "check_space", lambda *_: None)  # what it sees beforehand may be gone a moment later
    with small_disk(tmp_path / "disk", 512) as disk:
        root, hog = disk / "out", disk / "hog"
        ended = []
        for room in range(0, 200, 12):
            shutil.rmtree(root, ignore_errors=True)
            hog.write_bytes(bytes(shutil.disk_usage(disk).free - room * 1024))
            try:
                ended.append(states(many(), root))
            except StorageError as error:
                ended.append(error.code)
                assert temporary(root) == [], room
                assert not (root / "manifest.json").exists()
            hog.unlink()
            states(many(), root)
            assert contents(root) == contents(sealed), room
        assert ended[0] == 74
        assert ended[-1] == "done"
        assert ended.count(74) > 5


@pytest.mark.parametrize("name", ["manifest.json", "shards/00001.json"])
def test_what_cannot_be_read_is_not_taken_for_missing(name, dump, spec_file):
    """A folder stands for what the disk refuses to read: permissions do not bind root."""
    (dump / "manifest.json").unlink()
    (dump / name).unlink(missing_ok=True)
    (dump / name).mkdir()
    before = files(dump / "shards")
    command("run", spec_file, "-o", dump, code=74)
    assert files(dump / "shards") == before


def test_a_shard_that_cannot_be_read_is_not_missing(dump):
    shard = dump / "shards/00000.safetensors"
    shard.unlink()
    shard.mkdir()
    with pytest.raises(StorageError, match=r"00000\.safetensors: cannot be read: Is a directory"):
        reader.open_dump(dump)["block"][0]


def test_a_finished_dump_on_a_read_only_disk_is_up_to_date(tmp_path, sealed, spec_file):
    with small_disk(tmp_path / "disk", 1024) as disk:
        root = Path(shutil.copytree(sealed, disk / "out"))
        os.system(f"mount -o remount,ro {disk}")
        command("run", spec_file, "-o", root, code=0)
        command("run", spec_file, "-o", root, "--repair", code=0)
        command("verify", root, code=0)
        assert "read-only" in command("run", spec_file, "-o", root, "--set", "dtype=float16", "--overwrite", code=74)
        os.system(f"mount -o remount,rw {disk}")
        flip(root / "shards/00001.safetensors")
        os.system(f"mount -o remount,ro {disk}")
        before = snapshot(root)
        assert "read-only" in command("run", spec_file, "-o", root, "--repair", code=74)
        assert snapshot(root) == before


@pytest.mark.parametrize(
    "name", ["with 'single' and \"double\" quotes,\nof two lines", " ", "-o", "[*]{a}~$HOME", "ü\u0301\u202e東京"]
)
def test_odd_names_of_folders(name, tmp_path, sealed, spec_file):
    root = tmp_path / name / "out"
    command("run", spec_file, "-o", root, code=0)
    assert contents(root) == contents(sealed)
    command("run", spec_file, "-o", root, code=0)
    flip(root / "shards/00001.safetensors")
    command("verify", root, code=65)
    command("run", spec_file, "-o", root, "--repair", code=0)
    command("verify", root, code=0)
    command("show", root, code=0)
    assert contents(root) == contents(sealed)


def test_names_that_no_folder_can_have(tmp_path, spec_file):
    assert "File name too long" in command("run", spec_file, "-o", tmp_path / ("a" * 300), code=74)
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    assert "which is not there" in command("run", spec_file, "-o", tmp_path / "link", code=73)


# --------------------------------------------------------------------------------------------------------------------- clocks

EPOCHS = {"1970": 0, "2106": 2**32 - 1}


@pytest.mark.parametrize("year", EPOCHS)
def test_times_of_files_decide_nothing(year, dump, sealed):
    for path in dump.rglob("*"):
        os.utime(path, (EPOCHS[year], EPOCHS[year]))
    before = snapshot(dump)
    assert states(many(), dump) == "up to date"
    assert verify.faults(actdump.open(dump)) == []
    assert snapshot(dump) == before
    lose(dump / "shards/00001.json")
    assert states(many(), dump) == "done"
    after = snapshot(dump)
    others = [path for path in before if path.parent.name == "shards" and "00001" not in path.name]
    assert {path: after[path] for path in others} == {path: before[path] for path in others}
    assert contents(dump) == contents(sealed)


@pytest.mark.parametrize("year", EPOCHS)
def test_a_clock_that_jumps_between_and_during_runs(year, sealed, tmp_path, monkeypatch):
    root, clock = tmp_path / "out", time.time

    class Jumping(datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime.fromtimestamp(EPOCHS[year], UTC)

    with pytest.raises(Stopped):
        job.run(many(), root, **stop_after(6, root))
    done = files(root / "shards")
    for path in root.rglob("*"):
        os.utime(path, (clock() + 10**6, clock() + 10**6))
    monkeypatch.setattr("actdump.job.provenance.datetime", Jumping)
    monkeypatch.setattr(time, "time", lambda: EPOCHS[year])
    assert states(many(), root) == "done"
    assert [path.name for path in done if files(root / "shards")[path][0] != done[path][0]] == []
    assert contents(root) == contents(sealed)
    assert actdump.open(root).manifest.made["finished"].startswith(year)


def test_a_prompt_file_with_a_time_in_the_future_is_watched_all_the_same(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"input_ids": [1, 2]}\n')
    os.utime(path, (2**32, 2**32))
    spec = many(prompts={"file": str(path)})
    assert states(spec, tmp_path / "out") == "done"
    path.write_text('{"input_ids": [1, 3]}\n')  # its time goes back
    with pytest.raises(OccupiedError, match="has changed"):
        job.run(spec, tmp_path / "out")


# --------------------------------------------------------------------------------------------------------------- out of memory


def short_of_memory(monkeypatch, most, error=None):
    """A model whose second block has no room for more than so many tokens at a time; the sizes that it saw."""
    load, sizes = model.load, []

    def loaded(source):
        module = load(source)

        def check(_, arguments):
            batch, width, _ = arguments[0].shape
            sizes.append(batch * width)
            if batch * width > most:
                raise error or torch.OutOfMemoryError(
                    "CUDA out of memory. Tried to allocate 2.00 GiB. And much advice. And more."
                )

        module.transformer.h[1].register_forward_pre_hook(check)
        return module

    monkeypatch.setattr(model, "load", loaded)
    return sizes


def alone(spec, number):
    """What plain hooks see in plain forwards of one prompt."""
    module = model.load(model.find(spec.model)).eval()
    kept = {}
    for name, place in {"block": module.transformer.h[1], "mlp": module.transformer.h[0].mlp}.items():
        place.register_forward_hook(
            lambda _, __, out, name=name: kept.__setitem__(name, out[0] if isinstance(out, tuple) else out)
        )
    with torch.no_grad():
        module(torch.tensor([spec.prompts.rows[number].input_ids]))
    return {"block": kept["block"][0], "mlp": kept["mlp"][0, -1]}


MEMORY = {
    "torch": None,
    "the CPU's": RuntimeError(
        "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"
    ),
    "python": MemoryError(),
}


@pytest.mark.parametrize("kind", MEMORY)
def test_batches_that_do_not_fit_are_halved_and_the_values_stay(kind, tmp_path, monkeypatch, caplog):
    spec = many(batch={"tokens": 256}, shard={"tokens": 200})
    job.run(spec, tmp_path / "roomy")
    with monkeypatch.context() as patch:
        sizes = short_of_memory(patch, 64, MEMORY[kind])
        job.run(spec, tmp_path / "out")
    assert max(sizes) > 64
    assert verify.faults(actdump.open(tmp_path / "out")) == []
    records = [json.loads(path.read_text())["written"] for path in sorted(tmp_path.glob("out/shards/*.json"))]
    assert all(0 < record["halved"] <= record["batches"] for record in records[:-1])
    assert json.loads((tmp_path / "roomy/shards/00000.json").read_text())["written"]["halved"] == 0
    assert [record.levelname for record in caplog.records] == ["WARNING"]  # once, not for every batch
    assert "does not fit into the memory of cpu, and is halved" in caplog.text
    assert (tmp_path / "out/plan.json").read_bytes() == (tmp_path / "roomy/plan.json").read_bytes()
    assert states(spec, tmp_path / "out") == "up to date"
    found = actdump.open(tmp_path / "out")
    for number in range(len(found)):
        for name, value in alone(spec, number).items():
            assert same(found[name][number], value, 1e-2 if value.dtype == torch.bfloat16 else 1e-5), (name, number)


def test_a_size_that_did_not_fit_is_not_tried_again_in_the_part_but_in_the_next(tmp_path, monkeypatch):
    spec = many(40, prompts=[{"input_ids": [1] * 8} for _ in range(64)], batch={"tokens": 64}, shard={"tokens": 256})
    with monkeypatch.context() as patch:
        patch.setattr(lanes, "MOST", 1)  # side by side, up to two more would be under way
        sizes = short_of_memory(patch, 60)
        job.run(spec, tmp_path / "out")
    assert sizes.count(64) == 2  # 8 prompts of 8 tokens, once in each of the two parts
    assert sizes.count(32) == 2 * 2 * 4


def test_a_batch_that_fits_when_the_rows_before_it_are_gone_is_not_halved():
    """On a device they are in its memory until the writer has them."""
    batch, waiting, sizes = Batch((0, 1), ([1, 2], [3])), ["rows"], []

    def do(given):
        sizes.append(len(given.numbers))
        if waiting:
            raise torch.OutOfMemoryError("CUDA out of memory")

    room = Room(torch.device("cpu"), lambda: bool(waiting) and not waiting.clear())
    room.halving(batch, do)
    assert (sizes, room.halved) == ([2, 2], 0)


def test_a_prompt_that_does_not_fit_alone_is_named(tmp_path, monkeypatch, spec_file):
    with monkeypatch.context() as patch:
        short_of_memory(patch, 55)  # the probe needs as much
        long = [*prompts(5), {"input_ids": [1] * 30}, {"input_ids": [2] * 32}]
        patch.setitem(CONFIG, "n_positions", 64)
        spec = many(prompts=[*long, {"input_ids": [3] * 60}])
        with pytest.raises(
            ActdumpError, match=r"prompt 7 of 60 tokens does not fit into the memory of cpu even alone"
        ) as error:
            job.run(spec, tmp_path / "out")
        assert error.value.code == 1
    assert temporary(tmp_path / "out") == []
    assert job.run(spec, tmp_path / "out").manifest.prompts == 8


def test_other_errors_of_a_forward_are_not_taken_for_memory(tmp_path, monkeypatch):
    short_of_memory(monkeypatch, 60, RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(DataError, match="does not run on prompt 3 of 17 tokens with 8 others beside it: RuntimeError: mat1"):
        job.run(many(batch={"tokens": 256}), tmp_path / "out")
    assert temporary(tmp_path / "out") == []


LITTLE = """
import resource, sys
from pathlib import Path
from actdump import job, model
from actdump.spec import load

real = model.load

def loaded(source):
    module = real(source)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 500 * 2**20, used + 500 * 2**20))
    return module

model.load = loaded
job.run(load(Path(sys.argv[1])), Path(sys.argv[2]))
"""


def test_a_process_with_little_memory(tmp_path):
    """Not injected: attention scores of 32 prompts take 400 MB, and there are 500 for everything."""
    need(sys.platform == "linux", "only Linux says how much address space a process has")
    shape = {**CONFIG, "n_embd": 24, "n_head": 12, "n_layer": 1, "n_positions": 512}
    rows = [{"input_ids": [number + 1] * 512} for number in range(32)]
    spec = {"model": {"config": shape, "attn_implementation": "eager"}, "prompts": rows,
            "save": ["transformer.h[0].output[0]"], "tokens": "last", "batch": {"tokens": 32 * 512}}  # fmt: skip
    (tmp_path / "spec.yaml").write_text(json.dumps(spec))
    words = [sys.executable, "-c", LITTLE, tmp_path / "spec.yaml", tmp_path / "out"]
    said = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False)
    assert said.returncode == 0, said.stderr
    assert json.loads((tmp_path / "out/shards/00000.json").read_text())["written"]["halved"] == 1
    dump = actdump.open(tmp_path / "out")
    assert verify.faults(dump) == []
    assert_values_of_plain_forwards(dump, shape, rows)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")  # in CI, too, which cannot install one
def test_a_gpu_with_little_memory(tmp_path):
    """Not injected either."""
    shape = {**CONFIG, "n_embd": 256, "n_head": 16, "n_layer": 1, "n_positions": 1024}
    rows = [{"input_ids": [number % 39 + 1] * 1024} for number in range(64)]
    spec = Spec.model_validate(
        {
            "model": {"config": shape, "attn_implementation": "eager", "device": "cuda"},
            "prompts": rows,
            "save": ["transformer.h[0].output[0]"],
            "tokens": "last",
            "batch": {"tokens": 64 * 1024},
        }
    )
    job.run(spec, tmp_path / "roomy")
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(2**30 / torch.cuda.get_device_properties(0).total_memory)
    try:
        job.run(spec, tmp_path / "out")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert json.loads((tmp_path / "out/shards/00000.json").read_text())["written"]["halved"] == 1
    for name in ("roomy", "out"):
        assert_values_of_plain_forwards(actdump.open(tmp_path / name), shape, rows, "cuda")


def assert_values_of_plain_forwards(dump, shape, rows, device="cpu"):
    """The last token after the first block of a model that is made without actdump, prompt by prompt."""
    torch.manual_seed(0)
    module, seen = AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape), attn_implementation="eager").eval(), []
    module.to(device).transformer.h[0].register_forward_hook(lambda _module, _args, result: seen.append(result))
    for number, row in enumerate(rows):
        with torch.no_grad():
            module(torch.tensor([row["input_ids"]], device=device))
        assert same(dump["transformer.h[0].output[0]"][number], seen.pop()[0, -1].cpu())


# -------------------------------------------------------------------------------------------------------------------- kill -9


def work(spec, root):
    """A worker's life; its exit code is the command's."""
    try:
        job.run(spec, root)
    except ActdumpError as error:
        sys.exit(error.code)


def records(root):
    """What shows whether a part that is done was touched: its shard and its record."""
    done = [path for path in root.glob("shards/*.json") if not path.name.startswith(".")]
    statuses = {path: path.stat() for record in done for path in (record, record.with_suffix(".safetensors"))}
    return {path: (status.st_ino, status.st_mtime_ns, status.st_size) for path, status in statuses.items()}


def a_while(root, chance):
    """Until a few more parts are done or a moment has passed, so that any line of a run may be its last."""
    begun, before = time.monotonic(), len(records(root))
    most, more = chance.uniform(0, 1), chance.randrange(1, 6)
    while time.monotonic() < begun + most and len(records(root)) < before + more:
        time.sleep(0.002)
    time.sleep(chance.uniform(0, 0.02))


def killed_again_and_again(start, root, chance, most):
    """Two workers, of which one dies at a random moment and is replaced, until the dump is whole; how often that was."""
    workers, kept, kills = [], {}, 0
    while not any(worker.exitcode == 0 for worker in workers):
        alive = [worker for worker in workers if worker.is_alive()]
        new = [start() for _ in range(2 - len(alive))]
        workers += new
        if kills < most:
            a_while(root, chance)
            victim = chance.choice([*alive, *new])
            victim.kill()
            victim.join()
            kills += victim.exitcode == -9
        else:
            new[-1].join() if new else alive[-1].join()
        found = records(root)
        assert {path: found.get(path) for path in kept} == kept  # a part that is done is not made again
        kept = found
    for worker in workers:
        worker.join()
    assert {worker.exitcode for worker in workers} <= {0, -9}
    assert {path: records(root)[path] for path in kept} == kept
    return kills


def test_fifty_kills_of_two_workers(tmp_path, forks):
    seed = time.time_ns()
    print("seed", seed)
    chance = random.Random(seed)
    spec = make_spec(300, shard={"tokens": 30}, batch={"tokens": 20})
    root = tmp_path / "whole"

    def start():
        process = forks.Process(target=work, args=(spec, root))
        process.start()
        return process

    start().join()
    whole = contents(root)
    kills = 0
    while kills < 50:
        root = tmp_path / f"after {kills} kills"
        kills += killed_again_and_again(start, root, chance, 50 - kills)
        assert verify.faults(actdump.open(root)) == []
        assert contents(root) == whole
        assert states(spec, root) == "up to date"


def test_two_specs_at_once_on_one_folder(tmp_path, forks, one_thread):
    specs = [make_spec(60, shard={"tokens": 30}, tokens=tokens) for tokens in ("last", "first")]
    wholes = [tmp_path / "last", tmp_path / "first"]
    for spec, whole in zip(specs, wholes, strict=True):
        job.run(spec, whole)
    chance = random.Random(time.time_ns())
    for number in range(4):
        root = tmp_path / str(number)
        workers = [forks.Process(target=work, args=(spec, root)) for spec in specs]
        for worker in workers:
            worker.start()
            time.sleep(chance.uniform(0, 0.1))
        for worker in workers:
            worker.join()
        codes = [worker.exitcode for worker in workers]
        assert sorted(codes) == [0, 73]
        assert contents(root) == contents(wholes[codes.index(0)])
        assert verify.faults(actdump.open(root)) == []
