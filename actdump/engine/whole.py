"""Values whole, as they are, with every axis: what a trace of one forward keeps."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, cast

from torch import Tensor, nn

from actdump.address import Index, Nth, written
from actdump.engine.hooks import Hooks, Stop, Unfit, copied, not_a_tensor, read, tensor_index, which_call
from actdump.engine.site import Site
from actdump.errors import AddressError
from actdump.tap import Tap


def capture_whole(
    model: nn.Module, sites: Sequence[Site], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[list[Any], list[int]]:
    """Run one forward on the model's own arguments, and keep the values whole, as they are, with every axis.

    The forward ends early where the number of calls of every site is known; otherwise it runs to its end, to count them. So it
    does for a call that is counted from the last: another input may have more.

    Returns:
        For each site its value (a structure, where the address stops at one), and how often its module ran. A tensor of which autograd
        knows how it was computed is that of the forward, so that gradients come to it; unless somebody wrote into it afterwards.

    Raises:
        AddressError: a module never ran, or ran more than once, or an item leads nowhere.
    """
    kept: list[dict[int, Any]] = [{} for _ in sites]
    calls = [0] * len(sites)
    known = all(site.calls is not None and not site.late for site in sites)
    wanted = [_wanted_call(site) if known else None for site in sites]
    copies = _Copies()

    def seen(place: int, held: Any) -> None:
        if wanted[place] in (None, calls[place]):
            kept[place][calls[place]] = copied(_whole(sites[place].tap, held), copies.take)
        calls[place] += 1
        if known and all(kept):
            raise Stop

    with suppress(Stop), Hooks(sites, seen):
        model(*args, **kwargs)
    if known and not all(kept):  # a module ran less often than it did before: count again
        return capture_whole(model, [replace(site, calls=None) for site in sites], args, kwargs)
    if not known:
        sites = [replace(site, calls=count) for site, count in zip(sites, calls, strict=True)]
    values = [copied(calls[_wanted_call(site)], copies.settled) for site, calls in zip(sites, kept, strict=True)]
    return values, [cast(int, site.calls) for site in sites]


class _Copies:
    """Copies of tensors, and those of the tensors themselves that stand in a graph."""

    def __init__(self) -> None:
        self._live: dict[int, tuple[Tensor, int]] = {}  # by the copy, with torch's count of the writes to it

    def take(self, tensor: Tensor) -> Tensor:
        copy = tensor.clone()
        if tensor.grad_fn is not None:
            self._live[id(copy)] = tensor, tensor._version
        return copy

    def settled(self, copy: Tensor) -> Tensor:
        """The tensor itself, if it is in a graph and holds what it held; otherwise the copy."""
        if (found := self._live.get(id(copy))) is None:
            return copy
        tensor, writes = found
        return tensor if tensor._version == writes else copy


def _wanted_call(site: Site) -> int:
    """The place of the wanted call in a forward whose calls were counted."""
    try:
        return which_call(site, cast(int, site.calls), cast(int, site.calls))
    except Unfit as reason:
        raise AddressError(f"{site.tap.name}: {reason}") from None


def _whole(tap: Tap, held: Any) -> Any:
    try:
        if tap.address.port in ("inputs", "outputs") and not tap.address.items:
            return held
        value, index = read(tap, held)
        if value is None:
            raise Unfit(not_a_tensor(value, held))
        for item in index:
            if not isinstance(item, Nth | Index):
                raise Unfit(f"`{written(item)}` cannot follow a tensor")
            value = value[tensor_index(item)]
    except (Unfit, IndexError, ValueError, OverflowError) as reason:
        raise AddressError(f"{tap.name}: {reason}") from None
    return value
