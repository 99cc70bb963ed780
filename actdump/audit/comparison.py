"""The audit: prompts run alone, compared with what the files of a dump hold."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from math import inf
from time import monotonic
from typing import Any

import torch
from torch import Tensor, nn

from actdump.audit import alone
from actdump.audit.alone import Alone, Noise
from actdump.audit.choice import Choice
from actdump.audit.limits import errors, limit
from actdump.audit.place import Place, find
from actdump.errors import DataError
from actdump.format import TOKENS
from actdump.memory import reworded
from actdump.reader import Dump, Values

# The second look: how far does the model itself move a token when each leaf's output is disturbed by so many spacings of its dtype?
# With one spacing, the real drift was at the median 0.2 to 0.5 of that movement in bfloat16, 1.0 at the 99th percentile and 2.5 at
# worst (SmolLM2 and tiny GPT-2, Llama, Mixtral; float32 alike in the tiny ones), so that twice the largest of a few movements holds
# it. The larger ones are for steps, as a router's, that small noise may miss.
SCALES = (1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 4.0, 4.0)
FACTOR = 2.0
FEW = 8  # tokens whose median says nothing
MOST = 8  # faults that are told in full


@dataclass(frozen=True)
class Tally:
    """What was found at one tap, over all tokens of the audited prompts.

    Attributes:
        limit: the largest relative error that needs no second look.
        worst, median: of the relative errors.
        exact, drift, wrong: how many tokens have the very value, differ as another batch shape explains, or are wrong.
        unstable: how many of those with drift passed the limit, but the model itself moves as much there when its rounding is
            disturbed: a router's scores are nearly tied, say.
        witnessed: whether `hidden_states` held the value too.
    """

    name: str
    limit: float
    worst: float
    median: float
    exact: int
    drift: int
    unstable: int
    wrong: int
    witnessed: bool


@dataclass(frozen=True)
class Audit:
    """What an audit found.

    Attributes:
        prompts, padded: the numbers of the prompts that were run alone, and of those that were padded in their batch.
        taps: what was found at each.
        seconds: how long it took.
        faults: what is wrong, in words, a line each; none if all is well.
    """

    prompts: tuple[int, ...]
    padded: tuple[int, ...]
    taps: tuple[Tally, ...]
    seconds: float
    faults: tuple[str, ...] = ()

    @property
    def told(self) -> str:
        """What is wrong, a few lines of it."""
        more = len(self.faults) - MOST
        return "\n".join([*self.faults[:MOST], *([f"and {more} more like these"] if more > 0 else [])])


def to_json(audit: Audit) -> dict[str, Any]:
    """An audit as it stands in a manifest."""
    plain = asdict(audit)
    del plain["faults"]
    return plain


def compare(dump: Dump, model: nn.Module, choice: Choice, check_stop: Callable[[], None] = lambda: None) -> Audit:
    """Run the chosen prompts of a dump alone, and compare.

    Args:
        dump: a finished one, or one that is about to be sealed.
        model: in evaluation mode, on its device.
        check_stop: called before each forward; it raises to end the audit.

    Raises:
        AddressError: the model does not have the modules of the dump's taps.
        DataError: a tap of the model holds something else than the dump says, or a shard cannot be read.
    """
    began = monotonic()
    tallies = [_Tallying(place) for place in find(model, dump.manifest.columns)]
    ids = {number: dump.shard_of(number).prompt(TOKENS, number).tolist() for number in choice.numbers}
    shortest = min(ids, key=lambda number: len(ids[number]))  # its forward goes to the end, the others stop at the last tap
    for number in ids:
        _compare(dump, model, tallies, number, ids[number], check_stop, witness=number == shortest)
    faults = tuple(fault for tally in tallies for fault in tally.faults)
    seconds = round(monotonic() - began, 3)
    return Audit(choice.numbers, choice.padded, tuple(tally.result for tally in tallies), seconds, faults)


@dataclass
class _Tallying:
    """A tally that grows by a prompt at a time."""

    place: Place
    limit: float = 0.0
    errors: list[Tensor] = field(default_factory=list)
    unstable: int = 0
    wrong: int = 0
    witnessed: bool = False
    faults: list[str] = field(default_factory=list)

    @property
    def result(self) -> Tally:
        found = torch.cat(self.errors)
        exact = int((found == 0).sum())
        worst, median = (float(found.max()), float(found.median())) if len(found) else (0.0, 0.0)
        drift = len(found) - exact - self.wrong
        name = self.place.column.name
        return Tally(name, self.limit, worst, median, exact, drift, self.unstable, self.wrong, self.witnessed)


def _compare(
    dump: Dump,
    model: nn.Module,
    tallies: Sequence[_Tallying],
    number: int,
    ids: Sequence[int],
    check_stop: Callable[[], None],
    *,
    witness: bool,
) -> None:
    """Run one prompt alone, and class each of its tokens at every tap."""
    check_stop()
    places = [tally.place for tally in tallies]
    with reworded(partial(_not_alone, number, len(ids))):
        plain = alone.run(model, places, ids, witness=witness)
    doubtful: dict[int, Tensor] = {}
    dtypes = {parameter.dtype for parameter in model.parameters()}
    for at, (tally, value, computed) in enumerate(zip(tallies, plain.values, plain.computed, strict=True)):
        stored = Values(dump, tally.place.column)[number]
        found = errors(stored, value, tally.place.column.token_axis)
        tally.limit = limit(computed, dtypes, value.dtype)
        tally.errors.append(found)
        if (found > tally.limit).any():
            doubtful[at] = found
        if witness:
            _hear(tally, plain.witnesses[at])
    if doubtful:
        check_stop()
        for at in _unsteady(tallies, doubtful, plain, alone.run(model, places, ids), number):
            del doubtful[at]
    limits = [tally.limit for tally in tallies]
    for at, moves in _movement(model, places, ids, plain, doubtful, limits, check_stop).items():
        _class(dump, tallies[at], number, len(ids), doubtful[at], moves)


def _not_alone(number: int, tokens: int, error: Exception) -> DataError:
    return DataError(
        f"the audit: prompt {number} of {tokens:,} tokens does not run alone, under plain hooks: {type(error).__name__}: {error}; "
        "`audit: 0` keeps the dump without it"
    )


def _unsteady(
    tallies: Sequence[_Tallying], doubtful: Mapping[int, Tensor], plain: Alone, again: Alone, number: int
) -> list[int]:
    """The doubtful taps that the model computes otherwise each time, as with hashes drawn at random: nothing can be said of them."""
    found = []
    for at, seen in doubtful.items():
        tally = tallies[at]
        apart = errors(again.values[at], plain.values[at], tally.place.column.token_axis)
        if (apart > tally.limit).any():
            found.append(at)
            tally.wrong += int((seen > tally.limit).sum())
            tally.faults.append(
                f"{tally.place.column.name}: prompt {number}: the model itself computes other values each time, off by "
                f"{float(apart.max()):.2g} of their size from one plain forward to the next, so nothing can be said of those in the "
                "files; `audit: 0` keeps them all the same"
            )
    return found


def _hear(tally: _Tallying, witnesses: Sequence[int]) -> None:
    """Hear the second witness: `hidden_states` says of which blocks a value is the output."""
    block = tally.place.block
    if block is None or not witnesses:
        return
    tally.witnessed = block in witnesses
    if not tally.witnessed:
        tally.faults.append(
            f"{tally.place.column.name}: the model's own hidden_states say that this is the output of block {witnesses[0]}, "
            f"and the address says {block}"
        )


@dataclass(frozen=True)
class _Movement:
    """How far the model itself moves each token of a tap when its rounding is disturbed.

    Attributes:
        most: the farthest that each was seen to move.
        usual: the median over the tokens at the smallest disturbance; it tells nothing of integers, most of which stay as they are.
    """

    most: Tensor
    usual: float

    def explains(self, found: Tensor, limit: float) -> Tensor:
        """The tokens whose errors it explains. None, where the tokens are off as a whole and not here and there."""
        whole = len(found) >= FEW and float(found.median()) > max(limit, FACTOR * self.usual)
        return torch.zeros_like(found, dtype=torch.bool) if whole else found <= FACTOR * self.most


def _movement(
    model: nn.Module,
    places: Sequence[Place],
    ids: Sequence[int],
    plain: Alone,
    doubtful: Mapping[int, Tensor],
    limits: Sequence[float],
    check_stop: Callable[[], None],
) -> dict[int, _Movement]:
    """How far the model itself moves each token of the doubtful taps, until that explains them."""
    moves: dict[int, _Movement] = {}
    for seed, scale in enumerate(SCALES):
        if all(at in moves and moves[at].explains(found, limits[at]).all() for at, found in doubtful.items()):
            break
        check_stop()
        moved = alone.run(model, places, ids, noise=Noise(seed, scale))
        for at in doubtful:
            value = moved.values[at]
            seen = errors(value, plain.values[at], places[at].column.token_axis)
            usual = float(seen.median()) if value.is_floating_point() else inf
            before = moves.get(at, _Movement(seen, usual))
            moves[at] = _Movement(
                torch.maximum(before.most, seen), max(before.usual, usual) if scale == SCALES[0] else before.usual
            )
    return moves


def _class(dump: Dump, tally: _Tallying, number: int, tokens: int, found: Tensor, moves: _Movement) -> None:
    wrong = (found > tally.limit) & ~moves.explains(found, tally.limit)
    tally.unstable += int(((found > tally.limit) & ~wrong).sum())
    if not wrong.any():
        return
    tally.wrong += int(wrong.sum())
    row = int(torch.where(wrong, found, -1.0).argmax())
    others = f"; {int(wrong.sum())} of the prompt's {len(found)} values there are wrong" if len(found) > 1 else ""
    tally.faults.append(
        f"{tally.place.column.name}: prompt {number} (`{dump.prompts[number].id}`), {tally.place.words(row, tokens)}: off by "
        f"{found[row]:.2g} of its size from the prompt run alone, where {tally.limit:.2g} is allowed and the model itself moves "
        f"by {moves.most[row]:.2g}{others}"
    )
