"""The errors that actdump raises on purpose. Each class knows the exit code that the command line gives it."""

from collections.abc import Iterable, Sequence
from difflib import get_close_matches


class ActdumpError(Exception):
    """The root of the tree; raised itself only for faults that no subclass names."""

    code = 1


class UsageError(ActdumpError):
    """What was asked for cannot be done; asking differently can help."""

    code = 2


class AddressError(UsageError):
    """An address is misspelt, or names what the model does not have."""


class SpecError(UsageError):
    """A spec has mistakes; the message lists every one of them with file and line."""


class TraceError(UsageError):
    """The Python front end was used in a way that it does not support."""


class DataError(ActdumpError):
    """The data are bad: a cast overflowed, a checksum differs, a value is not what the probe promised."""

    code = 65


class MissingError(ActdumpError):
    """An input is not there: a prompt file, a model folder, a dump."""

    code = 66


class OccupiedError(ActdumpError):
    """The output folder holds something else."""

    code = 73


class StorageError(ActdumpError):
    """The file system refused: disk full, no permission, a device error."""

    code = 74


class Stopped(ActdumpError):
    """Asked to stop before the end; the same command goes on."""

    code = 75


MANY = 10_000  # words, above which nobody waits for the nearest: it takes 6 microseconds a word


def did_you_mean(wrong: str, known: Iterable[str]) -> str:
    """Say which of the known words are near the wrong one, or list a few: `; did you mean "tokens"?`."""
    words = list(known)
    near = get_close_matches(wrong, words, n=3, cutoff=0.6) if len(words) <= MANY else ()
    if near:
        return "; did you mean " + " or ".join(f"`{word}`" for word in near) + "?"
    if not words:
        return ""
    shown = ", ".join(words[:12]) + (", …" if len(words) > 12 else "")
    return f"; there is {shown}"


def few(names: Sequence[str]) -> str:
    """The first of many names, and how many more there are."""
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
