"""The same table on a GPU: a model of 3 billion parameters with random weights, bfloat16."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from actdump import model
from actdump.spec import ModelSpec
from benchmarks.bare import bare, best_budget, forwards, padded_batches
from benchmarks.rounds import Figure, Goal, in_turns, timed, times
from benchmarks.running import Dumping, spec_of
from benchmarks.setting import Setting, say
from benchmarks.subject import FOLDER, Task, tokenizer
from benchmarks.texts import mixed

MODEL = {"model_type": "llama", "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28,
         "num_attention_heads": 24, "num_key_value_heads": 8, "vocab_size": 49152, "dtype": "bfloat16"}  # fmt: skip
SOURCE = {"config": MODEL, "dtype": "bfloat16"}
BUDGETS = (4096, 8192, 16_384, 32_768, 65_536)
TASKS = (
    Task("A (3 layers)", (5, 10, 15)),
    Task("8 layers", tuple(range(3, 28, 3))[:8]),
    Task("B (all layers)", tuple(range(28))),
    Task("C (last token)", (5, 10, 15), tokens="last"),
)
GOAL = Goal("at least", 0.95)  # with 8 layers saved


def measure(setting: Setting) -> Iterator[Figure]:
    """Tokens per second against the bare forwards, and the share of a run in which the device waits."""
    if not torch.cuda.is_available():
        say("there is no GPU here, so nothing is measured on one")
        return
    say(torch.cuda.get_device_name())
    prompts = mixed(tokenizer(), setting.some(4096, 64))
    say(prompts.described())
    whole = model.load(model.find(ModelSpec.model_validate(SOURCE)))
    batches = padded_batches(prompts.ids, best_budget(whole, prompts.ids, setting.some(2, 1), BUDGETS), "cuda")
    file, out = setting.saved(prompts), setting.scratch / "dump"
    with already_loaded(whole):
        for task in TASKS:
            run = Dumping(spec_of(task, SOURCE, file, tokenizer={"name": str(FOLDER)}), out)
            limit = timed(forwards(bare(whole, task.depth), batches))
            limit()
            taken = in_turns({"the limit": limit, "actdump": run}, setting.rounds)
            yield from times(taken, task.name)
            yield from _speeds(task, prompts.tokens, taken)
            with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
                run()
            yield Figure(f"{task.name}: the device waits", 100 * (1 - busy(profiler.events())), "%")


def _speeds(task: Task, tokens: int, taken: dict[str, tuple[float, ...]]) -> Iterator[Figure]:
    for side, each in taken.items():
        speeds = tuple(tokens / seconds for seconds in each)
        yield Figure(f"{task.name}: {side}", sorted(speeds)[len(speeds) // 2], "tokens/s", speeds)
    ratios = tuple(first / second for first, second in zip(taken["the limit"], taken["actdump"], strict=True))
    goal = GOAL if len(task.layers) == 8 else None
    yield Figure(f"{task.name}: speed / the limit's", sorted(ratios)[len(ratios) // 2], "×", ratios, goal)


@contextmanager
def already_loaded(whole: nn.Module) -> Iterator[None]:
    """While the block runs, loading gives this model: random weights take minutes to make, and loading is not measured."""
    load = model.load
    model.load = lambda source: whole  # noqa: ARG005 # it is the only source
    try:
        yield
    finally:
        model.load = load


def busy(events: Sequence[Any] | None) -> float:
    """The share of the time between the first and the last thing that the device did in which it did something."""
    on_device = [event.time_range for event in events or () if str(event.device_type).endswith("CUDA")]
    if not on_device:
        raise RuntimeError("the profiler saw nothing on the device")
    spans = sorted((float(span.start), float(span.end)) for span in on_device)
    reached, ran = spans[0][0], 0.0
    for start, end in spans:
        ran += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return ran / (reached - spans[0][0])
