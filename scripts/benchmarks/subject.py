"""What is measured: a model, cut or whole, and the real job on it."""

import gc
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from actdump import job, model
from actdump.job.watching import Silent
from actdump.spec import ModelSpec, Spec
from benchmarks.rounds import Run, in_turns, timed
from benchmarks.setting import say

ROOT = Path(__file__).parents[2]
NAME = "SmolLM2-135M-Instruct"
FOLDER = ROOT / "models" / NAME
BUDGETS = (256, 512, 1024, 2048, 4096)  # padded tokens in a batch
FEW_BLOCKS = 4


@dataclass(frozen=True)
class Task:
    """What is to be saved: the outputs of some blocks."""

    name: str
    layers: tuple[int, ...]
    tokens: str = "all"

    @property
    def depth(self) -> int:
        """How many blocks must run."""
        return max(self.layers) + 1


A = Task("A", (5, 10, 15))
B = Task("B", tuple(range(30)))
C = Task("C", (5, 10, 15), tokens="last")
TASKS = (A, B, C)


@cache
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(FOLDER)


def load(dtype: str, **options: Any) -> nn.Module:
    """The whole model, loaded as a run loads it."""
    return model.load(model.find(ModelSpec(name=str(FOLDER), dtype=dtype, **options)))  # type: ignore[arg-type]


def bare(whole: nn.Module, depth: int) -> nn.Module:
    """The model without its head, its last norm and the blocks after the last that is needed: really gone, not skipped.

    The weights are shared with the whole model, which stays as it is.
    """
    base: Any = copy(whole.get_submodule("model"))
    base._modules = {**base._modules, "layers": base.layers[:depth], "norm": nn.Identity()}
    return base  # type: ignore[no-any-return]


# ------------------------------------------------------------------------------------------------------------------ the limit


def padded_batches(ids: Sequence[Sequence[int]], budget: int, device: torch.device | str = "cpu") -> list[Tensor]:
    """Prompts sorted by length, longest first, cut into right-padded batches of at most `budget` tokens."""
    batches: list[list[Sequence[int]]] = []
    for prompt in sorted(ids, key=len, reverse=True):
        if not batches or len(batches[-1][0]) * (len(batches[-1]) + 1) > budget:
            batches.append([])
        batches[-1].append(prompt)
    return [_padded(batch).to(device) for batch in batches]


def _padded(batch: Sequence[Sequence[int]]) -> Tensor:
    return torch.tensor([[*prompt, *[0] * (len(batch[0]) - len(prompt))] for prompt in batch])


def forwards(base: nn.Module, batches: Sequence[Tensor]) -> Callable[[], None]:
    """The bare forwards: no hooks, no masks, nothing kept."""

    def run() -> None:
        with torch.inference_mode():
            for ids in batches:
                base(input_ids=ids, use_cache=False)
        if batches[0].is_cuda:
            torch.cuda.synchronize()

    return run


def best_budget(whole: nn.Module, ids: Sequence[Sequence[int]], rounds: int, budgets: Sequence[int] = BUDGETS) -> int:
    """The fastest of several budgets on this machine. Blocks are alike, so a few of them tell."""
    few, device = bare(whole, FEW_BLOCKS), next(whole.parameters()).device
    sides = {str(budget): timed(forwards(few, padded_batches(ids, budget, device))) for budget in budgets}
    next(iter(sides.values()))()  # the first forwards of a process are slower
    taken = {name: min(each) for name, each in in_turns(sides, rounds).items()}
    best = min(taken, key=lambda name: taken[name])
    others = ", ".join(f"{name}: {seconds / taken[best]:.2f}" for name, seconds in taken.items())
    say(f"batches of {best} padded tokens are the fastest forwards: {others}")
    return int(best)


# ---------------------------------------------------------------------------------------------------------------- the real job


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
def loading_timed() -> Iterator[list[float]]:
    """While the block runs, every loading of a model says how long it took: it is no part of what is measured."""
    taken: list[float] = []
    load = model.load

    def timed_load(source: model.Source) -> nn.Module:
        began = perf_counter()
        try:
            return load(source)
        finally:
            taken.append(perf_counter() - began)

    model.load = timed_load
    try:
        yield taken
    finally:
        model.load = load


def spec_of(task: Task, source: dict[str, Any], prompts: Path, **rest: Any) -> Spec:
    """The spec that a user would write for a task. The audit is off where there is one, unless `rest` says otherwise."""
    off = {"audit": 0} if "audit" in Spec.model_fields else {}
    return Spec.model_validate({
        "model": source,
        "prompts": {"file": str(prompts)},
        "save": [f"model.layers[{layer}].output" for layer in task.layers],
        "tokens": task.tokens,
        "dtype": "bfloat16",
        **off,
        **rest,
    })  # fmt: skip


def dump(spec: Spec, out: Path) -> float:
    """The real run in this process: the seconds from its step `tokenising` until it returns with the manifest sealed.

    It loads the model on the way, as the command does; only that is taken off. What is written is removed.
    """
    watch = Stopwatch()
    try:
        with loading_timed() as loading:
            outcome = job.run(spec, out, watcher=watch)
            seconds = watch.since("tokenising") - sum(loading)
    finally:
        shutil.rmtree(out, ignore_errors=True)
    if outcome.state != "done":
        raise RuntimeError(f"the run was {outcome.state}")
    gc.collect()
    return seconds


def dumping(spec: Spec, out: Path) -> Run:
    return lambda: dump(spec, out)
