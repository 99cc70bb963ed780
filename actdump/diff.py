"""Two dumps compared: the same prompts and taps or not, how far apart the values are, and where they part first."""

import json
import math
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple

from actdump.address import Slice
from actdump.errors import UsageError, few
from actdump.format import TOKENS
from actdump.plan import Column
from actdump.reader import Dump, Values
from actdump.tokenwise import by_token, capped

if TYPE_CHECKING:
    from torch import Tensor

PIECE = 1 << 21  # values that are compared at a time, in float64
NAMED = 5  # prompts that are told by name
WIDTH = math.log(1.01)  # of a bin of relative errors
BINS, ONE = 4800, 4700  # how many, from 5e-21 on, and the one that begins at an error of 1


@dataclass(frozen=True)
class Limits:
    """What counts as the same: no value of a token's vector is off by more than `atol`, or the vector by more than `rtol` of its norm.

    Integers are the same when they are equal.
    """

    atol: float = 0.0
    rtol: float = 0.0

    def __post_init__(self) -> None:
        if not (0 <= self.atol < math.inf and 0 <= self.rtol < math.inf):
            raise UsageError(f"atol {self.atol} and rtol {self.rtol}: a limit is a finite number from 0 on")


@dataclass(frozen=True)
class Parting:
    """The first place beyond the limits.

    Attributes:
        prompt: its id.
        token: which of the prompt's tokens; `None` where the value belongs to no single one.
        index: the place in the prompt's value.
        values: what the two dumps hold there; text where that is not finite, because JSON has no such number.
    """

    prompt: str
    token: int | None
    index: tuple[int, ...]
    values: tuple[float | str, float | str]

    def __str__(self) -> str:
        token = "" if self.token is None else f", token {self.token}"
        one, other = (value if isinstance(value, str) else f"{value:.9g}" for value in self.values)
        return f"prompt `{self.prompt}`{token}, {list(self.index)}: {one} and {other}"


@dataclass(frozen=True)
class Difference:
    """How far apart two dumps are at one tap. A token is one vector; a value without a token axis counts as one.

    Attributes:
        addresses, dtypes: where the values come from, and their types on disk, in the two dumps.
        tokens, values: how many were compared.
        beyond: how many tokens are beyond the limits.
        differing: how many values are not equal; NaN equals NaN.
        nonfinite: how many values are not finite, or another infinity, in one dump only; left out of the figures below.
        largest, mean: of the absolute differences.
        median, high, worst: of the tokens' errors: the norm of the difference over the larger of the two norms. `high` is that which
            99 % of the tokens do not pass; it and the median are known to 1 %.
        cosine, mean_cosine: the least and the mean over the tokens.
        first: where they part.

    The figures from `largest` to `mean_cosine` are `None` for integers.
    """

    name: str
    addresses: tuple[str, str]
    dtypes: tuple[str, str]
    tokens: int
    values: int
    beyond: int
    differing: int
    nonfinite: int
    largest: float | None
    mean: float | None
    median: float | None
    high: float | None
    worst: float | None
    cosine: float | None
    mean_cosine: float | None
    first: Parting | None


@dataclass
class Counted:
    """Prompts, counted, and the first few by id."""

    count: int = 0
    ids: list[str] = field(default_factory=list)

    def add(self, id: str) -> None:
        self.count += 1
        if self.count <= NAMED:
            self.ids.append(id)

    def __str__(self) -> str:
        more = f" and {self.count - NAMED} more" if self.count > NAMED else ""
        return f"{self.count} prompt{'s' * (self.count != 1)} ({', '.join(self.ids)}{more})"


@dataclass(frozen=True)
class Comparison:
    """What was found.

    Attributes:
        prompts: how many are in both, with the same tokens.
        missing: prompts that are in the first dump only, and in the second only.
        retokenised: prompts of the same id with other tokens; not compared.
        taps: what was found at each that is in both.
        unlike: taps of one name that cannot be compared, and why.
        alone: taps that are in the first dump only, and in the second only.
    """

    limits: Limits
    prompts: int
    missing: tuple[Counted, Counted]
    retokenised: Counted
    taps: tuple[Difference, ...]
    unlike: Mapping[str, str]
    alone: tuple[tuple[str, ...], tuple[str, ...]]

    @property
    def faults(self) -> list[str]:
        """Why the dumps are not the same, a line each; none if they are, within the limits."""
        sides = ("first", "second")
        return [
            *(f"{some}: in the {side} dump only" for some, side in zip(self.missing, sides, strict=True) if some.count),
            *([f"{self.retokenised}: other tokens, so not compared"] if self.retokenised.count else []),
            *(f"{few(names)}: in the {side} dump only" for names, side in zip(self.alone, sides, strict=True) if names),
            *(f"{name}: not compared: {why}" for name, why in self.unlike.items()),
            *(
                f"{tap.name}: {tap.beyond:,} of {tap.tokens:,} tokens are beyond the limits; first at {tap.first}"
                for tap in self.taps
                if tap.beyond
            ),
        ]


def to_json(comparison: Comparison) -> dict[str, Any]:
    """A comparison for programs."""
    return {"same": not comparison.faults, **asdict(comparison)}


def compare(one: Dump, other: Dump, limits: Limits) -> Comparison:
    """Compare two dumps, prompt by prompt in the order of the first; prompts are matched by id, taps by name.

    Raises:
        DataError: a shard is missing or cannot be read.
    """
    shared = [name for name in one.names if name in other.names]
    pairs = {name: (one[name].column, other[name].column) for name in shared}
    unlike = {name: why for name, pair in pairs.items() if (why := _unlike(*pair))}
    alike = [name for name in pairs if name not in unlike]
    tallies = [_Tally(name, *pairs[name], limits, PIECE // len(alike)) for name in alike]
    missing, retokenised, prompts = (Counted(), Counted()), Counted(), 0
    for id, place, there in _matched(one, other, missing):
        if not _same_tokens(one, place, other, there):
            retokenised.add(id)
            continue
        prompts += 1
        for tally in tallies:
            tally.take(id, one, place, other, there)
    for tally in tallies:
        tally.settle()
    alone = tuple(name for name in one.names if name not in pairs), tuple(name for name in other.names if name not in pairs)
    return Comparison(limits, prompts, missing, retokenised, tuple(tally.result for tally in tallies), unlike, alone)


def _matched(one: Dump, other: Dump, missing: tuple[Counted, Counted]) -> Iterator[tuple[str, int, int]]:
    """The prompts that are in both, with their numbers; the others are noted."""
    there = other.prompts.numbers
    for id, number in one.prompts.numbers.items():
        if id in there:
            yield id, number, there[id]
        else:
            missing[0].add(id)
    for id in there:
        if id not in one.prompts.numbers:
            missing[1].add(id)


def _same_tokens(one: Dump, place: int, other: Dump, there: int) -> bool:
    import torch

    return torch.equal(one.shard_of(place).prompt(TOKENS, place), other.shard_of(there).prompt(TOKENS, there))


def _unlike(one: Column, other: Column) -> str | None:
    """Why two taps of one name cannot be compared."""
    if one.tokens != other.tokens:
        return f"the tokens are `{one.tokens}` and `{other.tokens}`"
    if one.layout.dims != other.layout.dims:
        return f"a prompt gives {one.layout.words} and {other.layout.words}"
    return None


def _token(column: Column, row: int, tokens: int) -> int | None:
    """Which of a prompt's tokens a row belongs to."""
    if column.token_axis is not None:
        dim = column.layout.dims[column.token_axis]
        return dim.of(tokens)[row] if isinstance(dim, Slice) else int(json.loads(column.tokens)[row]) % tokens
    if not any("token" in name for name in column.axes):
        return None
    return {"first": 0, "last": tokens - 1}.get(column.tokens)


class _Errors:
    """Relative errors, counted in bins of 1 %, so that memory does not grow with their number."""

    def __init__(self) -> None:
        import torch

        self.bins = torch.zeros(BINS, dtype=torch.int64)
        self.zeros, self.worst = 0, 0.0

    def add(self, errors: "Tensor") -> None:
        import torch

        above = errors[errors > 0]
        self.zeros += len(errors) - len(above)
        if len(above):
            self.worst = max(self.worst, float(above.max()))
            places = (above.log() / WIDTH).floor().long() + ONE
            self.bins += torch.bincount(places.clamp(0, BINS - 1), minlength=BINS)

    def quantile(self, share: float) -> float:
        """The error that this share of the tokens does not pass."""
        reached = self.zeros + self.bins.cumsum(0)
        rank = math.ceil(share * float(reached[-1]))
        if rank <= self.zeros:
            return 0.0
        place = int((reached < rank).sum())
        return min(math.exp((place - ONE + 0.5) * WIDTH), self.worst)


class _Prompt(NamedTuple):
    """A prompt's value in two dumps, a row a token.

    Attributes:
        tokens: how many the prompt has.
        shape: of its value.
    """

    id: str
    tokens: int
    shape: Sequence[int]
    rows: "Tensor"
    others: "Tensor"


class _Tally:
    """The comparison of one tap, growing by a prompt at a time.

    Args:
        most: how many values wait, about, until they are compared.
    """

    def __init__(self, name: str, one: Column, other: Column, limits: Limits, most: int) -> None:
        self.name, self.columns, self.limits = name, (one, other), limits
        self.axis = one.token_axis
        self.floating = any("float" in column.layout.dtype for column in self.columns)
        self.errors = _Errors()
        self.tokens = self.values = self.beyond = self.differing = self.nonfinite = 0
        self.largest = self.sum = self.cosines = 0.0
        self.cosine = 1.0
        self.first: Parting | None = None
        self._waiting: list[_Prompt] = []
        self._values, self._most = 0, most

    def take(self, id: str, one: Dump, place: int, other: Dump, there: int) -> None:
        """Take a prompt in; it is compared when there is enough to compare, because many prompts at once take no longer than one."""
        first, second = (
            Values(dump, column)[at] for dump, column, at in zip((one, other), self.columns, (place, there), strict=True)
        )
        rows, others = by_token(first, self.axis), by_token(second, self.axis)
        if self._waiting and rows.shape[1] != self._waiting[0].rows.shape[1]:
            self.settle()
        self._waiting.append(_Prompt(id, len(one.shard_of(place).prompt(TOKENS, place)), first.shape, rows, others))
        self._values += rows.numel()
        if self._values >= self._most:
            self.settle()

    def settle(self) -> None:
        """Compare the prompts that wait, a number of tokens at a time."""
        import torch

        if not self._waiting:
            return
        prompts, self._waiting, self._values = self._waiting, [], 0
        rows, others = torch.cat([each.rows for each in prompts]), torch.cat([each.others for each in prompts])
        self.tokens += len(rows)
        self.values += rows.numel()
        if not rows.numel() or (rows.dtype == others.dtype and torch.equal(rows, others)):
            self.errors.zeros += len(rows)
            self.cosines += len(rows)
            return
        step = max(1, PIECE // max(1, rows.shape[1]))
        for start in range(0, len(rows), step):
            beyond, parted = self._piece(rows[start : start + step], others[start : start + step])
            if self.first is None and beyond.any():
                row = int(beyond.int().argmax())
                self.first = self._parting(prompts, start + row, int(parted[row].int().argmax()))

    def _parting(self, prompts: "Sequence[_Prompt]", row: int, element: int) -> Parting:
        """An element of a row of several prompts, one after another, as a place in its prompt."""
        ends = list(accumulate(len(each.rows) for each in prompts))
        prompt = prompts[bisect_right(ends, row)]
        row -= ends[bisect_right(ends, row)] - len(prompt.rows)
        values = _number(prompt.rows[row, element]), _number(prompt.others[row, element])
        return Parting(prompt.id, _token(self.columns[0], row, prompt.tokens), self._index(prompt.shape, row, element), values)

    def _index(self, shape: Sequence[int], row: int, element: int) -> tuple[int, ...]:
        """The place in a prompt's value of an element of one of its rows."""
        import numpy as np

        if self.axis is None:
            return tuple(map(int, np.unravel_index(element, shape)))
        rest = [size for axis, size in enumerate(shape) if axis != self.axis]
        index = list(map(int, np.unravel_index(element, rest))) if rest else []
        return (*index[: self.axis], row, *index[self.axis :])

    def _piece(self, one: "Tensor", other: "Tensor") -> "tuple[Tensor, Tensor]":
        """Compare some rows; which rows are beyond the limits, and which of their values put them there."""
        if self.floating:
            return self._floats(one.double(), other.double())
        parted = one != other if one.dtype == other.dtype else one.long() != other.long()
        beyond = parted.any(1)
        self.differing += int(parted.sum())
        self.beyond += int(beyond.sum())
        return beyond, parted

    def _floats(self, one: "Tensor", other: "Tensor") -> "tuple[Tensor, Tensor]":
        import torch

        same = (one == other) | (one.isnan() & other.isnan())
        finite = one.isfinite() & other.isfinite()
        odd = ~same & ~finite
        one, other = torch.where(finite, one, 0.0), torch.where(finite, other, 0.0)
        difference = (one - other).abs()
        norms = one.norm(dim=1), other.norm(dim=1)
        error = torch.where(same.all(1), 0.0, difference.norm(dim=1) / torch.maximum(*norms))
        error = capped(torch.where(odd.any(1), math.inf, error))
        cosine = ((one * other).sum(1) / (norms[0] * norms[1])).nan_to_num(0.0).clamp(-1, 1)
        cosine = torch.where(same.all(1), 1.0, cosine)
        parted = (difference > self.limits.atol) | odd
        beyond = parted.any(1) & ((error > self.limits.rtol) | odd.any(1))
        self.differing += int((~same).sum())
        self.nonfinite += int(odd.sum())
        self.beyond += int(beyond.sum())
        self.largest = max(self.largest, float(difference.max()))
        self.sum += float(difference.sum())
        self.cosine = min(self.cosine, float(cosine.min()))
        self.cosines += float(cosine.sum())
        self.errors.add(error)
        return beyond, parted

    @property
    def result(self) -> Difference:
        one, other = self.columns
        places = self.name, (one.resolved, other.resolved), (one.layout.dtype, other.layout.dtype)
        counts = self.tokens, self.values, self.beyond, self.differing, self.nonfinite
        if not self.floating or not self.tokens:
            return Difference(*places, *counts, None, None, None, None, None, None, None, self.first)
        mean = self.sum / max(self.values - self.nonfinite, 1)
        errors = self.errors.quantile(0.5), self.errors.quantile(0.99), self.errors.worst
        cosines = self.cosine, self.cosines / self.tokens
        return Difference(*places, *counts, self.largest, mean, *errors, *cosines, self.first)


def _number(value: "Tensor") -> float | str:
    number = float(value)
    return number if math.isfinite(number) else str(number)
