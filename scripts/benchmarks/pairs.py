"""The real run against the limit once more, batch by batch, for machines whose speed wavers from one minute to the next.

Each batch of the run has its bare forward right beside it, before it and after it in turns, so that both meet the same machine.
For that, the run captures one batch at a time, though it would capture several side by side: what they gain, `limit` shows.
What the writer's thread computes is added to the run in full, as if nothing of it had been done while a bare forward ran. The
batches are those of the run; whether `auto` cuts them well is what `explore` measures.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from time import perf_counter, thread_time
from typing import Any

import torch
from torch import nn

from actdump import engine, store
from actdump.job import lanes
from benchmarks.bare import bare, padded
from benchmarks.limit import GOALS
from benchmarks.rounds import Figure, ratio, seconds
from benchmarks.running import Dumping, spec_of
from benchmarks.setting import Setting, say
from benchmarks.subject import FOLDER, TASKS, A, Task, load, tokenizer
from benchmarks.texts import Prompts, mixed

RUN, BARE = "the run", "the bare forwards beside it"


@dataclass
class Pairs:
    """What ran beside a run.

    Attributes:
        bare: the seconds of each bare forward.
        beside: the seconds in which the run stood still for them.
        writer: the seconds that the writer's thread computed.
    """

    bare: list[float] = field(default_factory=list)
    beside: float = 0.0
    writer: float = 0.0


def measure(setting: Setting) -> Iterator[Figure]:
    """A, B and C from tokenising to the sealed manifest, over the bare forwards of the same batches."""
    prompts = mixed(tokenizer(), setting.some(512, 3))
    file, few = setting.saved(prompts), setting.saved(Prompts("few", prompts.texts[:8], prompts.ids[:8]))
    say(prompts.described())
    for dtype in setting.dtypes:
        whole, source, out = load(dtype), {"name": str(FOLDER), "dtype": dtype}, setting.scratch / "dump"
        _paired(Dumping(spec_of(A, source, few), out), bare(whole, A.depth))  # the first run is slower
        for task in TASKS:
            run = Dumping(spec_of(task, source, file), out)
            yield from _compared(task, dtype, [_paired(run, bare(whole, task.depth)) for _ in range(setting.rounds)])


def _compared(task: Task, dtype: str, each: Sequence[tuple[float, Pairs]]) -> Iterator[Figure]:
    taken = {
        RUN: tuple(whole - pairs.beside + pairs.writer for whole, pairs in each),
        BARE: tuple(sum(pairs.bare) for _, pairs in each),
    }
    yield seconds(f"{dtype}: {task.name}, {RUN}", taken[RUN])
    yield seconds(f"{dtype}: {task.name}, of it the writer's computing", tuple(pairs.writer for _, pairs in each))
    yield seconds(f"{dtype}: {task.name}, {BARE}", taken[BARE])
    yield ratio(f"{dtype}: {task.name}, {RUN} / {BARE}", taken, RUN, BARE, GOALS[task.name])


def _paired(run: Dumping, base: nn.Module) -> tuple[float, Pairs]:
    with _beside(base) as pairs:
        return run(), pairs


@contextmanager
def _beside(base: nn.Module) -> Iterator[Pairs]:
    """While the block runs, every batch of a run has its bare forward beside it."""
    pairs = Pairs()
    stream, submit = engine.stream, store.Writer._submit

    def forward(ids: Sequence[Sequence[int]]) -> None:
        began = perf_counter()
        batch = padded(ids)
        ready = perf_counter()
        with torch.inference_mode():
            base(input_ids=batch, use_cache=False)
        pairs.bare.append(perf_counter() - ready)
        pairs.beside += perf_counter() - began

    def streamed(model: nn.Module, sites: Any, feed: Any, batch: Any, sink: Any) -> bool:
        if first := len(pairs.bare) % 2 == 1:
            forward(batch.ids)
        alone = stream(model, sites, feed, batch, sink)
        if not first:
            forward(batch.ids)
        return alone

    def submitted(writer: store.Writer, threads: Any, task: Callable[[], Any]) -> Any:
        def worked() -> None:
            began = thread_time()
            try:
                task()
            finally:
                pairs.writer += thread_time() - began

        return submit(writer, threads, worked)

    with ExitStack() as stack:
        changes = (
            (engine, "stream", stream, streamed),
            (store.Writer, "_submit", submit, submitted),
            (lanes, "MOST", lanes.MOST, 1),
        )
        for owner, name, real, ours in changes:
            setattr(owner, name, ours)
            stack.callback(setattr, owner, name, real)
        yield pairs
