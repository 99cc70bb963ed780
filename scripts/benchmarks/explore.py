"""What is fastest on this machine, and whether `auto` finds it. Bare forwards of a few blocks, prompts of mixed length."""

import os
from collections.abc import Iterator
from statistics import median
from typing import Any

import torch
from torch import nn

from actdump import job
from actdump.job.lanes import MOST
from benchmarks.bare import BUDGETS, FEW_BLOCKS, bare, forwards, padded_batches, side_by_side
from benchmarks.rounds import Figure, Run, in_turns, timed
from benchmarks.running import spec_of
from benchmarks.setting import Setting, say
from benchmarks.subject import FOLDER, A, load, tokenizer
from benchmarks.texts import Prompts, mixed

ATTENTION = ("sdpa", "eager")


def measure(setting: Setting) -> Iterator[Figure]:
    """Tokens per second, one choice after another, the rest as `auto` has it; and the share of the best that `auto` reaches."""
    prompts = mixed(tokenizer(), setting.some(512, 3))
    say(prompts.described())
    threads = torch.get_num_threads()
    for dtype in setting.dtypes:
        auto = _auto_budget(setting, prompts, dtype)
        few = bare(load(dtype), FEW_BLOCKS)
        kernels = {kernel: bare(load(dtype, attn_implementation=kernel), FEW_BLOCKS) for kernel in ATTENTION}
        budgets = {budget: _forwards(few, prompts, budget, _lanes(threads)) for budget in sorted({auto, *BUDGETS})}
        counts = {count: _on_threads(count, _forwards(few, prompts, auto, _lanes(count))) for count in _threads()}
        lanes = {count: _forwards(few, prompts, auto, count) for count in range(1, MOST + 1) if threads % count == 0}
        attentions = {kernel: _forwards(base, prompts, auto, _lanes(threads)) for kernel, base in kernels.items()}
        yield from _choice(setting, prompts, f"{dtype}, budget", auto, budgets)
        yield from _choice(setting, prompts, f"{dtype}, threads", threads, counts)
        yield from _choice(setting, prompts, f"{dtype}, forwards side by side", _lanes(threads), lanes)
        yield from _choice(setting, prompts, f"{dtype}, attention", "sdpa", attentions)


def _auto_budget(setting: Setting, prompts: Prompts, dtype: str) -> int:
    """The batch budget that a run takes by itself."""
    return job.forecast(spec_of(A, {"name": str(FOLDER), "dtype": dtype}, setting.saved(prompts))).plan.budget.tokens


def _lanes(threads: int) -> int:
    """How many forwards a run has side by side."""
    return max(count for count in range(1, MOST + 1) if threads % count == 0)


def _forwards(base: nn.Module, prompts: Prompts, budget: int, lanes: int) -> Run:
    batches = padded_batches(prompts.ids, budget)
    return timed(side_by_side(base, batches, lanes) if lanes > 1 else forwards(base, batches))


def _threads() -> list[int]:
    cores = os.cpu_count() or 1
    return sorted({1, max(cores // 2, 1), cores, torch.get_num_threads()})


def _on_threads(count: int, run: Run) -> Run:
    usual = torch.get_num_threads()

    def on_threads() -> float:
        torch.set_num_threads(count)
        try:
            return run()
        finally:
            torch.set_num_threads(usual)

    return on_threads


def _choice(setting: Setting, prompts: Prompts, name: str, auto: Any, sides: dict[Any, Run]) -> Iterator[Figure]:
    next(iter(sides.values()))()
    taken = in_turns({str(choice): run for choice, run in sides.items()}, setting.rounds)
    speeds = {choice: tuple(prompts.tokens / seconds for seconds in each) for choice, each in taken.items()}
    for choice, each in speeds.items():
        yield Figure(f"{name} {choice}{' (auto)' if choice == str(auto) else ''}", median(each), "tokens/s", each)
    best = max(speeds, key=lambda choice: median(speeds[choice]))
    each = tuple(first / second for first, second in zip(speeds[str(auto)], speeds[best], strict=True))
    yield Figure(f"{name}: auto / the best ({best})", median(speeds[str(auto)]) / median(speeds[best]), "×", each)
