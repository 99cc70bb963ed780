"""Relative errors, of as many tokens as there are, in little memory."""

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

WIDTH = math.log(1.01)  # of a bin of relative errors
BINS, ONE = 4800, 4700  # how many, from 5e-21 on, and the one that begins at an error of 1


class Histogram:
    """Relative errors from 0 on, counted in bins of 1 %, so that memory does not grow with their number.

    Attributes:
        zeros: how many are 0.
        worst: the largest of them.
    """

    def __init__(self) -> None:
        import torch

        self._bins = torch.zeros(BINS, dtype=torch.int64)
        self.zeros, self.worst = 0, 0.0

    def add(self, errors: "Tensor") -> None:
        import torch

        above = errors[errors > 0]
        self.zeros += len(errors) - len(above)
        if len(above):
            self.worst = max(self.worst, float(above.max()))
            places = (above.log() / WIDTH).floor().long() + ONE
            self._bins += torch.bincount(places.clamp(0, BINS - 1), minlength=BINS)

    def quantile(self, share: float) -> float:
        """The error that this share of the tokens does not pass."""
        reached = self.zeros + self._bins.cumsum(0)
        rank = math.ceil(share * float(reached[-1]))
        if rank <= self.zeros:
            return 0.0
        place = int((reached < rank).sum())
        return min(math.exp((place - ONE + 0.5) * WIDTH), self.worst)
