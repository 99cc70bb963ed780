"""What the audit at the end of a run costs: its share of A."""

from collections.abc import Iterator
from statistics import median

from benchmarks.rounds import Figure, Goal, seconds
from benchmarks.running import Dumping, spec_of
from benchmarks.setting import Setting
from benchmarks.subject import FOLDER, A, tokenizer
from benchmarks.texts import mixed

PROMPTS = 2  # a run's default


def measure(setting: Setting) -> Iterator[Figure]:
    """Task A; the run itself says how long its audit took, because two runs differ by more than that."""
    prompts = mixed(tokenizer(), setting.some(512, 3))
    file, out = setting.saved(prompts), setting.scratch / "dump"
    for dtype in setting.dtypes:
        run = Dumping(spec_of(A, {"name": str(FOLDER), "dtype": dtype}, file, audit=PROMPTS), out)
        taken = tuple(run() for _ in range(setting.rounds))
        yield seconds(f"{dtype}: A with the audit", taken)
        yield seconds(f"{dtype}: of it the audit", tuple(run.auditing))
        each = tuple(100 * audit / (whole - audit) for audit, whole in zip(run.auditing, taken, strict=True))
        yield Figure(f"{dtype}: the audit, over the rest", median(each), "%", each, Goal("at most", 2))
