"""What captured rows look like, measured where they are: on their device, before they leave it."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import torch
from torch import Tensor

from actdump.plan import Layout
from actdump.statistics import POSITIONS, Statistics


class Early:
    """Which rows are of the first tokens of prompts, told by the place of each row's token in its prompt."""

    def __init__(self, places: "np.ndarray") -> None:
        self._rows = np.flatnonzero(places < POSITIONS)
        self._places = places[self._rows]
        self._counts: list[int] = np.bincount(self._places, minlength=POSITIONS).tolist()

    def summed(self, norms: "np.ndarray") -> tuple[list[int], list[float]]:
        """How many rows each of the first places has, and the sums of their norms."""
        return self._counts, np.bincount(self._places, norms[self._rows], POSITIONS).tolist()


@dataclass(frozen=True)
class Measured:
    """Figures of the rows of one batch at one site, still on the device.

    Attributes:
        early: which rows are of the first tokens of prompts; `None` where a row is no token.
        shape: how many vectors of how many values.
        norms: the Euclidean norm of each vector, float32.
        figures: the sum of all values, the largest absolute one, how many are not finite, how many were too large for the cast,
            and the largest finite absolute value before the cast (0 where the cast lost none, on a CPU).
    """

    layout: Layout
    early: Early | None
    shape: tuple[int, int]
    norms: Tensor
    figures: Tensor

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

    def moved(self, move: Callable[[Tensor], Tensor]) -> "Measured":
        """The same figures elsewhere."""
        return replace(self, norms=move(self.norms), figures=move(self.figures))

    def statistics(self) -> Statistics:
        """The figures as statistics; they must be on the CPU."""
        total, largest, nonfinite = self.figures[:3].tolist()
        norms = self.norms.double().numpy()
        finite = self.shape[0] * self.shape[1] - int(nonfinite)
        mean = total / finite if finite else 0.0
        spread = norms.dot(norms) / finite - mean * mean if finite else 0.0
        flat = self.layout.flat
        rows, sums = self.early.summed(norms) if self.early is not None else ([], [])
        return Statistics(
            rows=self.shape[1] if flat else self.shape[0],
            values=self.shape[0] * self.shape[1],
            nonfinite=int(nonfinite),
            mean=mean,
            std=math.sqrt(max(spread, 0.0)),
            norm=None if flat else norms.mean().item() if len(norms) else 0.0,
            largest=largest,
            rows_by_position=tuple(rows),
            norm_by_position=tuple(each / max(count, 1) for each, count in zip(sums, rows, strict=True)),
        )


def measure(stored: Tensor, computed: Tensor, layout: Layout, early: Early | None) -> Measured:
    """Measure rows that are on their way into a file.

    Args:
        stored: the rows as they are stored, floating point.
        computed: the rows before the cast; the same tensor where there was none.
        early: which rows are of the first tokens of prompts; `None` where a row is no token.
    """
    width = stored.numel() if layout.flat else math.prod(layout.row)
    vectors = stored.reshape(stored.numel() // max(width, 1), width)
    exact = vectors if vectors.dtype in (torch.float32, torch.float64) else vectors.float()
    norms = torch.linalg.vector_norm(exact, dim=1)
    # Two finite numbers prove that every value is finite, and spare a look at each. On an accelerator asking would be a wait.
    tells = computed is stored or _has_infinity(stored.dtype)
    if tells and exact.device.type == "cpu" and exact.numel() and bool(norms.sum().isfinite()):
        none = exact.new_zeros(())
        figures = torch.stack([exact.sum(), _largest(exact), none, none, none])
    else:
        norms, figures = _measured_with_care(exact, computed if computed is not stored else None, stored.dtype)
    return Measured(layout, early, (exact.shape[0], exact.shape[1]), norms, figures)


def _largest(values: Tensor) -> Tensor:
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


def _measured_with_care(values: Tensor, computed: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Norms and figures where values may not be finite; on a CPU in float64, because squares may overflow too."""
    finite = values.isfinite()
    kept = torch.where(finite, values, 0)
    kept = kept.double() if kept.device.type == "cpu" else kept
    lost = reach = kept.new_zeros(())
    if computed is not None and kept.numel():
        sound = computed.isfinite()
        lost = sound & ~finite.reshape(computed.shape) if _has_infinity(dtype) else computed.abs() > _most(dtype)
        lost = lost.sum()
        reach = _largest(torch.where(sound, computed, 0))
    largest = _largest(kept) if kept.numel() else kept.new_zeros(())
    figures = [kept.sum(), largest, (~finite).sum(), lost, reach]
    return torch.linalg.vector_norm(kept, dim=1), torch.stack([figure.to(kept.dtype) for figure in figures])
