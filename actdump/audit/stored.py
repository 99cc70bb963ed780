"""What a dump should hold of what a module held for one prompt. Nothing of the engine is in it."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from actdump.address import Child, Index, Item, Key, Nth, Slice, nth, written
from actdump.audit.place import Place, picked
from actdump.errors import DataError


def follow(place: Place, calls: Sequence[Any]) -> tuple[Tensor, list[Item]]:
    """The tensor at an address, on the CPU, and the items that index it. After `output`, a bare tensor counts as a tuple of one."""
    items = list(place.address.items)
    if place.column.call is None and len(calls) > 1:
        raise DataError(
            f"{place.column.name}: its module ran more than once when a prompt ran alone, and once in the probe; say which call, "
            "with `call: 0`"
        )
    try:
        held = calls[place.column.call or 0]
        if place.address.port in ("input", "output"):
            if isinstance(held, Tensor):
                items = items[1:] if place.address.port == "output" and items and isinstance(items[0], Nth) else items
            elif not items or isinstance(items[0], Index):
                items.insert(0, Nth(0))
        while items and not isinstance(held, Tensor):
            held = _entry(held, items.pop(0))
    except (IndexError, KeyError, AttributeError, TypeError):
        held = None
    if not isinstance(held, Tensor):
        raise DataError(f"{place.column.name}: there is no tensor at `{place.column.address}` when a prompt runs alone")
    return held.cpu(), items


def _entry(held: Any, item: Item) -> Any:
    match item:
        case Nth(number):
            return nth(held, number) if isinstance(held, Mapping) else held[number]
        case Key(key) | Child(key) if isinstance(held, Mapping):
            return held[key]
        case Child(name):
            return getattr(held, name)
    raise TypeError(written(item))


def as_stored(place: Place, value: Tensor, index: Sequence[Item], tokens: int) -> Tensor:
    """The value of a prompt as a dump holds it: tokens selected, indexed, without the batch axis, cast."""
    column = place.column
    if column.tokens != "all":
        value = _selected(value, cast(int, place.axis), column.tokens)
    for item in index:
        value = value[_tensor_index(item)]
    shape = column.layout.shape(tokens)
    if [size for size in value.shape if size != 1] != [size for size in shape if size != 1]:
        raise DataError(
            f"{column.name}: a prompt of {tokens} tokens alone gives {tuple(value.shape)}, and the dump holds {shape} for it"
        )
    return value.reshape(shape).to(getattr(torch, column.layout.dtype))


def _selected(value: Tensor, axis: int, tokens: str) -> Tensor:
    """The tokens that a selection keeps, every axis kept: the address indexes after it as it would have before."""
    if tokens == "mean":
        return value.double().mean(axis, keepdim=True)
    return value[(slice(None),) * axis + (picked(tokens, value.shape[axis]),)]


def _tensor_index(item: Item) -> Any:
    if isinstance(item, Nth):
        return item.number
    entries = cast(Index, item).entries
    return tuple(slice(entry.start, entry.stop, entry.step) if isinstance(entry, Slice) else entry for entry in entries)
