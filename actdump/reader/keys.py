"""What prompts and rows are taken by."""

from operator import index
from typing import TYPE_CHECKING, SupportsIndex, TypeGuard

if TYPE_CHECKING:
    from actdump.reader.dump import Dump


def is_number(key: object) -> TypeGuard[SupportsIndex]:
    """Whether a key is one number: torch takes a tensor of one axis with one element for one, and a truth value, as Python does."""
    if type(key) is int:  # the protocol takes five microseconds to look at
        return True
    truth = isinstance(key, bool) or str(getattr(key, "dtype", "")).endswith("bool")
    return isinstance(key, SupportsIndex) and not truth and not getattr(key, "ndim", 0)


def prompt_number(key: SupportsIndex | str, dump: "Dump") -> int:
    """The place of a prompt that is named by its place or, as text, by its id.

    Raises:
        IndexError: there is no such place.
        UsageError: there is no such id.
    """
    if isinstance(key, str):
        return dump.prompts.number(key)
    if not is_number(key):
        raise TypeError(f"prompts are taken by a number, an id or a slice, not by {type(key).__name__}")
    key = index(key)
    count = dump.manifest.prompts
    if not -count <= key < count:
        raise IndexError(f'there is no prompt {key}; the dump has {count}, from 0 (an id is text: "{key}")')
    return key % count
