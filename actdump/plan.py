"""The plan: taps, parts and the digest of all that decides the bytes. Pure: no files, no model, no clock."""

import hashlib
import json
import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any

from actdump.address import Slice

ITEM_BYTES = {
    "float64": 8, "int64": 8, "uint64": 8, "float32": 4, "int32": 4, "uint32": 4, "float16": 2, "bfloat16": 2, "int16": 2,
    "uint16": 2, "int8": 1, "uint8": 1, "bool": 1, "float8_e4m3fn": 1, "float8_e5m2": 1,
}  # fmt: skip

# Beside its tokens, a forward costs a tenth of what the tokens of a full batch do. About that was measured, on CPUs and on a GPU.
FORWARD = 10


@dataclass(frozen=True)
class Layout:
    """What one prompt gives at a tap.

    Attributes:
        dims: the axes of one prompt's value, the batch axis dropped. A number is a fixed size; a slice is the
            positions that it picks from the prompt's tokens.
        dtype: the storage type, by torch's name.
    """

    dims: tuple[int | Slice, ...]
    dtype: str

    @cached_property
    def ragged(self) -> int:
        """How many axes depend on the number of tokens."""
        return sum(isinstance(dim, Slice) for dim in self.dims)

    @cached_property
    def flat(self) -> bool:
        """Whether values are stored as bare elements, because more than the leading axis is ragged."""
        return self.ragged > 1 or (self.ragged == 1 and not isinstance(self.dims[0], Slice))

    @cached_property
    def row(self) -> tuple[int, ...]:
        """The shape of one stored row: `(rows, *row)` is the shape of the tensor in a shard."""
        if self.flat:
            return ()
        return tuple(dim for dim in self.dims if isinstance(dim, int))

    @property
    def words(self) -> str:
        """What one prompt gives, in words: `(tokens, 768)`."""
        dims = [str(dim) if isinstance(dim, int) else "tokens" if dim == Slice() else f"tokens[{dim}]" for dim in self.dims]
        return "(" + ", ".join(dims) + ("," if len(dims) == 1 else "") + ")"

    def shape(self, tokens: int) -> tuple[int, ...]:
        """The shape of the value of a prompt with that many tokens."""
        return tuple(len(dim.of(tokens)) if isinstance(dim, Slice) else dim for dim in self.dims)

    def rows(self, tokens: int) -> int:
        """How many rows a prompt with that many tokens takes in a shard."""
        if self.flat:
            return math.prod(self.shape(tokens))
        return self.shape(tokens)[0] if self.ragged else 1

    @cached_property
    def row_bytes(self) -> int:
        """The size of one stored row."""
        return math.prod(self.row) * ITEM_BYTES[self.dtype]

    def bytes(self, tokens: int) -> int:
        """How many bytes a prompt with that many tokens takes in a shard, its offset apart."""
        return self.rows(tokens) * self.row_bytes


@dataclass(frozen=True)
class Column:
    """A tap as it stands in a dump.

    Attributes:
        name: the name in the files.
        address: the address as the user spelt it; of a pattern's taps, the resolved one.
        resolved: the address with every index counted from the start.
        module: the class of the module.
        form: what the module returned or was given at the port, in words: `tensor`, `tuple of 2`.
        tokens: the selection as text: `all`, `last`, `[0, -1]`, `2:5`.
        call: which call of the module, where it runs more than once.
        axes: the axes of what the module holds, in words: `("batch", "token", "768")`.
        layout: what one prompt gives.
        token_axis: the axis of a prompt's value that counts its tokens, the query's in attention; `None` where the value is one whole.
    """

    name: str
    address: str
    resolved: str
    module: str
    form: str
    tokens: str
    call: int | None
    axes: tuple[str, ...]
    layout: Layout
    token_axis: int | None


@dataclass(frozen=True)
class Span:
    """The prompts of one shard: consecutive, `first` to `first + prompts - 1`."""

    number: int
    first: int
    prompts: int
    tokens: int
    bytes: int


@dataclass(frozen=True)
class Part:
    """The unit of work, of resuming, and of sharing out among workers: the prompts of a few consecutive shards.

    Its prompts are sorted and batched together, and so a shard can be small and few tokens padding.
    """

    number: int
    shards: tuple[Span, ...]

    @property
    def first(self) -> int:
        return self.shards[0].first

    @property
    def prompts(self) -> int:
        return sum(shard.prompts for shard in self.shards)

    @property
    def tokens(self) -> int:
        return sum(shard.tokens for shard in self.shards)

    @property
    def bytes(self) -> int:
        return sum(shard.bytes for shard in self.shards)


@dataclass(frozen=True)
class Budget:
    """How large a batch may be, in padded tokens and in prompts."""

    tokens: int
    prompts: int | None = None


@dataclass(frozen=True)
class Batch:
    """Prompts that pass through the model together.

    Attributes:
        numbers: the prompts' numbers.
        ids: the token ids of each.
    """

    numbers: tuple[int, ...]
    ids: tuple[Sequence[int], ...]

    @property
    def lengths(self) -> tuple[int, ...]:
        """The number of tokens of each prompt."""
        return tuple(map(len, self.ids))


@dataclass(frozen=True)
class Plan:
    """All that is decided before the first forward; the same for any number of workers, on every machine with this kind of device.

    Attributes:
        digest: sha256 of all that decides the bytes.
        facts: what the plan was made from: the spec, the inputs' hashes, the model, the tokens.
        columns: the taps with what one prompt gives at each.
        parts: what is done, and shared out, as a whole.
        budget: how large a batch may be.
    """

    digest: str
    facts: Mapping[str, Any]
    columns: tuple[Column, ...]
    parts: tuple[Part, ...]
    budget: Budget

    @cached_property
    def shards(self) -> tuple[Span, ...]:
        """The shards of all parts."""
        return tuple(shard for part in self.parts for shard in part.shards)

    @property
    def prompts(self) -> int:
        return sum(shard.prompts for shard in self.shards)

    @property
    def tokens(self) -> int:
        return sum(shard.tokens for shard in self.shards)

    @property
    def bytes(self) -> int:
        return sum(shard.bytes for shard in self.shards)

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """How many tokens the parts before each part have."""
        return tuple(accumulate((part.tokens for part in self.parts), initial=0))


def parts(
    columns: Sequence[Column], lengths: Sequence[int], *, most_bytes: int, most_tokens: int, most_shards: int
) -> tuple[Part, ...]:
    """Cut prompts into parts.

    Args:
        most_bytes: of a shard. A prompt that alone passes it has a shard of its own.
        most_tokens: of a part. A prompt that alone passes it has a part of its own.
        most_shards: of a part.
    """
    cut: list[list[Span]] = []
    tokens = 0
    for shard in _spans(columns, lengths, most_bytes, most_tokens):
        if not cut or len(cut[-1]) == most_shards or tokens + shard.tokens > most_tokens:
            cut.append([])
            tokens = 0
        cut[-1].append(shard)
        tokens += shard.tokens
    return tuple(Part(number, tuple(shards)) for number, shards in enumerate(cut))


def _spans(columns: Sequence[Column], lengths: Sequence[int], most_bytes: int, most_tokens: int) -> Iterator[Span]:
    """Cut prompts into shards: consecutive prompts, up to a number of bytes and of tokens."""
    costs: dict[int, int] = {}
    number = first = tokens = size = 0
    for prompt, length in enumerate(lengths):
        if (cost := costs.get(length)) is None:
            cost = costs[length] = prompt_bytes(columns, length)
        if prompt > first and (size + cost > most_bytes or tokens + length > most_tokens):
            yield Span(number, first, prompt - first, tokens, size)
            number, first, tokens, size = number + 1, prompt, 0, 0
        tokens += length
        size += cost
    if first < len(lengths):
        yield Span(number, first, len(lengths) - first, tokens, size)


def make(facts: Mapping[str, Any], columns: Sequence[Column], parts: Sequence[Part], budget: Budget) -> Plan:
    """Make the plan.

    Args:
        facts: JSON-able; whatever else decides the bytes (spec, hashes of the inputs, hash of the tokens).
    """
    decided = {
        "facts": facts,
        "columns": [_plain(column) for column in columns],
        "parts": [[number for shard in part.shards for number in (shard.first, shard.prompts)] for part in parts],
        "budget": [budget.tokens, budget.prompts],
    }
    return Plan(digest(decided), facts, tuple(columns), tuple(parts), budget)


def digest(value: object) -> str:
    """sha256 of a JSON-able value, the same however its mappings are ordered."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _plain(column: Column) -> list[object]:
    layout = column.layout
    return [column.name, column.resolved, column.tokens, column.call, [str(dim) for dim in layout.dims], layout.dtype]


def prompt_bytes(columns: Sequence[Column], length: int) -> int:
    """What a prompt of that many tokens adds to a shard: its rows, its token ids, and an offset for each of them."""
    return sum(column.layout.bytes(length) + 8 for column in columns) + 4 * length + 8


def batches(lengths: Sequence[int], budget: Budget) -> list[list[int]]:
    """Cut the prompts of a part into batches: places in `lengths`, longest first, up to the budget of padded tokens.

    Of the cuts after the last prompt of a length, or where a batch is full, it is the one that costs least (see `FORWARD`). Cut only
    where batches are full, prompts of 5 to 400 tokens have a sixth to a third more padding. The cut is the same wherever it is made: by
    length, then by place.
    """
    order = sorted(range(len(lengths)), key=lambda place: (-lengths[place], place))
    count = len(order)
    ends = [end for end in range(1, count + 1) if end == count or lengths[order[end]] < lengths[order[end - 1]]]
    # For the prompts up to each place: what the best cut of them costs, and where its last batch begins.
    best: list[tuple[float, int]] = [(0, 0), *[(math.inf, 0)] * count]
    for begin, place in enumerate(order):
        before, _ = best[begin]
        if before == math.inf:  # no batch ends here
            continue
        width = lengths[place]
        full = min(count, begin + max(1, min(budget.prompts or count, budget.tokens // width)))
        for end in (*ends[bisect_right(ends, begin) : bisect_left(ends, full)], full):
            best[end] = min(best[end], (before + width * (end - begin) + budget.tokens / FORWARD, begin))
    cut: list[list[int]] = []
    while count:
        _, begin = best[count]
        cut.append(order[begin:count])
        count = begin
    return cut[::-1]


def widest(lengths: Iterable[int], budget: Budget) -> int:
    """How many tokens wide a batch with padding can be, at most, however the prompts stand in parts; 0 where none has padding.

    `batches` puts no two lengths together that lie further apart than what a forward costs.
    """
    different = sorted(set(lengths), reverse=True)
    near = (
        longer
        for longer, shorter in pairwise(different)
        if 2 * longer <= budget.tokens and longer - shorter <= budget.tokens / FORWARD
    )
    return next(near, 0) if budget.prompts != 1 else 0


def padded(lengths: Sequence[int], cut: Sequence[Sequence[int]]) -> int:
    """How many tokens the batches compute, padding included."""
    return sum(len(batch) * max(lengths[place] for place in batch) for batch in cut)
