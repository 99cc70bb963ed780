"""What the audit at the end of a run costs: its share of A."""

from collections.abc import Iterator

from benchmarks.rounds import Figure, Goal, in_turns, times
from benchmarks.running import Dumping, spec_of
from benchmarks.setting import Setting
from benchmarks.subject import FOLDER, A, tokenizer
from benchmarks.texts import mixed

PROMPTS = 2  # a run's default


def measure(setting: Setting) -> Iterator[Figure]:
    """Task A with the audit and without."""
    prompts = mixed(tokenizer(), setting.some(512, 12))
    file, out = setting.saved(prompts), setting.scratch / "dump"
    for dtype in setting.dtypes:
        source = {"name": str(FOLDER), "dtype": dtype}
        sides = {
            "A without the audit": Dumping(spec_of(A, source, file), out),
            "A with the audit": Dumping(spec_of(A, source, file, audit=PROMPTS), out),
        }
        taken = in_turns(sides, setting.rounds)
        yield from times(taken, dtype)
        yield _more(dtype, taken)


def _more(dtype: str, taken: dict[str, tuple[float, ...]]) -> Figure:
    without, with_it = taken.values()
    each = tuple(100 * (second / first - 1) for first, second in zip(without, with_it, strict=True))
    return Figure(f"{dtype}: the audit takes", sorted(each)[len(each) // 2], "%", each, Goal("at most", 2))
