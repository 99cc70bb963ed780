"""What captured rows look like, measured where they are: on their device, before they leave it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import torch
from torch import Tensor

from actdump.plan import Layout
from actdump.statistics import POSITIONS, Statistics

CANCELLED = 1e-3  # of the mean square: a variance below that is looked for in the values
_WIDE = (torch.float32, torch.float64)


class Early:
    """Which rows are of the first tokens of prompts, told by the place of each row's token in its prompt."""

    def __init__(self, places: "np.ndarray") -> None:
        self._rows = np.flatnonzero(places < POSITIONS)
        self._places = places[self._rows]
        self._counts: list[int] = np.bincount(self._places, minlength=POSITIONS).tolist()

    def summed(self, norms: "np.ndarray", whole: "np.ndarray | None") -> tuple[list[int], list[float]]:
        """How many rows each of the first places has, and the sums of their norms; of those alone that are whole, if some are not."""
        if whole is None:
            return self._counts, np.bincount(self._places, norms[self._rows], POSITIONS).tolist()
        counted = whole[self._rows]
        places = self._places[counted]
        return np.bincount(places, minlength=POSITIONS).tolist(), np.bincount(
            places, norms[self._rows[counted]], POSITIONS
        ).tolist()


@dataclass(frozen=True)
class Measured:
    """Figures of the rows of one batch at one site, still on the device.

    Attributes:
        early: which rows are of the first tokens of prompts; `None` where a row is no token.
        shape: how many vectors of how many values.
        norms: the Euclidean norm of each vector, float32 or float64; of its finite values, where some are not.
        figures: the sum of all values, the largest absolute one, how many are not finite, how many were too large for the cast,
            and the largest finite absolute value before the cast (0 where the cast lost none, on a CPU). On an accelerator none is
            counted as not finite: a norm tells that some are, and `landed` counts them.
        whole: which vectors are finite throughout; `None` where nobody looked at each, because all are, or nobody did yet.
        spread: the variance of the finite values, where norms and sum do not tell it, because their squares cancel.
    """

    layout: Layout
    early: Early | None
    shape: tuple[int, int]
    norms: Tensor
    figures: Tensor
    whole: Tensor | None = None
    spread: float | None = None

    @property
    def nonfinite(self) -> int:
        """How many values are NaN or infinite."""
        return int(self.figures[2])

    @property
    def lost(self) -> int:
        """How many values were too large for the cast; an infinite one is where the type has no infinity."""
        return int(self.figures[3])

    @property
    def reach(self) -> float:
        """The largest finite absolute value before the cast, where it lost any."""
        return float(self.figures[4])

    def landed(self, stored: Tensor) -> "Measured":
        """The figures on the CPU, where the rows are now. Where a norm is not finite, what is not is counted here; or only squares
        overflowed."""
        norms, figures, whole = self.norms.cpu(), self.figures.cpu(), self.whole
        if not bool(norms.sum().isfinite()):
            norms, whole, counted = _with_care(_vectors(stored, self.layout))
            figures = torch.stack([*(each.double() for each in counted), *figures[3:].double()])
        return replace(self, norms=norms, figures=figures, whole=whole).settled(stored)

    def settled(self, stored: Tensor) -> "Measured":
        """With the variance, where only a look at the rows tells it. All must be on the CPU.

        What float32 norms say of squares is good to seven digits, and a mean that is a hundred times the deviation takes four of them.
        """
        norms, (finite, mean) = self.norms.double(), self._mean
        square = float(norms.dot(norms)) / finite if finite else 0.0
        if square - mean * mean > CANCELLED * square or not math.isfinite(square):
            return self
        values = _vectors(stored, self.layout)
        return replace(self, spread=float(values[values.isfinite()].double().var(correction=0))) if finite else self

    @property
    def _mean(self) -> tuple[int, float]:
        """How many values are finite, and their mean."""
        finite = self.shape[0] * self.shape[1] - self.nonfinite
        return finite, float(self.figures[0]) / finite if finite else 0.0

    def statistics(self) -> Statistics:
        """The figures as statistics; they must be on the CPU."""
        _, largest, nonfinite = self.figures[:3].tolist()
        norms = self.norms.double().numpy()
        finite, mean = self._mean
        spread = self.spread
        if spread is None:
            spread = float(norms.dot(norms)) / finite - mean * mean if finite else 0.0
        flat, whole = self.layout.flat, None if self.whole is None else self.whole.numpy()
        rows, sums = self.early.summed(norms, whole) if self.early is not None else ([], [])
        normed = norms if whole is None else norms[whole]
        return Statistics(
            rows=self.shape[1] if flat else self.shape[0],
            values=self.shape[0] * self.shape[1],
            nonfinite=int(nonfinite),
            mean=_held(mean),
            std=math.sqrt(max(_held(spread), 0.0)),
            norm=None if flat else _held(normed.mean().item()) if len(normed) else 0.0,
            largest=largest,
            rows_by_position=tuple(rows),
            norm_by_position=tuple(_held(each / max(count, 1)) for each, count in zip(sums, rows, strict=True)),
            rows_nonfinite=0 if flat else len(norms) - len(normed),
        )


def _held(figure: float) -> float:
    """A figure, or NaN where float64 does not hold it."""
    return figure if math.isfinite(figure) else math.nan


def measure(stored: Tensor, computed: Tensor, layout: Layout, early: Early | None) -> Measured:
    """Measure rows that are on their way into a file.

    On an accelerator nothing waits for an answer: three looks at the rows, and some more at those that a cast made narrower.

    Args:
        stored: the rows as they are stored, floating point.
        computed: the rows before the cast; the same tensor where there was none.
        early: which rows are of the first tokens of prompts; `None` where a row is no token.
    """
    vectors = _vectors(stored, layout)
    exact = torch.float64 if vectors.dtype == torch.float64 else torch.float32
    norms = torch.linalg.vector_norm(vectors, dim=1, dtype=exact)
    nonfinite = lost = reach = norms.new_zeros(())
    whole = None
    # Two finite numbers prove that every value is finite, and spare a look at each. On an accelerator asking would be a wait.
    sound = vectors.is_cpu and bool(norms.sum().isfinite())
    if computed is not stored and not (sound and _has_infinity(stored.dtype)):
        lost, reach = _lost(vectors, computed, stored.dtype)
    if sound or not vectors.is_cpu:
        total, largest = vectors.sum(dtype=exact), _largest(vectors)
    else:
        norms, whole, (total, largest, nonfinite) = _with_care(vectors)
    kind = torch.float64 if vectors.is_cpu else exact  # not every accelerator knows float64
    figures = torch.stack([figure.to(kind) for figure in (total, largest, nonfinite, lost, reach)])
    measured = Measured(layout, early, (vectors.shape[0], vectors.shape[1]), norms, figures, whole)
    return measured.settled(stored) if vectors.is_cpu else measured


def _vectors(stored: Tensor, layout: Layout) -> Tensor:
    """The rows as vectors of a type to compute with; a flat value has no rows, and is one vector."""
    width = stored.numel() if layout.flat else math.prod(layout.row)
    vectors = stored.reshape(stored.numel() // max(width, 1), width)
    # Kernels of accelerators widen what they read; those of CPUs are slower than a copy.
    able = _WIDE if vectors.is_cpu else (*_WIDE, torch.bfloat16, torch.float16)
    return vectors if vectors.dtype in able else vectors.float()


def _largest(values: Tensor) -> Tensor:
    if not values.numel():
        return values.new_zeros(())
    low, high = values.aminmax()
    return torch.maximum(-low, high)


@cache
def _has_infinity(dtype: torch.dtype) -> bool:
    """Whether what is too large for a type becomes infinite in it. `float8_e4m3fn` has no infinity: its largest value stands there."""
    return bool(torch.tensor(math.inf, device="cpu").to(dtype).float().isinf())


@cache
def _most(dtype: torch.dtype) -> float:
    """The largest value that is rounded to one of that type; half a spacing beyond its largest."""
    kind = torch.finfo(dtype)
    return kind.max + 2.0 ** math.floor(math.log2(kind.max)) * kind.eps / 2


def _lost(vectors: Tensor, computed: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """How many values were too large for the cast, and the largest finite absolute value before it."""
    sound = computed.isfinite()
    infinite = _has_infinity(dtype)
    lost = sound & ~vectors.isfinite().reshape(computed.shape) if infinite else computed.abs() > _most(dtype)
    return lost.sum(), _largest(torch.where(sound, computed, 0))


def _with_care(vectors: Tensor) -> tuple[Tensor, Tensor, Sequence[Tensor]]:
    """Norms; which vectors are finite throughout; and sum, largest absolute value, and number of the values that are not finite, which
    are left out of all else.

    On the CPU, because in float64: squares may overflow too, and not every accelerator knows that type.
    """
    finite = vectors.isfinite()
    kept = torch.where(finite, vectors, 0).double()
    return torch.linalg.vector_norm(kept, dim=1), finite.all(1), (kept.sum(), _largest(kept), (~finite).sum())
