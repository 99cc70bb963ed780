"""What several workers gain, and what it costs to share the work out."""

import json
import os
import shutil
import subprocess
import sys
from bisect import bisect_left
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from threading import current_thread, main_thread
from time import perf_counter, thread_time
from typing import Any

from actdump import plan, store
from actdump.spec import Spec
from actdump.store import manifest, shards, standing
from benchmarks import child
from benchmarks.rounds import Figure, Goal, in_turns, ratio, timed, times
from benchmarks.running import Dumping, spec_of
from benchmarks.setting import Setting, say
from benchmarks.subject import FOLDER, A, tokenizer
from benchmarks.texts import Prompts, mixed

PARTS_TO_SHARE = 16
WHOLE = "one process, two threads, one part"
ONE, TWO = f"one process, two threads, {PARTS_TO_SHARE} parts", f"two workers, one thread each, {PARTS_TO_SHARE} parts"
PARTS = 200  # of the run whose overhead is measured
# What is only done so that a run can be shared out, gone on with and described.
OVERHEAD = (
    (store.Crew, "_take"),
    (store.Lock, "remove"),
    (store.Intake, "place"),
    (store.Intake, "commit"),
    (store, "done"),
    (standing, "done"),
    (shards, "finished"),
    (manifest, "finished"),
    (shards, "write_atomically"),
)


def measure(setting: Setting) -> Iterator[Figure]:
    """Task A from the command to its end, by two workers and by one process; and the share of its overhead in many parts."""
    prompts = mixed(tokenizer(), setting.some(512, 3))
    for dtype in setting.dtypes:
        say(dtype)
        yield from _two_workers(setting, prompts, dtype)
        yield from _overhead(setting, prompts, dtype)


def _spec(setting: Setting, prompts: Prompts, dtype: str, parts: int) -> Spec:
    shard = {"tokens": _tokens_for(prompts, parts)}
    return spec_of(A, {"name": str(FOLDER), "dtype": dtype}, setting.saved(prompts), shard=shard)


def _tokens_for(prompts: Prompts, parts: int) -> int:
    """The fewest tokens of a part with which prompts come to no more than so many parts."""

    def count(tokens: int) -> int:
        return len(plan.parts((), prompts.lengths, most_bytes=sys.maxsize, most_tokens=tokens, most_shards=1))

    return 1 + bisect_left(range(1, prompts.tokens), -parts, key=lambda tokens: -count(tokens))


def _two_workers(setting: Setting, prompts: Prompts, dtype: str) -> Iterator[Figure]:
    out = setting.scratch / "workers"
    files = {parts: setting.scratch / f"{parts}.json" for parts in (1, PARTS_TO_SHARE)}
    for parts, file in files.items():
        spec = _spec(setting, prompts, dtype, parts)
        file.write_text(json.dumps(spec.model_dump(mode="json", exclude_defaults=True)))
    sides = {
        WHOLE: timed(lambda: _run(files[1], out, threads=2, workers=1)),
        ONE: timed(lambda: _run(files[PARTS_TO_SHARE], out, threads=2, workers=1)),
        TWO: timed(lambda: _run(files[PARTS_TO_SHARE], out, threads=1, workers=2)),
    }
    taken = in_turns(sides, setting.rounds)
    yield from times(taken, dtype)
    yield ratio(f"{dtype}: two workers / one process", taken, TWO, ONE, Goal("at most", 1.1))
    yield ratio(f"{dtype}: {PARTS_TO_SHARE} parts / one part", taken, ONE, WHOLE)


def _run(spec: Path, out: Path, threads: int, workers: int) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, "-c", child.CLI, "run", str(spec), "-o", str(out), "-q", "--worker"]
    try:
        running = [
            subprocess.Popen([*command, f"{index}/{workers}"], env=environment, stdout=subprocess.DEVNULL)
            for index in range(workers)
        ]
        codes = [process.wait() for process in running]
        if any(codes):
            raise RuntimeError(f"the workers ended with {codes}")
    finally:
        shutil.rmtree(out, ignore_errors=True)


def _overhead(setting: Setting, prompts: Prompts, dtype: str) -> Iterator[Figure]:
    run = Dumping(_spec(setting, prompts, dtype, PARTS), setting.scratch / "dump")
    each = []
    for _ in range(setting.rounds):
        with _clocked() as spent:
            seconds = run()
        each.append(100 * sum(spent) / seconds)
    yield Figure(f"{dtype}: locks, plan and records of {PARTS} parts", median(each), "%", tuple(each), Goal("at most", 1))


@contextmanager
def _clocked() -> Iterator[list[float]]:
    """While the block runs, what makes up the overhead says how long it took.

    In the writer's thread only computing counts: while it waits for the disk, as it does in every flush, the model goes on.
    """
    spent: list[float] = []
    with ExitStack() as stack:
        for owner, name in OVERHEAD:
            real = getattr(owner, name)
            setattr(owner, name, _clock(real, spent))
            stack.callback(setattr, owner, name, real)
        yield spent


def _clock(real: Callable[..., Any], spent: list[float]) -> Callable[..., Any]:
    def clocked(*args: Any, **kwargs: Any) -> Any:
        clock = perf_counter if current_thread() is main_thread() else thread_time
        began = clock()
        try:
            return real(*args, **kwargs)
        finally:
            spent.append(clock() - began)

    return clocked
