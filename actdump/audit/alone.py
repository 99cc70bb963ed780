"""A prompt run alone: plain PyTorch hooks on a batch of one, without padding and without a mask. Nothing of the engine is in it."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, fields, is_dataclass
from functools import partial
from inspect import Parameter, signature
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor, nn

from actdump.address import Address, Child, Every, Index, Item, Key, Nth, Port, Slice, Some, Step, parse, path_text, written
from actdump.errors import AddressError, DataError
from actdump.plan import Column
from actdump.state import State


@dataclass(frozen=True)
class Place:
    """A tap of a dump, found again in a model by the address that the user wrote."""

    column: Column
    address: Address
    path: str
    module: nn.Module

    @property
    def axis(self) -> int | None:
        """The axis of what the module holds that counts tokens; the query's, in attention."""
        return next((place for place, name in enumerate(self.column.axes) if "token" in name.split("*")), None)

    @property
    def rows(self) -> int | None:
        """The axis of a prompt's stored value that counts tokens; `None` where the value is one whole."""
        if self.column.tokens.startswith("["):
            return self._row_axis
        ragged = [at for at, dim in enumerate(self.column.layout.dims) if isinstance(dim, Slice)]
        return ragged[0] if ragged and self.column.tokens not in ("first", "last", "mean") else None

    @property
    def _row_axis(self) -> int | None:
        """Where the axis that counts tokens stands in a stored value of chosen tokens. Which items index the tensor is not known, only
        how many axes they leave."""
        items, dims = self.address.items, self.column.layout.dims
        left = (self._left(items[first:]) for first in range(len(items), -1, -1))
        return next((axes.index(self.axis) for axes in left if len(axes) == len(dims) and self.axis in axes), None)

    def _left(self, items: Sequence[Item]) -> list[int]:
        """The axes of what the module holds that are left of a prompt's value where these items index it; none where they cannot."""
        axes, left = self.column.axes, list(range(len(self.column.axes)))
        for item in items:
            given = item.entries if isinstance(item, Index) else (item.number,) if isinstance(item, Nth) else ()
            place = given.index(...) if ... in given else len(given)
            rest = len(left) - len(given) + (... in given)
            if rest < 0 or not given:
                return []
            entries = [*given[:place], *[...] * rest, *given[place + 1 :]]
            left = [axis for axis, entry in zip(left, entries, strict=True) if not isinstance(entry, int)]
        shared = [0] if len(left) > len(self.column.layout.dims) else []  # (1, token, …), the same for all prompts
        batch = [axes.index("batch")] if "batch" in axes else shared
        return [axis for axis in left if axis not in batch]

    def words(self, row: int, tokens: int) -> str:
        """Which token a row of a prompt's value is about."""
        if self.rows is None:
            return {"first": "token 0", "last": f"token {tokens - 1}", "mean": "the mean of its tokens"}.get(
                self.column.tokens, "its value"
            )
        if any(isinstance(item, Index) for item in self.address.items):
            return f"row {row} of its value"
        return f"token {picked(self.column.tokens, tokens)[row]} of {tokens}"

    @property
    def block(self) -> int | None:
        """Which entry of a list of modules it is the output of, so that `hidden_states` may hold it too."""
        last = self.path.rpartition(".")[2]
        plain = self.address.port == "output" and self.address.items in ((), (Nth(0),)) and self.column.call is None
        return int(last) if plain and last.isdigit() else None


def find(model: nn.Module, columns: Sequence[Column]) -> list[Place]:
    """Find the taps of a dump in a model.

    Raises:
        AddressError: the model has no such module; the message names every tap that leads nowhere.
    """
    found, wrong = [], []
    for column in columns:
        address = parse(column.address)
        try:
            path = _path(address.module, model)
            found.append(Place(column, address, path, model.get_submodule(path)))
        except (AttributeError, IndexError):
            wrong.append(f"{column.name}: the model ({type(model).__name__}) has no module `{path_text(address.module)}`")
    if wrong:
        raise AddressError("\n".join(wrong))
    return found


def _path(steps: Sequence[Step], model: nn.Module) -> str:
    """A module path as `get_submodule` takes it, numbers counted from the start."""
    path: list[str] = []
    for step in steps:
        names = [name for name, child in model.get_submodule(".".join(path))._modules.items() if child is not None]
        match step:
            case Child(name):
                path.append(name)
            case Nth(number):
                path.append(names[number])
            case Some() | Every():
                raise IndexError(step)
    return ".".join(path)


# ------------------------------------------------------------------------------------------------------------- the forward


class _Enough(BaseException):
    """Ends a forward when all that is wanted was seen. Never leaves this module."""


class _Kept:
    """What one forward shows: for each place what its module held at each call, and the hidden states if they are wanted."""

    def __init__(self, places: Sequence[Place], witness: nn.Module | None) -> None:
        """
        Args:
            witness: the list of blocks whose outputs the hidden states may be.
        """
        self.wanted = [place.column.call or 0 for place in places]
        self.calls: list[list[Any]] = [[] for _ in places]
        self.witness, self.waiting = witness, witness is not None
        self.first: Any = None
        self.states: Sequence[Tensor] = ()

    def seen(self, number: int, held: Any) -> None:
        self.calls[number].append(_copy(held))
        self._end()

    def begun(self, held: Any) -> None:
        """The first block begins: `hidden_states` starts with what it is given."""
        self.first = _copy(held) if self.first is None else self.first

    def returned(self, result: Any) -> None:
        """The inner model returns: its hidden states are known, and the head need not run for them."""
        self.states, self.waiting = getattr(result, "hidden_states", None) or (), False
        self._end()

    def _end(self) -> None:
        """End the forward if all that is wanted was seen; which call is the last is known only at the end."""
        if not self.waiting and all(0 <= call < len(calls) for call, calls in zip(self.wanted, self.calls, strict=True)):
            raise _Enough

    def blocks(self, value: Tensor, block: int | None) -> list[int]:
        """The blocks whose output a value is that should be that of `block`, if the hidden states are what the first block was given and
        what each returned.

        Those of some models (Mamba) are not, and the last is after the final norm; neither is a witness. So nothing is said against
        the last block, which may return what it was given. Nor are states of more
        blocks than the list has (Funnel's are of several lists, ALBERT's of one block that runs again and again).
        """
        if self.witness is None or len(self.states) != len(self.witness._modules) + 1 or not _equal(self.states[0], self.first):
            return []
        found = [number for number, state in enumerate(self.states[1:]) if _equal(state, value)]
        return [] if block == len(self.states) - 2 and block not in found else found


def _equal(one: Tensor, other: Any) -> bool:
    return isinstance(other, Tensor) and torch.equal(one.cpu(), other.cpu())


@dataclass(frozen=True)
class Noise:
    """Rounding made larger on purpose: every leaf's output is changed by up to `scale` of its dtype's spacing, at random."""

    seed: int
    scale: float


@dataclass(frozen=True)
class Alone:
    """One prompt, run alone.

    Attributes:
        values: for each place, the value in the form and dtype of the dump.
        computed: for each place, the dtype in which the model computed it.
        witnesses: for each place, which blocks' outputs the model's `hidden_states` say that this value is, bit for bit.
    """

    values: list[Tensor]
    computed: list[torch.dtype]
    witnesses: list[list[int]]


def run(
    model: nn.Module, places: Sequence[Place], ids: Sequence[int], *, witness: bool = False, noise: Noise | None = None
) -> Alone:
    """Run one prompt alone and take every place's value as a dump would hold it.

    Args:
        witness: ask the model for its `hidden_states` too, and look for the values of blocks among them.
        noise: how to disturb the forward, to see how much the model itself moves.

    Raises:
        DataError: a place does not hold what its column says.
    """
    kept = _forward(model, places, ids, _Kept(places, _blocks(model, places) if witness else None), noise)
    found = [_follow(place, calls) for place, calls in zip(places, kept.calls, strict=True)]
    values = [_as_stored(place, value, index, len(ids)) for place, (value, index) in zip(places, found, strict=True)]
    return Alone(
        values,
        [value.dtype for value, _ in found],
        [kept.blocks(value, place.block) for place, (value, _) in zip(places, found, strict=True)],
    )


def _forward(model: nn.Module, places: Sequence[Place], ids: Sequence[int], kept: _Kept, noise: Noise | None) -> _Kept:
    options = {"output_hidden_states": True} if kept.waiting else {}
    if "use_cache" in signature(model.forward).parameters:
        options["use_cache"] = False  # with one, some recurrent models take another way for a prompt of one token
    embedding = next((module for module in model.modules() if isinstance(module, nn.Embedding)), model)
    weights = [*embedding.parameters(), *model.parameters()]
    device = next(
        (weight.device for weight in weights if not weight.is_meta), torch.device("cpu")
    )  # `device_map` leaves some away
    with ExitStack() as stack, torch.no_grad(), suppress(_Enough):
        stack.callback(State(model).restored)
        if noise is not None:
            stack.enter_context(_disturbed(model, noise))
        for number, place in enumerate(places):
            stack.callback(_hooked(place.module, place.address.port, partial(kept.seen, number)).remove)
        if kept.witness is not None:
            stack.callback(_hooked(next(kept.witness.children()), "input", kept.begun).remove)
            stack.callback(_hooked(getattr(model, "base_model", model), "output", kept.returned).remove)
        model(input_ids=torch.tensor([list(ids)], device=device), **options)
    return kept


def _blocks(model: nn.Module, places: Sequence[Place]) -> nn.Module | None:
    """The list of blocks whose outputs are among the places, if it is one, and if a forward can be asked for its hidden states.

    Remote code may not know the word.
    """
    taken = signature(model.forward).parameters.values()
    told = any(each.name == "output_hidden_states" or each.kind is Parameter.VAR_KEYWORD for each in taken)
    lists = {place.path.rpartition(".")[0] for place in places if place.block is not None}
    return model.get_submodule(lists.pop()) if told and len(lists) == 1 else None


def _hooked(module: nn.Module, port: Port, seen: Callable[[Any], None]) -> Any:
    """Call `seen` with what a port of a module holds whenever it runs; the handle of the hook."""

    def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen((args, kwargs) if port == "inputs" else [*args, *kwargs.values()][0])

    def after(_module: nn.Module, _args: Any, result: Any) -> None:
        if port == "output":
            seen(result)
        elif isinstance(result, Mapping):
            seen(((), dict(result)))
        else:
            seen((result if isinstance(result, tuple | list) else (result,), {}))

    if port in ("input", "inputs"):
        return module.register_forward_pre_hook(before, with_kwargs=True)
    return module.register_forward_hook(after)


def _copy(held: Any) -> Any:
    """What a port held, its tensors copied: the model may write into them later."""
    if isinstance(held, Tensor):
        return held.detach().clone()
    if isinstance(held, Mapping):
        return {key: _copy(value) for key, value in held.items()}
    if isinstance(held, tuple) and hasattr(held, "_fields"):
        return type(held)(*map(_copy, held))
    if is_dataclass(held) and not isinstance(held, type):
        return SimpleNamespace(**{each.name: _copy(getattr(held, each.name)) for each in fields(held)})
    return [_copy(value) for value in held] if isinstance(held, tuple | list) else held


@contextmanager
def _disturbed(model: nn.Module, noise: Noise) -> Iterator[None]:
    generator = torch.Generator().manual_seed(noise.seed)

    def moved(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(moved, value))
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        dtype = value.dtype if value.dtype == torch.float64 else torch.float32
        random = torch.rand(value.shape, generator=generator, dtype=dtype, device="cpu").to(value.device) * 2 - 1
        return (value.to(dtype) * (1 + random * (noise.scale * torch.finfo(value.dtype).eps))).to(value.dtype)

    leaves = [module for module in model.modules() if next(module.children(), None) is None]
    with ExitStack() as stack:
        for leaf in leaves:
            stack.callback(leaf.register_forward_hook(lambda _module, _args, result: moved(result)).remove)
        yield


# ----------------------------------------------------------------------------------------------- what the dump should hold


def _follow(place: Place, calls: Sequence[Any]) -> tuple[Tensor, list[Item]]:
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
            return (list(held.values()) if isinstance(held, Mapping) else held)[number]
        case Key(key) | Child(key) if isinstance(held, Mapping):
            return held[key]
        case Child(name):
            return getattr(held, name)
    raise TypeError(written(item))


def _as_stored(place: Place, value: Tensor, index: Sequence[Item], tokens: int) -> Tensor:
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


def picked(tokens: str, size: int) -> list[int]:
    """The positions that a selection keeps of a prompt of that many tokens, as its column words it."""
    every = list(range(size))
    if tokens in ("all", "mean"):
        return every
    if tokens in ("first", "last"):
        return every[:1] if tokens == "first" else every[-1:]
    if tokens.startswith("["):
        return [every[place] for place in json.loads(tokens)]
    return every[slice(*(int(bound) if bound else None for bound in tokens.split(":")))]


def _tensor_index(item: Item) -> Any:
    if isinstance(item, Nth):
        return item.number
    entries = cast(Index, item).entries
    return tuple(slice(entry.start, entry.stop, entry.step) if isinstance(entry, Slice) else entry for entry in entries)
