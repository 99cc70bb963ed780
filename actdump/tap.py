"""Taps: what to keep of a model, and where: an address with a name, the tokens to keep, the storage type, the call."""

from dataclasses import dataclass, replace
from typing import Literal, cast

from actdump.address import Address, Every, Slice, Some, Tree, expand, parse_slice, written
from actdump.errors import AddressError

Selection = Literal["all", "first", "last", "mean"] | tuple[int, ...] | Slice
WORDS = ("all", "first", "last", "mean")


def parse_selection(value: object) -> Selection:
    """Read which tokens to keep: a word, a list of positions, or a slice as text (`"2:5"`).

    Raises:
        AddressError: it is none of these.
    """
    if isinstance(value, str):
        if value in WORDS:
            return cast(Selection, value)
        if (entries := parse_slice(value)) is not None:
            return _filled(entries)
    if isinstance(value, list) and value and all(type(entry) is int for entry in value):
        return tuple(value)
    raise AddressError(
        f"`{value}` does not select tokens; use all, first, last, mean, "
        'a list of positions such as [0, -1], or a slice such as "2:5"'
    )


def _filled(entries: Slice) -> Slice:
    """The slice, if it picks anything of some prompt, be it a short one or a long one."""
    bounds = [abs(bound) for bound in (entries.start, entries.stop) if bound is not None]
    if not any(entries.of(tokens) for tokens in (1, max(bounds, default=1), sum(bounds) + 1)):
        raise AddressError(f"the slice {entries} never picks a token")
    return entries


@dataclass(frozen=True)
class Tap:
    """What to keep at an address.

    Attributes:
        name: its name on disk, as the user spelt it where one address gives one tap.
        address: the resolved address, when bound; as written, before.
        tokens: which tokens to keep; `None` where nobody said, which means all.
        dtype: the storage type, or `None` for the type in which it was computed.
        call: which call of a module that runs several times in a forward; `None` where it must run once.
    """

    name: str
    address: Address
    tokens: Selection | None = None
    dtype: str | None = None
    call: int | None = None


def expand_tap(tap: Tap, root: Tree, *, named: bool) -> list[Tap]:
    """The taps that one line of `save` stands for in a model.

    Args:
        named: the user gave the name, so a pattern's taps are that name and what the pattern picked: `resid[4]`.
    """
    resolved = expand(tap.address, root)
    if not tap.address.many:
        return [replace(tap, address=resolved[0])]
    if not named:
        return [replace(tap, name=str(address), address=address) for address in resolved]
    return [replace(tap, name=tap.name + _picked(tap.address, address), address=address) for address in resolved]


def _picked(pattern: Address, resolved: Address) -> str:
    steps = zip(pattern.module, resolved.module, strict=True)
    return "".join(written(taken) for step, taken in steps if isinstance(step, Some | Every))
