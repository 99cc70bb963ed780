"""A model with the taps of a spec bound to it."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from actdump.errors import UsageError
from actdump.job.watching import Silent, Watcher
from actdump.plan import Budget, Column
from actdump.spec import ModelSpec, Spec

if TYPE_CHECKING:
    from torch import nn

    from actdump.engine import Feed, Site
    from actdump.model import Source

# Padded tokens in a batch where the spec says `auto`: `scripts/bench explore` measures them. On two CPU cores, SmolLM2 in float32 ran
# within 2 % of its best from 1,024 to 2,048 (512: 6 % behind, 4,096: 20 %), and in bfloat16, whose weights are packed anew for each
# product, from 1,536 to 3,072 on one CPU (512: 25 % behind), and on another, two forwards side by side, from 768 to 1,536 (2,048: 4 %
# behind). The number decides bytes, so it must not vary from run to run, as a timing would. On an H100 in bfloat16, blocks as in a Llama
# of 3 (and of 7) billion parameters were fastest with 4,096 (2,048: 5 % behind, and 3 % ahead; 8,192: 2 and 4 % behind; 16,384: 7 and 9;
# 32,768: 22 and 23): long before that the device is busy, and what larger batches add is padding.
AUTO_TOKENS = {"float64": 1024, "float32": 1024, "bfloat16": 1536, "float16": 1536}
AUTO_TOKENS_ACCELERATOR = 4096

# Shards in a part, at most. The more prompts are sorted, the less padding: of a model of 7 billion parameters, 8 layers in bfloat16,
# 1 GB is 15,000 tokens, and batches of 4,096 cut from prompts of 5 to 400 are padded by 15 %, from four times as many by 7 %, from 16
# times by 2 %. Not more, because what an interruption can lose grows with it, and so does what is left to hash when the last forward
# has ended. 16 GB of that model are eight seconds of work of an H100, and hours of a CPU's.
SHARDS = 4
SHARDS_ACCELERATOR = 16


@dataclass(frozen=True)
class Bound:
    """A model with the spec's taps bound to it and their axes known."""

    source: "Source"
    module: "nn.Module"
    feed: "Feed"
    sites: "list[Site]"

    @property
    def columns(self) -> tuple[Column, ...]:
        return tuple(site.column for site in self.sites)

    @property
    def dtype(self) -> str:
        """The model's own."""
        return str(self.module.dtype).removeprefix("torch.")

    @property
    def least(self) -> int:
        """The fewest tokens that a prompt must have for every tap's positions to be there."""
        return max((site.least for site in self.sites), default=1)


def bind(spec: Spec, source: "Source", module: "nn.Module") -> Bound:
    """Bind the spec's taps to a model and probe them.

    Raises:
        AddressError: taps that lead nowhere or cannot be captured, all of them at once.
    """
    from actdump import engine

    with engine.any_shape():  # as in the run, which leaves a mask out where the probe saw the same bits without
        probe = engine.probe(
            module,
            _sites(spec, module),
            engine.feed_for(module),
            tokens=spec.selection,
            dtype=spec.dtype,
            apart=spec.batch.prompts == 1,
        )
    return Bound(source, module, probe.feed, probe.sites)


def bind_early(spec: Spec, source: "Source") -> None:
    """Find wrong addresses before the weights are loaded, where the model class can be made without them."""
    if (skeleton := _skeleton(source)) is not None:
        _sites(spec, skeleton)


def _sites(spec: Spec, module: "nn.Module") -> "list[Site]":
    from actdump import engine

    return engine.bind(module, [entry.tap for entry in spec.save], named=[entry.name is not None for entry in spec.save])


def _skeleton(source: "Source") -> "nn.Module | None":
    """The model without its weights; `None` where its class cannot be made so, and loading it will say what is wrong, if anything is."""
    from actdump import model

    try:
        return model.skeleton(source)
    except UsageError:
        return None


def survey(spec: Spec, *, watcher: Watcher | None = None) -> tuple[Bound, bool]:
    """Bind the taps without weights where the model class allows it, and with them where it does not.

    Returns:
        What was bound, and whether weights were needed.
    """
    from actdump import model

    source = model.find(spec.model)
    if (skeleton := _skeleton(source)) is not None:
        try:
            return bind(spec, source, skeleton), False
        except UsageError as error:
            if not isinstance(error.__cause__, Exception):
                raise
            # the model itself does not run on the meta device
    (watcher or Silent()).step("loading the model, which cannot be probed without weights")
    return bind(spec, source, model.load(source)), True


def modules(spec: ModelSpec, *, grep: str | None = None, depth: int | None = None) -> Iterator[tuple[int, str, str, str]]:
    """The modules of a model without its weights: depth, path, class, and the axes of the output or why it has none."""
    from actdump import engine, model

    source = model.find(spec)
    skeleton = _skeleton(source)
    found = engine.outline(skeleton, engine.feed_for(skeleton)) if skeleton is not None else []
    if not any(output for _, _, output in found):  # this class cannot be made, or does not run, on the meta device
        module = model.load(source)
        found = engine.outline(module, engine.feed_for(module))
    for path, kind, output in found:
        level = path.count(".") + path.count("[") + (1 if path else 0)
        if (depth is None or level <= depth) and (grep is None or grep.lower() in f"{path} {kind}".lower()):
            yield level if grep is None else 0, path or "(the model)", kind, output


def budget_for(spec: Spec, bound: Bound) -> Budget:
    """How large batches may be: what the spec says, or what is fast on the device for the model's dtype."""
    tokens = spec.batch.tokens
    if tokens == "auto":
        tokens = AUTO_TOKENS[bound.dtype] if _on_cpu(spec, bound) else AUTO_TOKENS_ACCELERATOR
    return Budget(tokens, spec.batch.prompts)


def shards_for(spec: Spec, bound: Bound) -> int:
    """How many shards a part may have."""
    return SHARDS if _on_cpu(spec, bound) else SHARDS_ACCELERATOR


def _on_cpu(spec: Spec, bound: Bound) -> bool:
    """Whether the model is on a CPU; a skeleton: would be."""
    from actdump import model

    device = bound.feed.device
    return (model.pick_device(spec.model.device) if device.type == "meta" else device).type == "cpu"
