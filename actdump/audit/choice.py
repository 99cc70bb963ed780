"""Which prompts are audited: as good as random, the same for the same plan, and one that was padded much where any was."""

import hashlib
from bisect import bisect_right
from collections.abc import Callable, Sequence
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
    """Choose that many prompts by the plan's digest, the most padded of a part among them; or all, where there are no more."""

    def lengths(part: Part) -> list[int]:
        each = (dump.shard_of(shard.first).offsets(TOKENS) for shard in part.shards)
        return [last - first for offsets in each for first, last in pairwise(offsets)]

    numbers = _drawn(plan, min(count, plan.prompts))
    most = _most_padded(plan, lengths)
    if numbers and most is not None and most not in numbers:
        numbers[-1] = most
    firsts = [part.first for part in plan.parts]
    inside = {part.number: part for number in numbers for part in [plan.parts[bisect_right(firsts, number) - 1]]}
    padded = {number for part in inside.values() for number in _padding(plan, part, lengths(part))}
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


def _padding(plan: Plan, part: Part, lengths: Sequence[int]) -> dict[int, int]:
    """How many tokens fill up the rows of a part's prompts, of those that are shorter than the longest of their batch."""
    found: dict[int, int] = {}
    for batch in batches(lengths, plan.budget):
        width = max(lengths[place] for place in batch)
        found |= {part.first + place: width - lengths[place] for place in batch if lengths[place] < width}
    return found


def _most_padded(plan: Plan, lengths: Callable[[Part], Sequence[int]]) -> int | None:
    """The prompt with the most padding of a part, by which a fault of padding shows best; `None` where no prompt has any."""
    if plan.budget.prompts == 1:
        return None
    start = _draw(plan, -1, len(plan.parts))
    for part in (*plan.parts[start:], *plan.parts[:start]):
        if found := _padding(plan, part, lengths(part)):
            return max(found, key=lambda number: (found[number], number))
    return None
