"""Axes: what the shapes that two probes gave say of a tap."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor

from actdump.address import Index, Item, Nth, Slice, written
from actdump.engine.hooks import Unfit, form, not_a_tensor, read, which_call
from actdump.engine.site import Axis, Site, shape_text
from actdump.plan import ITEM_BYTES, Layout
from actdump.tap import Selection, Tap

# Two shapes whose ratios and differences name every axis: from (1, 7) to (4, 12), a batch axis grows by a factor 4, a token
# axis by 12/7, their product by 48/7, and a token axis with something added by 5, which is no multiple of 4 - 1.
ALONE = (1, 7)
TOGETHER = (4, 12)


@dataclass(frozen=True)
class Fault:
    """A tap that cannot be captured, and why."""

    tap: Tap
    reason: str

    def __str__(self) -> str:
        return f"{self.tap.name}: {self.reason}"


def labelled(site: Site, tokens: Selection | None, dtype: str | None, alone: list[Any], batch: list[Any]) -> Site | Fault:
    """A site with its axes, its calls and what one prompt gives.

    Args:
        tokens, dtype: the selection and the storage type where the tap names none.
        alone, batch: what its port held at each call of a probe of the shape ALONE, and of one of the shape TOGETHER.
    """
    try:
        call = which_call(site, len(alone), len(batch))
        value, index = read(site.tap, alone[call])
        other, _ = read(site.tap, batch[call])
        if not isinstance(value, Tensor) or not isinstance(other, Tensor):
            raise Unfit(not_a_tensor(value, alone[call]))
        axes = axes_of(tuple(value.shape), tuple(other.shape))
        if not all(axis.times for axis in axes):
            raise Unfit(f"it holds no values: {shape_text(axes)}")
        shape, dropped, least = _one_prompt(axes, index)
        bound = replace(
            site, axes=axes, shape=shape, index=index, dropped=dropped, indexed=least, calls=len(alone), form=form(alone[call])
        )
        tap = bound.tap if bound.tap.tokens is not None else replace(bound.tap, tokens=tokens)
        if site.tap.tokens not in (None, "all") and bound.token_axis is None:
            raise Unfit(f"it has no token axis to select from: {shape_text(axes)}")
        bound = replace(bound, tap=tap)
        _check_selection(bound, value.dtype)
        return replace(bound, layout=Layout(_selected_dims(bound), _storage(value.dtype, tap.dtype, dtype)))
    except Unfit as reason:
        return Fault(site.tap, str(reason))


def _check_selection(site: Site, computed: torch.dtype) -> None:
    """Refuse a selection of tokens that cannot be made, or could mean two things."""
    if site.token_axis is None or site.selection == "all":
        return
    axes = cast(tuple[Axis, ...], site.axes)
    if not _keeps_first(axes, site.index):
        raise Unfit(
            f"its address picks a position on one token axis and `tokens` would select on another: {shape_text(axes)}; write both "
            "into the address, or neither (`tokens: all`)"
        )
    if site.selection == "mean" and not computed.is_floating_point:
        raise Unfit(f"it is {dtype_name(computed)}, which has no mean; use another selection of `tokens` for it")


def _keeps_first(axes: Sequence[Axis], index: Sequence[Item]) -> bool:
    """Whether the first token axis, the query's in attention, is there after the tensor indices."""
    first = next(place for place, axis in enumerate(axes) if axis.token)
    alone = [axis if place == first or not axis.token else Axis(False, False, sys.maxsize) for place, axis in enumerate(axes)]
    return any(isinstance(dim, Slice) for dim in _one_prompt(alone, index)[0])


@cache
def axes_of(alone: tuple[int, ...], together: tuple[int, ...]) -> tuple[Axis, ...]:
    """The axes of what has these two shapes in the two probes; the same tuple for the same shapes."""
    if len(alone) != len(together):
        raise Unfit(f"its number of axes depends on the input: {alone} and {together}")
    axes = [_axis(*sizes) for sizes in zip(alone, together, strict=True)]
    if None in axes:
        raise Unfit(
            f"axis {axes.index(None)} cannot be attributed: the shape is {alone} for {ALONE[0]} prompt of {ALONE[1]} tokens "
            f"and {together} for {TOGETHER[0]} prompts of {TOGETHER[1]}"
        )
    return tuple(cast(list[Axis], axes))


def _axis(alone: int, together: int) -> Axis | None:
    for batch, token in ((False, False), (True, False), (False, True), (True, True)):
        unit = Axis(batch, token, 1)
        times = alone // unit.size(*ALONE)
        axis = replace(unit, times=times)
        if axis.size(*ALONE) == alone and axis.size(*TOGETHER) == together and (times == 1 or not token):
            return axis
    return None


def _one_prompt(axes: Sequence[Axis], index: Sequence[Item]) -> tuple[tuple[int | Slice, ...], int | None, int]:
    """The axes of one prompt's value after its tensor indices, where the batch axis was dropped, and the tokens it needs."""
    least = 1
    dims: list[int | Slice | None] = [_one_prompt_dim(axis) for axis in axes]
    if not any(axis.batch for axis in axes) and len(axes) > 1 and dims[0] == 1 and isinstance(dims[1], Slice):
        dims[0] = None  # a table shared by the batch, (1, token, …): the leading 1 stands where the batch would
    if dims.count(None) > 1:
        raise Unfit(f"it has more than one batch axis: {shape_text(axes)}")
    for item in index:
        if not isinstance(item, Nth | Index):
            raise Unfit(f"`{written(item)}` cannot follow a tensor; it has the shape {shape_text(axes)}")
        entries = _filled((item.number,) if isinstance(item, Nth) else item.entries, dims, axes)
        least = max(least, *map(_least_tokens, dims, entries), 1)
        dims = _indexed_dims(dims, entries, axes)
    dropped = dims.index(None) if None in dims else None
    return tuple(dim for dim in dims if dim is not None), dropped, least


def _least_tokens(dim: int | Slice | None, entry: int | Slice) -> int:
    """How many tokens a prompt needs for an entry of a tensor index to be there."""
    if not isinstance(dim, Slice) or not isinstance(entry, int):
        return 1
    if dim != Slice():
        raise Unfit("a position of a slice of the token axis; write the position alone")
    return entry + 1 if entry >= 0 else -entry


def _one_prompt_dim(axis: Axis) -> int | Slice | None:
    """A slice for tokens, `None` for the batch axis, a number otherwise."""
    if axis.token:
        return Slice()
    return None if axis.batch and axis.times == 1 else axis.times


def _filled(entries: Sequence[Any], dims: Sequence[int | Slice | None], axes: Sequence[Axis]) -> list[int | Slice]:
    """The entries of a tensor index, one for each axis."""
    if entries.count(...) > 1 or len(entries) - entries.count(...) > len(dims):
        raise Unfit(f"the tensor index has too many entries for the shape {shape_text(axes)}")
    place = entries.index(...) if ... in entries else len(entries)
    full = Slice()
    return [*entries[:place], *[full] * (len(dims) - len(entries) + (... in entries)), *entries[place + 1 :]]


def _indexed_dims(
    dims: Sequence[int | Slice | None], entries: Sequence[int | Slice], axes: Sequence[Axis]
) -> list[int | Slice | None]:
    picked: list[int | Slice | None] = []
    for dim, entry in zip(dims, entries, strict=True):
        if isinstance(entry, int):
            _check_position(1 if dim is None else dim, entry, axes)
        else:
            picked.append(_sliced_dim(dim, entry))
    return picked


def _check_position(dim: int | Slice, entry: int, axes: Sequence[Axis]) -> None:
    if isinstance(dim, int) and not -dim <= entry < dim:
        raise Unfit(
            f"[{entry}] is outside an axis of size {dim} (the batch axis of one prompt is 1); the shape is {shape_text(axes)}"
        )


def _sliced_dim(dim: int | Slice | None, entry: Slice) -> int | Slice | None:
    if entry == Slice():
        return dim
    if entry.step is not None and entry.step < 0:
        raise Unfit(f"the slice {entry} steps backwards, which tensors cannot do")
    if dim is None:
        if len(entry.of(1)) != 1:
            raise Unfit(f"the slice {entry} leaves nothing of the batch axis, whose size is 1 for one prompt")
        return None
    if isinstance(dim, int):
        if not (left := len(entry.of(dim))):
            raise Unfit(f"the slice {entry} leaves nothing of an axis of size {dim}")
        return left
    if dim != Slice():
        raise Unfit("two slices of the token axis; write them as one")
    return entry


def _selected_dims(site: Site) -> tuple[int | Slice, ...]:
    """The axes of what is stored: those of the value with the token selection done."""
    axis, selection = site.token_axis, site.selection
    if axis is None or selection == "all":
        return site.shape
    if site.shape[axis] != Slice():
        raise Unfit("the address slices the tokens already; leave out the slice or `tokens`")
    before, after = site.shape[:axis], site.shape[axis + 1 :]
    if isinstance(selection, Slice):
        return (*before, selection, *after)
    return (*before, len(selection), *after) if isinstance(selection, tuple) else (*before, *after)


def dtype_name(dtype: torch.dtype) -> str:
    """`float32`, without torch's name before it."""
    return str(dtype).removeprefix("torch.")


def _storage(computed: torch.dtype, asked: str | None, default: str | None) -> str:
    name = dtype_name(computed)
    if name not in ITEM_BYTES:
        raise Unfit(f"it is {name}, which safetensors files cannot hold")
    if computed.is_floating_point:
        return asked or default or name
    if asked not in (None, name):
        raise Unfit(f"it is {name}; `dtype` is for floating point numbers")
    return name
