"""The real run against the limit: bare forwards of the cut model, prompts sorted, at the best batch budget."""

from collections.abc import Iterator

from benchmarks.bare import bare, best_budget, forwards, padded_batches
from benchmarks.rounds import Figure, Goal, in_turns, ratio, seconds, timed, times
from benchmarks.running import Dumping, spec_of
from benchmarks.setting import Setting, say
from benchmarks.subject import FOLDER, TASKS, A, B, load, tokenizer
from benchmarks.texts import Prompts, mixed

GOALS = {"A": Goal("at most", 1.03), "B": Goal("at most", 1.08), "C": Goal("at most", 1.03)}
LIMITS = {"A": "the limit of A and C", "B": "the limit of B", "C": "the limit of A and C"}


def measure(setting: Setting) -> Iterator[Figure]:
    """A, B and C from tokenising to the sealed manifest, over the limit, which nothing can beat that runs the same forwards."""
    prompts = mixed(tokenizer(), setting.some(512, 12))
    say(prompts.described())
    for dtype in setting.dtypes:
        say(dtype)
        yield from _tasks(setting, prompts, dtype)


def _tasks(setting: Setting, prompts: Prompts, dtype: str) -> Iterator[Figure]:
    whole, file = load(dtype), setting.saved(prompts)
    batches = padded_batches(prompts.ids, best_budget(whole, prompts.ids, setting.some(2, 1)))
    limits = {LIMITS[task.name]: timed(forwards(bare(whole, task.depth), batches)) for task in (A, B)}
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
    for name, limit in LIMITS.items():
        rest = {name: tuple(map(float.__sub__, taken[name], runs[name].probing)), limit: taken[limit]}
        yield ratio(f"{dtype}: {name} without the probe / {limit}", rest, name, limit)
