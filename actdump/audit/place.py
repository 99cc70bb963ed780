"""Taps of a dump found again in a model, and which tokens their rows are of. Nothing of the engine is in it."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from actdump.address import Address, Child, Every, Index, Nth, Some, Step, parse, path_text
from actdump.errors import AddressError
from actdump.plan import Column


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

    def words(self, row: int, tokens: int) -> str:
        """Which token a row of a prompt's value is about."""
        if self.column.token_axis is None:
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
