"""The store against a plain file: a model that costs nothing, so that only the writing is left."""

import os
import shutil
from collections.abc import Iterator
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from actdump import store
from actdump.address import Slice
from actdump.format import Folder
from actdump.job.bound import SHARDS
from actdump.plan import Budget, Column, Layout, Plan, batches, make, parts
from benchmarks.rounds import Figure, Goal, in_turns, timed
from benchmarks.setting import Setting
from benchmarks.texts import MEDIAN

Array = np.ndarray[Any, Any]
WIDTH, TAPS, BUDGET = 576, 3, 512  # as in task A
CHUNK = 1 << 20  # bytes that the plain side writes and hashes at a time


def measure(setting: Setting) -> Iterator[Figure]:
    """The share of the plain side's bytes per second that the store reaches: rows of many prompts, put as a run puts them."""
    plan, lengths = _plan(setting.some(10_000, 200))
    source = np.random.default_rng(0).integers(0, 256, 64 << 20, dtype=np.uint8)
    out = setting.scratch
    sides = {
        "the store": timed(lambda: written(plan, lengths, source, out / "dump")),
        "a plain file": timed(lambda: plainly(plan, source, out / "plain")),
    }
    taken = in_turns(sides, setting.rounds)
    speeds = {name: tuple(plan.bytes / 1e6 / seconds for seconds in times) for name, times in taken.items()}
    for name, each in speeds.items():
        yield Figure(f"{name}, {plan.bytes / 1e6:,.0f} MB in {len(plan.shards)} shards", float(np.median(each)), "MB/s", each)
    ours, plain = speeds.values()
    ratios = tuple(first / second for first, second in zip(ours, plain, strict=True))
    yield Figure("the store / a plain file", float(np.median(ours) / np.median(plain)), "×", ratios, Goal("at least", 0.8))


def _plan(prompts: int) -> tuple[Plan, Array]:
    """Prompts of mixed length, and the plan of task A for them."""
    lengths = np.clip(np.random.default_rng(0).lognormal(np.log(MEDIAN), 0.9, prompts), 5, 400).astype(int)
    columns = [_column(f"layer{number}") for number in range(TAPS)]
    cut = parts(columns, lengths.tolist(), most_bytes=10**9, most_tokens=262_144, most_shards=SHARDS)
    facts = {"spec": {}, "inputs": {}, "tokens": "", "prompts": {"bytes": 0, "sha256": ""}}
    return make(facts, columns, cut, Budget(BUDGET)), lengths


def _column(name: str) -> Column:
    layout = Layout((Slice(None, None, None), WIDTH), "bfloat16")
    return Column(name, name, name, "Block", "tensor", "all", None, ("batch", "token", str(WIDTH)), layout, 0)


def written(plan: Plan, lengths: Array, source: Array, root: Path) -> None:
    """What a run does with captured rows; they are slices of the source."""
    folder = Folder(root)
    root.mkdir()
    try:
        with store.Pendings() as pendings, store.Writer() as writer:
            for part in plan.parts:
                own = lengths[part.first : part.first + part.prompts].tolist()
                pending = pendings.begin(folder, plan, part, [np.zeros(length, dtype="<i4") for length in own])
                for places in batches(pending.lengths, plan.budget):
                    size = sum(own[place] for place in places) * WIDTH * 2
                    for column in plan.columns:
                        pending.put(column.name, places, source[:size])
                    pending.complete(places)
                    writer.flush(pending)
                writer.hold(partial(pending.seal, place, {}, {}) for place in range(len(part.shards)))
            writer.finish()
    finally:
        shutil.rmtree(root)


def plainly(plan: Plan, source: Array, path: Path) -> None:
    """As many bytes, file by file, from the first to the last, hashed on the way, flushed to the device."""
    for shard in plan.shards:
        _plain_file(shard.bytes, source.data, path)
        path.unlink()


def _plain_file(size: int, source: memoryview, path: Path) -> None:
    digest = sha256()
    with path.open("wb", buffering=0) as file:
        for start in range(0, size, CHUNK):
            place = start % len(source)
            piece = source[place : place + min(CHUNK, size - start)]
            file.write(piece)
            digest.update(piece)
        os.fsync(file.fileno())
