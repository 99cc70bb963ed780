"""What captured rows look like, measured where they are: on their device, before they leave it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from actdump.plan import Layout
from actdump.statistics import POSITIONS, Statistics


@dataclass(frozen=True)
class Measured:
    """Figures of the rows of one batch at one site, still on the device.

    Attributes:
        shape: how many vectors of how many values.
        norms: the Euclidean norm of each vector, float32.
        figures: the sum of all values, the largest absolute one, how many are not finite, how many of these were finite
            before the cast, and the largest finite absolute value before the cast (0 where the cast lost none, on a CPU).
    """

    layout: Layout
    shape: tuple[int, int]
    norms: Tensor
    figures: Tensor

    @property
    def lost(self) -> int:
        """How many finite values became infinite in the cast."""
        return int(self.figures[3])

    @property
    def reach(self) -> float:
        """The largest finite absolute value before the cast, where it lost any."""
        return float(self.figures[4])

    def statistics(self, places: "np.ndarray | None") -> Statistics:
        """The figures as statistics.

        Args:
            places: for each row the place of its token in the prompt; `None` where a row is no token.
        """
        total, largest, nonfinite = self.figures[:3].tolist()
        norms = self.norms.double().numpy()
        finite = self.shape[0] * self.shape[1] - int(nonfinite)
        mean = total / finite if finite else 0.0
        spread = norms.dot(norms) / finite - mean**2 if finite else 0.0
        flat = self.layout.flat
        rows, sums = _by_position(places, norms)
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


def _by_position(places: "np.ndarray | None", norms: "np.ndarray") -> tuple[list[int], list[float]]:
    """How many rows the first tokens of prompts have, and the sums of their norms."""
    if places is None:
        return [], []
    early = places < POSITIONS
    counts, sums = (np.bincount(places[early], weights, POSITIONS) for weights in (None, norms[early]))
    return counts.tolist(), sums.tolist()


def measure(stored: Tensor, computed: Tensor, layout: Layout) -> Measured:
    """Measure rows that are on their way into a file.

    Args:
        stored: the rows as they are stored, floating point.
        computed: the rows before the cast; the same tensor where there was none.
    """
    width = stored.numel() if layout.flat else math.prod(layout.row)
    vectors = stored.reshape(stored.numel() // max(width, 1), width)
    exact = vectors if vectors.dtype in (torch.float32, torch.float64) else vectors.float()
    norms = torch.linalg.vector_norm(exact, dim=1)
    # Two finite numbers prove that every value is finite, and spare a look at each. On an accelerator asking would be a wait.
    if exact.device.type == "cpu" and exact.numel() and bool(norms.sum().isfinite()):
        none = exact.new_zeros(())
        figures = torch.stack([exact.sum(), _largest(exact), none, none, none])
    else:
        norms, figures = _measured_with_care(exact, computed if computed is not stored else None)
    return Measured(layout, (exact.shape[0], exact.shape[1]), norms, figures)


def joined(pieces: Sequence[Measured]) -> Measured:
    """The figures of the rows of several forwards, as those of one."""
    first, figures = pieces[0], torch.cat([piece.figures[None] for piece in pieces])
    vectors, width = (sum(sizes) for sizes in zip(*(piece.shape for piece in pieces), strict=True))
    shape = (first.shape[0], width) if first.layout.flat else (vectors, first.shape[1])
    summed, largest = figures.sum(0), figures.amax(0)
    return Measured(
        first.layout,
        shape,
        torch.cat([piece.norms for piece in pieces]),
        torch.stack([summed[0], largest[1], summed[2], summed[3], largest[4]]),
    )


def _largest(values: Tensor) -> Tensor:
    low, high = values.aminmax()
    return torch.maximum(-low, high)


def _measured_with_care(values: Tensor, computed: Tensor | None) -> tuple[Tensor, Tensor]:
    """Norms and figures where values may not be finite; on a CPU in float64, because squares may overflow too."""
    finite = values.isfinite()
    kept = torch.where(finite, values, 0)
    kept = kept.double() if kept.device.type == "cpu" else kept
    lost = reach = kept.new_zeros(())
    if computed is not None and kept.numel():
        sound = computed.isfinite()
        lost = (sound & ~finite.reshape(computed.shape)).sum()
        reach = _largest(torch.where(sound, computed, 0))
    largest = _largest(kept) if kept.numel() else kept.new_zeros(())
    figures = [kept.sum(), largest, (~finite).sum(), lost, reach]
    return torch.linalg.vector_norm(kept, dim=1), torch.stack([figure.to(kept.dtype) for figure in figures])
