"""Which prompts are audited: as good as random, the same for the same plan, and one that was padded where any was."""

import hashlib
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from actdump.format import TOKENS
from actdump.plan import Part, Plan, batches
from actdump.reader import Dump


@dataclass(frozen=True)
class Choice:
    """Prompts to audit.

    Attributes:
        numbers: in the order of the dump.
        padded: those among them that were padded in their batch.
    """

    numbers: tuple[int, ...]
    padded: tuple[int, ...]


def choose(dump: Dump, plan: Plan, count: int) -> Choice:
    """Choose that many prompts by the plan's digest, or all where there are no more."""

    def lengths(part: Part) -> list[int]:
        each = (dump.shard_of(shard.first).offsets(TOKENS) for shard in part.shards)
        return [last - first for offsets in each for first, last in pairwise(offsets)]

    numbers = _drawn(plan, min(count, plan.prompts))
    firsts = [part.first for part in plan.parts]
    inside = {part.number: part for number in numbers for part in [plan.parts[bisect_right(firsts, number) - 1]]}
    padded = {number for part in inside.values() for number in _padded(plan, part, lengths(part))}
    if numbers and not padded.intersection(numbers) and (other := _any_padded(plan, lengths)) is not None:
        numbers[-1], padded = other, {other}
    return Choice(tuple(sorted(numbers)), tuple(sorted(padded.intersection(numbers))))


def _drawn(plan: Plan, count: int) -> list[int]:
    if count == plan.prompts:
        return list(range(count))
    drawn: dict[int, None] = {}
    turn = 0
    while len(drawn) < count:
        drawn[_draw(plan, turn, plan.prompts)] = None
        turn += 1
    return list(drawn)


def _draw(plan: Plan, turn: int, below: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{plan.digest} {turn}".encode()).digest()) % below


def _padded(plan: Plan, part: Part, lengths: Sequence[int]) -> Iterator[int]:
    """The prompts of a part that are shorter than the longest of their batch."""
    for batch in batches(lengths, plan.budget):
        width = max(lengths[place] for place in batch)
        yield from (part.first + place for place in batch if lengths[place] < width)


def _any_padded(plan: Plan, lengths: Callable[[Part], Sequence[int]]) -> int | None:
    start = _draw(plan, -1, len(plan.parts))
    for part in (*plan.parts[start:], *plan.parts[:start]):
        if found := sorted(_padded(plan, part, lengths(part))):
            return found[_draw(plan, -2, len(found))]
    return None
