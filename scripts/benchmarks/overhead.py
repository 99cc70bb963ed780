"""What a capture adds to one small forward, beside what plain hooks add, and nnsight."""

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2Model

from actdump import engine
from actdump.address import parse
from actdump.plan import Batch
from actdump.tap import Tap
from benchmarks.rounds import Figure, Goal, in_turns, timed
from benchmarks.setting import Setting, say

BLOCKS, WIDTH, TOKENS = 12, 64, 16


def measure(setting: Setting) -> Iterator[Figure]:
    """Microseconds that each way adds: the median of the differences to the bare forward of the same turn."""
    ways = _ways()
    repetitions = setting.some(300, 10)
    with torch.inference_mode():
        for way in ways.values():
            for _ in range(setting.some(20, 2)):
                way()
        rounds = [
            _added(in_turns({name: timed(way) for name, way in ways.items()}, repetitions)) for _ in range(setting.rounds)
        ]
    each = {name: tuple(one[name] for one in rounds) for name in rounds[0]}
    yield Figure("the bare forward", median(each["bare"]), "µs", each["bare"])
    for name in list(ways)[1:]:
        yield Figure(f"{name} adds", median(each[name]), "µs", each[name])
    yield _ratio(each, "hooks by hand", Goal("at most", 2.5))
    if "nnsight" in each:
        yield _ratio(each, "nnsight", Goal("at most", 0.25))


def _added(taken: dict[str, tuple[float, ...]]) -> dict[str, float]:
    """For each way the median of what it adds, in microseconds; for the bare forward the median of itself."""
    bare = taken["bare"]
    added = {name: median(map(float.__sub__, times, bare)) * 1e6 for name, times in taken.items()}
    return {**added, "bare": median(bare) * 1e6}


def _ratio(each: dict[str, tuple[float, ...]], other: str, goal: Goal) -> Figure:
    ours = each["capture"]
    ratios = tuple(first / second for first, second in zip(ours, each[other], strict=True))
    return Figure(f"capture adds / {other} adds", median(ours) / median(each[other]), "×", ratios, goal)


def _ways() -> dict[str, Callable[[], object]]:
    model = small()
    ids = torch.arange(TOKENS)[None]
    found = {
        "bare": lambda: model(input_ids=ids, use_cache=False),
        "hooks by hand": lambda: hooked(model, ids),
        "capture": capturing(model),
    }
    if find_spec("nnsight") is None:
        say("nnsight is not installed, so it is not measured")
        return found
    return {**found, "nnsight": tracing(small(), ids)}  # on a model of its own: it wraps modules


def small() -> Any:
    """A GPT-2 with nothing after its last block, so that every way runs the same modules."""
    torch.manual_seed(0)
    model = GPT2Model(GPT2Config(n_layer=BLOCKS, n_embd=WIDTH, n_head=4, vocab_size=1000)).eval()
    model.ln_f = nn.Identity()
    return model


def hooked(model: Any, ids: Tensor) -> list[Tensor]:
    kept: list[Tensor] = []

    def keep(_module: nn.Module, _args: Any, output: Tensor) -> None:
        kept.append(output.clone())

    handles = [block.register_forward_hook(keep) for block in model.h]
    try:
        model(input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return kept


def capturing(model: nn.Module) -> Callable[[], object]:
    taps = [Tap(f"h{block}", parse(f"h[{block}].output")) for block in range(BLOCKS)]
    probe = engine.probe(model, engine.bind(model, taps), engine.feed_for(model))
    batch = Batch((0,), (tuple(range(TOKENS)),))
    return lambda: engine.capture(model, probe.sites, probe.feed, batch)


def tracing(model: nn.Module, ids: Tensor) -> Callable[[], object]:
    import nnsight

    wrapped: Any = nnsight.NNsight(model)

    def trace() -> object:
        with wrapped.trace(input_ids=ids, use_cache=False):
            kept = nnsight.save([])
            for block in wrapped.h:
                kept.append(block.output)
        return kept

    return trace
