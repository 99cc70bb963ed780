"""The store: files that are whole or not there at all, and shards that are plain safetensors files."""

import hashlib
import json
import os
import platform
import signal
import stat
import struct
import threading
import time
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from actdump import store
from actdump.errors import DataError, OccupiedError, StorageError
from actdump.format import Folder, plan_from_json, shard_layout, temporary
from actdump.plan import Budget, Column, Layout, Part, Slice, Span, make, parts, prompt_bytes
from actdump.prompts import Prompt
from actdump.statistics import Statistics
from actdump.store import pending as pendings
from actdump.store.files import to_json
from actdump.store.writer import UNSEALED

LENGTHS = (3, 1, 4, 2)
IDS = [np.arange(length, dtype=np.int32) + 10 * place for place, length in enumerate(LENGTHS)]


def column(name, dims, dtype):
    return Column(
        name,
        f"{name}.output",
        f"{name}.output",
        "Linear",
        "tensor",
        "all",
        None,
        ("batch", "token", "2"),
        Layout(dims, dtype),
        None,
    )


COLUMNS = (
    column("a.output[0]", (Slice(), 2), "float32"),
    column("pooled", (3,), "float16"),
    column("square", (Slice(), Slice()), "uint8"),
)


def known(place, name):
    """Values that are known in closed form: no two of them in a tap are the same."""
    length = LENGTHS[place]
    match name:
        case "a.output[0]":
            return np.arange(2 * length, dtype=np.float32).reshape(length, 2) + 100 * place
        case "pooled":
            return np.arange(3, dtype=np.float16) + 10 * place
        case _:
            return np.arange(length * length, dtype=np.uint8).reshape(length, length) + 20 * place


def buffers(places):
    """What a batch of these prompts hands to the store."""
    return [np.concatenate([known(place, each.name).reshape(-1) for place in places]).view(np.uint8) for each in COLUMNS]


@pytest.fixture(params=["out", 'a folder\'s "name"\nof two lines'])
def folder(request, tmp_path):
    root = tmp_path / request.param
    root.mkdir()
    return Folder(root)


def prompt(number, content, fields=None):
    return Prompt(number, f"p{number}", content, fields or {}, f"prompts[{number}]")


def take_in(folder, most_tokens=100, most_bytes=10**6):
    """A plan of the four prompts, with their tokens spooled."""
    with store.Intake(folder) as intake:
        for number, ids in enumerate(IDS):
            intake.add([prompt(number, "ü\t", {"label": number} if number else {})], [ids.tolist()])
        cut = parts(COLUMNS, intake.lengths, most_bytes=most_bytes, most_tokens=most_tokens, most_shards=4)
        intake.place(shard for part in cut for shard in part.shards)
        plan = make(intake.facts, COLUMNS, cut, Budget(8))
        intake.commit(plan, {"prompts": [1, 2]})
    return plan


def pending(folder, plan, number=0):
    part = plan.parts[number]
    return store.Pending(folder, plan, part, store.part_tokens(folder, plan, part))


def put(shard, places, prompts):
    """Put the rows of these prompts where those of the places belong."""
    for column, buffer in zip(COLUMNS, buffers(prompts), strict=True):
        shard.put(column.name, places, buffer)
    shard.complete(places)


def names(folder):
    return sorted(path.relative_to(folder.root).as_posix() for path in folder.root.rglob("*"))


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


# ---------------------------------------------------------------------------------------------------------------- shards


def test_what_is_not_utf_8_is_written_with_the_escapes_of_json():
    """As the name of a working folder can be."""
    value = {"model": "caf\udce9", "id": "\u00e9"}
    assert json.loads(to_json(value).decode()) == value


def test_a_shard_is_a_safetensors_file_with_its_header_first(folder):
    plan = take_in(folder)
    shard = pending(folder, plan)
    hidden = temporary(folder.shard(0), store.me())
    size = hidden.stat().st_size  # its places are known before the first row
    length = struct.unpack("<Q", hidden.read_bytes()[:8])[0]
    header = json.loads(hidden.read_bytes()[8 : 8 + length])
    assert set(header) - {"__metadata__"} == {
        name + end for name in ("a.output[0]", "pooled", "square", "tokens") for end in ("", ".offsets")
    }
    assert (8 + length) % 8 == 0
    for places in ([2, 0], [3, 1]):  # batches come in another order than the prompts
        put(shard, places, places)
    shard.seal(0, {}, {"batches": 2})
    record = store.finished(folder, plan.shards[0], plan.digest)
    assert record.bytes == folder.shard(0).stat().st_size == size
    assert record.written == {"batches": 2}
    assert record.rows == {"a.output[0]": 10, "pooled": 4, "square": 9 + 1 + 16 + 4}
    assert names(folder) == [
        "plan.json",
        "plan.tokens",
        "prompts.jsonl",
        "shards",
        "shards/00000.json",
        "shards/00000.safetensors",
    ]
    tensors = load_file(folder.shard(0))
    everything = range(len(LENGTHS))
    assert tensors["a.output[0]"].tolist() == np.concatenate([known(place, "a.output[0]") for place in everything]).tolist()
    assert tensors["pooled"].dtype == torch.float16
    assert tensors["pooled"].tolist() == np.stack([known(place, "pooled") for place in everything]).tolist()
    assert tensors["square"].tolist() == np.concatenate([known(place, "square").reshape(-1) for place in everything]).tolist()
    assert tensors["square.offsets"].tolist() == [0, 9, 10, 26, 30]
    assert tensors["a.output[0].offsets"].tolist() == tensors["tokens.offsets"].tolist() == [0, 3, 4, 8, 10]
    assert tensors["tokens"].tolist() == np.concatenate(IDS).tolist()


def test_a_shard_says_what_it_is(folder):
    plan = take_in(folder, most_tokens=5)
    shard = pending(folder, plan, 1)
    put(shard, [0, 1], [2, 3]) if plan.parts[1].prompts == 2 else put(shard, [0], [2])
    shard.seal(0, {}, {})
    with safe_open(folder.shard(1), framework="np") as file:
        about = file.metadata()
    assert about["first_prompt"] == "2"
    assert about["digest"] == plan.digest
    assert about["shard"] == f"1 of {len(plan.shards)}"
    assert json.loads(about["taps"])["pooled"] == ["pooled.output", "batch", "token", "2"]


def test_the_tensors_are_aligned_to_their_item_size(folder):
    plan = take_in(folder)
    layout = shard_layout(COLUMNS, LENGTHS, store.metadata(plan, plan.shards[0]))
    sizes = {"int64": 8, "float32": 4, "int32": 4, "float16": 2, "uint8": 1}
    assert all(tensor.start % sizes[tensor.dtype] == 0 for tensor in layout.tensors.values())


def test_a_discarded_shard_leaves_nothing(folder):
    plan = take_in(folder)
    before = names(folder)
    shard = pending(folder, plan)
    put(shard, [0], [0])
    assert len(names(folder)) == len(before) + 2
    shard.discard()
    shard.discard()
    assert names(folder) == sorted([*before, "shards"])
    assert not store.done(folder, plan.parts[0], plan.digest)


def test_discarding_a_sealed_shard_keeps_it(folder):
    plan = take_in(folder)
    shard = pending(folder, plan)
    put(shard, [0, 1, 2, 3], [0, 1, 2, 3])
    shard.seal(0, {}, {})
    kept = os.open(folder.plan, os.O_RDONLY)  # may have the number of the descriptor that the shard had
    shard.discard()
    assert os.fstat(kept).st_size > 0
    os.close(kept)
    assert store.done(folder, plan.parts[0], plan.digest)


def test_what_was_put_but_not_completed_is_missing_and_can_be_written_over(folder):
    """As after a batch that did not fit into memory, and came again in halves."""
    shard = pending(folder, take_in(folder))
    shard.put("pooled", [0, 1, 2, 3], buffers([3, 2, 1, 0])[1])
    with pytest.raises(DataError, match="the rows of 4 prompts never came"):
        shard.seal(0, {}, {})
    put(shard, [2, 3], [2, 3])
    put(shard, [0, 1], [0, 1])
    shard.seal(0, {}, {})
    with safe_open(folder.shard(0), framework="numpy") as file:
        assert file.get_tensor("pooled").tobytes() == b"".join(bytes(buffers([place])[1]) for place in range(4))


def test_a_shard_is_flushed_now_and_then_if_the_writer_has_nothing_else_to_do(folder, monkeypatch):
    monkeypatch.setattr(pendings, "FLUSH", 100)
    shard, flushed = pending(folder, take_in(folder)), []
    monkeypatch.setattr(shard, "flush", lambda: flushed.append(shard.wants_flush))
    with store.Writer() as writer:
        writer.flush(shard)
        assert not shard.wants_flush
        put(shard, [0, 1, 2, 3], [0, 1, 2, 3])
        ended = threading.Event()
        writer.do(ended.wait)
        writer.flush(shard)  # it is busy
        ended.set()
        writer.finish()
        assert flushed == []
        writer.flush(shard)
        writer.finish()
    assert flushed == [True]
    shard.discard()


def test_a_batch_of_the_wrong_size_is_refused(folder):
    shard = pending(folder, take_in(folder))
    with pytest.raises(DataError, match=r"gave \d+ bytes where \d+ were planned"):
        put(shard, [0], [0, 1])
    shard.discard()


def test_a_part_is_done_only_with_its_record_its_size_and_its_plan(folder):
    plan = take_in(folder)
    shard = pending(folder, plan)
    put(shard, [0, 1, 2, 3], [0, 1, 2, 3])
    shard.seal(0, {}, {})
    part = plan.parts[0]
    assert store.done(folder, part, plan.digest)
    assert not store.done(folder, part, "another")
    os.truncate(folder.shard(0), folder.shard(0).stat().st_size - 1)
    assert not store.done(folder, part, plan.digest)
    assert store.gathered(folder, plan) is None
    folder.record(0).write_text("{")
    assert not store.done(folder, part, plan.digest)
    assert not folder.manifest.exists()


def test_a_part_of_several_shards_is_done_with_the_last_of_them(folder):
    plan = take_in(folder, most_bytes=prompt_bytes(COLUMNS, LENGTHS[0]) + prompt_bytes(COLUMNS, LENGTHS[1]))
    assert [[shard.prompts for shard in part.shards] for part in plan.parts] == [[2, 1, 1]]
    part = pending(folder, plan)
    for places in ([3, 0], [2, 1]):  # batches know nothing of shards
        put(part, places, places)
    looks = {"pooled": Statistics(4, 8, 0, 0.5, 1.5, 2.5, 3.5)}
    for place in (2, 0, 1):
        assert not part.sealed
        assert not store.done(folder, plan.parts[0], plan.digest)
        assert part.seal(place, looks if place == 0 else {}, {}) == (place == 1)
    assert part.sealed
    assert store.done(folder, plan.parts[0], plan.digest)
    records = [store.finished(folder, shard, plan.digest) for shard in plan.shards]
    assert [record.statistics for record in records] == [looks, {}, {}]
    assert store.gathered(folder, plan).statistics == looks
    tensors = [load_file(folder.shard(number)) for number in range(3)]
    for name in ("a.output[0]", "pooled", "square"):
        found = torch.cat([each[name].reshape(-1) for each in tensors])
        assert found.tolist() == np.concatenate([known(place, name).reshape(-1) for place in range(4)]).tolist()
    assert torch.cat([each["tokens"] for each in tensors]).tolist() == np.concatenate(IDS).tolist()
    assert [json.loads(line)["shard"] for line in folder.prompts.read_text().splitlines()] == [0, 0, 1, 2]
    store.reopen(folder, plan.shards[1:2])
    assert not store.done(folder, plan.parts[0], plan.digest)
    assert store.gathered(folder, plan) is None


def test_a_shard_takes_no_room_before_its_rows(folder):
    """So that what others have still to write is not counted as written."""
    column = replace(COLUMNS[0], layout=Layout((Slice(), 1 << 20), "float32"))
    plan = make({}, [column], [Part(0, (Span(0, 0, 1, 5, 5 << 22),))], Budget(64))
    shard = store.Pending(folder, plan, plan.parts[0], [np.zeros(5, dtype="<i4")])
    assert temporary(folder.shard(0), store.me()).stat().st_size > 5 << 22
    assert store.being_written(folder) < 1 << 20
    shard.put(column.name, [0], np.zeros(5 << 22, dtype=np.uint8))
    shard.flush()
    assert store.being_written(folder) >= 5 << 22
    shard.discard()


def test_a_disk_that_refuses_leaves_no_file(folder, monkeypatch):
    plan = take_in(folder)
    before = names(folder)

    def full(descriptor, content, offset):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(StorageError, match="No space left on device"):
        pending(folder, plan)
    assert names(folder) == sorted([*before, "shards"])


# ------------------------------------------------------------------------------------------------------------ single files


def test_a_file_is_written_whole_or_not_at_all(folder, monkeypatch):
    path = folder.manifest
    store.write_atomically(path, b"first")
    assert path.read_bytes() == b"first"

    def broken(source, target):
        raise OSError(5, "Input/output error", str(target))

    monkeypatch.setattr(os, "replace", broken)
    with pytest.raises(StorageError, match="Input/output error"):
        store.write_atomically(path, b"second")
    assert path.read_bytes() == b"first"
    assert names(folder) == ["manifest.json"]


def test_the_file_is_flushed_before_it_gets_its_name_and_the_folder_after(folder, monkeypatch):
    order = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda each: (order.append(stat.S_ISDIR(os.fstat(each).st_mode)), fsync(each)))
    monkeypatch.setattr(os, "replace", lambda one, other: (order.append("renamed"), replace(one, other)))
    store.write_atomically(folder.manifest, b"content")
    assert order == [False, "renamed", True]


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_the_umask_decides_the_modes(mask, folder):
    before = os.umask(mask)
    try:
        plan = take_in(folder)
        shard = pending(folder, plan)
        put(shard, [0, 1, 2, 3], [0, 1, 2, 3])
        shard.seal(0, {}, {})
        store.seal(folder, store.gathered(folder, plan))
    finally:
        os.umask(before)
    for path in (folder.plan, folder.prompts, folder.manifest, folder.shard(0), folder.record(0)):
        assert mode(path) == 0o666 & ~mask
    assert mode(folder.shards) == 0o777 & ~mask


def test_sealing_writes_the_manifest_and_drops_the_spooled_tokens(folder):
    plan = take_in(folder)
    assert not store.complete(folder, plan)
    shard = pending(folder, plan)
    put(shard, [0, 1, 2, 3], [0, 1, 2, 3])
    shard.seal(0, {}, {})
    assert not store.complete(folder, plan)
    manifest = store.gathered(folder, plan)
    store.seal(folder, manifest)
    assert manifest.prompts == 4
    assert manifest.tokens == 10
    assert store.complete(folder, plan)
    assert not folder.tokens.exists()
    folder.record(0).unlink()
    assert not store.complete(folder, plan)


# ------------------------------------------------------------------------------------------------------------ the way in


def test_the_spooled_tokens_come_back_part_by_part(folder):
    plan = take_in(folder, most_tokens=4)
    assert [part.prompts for part in plan.parts] == [2, 1, 1]
    assert store.has_tokens(folder, plan)
    found = [ids.tolist() for part in plan.parts for ids in store.part_tokens(folder, plan, part)]
    assert found == [ids.tolist() for ids in IDS]
    loaded, stamps = store.load_plan(folder)
    assert loaded == plan == plan_from_json(json.loads(folder.plan.read_text()))
    assert stamps == {"prompts": [1, 2]}
    lines = [json.loads(line) for line in folder.prompts.read_text().splitlines()]
    assert lines[2] == {"number": 2, "id": "p2", "tokens": 4, "shard": 1, "text": "ü\t", "fields": {"label": 2}}
    os.truncate(folder.tokens, 8)
    assert not store.has_tokens(folder, plan)


def test_a_line_holds_what_the_user_gave_and_token_ids_stand_in_the_shard(folder):
    messages = [{"role": "user", "content": 'a "b"\n'}]
    given = [prompt(0, messages), prompt(1, [1, 2], {"source": {"deep": [None, 0.5]}}), prompt(2, "c")]
    with store.Intake(folder) as intake:
        intake.add(given, [[1], [1, 2], [3]])
        cut = parts(COLUMNS, intake.lengths, most_bytes=10**6, most_tokens=2, most_shards=4)
        intake.place(shard for part in cut for shard in part.shards)
        intake.commit(None, {})
    assert list(map(json.loads, folder.prompts.read_text().splitlines())) == [
        {"number": 0, "id": "p0", "tokens": 1, "shard": 0, "messages": messages},
        {"number": 1, "id": "p1", "tokens": 2, "shard": 1, "fields": {"source": {"deep": [None, 0.5]}}},
        {"number": 2, "id": "p2", "tokens": 1, "shard": 2, "text": "c"},
    ]
    assert intake.facts["prompts"] == {
        "bytes": folder.prompts.stat().st_size,
        "sha256": hashlib.sha256(folder.prompts.read_bytes()).hexdigest(),
    }


def test_an_intake_that_is_broken_off_leaves_nothing(folder):
    with pytest.raises(KeyboardInterrupt), store.Intake(folder) as intake:
        intake.add([prompt(0, "a")], [[1, 2]])
        assert names(folder) != []
        raise KeyboardInterrupt
    assert names(folder) == []


def test_temporary_files_of_dead_processes_are_swept_and_others_stay(folder):
    folder.shards.mkdir()
    dead, own, parents, other = (
        temporary(folder.shard(0), f"{2**22 + 1}-0123abcd-{platform.node()}"),
        temporary(folder.shard(1), store.me()),
        temporary(folder.plan, f"{os.getppid()}-0123abcd-{platform.node()}"),
        folder.root / ".hidden",
    )
    for path in (dead, own, parents, other):
        path.write_bytes(b"")
    store.sweep(folder)
    assert [path.exists() for path in (dead, own, parents, other)] == [False, False, True, True]


def test_clear_removes_a_dump_and_nothing_else(folder):
    plan = take_in(folder)
    folder.shards.mkdir()
    folder.shard(0).write_bytes(b"")
    (folder.root / "notes").write_bytes(b"")
    (folder.shards / "notes").write_bytes(b"")
    store.clear(folder, plan)
    assert names(folder) == ["notes", "shards", "shards/notes"]


def test_a_file_in_the_place_of_the_folder(tmp_path):
    (tmp_path / "out").write_text("a file")
    with pytest.raises(OccupiedError, match="is a file"):
        store.check_free(Folder(tmp_path / "out"), overwrite=True)
    with pytest.raises(StorageError, match="is a file"):
        store.check_free(Folder(tmp_path / "out" / "below"), overwrite=False)


def test_a_dump_that_does_not_fit_is_refused_beforehand(folder):
    store.check_space(folder, 1)
    with pytest.raises(StorageError, match="needs 1,000,000,000,000,000,000 bytes"):
        store.check_space(folder, 10**18)


# ------------------------------------------------------------------------------------------------------------- the writer


def test_the_writer_does_its_tasks_in_order():
    seen = []
    with store.Writer() as writer:
        for number in range(20):
            writer.do(seen.append, number)
        writer.finish()
        assert seen == list(range(20))


def test_a_held_task_comes_before_what_is_done_after_it():
    seen = []
    with store.Writer() as writer:
        writer.hold([lambda: seen.append("first"), lambda: seen.append("of two shards")])
        time.sleep(0.05)
        assert seen == []
        writer.do(seen.append, "second")
        writer.hold([lambda: seen.append("third")])
        writer.hold([lambda: seen.append("fourth")])
        writer.let_go()
        writer.hold([lambda: seen.append("last")])
        writer.finish()
    assert seen == ["first", "of two shards", "second", "third", "fourth", "last"]


def test_a_held_part_waits_as_one_task_however_many_shards_it_has():
    """Where seals have no threads of their own, whoever captures must not wait for all but the last."""
    gate, seen = threading.Event(), []
    with store.Writer() as writer:
        writer.hold([gate.wait, *(partial(seen.append, number) for number in range(2 * store.AHEAD))])
        writer.let_go()
        assert seen == []
        gate.set()
        writer.finish()
    assert seen == list(range(2 * store.AHEAD))


def test_an_error_in_the_thread_is_raised_at_the_next_call():
    failed = threading.Event()

    def fail():
        failed.set()
        raise StorageError("the disk is gone")

    with store.Writer() as writer:
        writer.do(fail)
        failed.wait()
        with pytest.raises(StorageError, match="the disk is gone"):
            for _ in range(store.AHEAD + 1):
                writer.do(lambda: None)
    with pytest.raises(StorageError, match="the disk is gone"), store.Writer() as writer:
        writer.do(fail)
        writer.finish()


def test_the_writer_lets_only_a_few_tasks_wait():
    gate, begun = threading.Event(), []
    with store.Writer() as writer:
        for _ in range(store.AHEAD):
            writer.do(gate.wait)
        late = threading.Thread(target=lambda: (writer.do(lambda: None), begun.append("let in")))
        late.start()
        late.join(0.05)
        assert begun == []
        gate.set()
        late.join()
        writer.finish()
    assert begun == ["let in"]


def test_a_seal_with_threads_of_its_own_keeps_no_rows_waiting():
    gate, seen = threading.Event(), []
    with store.Writer(seals=2) as writer:
        writer.hold([lambda: (gate.wait(10), seen.append("sealed"))])
        for number in range(3 * store.BESIDE):
            writer.do(seen.append, number)
        writer.settle()
        assert sorted(map(str, seen)) == sorted(map(str, range(3 * store.BESIDE)))
        gate.set()
        writer.finish()
        assert seen[-1] == "sealed"  # it is waited for, too


def test_no_more_shards_are_sealed_at_once_than_was_said():
    gate, begun = threading.Event(), []

    def hold_three(writer):  # parts
        for _ in range(3):
            writer.hold([lambda: (begun.append(1), gate.wait(10))] * (UNSEALED // 2))
        writer.let_go()

    with store.Writer(seals=2) as writer:
        late = threading.Thread(target=hold_three, args=[writer])
        late.start()
        for _ in range(1000):
            if len(begun) < 2:
                time.sleep(0.01)
        late.join(0.05)
        assert late.is_alive()
        assert len(begun) == 2
        gate.set()
        late.join()
        writer.finish()
    assert len(begun) == 3 * UNSEALED // 2


def test_a_seal_that_failed_is_told_at_the_next_call():
    def fail():
        raise StorageError("the disk is gone")

    with pytest.raises(StorageError, match="the disk is gone"), store.Writer(seals=1) as writer:
        writer.hold([fail])
        writer.let_go()
        for _ in range(200):
            time.sleep(0.01)
            writer.do(lambda: None)


def test_rows_on_their_way_settle():
    gate = threading.Event()
    with store.Writer(seals=1) as writer:
        writer.do(gate.wait)
        threading.Timer(0.05, gate.set).start()
        assert writer.settle() is True
        assert gate.is_set()
        assert writer.settle() is False
        writer.do(lambda: None)
        time.sleep(0.05)
        assert writer.settle() is True  # what is done by now may have been on its way when memory was short
    with store.Writer() as writer:  # where no rows are written later
        writer.do(time.sleep, 0.05)
        assert writer.settle() is False


def test_rows_that_failed_fail_the_seal_that_waits_for_them():
    failed = threading.Event()

    def fail():
        failed.wait()
        raise StorageError("the disk is gone")

    with pytest.raises(StorageError, match="the disk is gone"), store.Writer(seals=1) as writer:
        put = writer.do(fail)
        writer.hold([lambda: (put.result(), pytest.fail("sealed"))])
        writer.let_go()
        failed.set()
        writer.finish()


def test_an_error_here_drops_what_waits_there():
    gate, done = threading.Event(), []
    with pytest.raises(KeyboardInterrupt), store.Writer() as writer:
        writer.do(gate.wait)
        writer.do(done.append, "waited")
        threading.Timer(0.05, gate.set).start()
        raise KeyboardInterrupt
    assert done == []


def test_an_interrupt_waits_for_what_is_being_written():
    """Its file is closed next."""
    waiting, done = threading.Event(), []

    def write():
        waiting.wait()
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.2)
        done.append("written")

    with pytest.raises(KeyboardInterrupt), store.Writer() as writer:
        writer.do(write)
        threading.Timer(0.05, waiting.set).start()
    assert done == ["written"]


def test_a_failed_task_stops_those_that_wait_behind_it():
    began, done = threading.Event(), []

    def fail():
        began.wait()
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"), store.Writer() as writer:
        writer.do(fail)
        writer.do(done.append, "sealed")
        began.set()
        writer.finish()
    assert done == []


def test_what_went_wrong_is_raised_until_somebody_heeds_it():
    """A run takes a lack of memory for that of a batch in hand, and goes on."""

    def fail():
        raise MemoryError("no room")

    writer = store.Writer()
    writer.do(fail)
    with pytest.raises(MemoryError, match="no room"):
        writer.finish()
    for call in (writer.finish, lambda: writer.do(print), writer.finish):
        with pytest.raises(MemoryError, match="no room"):
            call()
    writer.__exit__(None, None, None)


def test_no_file_without_a_name_is_among_those_of_prompts_on_their_way(folder):
    """In NFS one gets a name that nobody knows."""
    with store.Intake(folder) as intake:
        intake.add([prompt(0, "x")], [[1, 2]])
        assert len(list(folder.root.iterdir())) == 3
        assert all(folder.written_by_us(path) for path in folder.root.iterdir())
    assert not folder.root.exists()


def test_a_shard_without_all_its_rows_is_not_sealed(folder):
    shard = pending(folder, take_in(folder))
    put(shard, [0, 2, 1], [0, 2, 1])
    with pytest.raises(DataError, match="the rows of 1 prompts never came"):
        shard.seal(0, {}, {})
    shard.discard()
    assert list(folder.shards.iterdir()) == []
