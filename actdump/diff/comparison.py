"""What two dumps have in common, and how far apart they are there."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from actdump.errors import UsageError, few

NAMED = 5  # prompts that are told by name


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
