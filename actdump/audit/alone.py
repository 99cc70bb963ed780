"""A prompt run alone: plain PyTorch hooks on a batch of one, without padding and without a mask. Nothing of the engine is in it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, fields, is_dataclass
from functools import partial
from inspect import Parameter, signature
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from actdump.address import Port
from actdump.audit.place import Place
from actdump.audit.stored import as_stored, follow
from actdump.state import State


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
    found = [follow(place, calls) for place, calls in zip(places, kept.calls, strict=True)]
    values = [as_stored(place, value, index, len(ids)) for place, (value, index) in zip(places, found, strict=True)]
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
