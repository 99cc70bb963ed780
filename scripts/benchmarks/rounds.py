"""Measuring several things side by side: in turns, so that whatever else the machine does meets all of them alike."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import Literal

Run = Callable[[], float]  # does it once, and says how long it took, in seconds


@dataclass(frozen=True)
class Goal:
    """What a figure should be."""

    kind: Literal["at most", "at least"]
    value: float

    def met(self, value: float) -> bool:
        return value <= self.value if self.kind == "at most" else value >= self.value

    def __str__(self) -> str:
        return f"{self.kind} {self.value:g}"


@dataclass(frozen=True)
class Figure:
    """One line of the results.

    Attributes:
        name: what was measured: `A, mixed, float32: actdump / limit`.
        value: the median of the rounds; of a ratio, that of the medians.
        each: the figure of each round.
    """

    name: str
    value: float
    unit: str
    each: tuple[float, ...] = ()
    goal: Goal | None = None


def in_turns(sides: Mapping[str, Run], rounds: int) -> dict[str, tuple[float, ...]]:
    """Run every side in every round. The order is turned round by round, forwards and then backwards, so none is always first."""
    taken: dict[str, list[float]] = {name: [] for name in sides}
    names = list(sides)
    for number in range(rounds):
        shift = number // 2 % len(names)
        order = names[shift:] + names[:shift]
        for name in order if number % 2 == 0 else reversed(order):
            taken[name].append(sides[name]())
    return {name: tuple(seconds) for name, seconds in taken.items()}


def timed(do: Callable[[], object]) -> Run:
    """A side that is timed from call to return."""

    def run() -> float:
        began = perf_counter()
        do()
        return perf_counter() - began

    return run


def ratio(name: str, taken: Mapping[str, tuple[float, ...]], over: str, under: str, goal: Goal | None = None) -> Figure:
    """How many times as long one side takes as another."""
    each = tuple(first / second for first, second in zip(taken[over], taken[under], strict=True))
    return Figure(name, median(taken[over]) / median(taken[under]), "×", each, goal)


def seconds(name: str, taken: tuple[float, ...], goal: Goal | None = None) -> Figure:
    """How long one side takes."""
    return Figure(name, median(taken), "s", taken, goal)


def times(taken: Mapping[str, tuple[float, ...]], where: str) -> list[Figure]:
    """How long each side takes."""
    return [seconds(f"{where}: {side}", each) for side, each in taken.items()]
