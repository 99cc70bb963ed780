"""The real run, timed."""

import gc
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from time import perf_counter
from types import ModuleType
from typing import Any

from actdump import engine, job, model
from actdump.job.watching import Silent
from actdump.spec import Spec
from benchmarks.rounds import Run
from benchmarks.subject import Task

LOADING, TOKENIZER, PROBING = "loading", "loading the tokenizer", "probing"
WATCHED = {LOADING: (model, "load"), TOKENIZER: (model, "load_tokenizer"), PROBING: (engine, "probe")}


class Stopwatch(Silent):
    """Remembers when a run began each of its steps."""

    def __init__(self) -> None:
        self.began: dict[str, float] = {}

    def step(self, doing: str) -> None:
        self.began[doing] = perf_counter()

    def since(self, doing: str) -> float:
        """The seconds since a step began."""
        return perf_counter() - self.began[doing]


@contextmanager
def watched() -> Iterator[dict[str, float]]:
    """While the block runs, what is done once a run, whatever its size, says how long it took."""
    taken: dict[str, float] = {}
    with ExitStack() as stack:
        for name, (module, function) in WATCHED.items():
            stack.enter_context(_timing(module, function, name, taken))
        yield taken


@contextmanager
def _timing(module: ModuleType, function: str, name: str, taken: dict[str, float]) -> Iterator[None]:
    real: Callable[..., Any] = getattr(module, function)

    def timed(*args: Any, **kwargs: Any) -> Any:
        began = perf_counter()
        try:
            return real(*args, **kwargs)
        finally:
            taken[name] = perf_counter() - began

    setattr(module, function, timed)
    try:
        yield
    finally:
        setattr(module, function, real)


def spec_of(task: Task, source: dict[str, Any], prompts: Path, **rest: Any) -> Spec:
    """The spec that a user would write for a task. The audit is off, unless `rest` says otherwise."""
    return Spec.model_validate({
        "model": source,
        "prompts": {"file": str(prompts)},
        "save": [f"model.layers[{layer}].output" for layer in task.layers],
        "tokens": task.tokens,
        "dtype": "bfloat16",
        "audit": 0,
        **rest,
    })  # fmt: skip


@dataclass
class Dumping:
    """The real run in this process, from its step `tokenising` until it returns with the manifest sealed.

    The run loads the model on the way, as the command does; only that is taken off. What is written is removed.

    Attributes:
        watching: makes the watcher of a run.
        before: the seconds of each run for loading the tokenizer, which comes before.
        probing, auditing: of what was timed, the seconds of each run for the probe, however many prompts there are, and for the audit.
    """

    spec: Spec
    out: Path
    watching: Callable[[], Stopwatch] = Stopwatch
    before: list[float] = field(default_factory=list)
    probing: list[float] = field(default_factory=list)
    auditing: list[float] = field(default_factory=list)

    def __call__(self) -> float:
        watch = self.watching()
        try:
            with watched() as taken:
                outcome = job.run(self.spec, self.out, watcher=watch)
                seconds = watch.since("tokenising") - taken[LOADING]
        finally:
            shutil.rmtree(self.out, ignore_errors=True)
            os.sync()  # what is still on its way to the disk would slow the next side down
        if outcome.state != "done":
            raise RuntimeError(f"the run was {outcome.state}")
        self.before.append(taken.get(TOKENIZER, 0.0))
        self.probing.append(taken.get(PROBING, 0.0))
        self.auditing.append((outcome.manifest.audit or {}).get("seconds", 0.0))
        gc.collect()
        return seconds


@contextmanager
def elsewhere(side: Run) -> Iterator[Run]:
    """A side in one process of its own in every round, so that what it sets for its process (how memory is kept) is not set for the
    other sides, too."""
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        yield lambda: process.submit(side).result()
