"""What one forward gave at one site: the rows of all prompts of its batch."""

from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor

from actdump.engine.measure import Measured
from actdump.engine.padded import Padded
from actdump.engine.site import Site
from actdump.errors import DataError
from actdump.plan import ITEM_BYTES, Layout


@dataclass(slots=True)
class Rows:
    """What one forward gave at one site: the rows of all prompts of its batch, in the batch's order.

    Call `wait` before reading; on CUDA the copies may still be on their way.

    Attributes:
        values: the rows, one prompt after another.
        measured: what they look like, where somebody measured.
    """

    site: Site
    padded: Padded
    values: Tensor
    measured: Measured | None = None
    ready: "torch.cuda.Event | None" = None

    def wait(self) -> None:
        """Return when the rows are there.

        Raises:
            DataError: a value was too large for the storage type.
        """
        if self.ready is not None:
            self.ready.synchronize()
        if self.measured is not None and self.measured.lost:
            raise DataError(_overflow(self.site, self.measured))

    def buffer(self) -> "np.ndarray":
        """The bytes of the rows, without a copy where they stand one after another."""
        return self.values.contiguous().view(-1).view(torch.uint8).numpy()

    def each(self) -> list[Tensor]:
        """The value of each prompt, batch axis dropped."""
        layout, lengths = cast(Layout, self.site.layout), self.padded.lengths
        shapes = [layout.shape(length) for length in lengths]
        sizes = [layout.rows(length) * (layout.row_bytes // ITEM_BYTES[layout.dtype]) for length in lengths]
        return [flat.reshape(shape) for flat, shape in zip(torch.split(self.values.reshape(-1), sizes), shapes, strict=True)]


def _overflow(site: Site, measured: Measured) -> str:
    dtype = cast(Layout, site.layout).dtype
    largest = {name: torch.finfo(getattr(torch, name)).max for name in (dtype, "float16", "bfloat16", "float32")}
    fitting = [f"`dtype: {name}`" for name, most in largest.items() if name != dtype and most >= measured.reach]
    lost = f"{measured.lost} value{'s' * (measured.lost > 1)}"
    return (
        f"{site.tap.name}: {lost} too large for {dtype}, whose largest is {largest[dtype]:g} (the finite ones reach {measured.reach:g}); "
        f"use {' or '.join(fitting) or '`dtype: float64`'}"
    )
