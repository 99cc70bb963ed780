"""How far two dumps are apart at one tap."""

import json
import math
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple

from actdump.address import Slice
from actdump.diff.comparison import Difference, Limits, Parting
from actdump.diff.histogram import Histogram
from actdump.format import TOKENS
from actdump.plan import Column
from actdump.reader import Dump, Values
from actdump.tokenwise import by_token, capped

if TYPE_CHECKING:
    from torch import Tensor

PIECE = 1 << 21  # values that are compared at a time, in float64


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


class Tally:
    """The comparison of one tap, growing by a prompt at a time.

    Args:
        taps: how many there are, which share the room of what waits to be compared.
    """

    def __init__(self, name: str, one: Column, other: Column, limits: Limits, taps: int) -> None:
        self.name, self.columns, self.limits = name, (one, other), limits
        self.axis = one.token_axis
        self.floating = any("float" in column.layout.dtype for column in self.columns)
        self.errors = Histogram()
        self.tokens = self.values = self.beyond = self.differing = self.nonfinite = 0
        self.largest = self.sum = self.cosines = 0.0
        self.cosine = 1.0
        self.first: Parting | None = None
        self._waiting: list[_Prompt] = []
        self._values, self._most = 0, PIECE // taps

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


def _token(column: Column, row: int, tokens: int) -> int | None:
    """Which of a prompt's tokens a row belongs to."""
    if column.token_axis is not None:
        dim = column.layout.dims[column.token_axis]
        return dim.of(tokens)[row] if isinstance(dim, Slice) else int(json.loads(column.tokens)[row]) % tokens
    if not any("token" in name for name in column.axes):
        return None
    return {"first": 0, "last": tokens - 1}.get(column.tokens)
