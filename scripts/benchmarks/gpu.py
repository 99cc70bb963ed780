"""The same table on a GPU: a model of 7 billion parameters with random weights, bfloat16."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from shutil import disk_usage
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForCausalLM

from actdump import model
from actdump.plan import Part, Plan
from benchmarks.bare import FEW_BLOCKS, bare, forwards, padded_batches
from benchmarks.rounds import Figure, Goal, Run, in_turns, ratio, timed
from benchmarks.running import Dumping, Stopwatch, spec_of
from benchmarks.setting import Setting, say
from benchmarks.subject import FOLDER, Task, tokenizer
from benchmarks.texts import Prompts, long, mixed, uniform

WIDTH = 4096
MODEL = {"model_type": "llama", "hidden_size": WIDTH, "intermediate_size": 14_336, "num_hidden_layers": 32,
         "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 49_152, "max_position_embeddings": 8192,
         "dtype": "bfloat16"}  # fmt: skip
SOURCE = {"config": MODEL, "dtype": "bfloat16"}
BUDGETS = (1024, 2048, 4096, 8192, 16_384, 32_768)
MEMORY = Path("/dev/shm")

DISK, RAM = "to the disk", "to memory"  # which tells what a faster disk would give
CAPTURING = "capturing"


@dataclass(frozen=True)
class Case:
    """A task, the prompts, as many as its bytes leave room for, and where it is written."""

    task: Task
    kind: Callable[[Any, int], Prompts]
    prompts: int
    place: str = RAM
    goal: Goal | None = None


EIGHT = Task("8 layers", tuple(range(3, 32, 4)))
CASES = (
    Case(EIGHT, mixed, 4096, goal=Goal("at least", 0.95)),
    Case(EIGHT, uniform, 2048, goal=Goal("at least", 0.95)),
    Case(EIGHT, long, 96),
    Case(EIGHT, mixed, 1024, DISK),
    Case(Task("A (3 layers)", (5, 10, 15)), mixed, 2048),
    Case(Task("C (last token)", (5, 10, 15), tokens="last"), mixed, 2048),
    Case(Task("B (all layers)", tuple(range(32))), mixed, 512),
)


def measure(setting: Setting) -> Iterator[Figure]:
    """Tokens per second against the bare forwards, and the share of a capture in which the device waits."""
    if not torch.cuda.is_available():
        say("there is no GPU here, so nothing is measured on one")
        return
    say(torch.cuda.get_device_name())
    whole = made()
    budgets = _budgets(setting, whole, mixed(tokenizer(), setting.some(1024, 64)))
    yield from budgets.values()
    budget = max(budgets, key=lambda budget: budgets[budget].value)
    with already_loaded(whole):
        for case in CASES:
            prompts = case.kind(tokenizer(), setting.some(case.prompts, 64))
            yield from _compared(Sides(setting, whole, case.task, budget), case, prompts)


def made() -> nn.Module:
    """The model, drawn on the device, where it takes a second."""
    with torch.device("cuda"):
        drawn: nn.Module = AutoModelForCausalLM.from_config(AutoConfig.for_model(**MODEL), dtype=torch.bfloat16)
    return drawn.eval()


def _budgets(setting: Setting, whole: nn.Module, prompts: Prompts) -> dict[int, Figure]:
    """How fast forwards in batches of these sizes are."""
    few = bare(whole, FEW_BLOCKS)
    sides = {str(budget): timed(forwards(few, padded_batches(prompts.ids, budget, "cuda"))) for budget in BUDGETS}
    for run in sides.values():
        run()
    title = f"bare forwards of {FEW_BLOCKS} blocks in batches of"
    return {
        int(budget): _speed(f"{title} {budget}", prompts.tokens, taken)
        for budget, taken in in_turns(sides, setting.rounds).items()
    }


@dataclass(frozen=True)
class Sides:
    """What is measured of a task: the bare forwards, and runs that write into a folder."""

    setting: Setting
    whole: nn.Module
    task: Task
    budget: int

    def limit(self, prompts: Prompts) -> Run:
        return timed(forwards(bare(self.whole, self.task.depth), padded_batches(prompts.ids, self.budget, "cuda")))

    def run(self, prompts: Prompts, folder: Path, **rest: Any) -> Dumping:
        spec = spec_of(self.task, SOURCE, self.setting.saved(prompts), tokenizer={"name": str(FOLDER)})
        return Dumping(spec, folder / "dump", **rest)


def _compared(sides: Sides, case: Case, prompts: Prompts) -> Iterator[Figure]:
    """Runs against the limit: as a whole, and from the first batch to the end of the last, which leaves out what a run does once."""
    say(prompts.described())
    title, place = f"{case.task.name}, {prompts.name}", case.place
    with _folder(sides.setting, case, prompts) as folder:
        if folder is None:
            say(f"{title}: there is no room {place}")
            return
        capturing = Capturing(prompts)
        both: dict[str, Run] = {"limit": sides.limit(prompts), place: sides.run(prompts, folder, watching=capturing.again)}
        runs = {name: _told(name, run) for name, run in both.items()}
        for name, run in runs.items():
            yield _speed(f"{title}: {name}, shapes met for the first time", prompts.tokens, (run(),))
        taken = in_turns(runs, sides.setting.rounds)
        for name, seconds in taken.items():
            yield _speed(f"{title}: {name}", prompts.tokens, seconds)
        yield ratio(f"{title}: speed {place} / the limit's", taken, "limit", place)
        captured = {"limit": taken["limit"], place: tuple(capturing.seconds[1:])}
        yield ratio(f"{title}: speed {place} / the limit's, first to last batch", captured, "limit", place, case.goal)
        some = prompts.some(len(prompts.texts) // 4)  # of more, the profile takes minutes to read
        yield Figure(f"{title}: {place}, the device waits", 100 * (1 - _busy(sides, some, folder)), "%")


class Capturing(Stopwatch):
    """Measures the time from the plan to when the device has done the last batch; of several runs, one after the other.

    Attributes:
        seconds: of each run.
    """

    def __init__(self, prompts: Prompts) -> None:
        super().__init__()
        self.prompts = len(prompts.texts)
        self.seconds: list[float] = []

    def again(self) -> "Capturing":
        self.left = self.prompts
        return self

    def planned(self, plan: Plan, done: Sequence[Part]) -> None:  # noqa: ARG002 # what they are is not looked at
        self.step(CAPTURING)

    def batch(self, prompts: int, tokens: int) -> None:  # noqa: ARG002 # they are known
        self.left -= prompts
        if not self.left:
            torch.cuda.synchronize()
            self.seconds.append(self.since(CAPTURING))


def _told(name: str, run: Run) -> Run:
    """A run that says how long it took: all of them together take minutes."""

    def told() -> float:
        seconds = run()
        say(f"  {name}: {seconds:.2f} s")
        return seconds

    return told


@contextmanager
def _folder(setting: Setting, case: Case, prompts: Prompts) -> Iterator[Path | None]:
    """Where to write; `None` where memory is meant and has no room."""
    size = 2 * prompts.tokens * len(case.task.layers) * WIDTH
    if case.place == DISK:
        yield setting.scratch
    elif MEMORY.is_dir() and disk_usage(MEMORY).free > 1.1 * size:
        with TemporaryDirectory(dir=MEMORY) as folder:
            yield Path(folder)
    else:
        yield None


def _speed(name: str, tokens: int, taken: tuple[float, ...]) -> Figure:
    speeds = tuple(tokens / seconds for seconds in taken)
    return Figure(name, median(speeds), "tokens/s", speeds)


class Profiled(Stopwatch):
    """Looks at what the device does from the first batch of a run on."""

    def __init__(self) -> None:
        super().__init__()
        self.profiler = profile(activities=[ProfilerActivity.CUDA])

    def planned(self, plan: Plan, done: Sequence[Part]) -> None:  # noqa: ARG002 # what they are is not looked at
        self.profiler.start()


def _busy(sides: Sides, prompts: Prompts, folder: Path) -> float:
    watch = Profiled()
    sides.run(prompts, folder, watching=lambda: watch)()
    watch.profiler.stop()
    profiler: Any = watch.profiler.profiler
    events = profiler.kineto_results.events()  # the public list of the same takes minutes to make
    on_device = [event for event in events if str(event.device_type()).endswith("CUDA")]
    return busy([(event.start_ns(), event.start_ns() + event.duration_ns()) for event in on_device])


@contextmanager
def already_loaded(whole: nn.Module) -> Iterator[None]:
    """While the block runs, loading gives this model: random weights take minutes to make, and loading is not measured."""
    load = model.load
    model.load = lambda source: whole  # noqa: ARG005 # it is the only source
    try:
        yield
    finally:
        model.load = load


def busy(spans: Sequence[tuple[int, int]]) -> float:
    """The share of the time between the first and the last thing that the device did in which it did something.

    Args:
        spans: when each thing began and ended.
    """
    if not spans:
        raise RuntimeError("the profiler saw nothing on the device")
    spans = sorted(spans)
    first, _ = spans[0]
    reached, ran = first, 0
    for start, end in spans:
        ran += max(0, end - max(start, reached))
        reached = max(reached, end)
    return ran / (reached - first)
