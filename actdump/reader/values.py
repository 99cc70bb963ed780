"""The values of a tap: of each prompt, and as rows across prompts."""

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import pairwise
from operator import index
from typing import TYPE_CHECKING, Any, SupportsIndex, overload

from actdump.format import TOKENS
from actdump.plan import Column
from actdump.reader.keys import is_number, prompt_number

if TYPE_CHECKING:
    import numpy as np
    import torch

    from actdump.reader.dump import Dump


class Values:
    """The values of one tap. `values[i]` and `values["id"]` are a prompt's value, as if it had run alone, batch axis dropped."""

    def __init__(self, dump: "Dump", column: Column) -> None:
        self.dump = dump
        self.column = column

    def __len__(self) -> int:
        return self.dump.manifest.prompts

    @overload
    def __getitem__(self, key: SupportsIndex | str) -> "torch.Tensor": ...

    @overload
    def __getitem__(self, key: slice) -> "list[torch.Tensor]": ...

    def __getitem__(self, key: SupportsIndex | str | slice) -> "torch.Tensor | list[torch.Tensor]":
        """The value of a prompt by number or id, or a list of them for a slice.

        Raises:
            IndexError: there is no prompt of that number.
            UsageError: there is no prompt of that id.
        """
        if isinstance(key, slice):
            return [self[number] for number in range(*key.indices(len(self)))]
        number = prompt_number(key, self.dump)
        shard = self.dump.shard_of(number)
        rows = shard.prompt(self.column.name, number)
        tokens = shard.offsets(TOKENS)
        place = number - shard.shard.first
        return rows.reshape(self.column.layout.shape(tokens[place + 1] - tokens[place])).clone()

    def __iter__(self) -> "Iterator[torch.Tensor]":
        return (self[number] for number in range(len(self)))

    @property
    def rows(self) -> "Rows":
        """The rows of all prompts one after another."""
        return Rows(self.dump, self.column)

    def __repr__(self) -> str:
        layout = self.column.layout
        return f"Values({self.column.name!r}: {len(self)} prompts of {layout.words}, {layout.dtype})"


class Rows:
    """All rows of a tap across prompts and shards; `rows[a:b]` and `rows[numbers]` read what they need and nothing more."""

    def __init__(self, dump: "Dump", column: Column) -> None:
        self.dump = dump
        self.column = column
        self._firsts = [0]
        for shard in dump.manifest.shards:
            self._firsts.append(self._firsts[-1] + shard.rows[column.name])

    def __len__(self) -> int:
        return self._firsts[-1]

    @property
    def shape(self) -> tuple[int, ...]:
        """(rows, …)."""
        return (len(self), *self.column.layout.row)

    def __getitem__(self, key: "SupportsIndex | slice | Sequence[int] | torch.Tensor | np.ndarray") -> "torch.Tensor":
        """One row, of shape (…); or a range of rows, those of several numbers in any order, or those that a mask of all rows wants, of
        shape (rows, …). They are copies, in the storage type.

        Raises:
            IndexError: there is no such row, or the mask has another length.
            ValueError: a slice runs backwards.
            TypeError: the key is something else.
            DataError: a shard is missing, or not whole.
        """
        import torch

        if is_number(key):
            first = self._place(index(key))
            return next(self._pieces(first, first + 1))[0].clone()
        if not isinstance(key, slice):
            return self._gathered(self._places(key))
        first, last, step = key.indices(len(self))
        if step < 0:
            raise ValueError("rows cannot be read backwards")
        if step > 1:
            return self._gathered(range(first, last, step))
        pieces = list(self._pieces(first, last))
        empty = torch.empty((0, *self.column.layout.row), dtype=getattr(torch, self.column.layout.dtype))
        if len(pieces) == 1:
            return pieces[0].clone()
        return torch.cat(pieces) if pieces else empty

    def __repr__(self) -> str:
        return f"Rows({self.column.name!r}: {self.shape}, {self.column.layout.dtype})"

    def where(self, row: int) -> tuple[int, int]:
        """The number of the prompt that a row belongs to, and which of the prompt's rows it is: with all tokens, its token.

        Raises:
            IndexError: there is no such row.
        """
        row = self._place(index(row))
        place = bisect_right(self._firsts, row) - 1
        shard = self.dump.shard_at(place)
        offsets = shard.offsets(self.column.name)
        prompt = bisect_right(offsets, row - self._firsts[place]) - 1
        return shard.shard.first + prompt, row - self._firsts[place] - offsets[prompt]

    def _place(self, number: int) -> int:
        if not -len(self) <= number < len(self):
            raise IndexError(f"there is no row {number}; the tap has {len(self)}")
        return number % len(self)

    def _places(self, key: Any) -> list[int]:
        """The numbers of rows that were given in a list, a tensor or an array of one axis, or those where it holds `True`."""
        import torch

        numbers = key.tolist() if isinstance(key, torch.Tensor) or hasattr(key, "__array__") else key
        if isinstance(numbers, list) and numbers and all(isinstance(number, bool) for number in numbers):
            if len(numbers) != len(self):
                raise IndexError(f"there are {len(self)} rows, and the mask has {len(numbers)} entries")
            return [place for place, wanted in enumerate(numbers) if wanted]
        if not isinstance(numbers, list | range) or not all(map(is_number, numbers)):
            raise TypeError(f"rows are taken by a number, a slice, or a list, tensor or array of numbers, not by {key!r}")
        return [self._place(index(number)) for number in numbers]

    def _gathered(self, places: Sequence[int]) -> "torch.Tensor":
        """Rows in the order of their numbers in `places`, taken together from each shard."""
        import torch

        rows = torch.empty((len(places), *self.column.layout.row), dtype=getattr(torch, self.column.layout.dtype))
        numbers, targets = torch.tensor(places, dtype=torch.long).sort()
        bounds = torch.searchsorted(numbers, torch.tensor(self._firsts)).tolist()
        for place, (begin, end) in enumerate(pairwise(bounds)):
            if begin < end:
                first, last = self._firsts[place : place + 2]
                there = self._bytes(self.dump.shard_at(place).rows(self.column.name, 0, last - first))
                self._bytes(rows)[targets[begin:end]] = there[numbers[begin:end] - first]
        return rows

    def _bytes(self, rows: "torch.Tensor") -> "torch.Tensor":
        """Rows as bytes, which torch can gather, whatever their type is."""
        import torch

        return rows.reshape(len(rows), math.prod(self.column.layout.row)).view(torch.uint8)

    def _pieces(self, first: int, last: int) -> "Iterator[torch.Tensor]":
        """The rows from one number to another, as each shard has them."""
        for place in range(bisect_right(self._firsts, first) - 1, len(self.dump.manifest.shards)):
            begin, end = max(first, self._firsts[place]), min(last, self._firsts[place + 1])
            if begin >= last:
                return
            if begin < end:
                shard = self.dump.shard_at(place)
                yield shard.rows(self.column.name, begin - self._firsts[place], end - self._firsts[place])
