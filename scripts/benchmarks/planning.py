"""A million prompts from text to plan, against the tokenizer alone."""

import random
import resource
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path

from actdump import job
from actdump.plan import Part, Plan
from actdump.spec import Spec
from benchmarks import child
from benchmarks.rounds import Figure, Goal, in_turns, ratio, timed
from benchmarks.running import LOADING, Stopwatch, spec_of, watched
from benchmarks.setting import Setting
from benchmarks.subject import FOLDER, Task, tokenizer
from benchmarks.texts import english

TOKENS = 30
CHUNK = 1024  # texts that a user hands to the tokenizer at a time
MODEL = {"model_type": "llama", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1,
         "num_key_value_heads": 1, "vocab_size": 49152}  # fmt: skip


def measure(setting: Setting) -> Iterator[Figure]:
    """Seconds in turns on a share, then the peak of a process that plans them all."""
    share, most = setting.some(200_000, 2_000), setting.some(1_000_000, 4_000)
    few, many = (_file(setting.scratch / f"{count}.txt", count) for count in (share, most))
    out = setting.scratch / "dump"
    planned(few, out)  # what is imported on the way is not planning
    sides = {"tokenising alone": timed(lambda: alone(few)), "planning": lambda: planned(few, out)[0]}
    taken = in_turns(sides, setting.rounds)
    yield ratio(f"{share:,} prompts: planning / tokenising alone", taken, "planning", "tokenising alone", Goal("at most", 1.15))
    ended = child.run([sys.executable, "-m", "benchmarks.planning", str(many), str(out)])
    seconds, before, peak = map(float, ended.output.split()[-3:])
    yield Figure(f"{most:,} prompts: planning", seconds, "s")
    yield Figure(f"{most:,} prompts: the process held before", before / 1e6, "MB")
    yield Figure(f"{most:,} prompts: its peak", peak / 1e6, "MB")
    yield Figure(f"{most:,} prompts: planning added", (peak - before) / 1e6, "MB", goal=Goal("at most", 400))


def _file(path: Path, count: int) -> Path:
    """A text file with a prompt of about 30 tokens on each line."""
    words, dice = english().split(), random.Random(0)
    long = round(TOKENS * len(words) / len(tokenizer()(english(), verbose=False)["input_ids"]))
    with path.open("w") as file:
        for _ in range(count):
            start = dice.randrange(len(words) - long)
            print(" ".join(words[start : start + long]), file=file)
    return path


def alone(path: Path) -> int:
    """What a user does to get token ids, a list of texts at a time."""
    convert, tokens = tokenizer(), 0
    with path.open() as file:
        while lines := [line.rstrip("\n") for line in islice(file, CHUNK)]:
            tokens += sum(map(len, convert(lines)["input_ids"]))
    return tokens


class _Planned(Exception):
    pass


class _Planning(Stopwatch):
    """Ends a run when its plan is made, and knows what the process held before."""

    before = 0.0

    def step(self, doing: str) -> None:
        if doing == "tokenising":
            self.before = peak()
        super().step(doing)

    def planned(self, plan: Plan, done: Sequence[Part]) -> None:  # noqa: ARG002 # a Watcher gets them
        raise _Planned


def planned(prompts: Path, out: Path) -> tuple[float, float]:
    """The real run of a model that is next to nothing, until the plan is there: seconds, and the bytes held before.

    What is loaded on the way is taken off.
    """
    watch = _Planning()
    try:
        with watched() as taken, suppress(_Planned):
            job.run(_spec(prompts), out, watcher=watch)
        return watch.since("tokenising") - taken[LOADING], watch.before
    finally:
        shutil.rmtree(out, ignore_errors=True)


def _spec(prompts: Path) -> Spec:
    return spec_of(Task("planning", (0,), "last"), {"config": MODEL}, prompts, tokenizer={"name": str(FOLDER)})


def peak() -> float:
    """The most memory that this process held so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    print(*planned(Path(sys.argv[1]), Path(sys.argv[2])), peak())
