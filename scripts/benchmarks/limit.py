"""The real run against the limit: bare forwards of the cut model, prompts sorted, at the best batch budget."""

from collections.abc import Iterator, Mapping

from torch import nn

from benchmarks.rounds import Figure, Goal, in_turns, ratio, timed
from benchmarks.setting import Setting, say
from benchmarks.subject import (
    BUDGETS,
    FOLDER,
    TASKS,
    A,
    B,
    bare,
    dumping,
    forwards,
    load,
    padded_batches,
    spec_of,
    tokenizer,
)
from benchmarks.texts import Prompts, mixed

GOALS = {"A": Goal("at most", 1.03), "B": Goal("at most", 1.08), "C": Goal("at most", 1.03)}
SAMPLE_DEPTH = 4  # blocks are alike, so a few of them tell which budget is best


def measure(setting: Setting) -> Iterator[Figure]:
    """A, B and C from tokenising to the sealed manifest, over the limit, which nothing can beat that runs the same forwards."""
    prompts = mixed(tokenizer(), setting.some(512, 12))
    say(prompts.described())
    for dtype in setting.dtypes:
        budget = best_budget(setting, prompts, dtype)
        bares = {"limit of A and C": bare(load(dtype), A.depth), "limit of B": bare(load(dtype), B.depth)}
        yield from _tasks(setting, prompts, dtype, bares, budget)


def best_budget(setting: Setting, prompts: Prompts, dtype: str) -> int:
    """The fastest of several budgets on this machine."""
    few = bare(load(dtype), SAMPLE_DEPTH)
    sides = {str(budget): timed(forwards(few, padded_batches(prompts.ids, budget))) for budget in BUDGETS}
    sides[str(BUDGETS[0])]()  # the first forward of a process is slower
    taken = {name: min(times) for name, times in in_turns(sides, setting.some(2, 1)).items()}
    best = min(taken, key=lambda name: taken[name])
    say(
        f"{dtype}: batches of {best} padded tokens are the best: "
        + ", ".join(f"{name}: {times / taken[best]:.2f}" for name, times in taken.items())
    )
    return int(best)


def _tasks(setting: Setting, prompts: Prompts, dtype: str, bares: Mapping[str, nn.Module], budget: int) -> Iterator[Figure]:
    batches, file = padded_batches(prompts.ids, budget), setting.saved(prompts)
    limits = {name: timed(forwards(base, batches)) for name, base in bares.items()}
    source = {"name": str(FOLDER), "dtype": dtype}
    runs = {task.name: dumping(spec_of(task, source, file), setting.scratch / "dump") for task in TASKS}
    for warm in limits.values():
        warm()
    taken = in_turns({**limits, **runs}, setting.rounds)
    for task in TASKS:
        limit = "limit of B" if task is B else "limit of A and C"
        yield ratio(f"{task.name}, {dtype}: run / limit", taken, task.name, limit, GOALS[task.name])
