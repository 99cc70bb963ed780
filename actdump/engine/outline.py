"""The modules of a model in words: what `actdump tree` shows."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from actdump.engine.axes import axes_of
from actdump.engine.hooks import Unfit, described
from actdump.engine.site import Feed, shape_text
from actdump.engine.tiny import observe, ports, probe_ids
from actdump.errors import UsageError


def outline(model: nn.Module, feed: Feed) -> list[tuple[str, str, str]]:
    """Every module of a model in its order: resolved path, class, and its output in words, with named axes.

    Where the model does not run as it is (on the meta device, say), the outputs are left empty.
    """
    sites = ports(model, "output")
    ids = probe_ids(feed)
    try:
        alone, together = (observe(model, sites, feed, ids[name]) for name in ("alone", "together"))
    except UsageError:
        alone = together = [[] for _ in sites]
    return [
        (site.tap.address.path, type(site.module).__name__, _outlined(*seen))
        for site, *seen in zip(sites, alone, together, strict=True)
    ]


def _outlined(alone: list[Any], together: list[Any]) -> str:
    if not alone or len(alone) != len(together):
        return "" if not alone else "runs a varying number of times"
    text = _words(alone[0], together[0])
    return text if len(alone) == 1 else f"{text}, {len(alone)} times"


def _words(alone: Any, together: Any) -> str:
    """What two probes gave, in words: `(batch, token, 768)`."""
    if isinstance(alone, Tensor) and isinstance(together, Tensor):
        try:
            return shape_text(axes_of(tuple(alone.shape), tuple(together.shape)))
        except Unfit:
            return f"{tuple(alone.shape)} or {tuple(together.shape)}"
    if isinstance(alone, Mapping) and isinstance(together, Mapping):
        return ", ".join(f"{key} {_words(alone[key], together.get(key))}" for key in alone)
    if isinstance(alone, tuple | list) and isinstance(together, tuple | list):
        return "[" + ", ".join(map(_words, alone, together)) + "]"
    return described(alone)
