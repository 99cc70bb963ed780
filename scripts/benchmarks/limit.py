"""The real run against the limit: bare forwards of the cut model, prompts sorted, at the best batch budget, one after another.

A run whose forwards stand side by side (see `actdump/job/lanes.py`) can be below it, so those of the limit are shown in this form, too.
"""

from collections.abc import Iterator

import torch

from benchmarks.bare import bare, best_budget, forwards, padded_batches, side_by_side
from benchmarks.rounds import Figure, Goal, in_turns, ratio, seconds, timed, times
from benchmarks.running import Dumping, spec_of
from benchmarks.setting import Setting, say
from benchmarks.subject import FOLDER, TASKS, A, B, load, tokenizer
from benchmarks.texts import Prompts, mixed

GOALS = {"A": Goal("at most", 1.03), "B": Goal("at most", 1.08), "C": Goal("at most", 1.03)}
SIDE_BY_SIDE = "the limit of A and C, two forwards side by side"
LIMITS = {"A": "the limit of A and C", "B": "the limit of B", "C": "the limit of A and C"}


def measure(setting: Setting) -> Iterator[Figure]:
    """A, B and C from tokenising to the sealed manifest, over the limit."""
    prompts = mixed(tokenizer(), setting.some(512, 3))
    say(prompts.described())
    for dtype in setting.dtypes:
        say(dtype)
        yield from _tasks(setting, prompts, dtype)


def _tasks(setting: Setting, prompts: Prompts, dtype: str) -> Iterator[Figure]:
    whole, file = load(dtype), setting.saved(prompts)
    batches = padded_batches(prompts.ids, best_budget(whole, prompts.ids, setting.some(2, 1)))
    limits = {LIMITS[task.name]: timed(forwards(bare(whole, task.depth), batches)) for task in (A, B)}
    if torch.get_num_threads() % 2 == 0:
        limits[SIDE_BY_SIDE] = timed(side_by_side(bare(whole, A.depth), batches, 2))
    source = {"name": str(FOLDER), "dtype": dtype}
    runs = {task.name: Dumping(spec_of(task, source, file), setting.scratch / "dump") for task in TASKS}
    limits[LIMITS["A"]]()  # the first forwards are slower
    taken = in_turns({**limits, **runs}, setting.rounds)
    yield from times(taken, dtype)
    for name, run in runs.items():
        yield seconds(f"{dtype}: {name}, loading the tokenizer before it", tuple(run.before))
        yield seconds(f"{dtype}: {name}, of it the probe", tuple(run.probing))
    for name, limit in LIMITS.items():
        yield ratio(f"{dtype}: {name} / {limit}", taken, name, limit, GOALS[name])
    if SIDE_BY_SIDE in taken:
        yield ratio(f"{dtype}: A / {SIDE_BY_SIDE}", taken, "A", SIDE_BY_SIDE)
    for name, limit in LIMITS.items():
        rest = {name: tuple(map(float.__sub__, taken[name], runs[name].probing)), limit: taken[limit]}
        yield ratio(f"{dtype}: {name} without the probe / {limit}", rest, name, limit)
