"""The prompts and taps of two dumps, matched."""

from collections.abc import Iterator

from actdump.diff.comparison import Comparison, Counted, Limits
from actdump.diff.tally import Tally
from actdump.format import TOKENS
from actdump.plan import Column
from actdump.reader import Dump


def compare(one: Dump, other: Dump, limits: Limits) -> Comparison:
    """Compare two dumps, prompt by prompt in the order of the first; prompts are matched by id, taps by name.

    Raises:
        DataError: a shard is missing or cannot be read.
    """
    shared = [name for name in one.names if name in other.names]
    pairs = {name: (one[name].column, other[name].column) for name in shared}
    unlike = {name: why for name, pair in pairs.items() if (why := _unlike(*pair))}
    alike = [name for name in pairs if name not in unlike]
    tallies = [Tally(name, *pairs[name], limits, len(alike)) for name in alike]
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
