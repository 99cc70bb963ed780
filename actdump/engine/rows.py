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

    Call `wait` before reading: those that are sent to the CPU may still be on their device.

    Attributes:
        values: the rows, one prompt after another.
        measured: what they look like, where somebody measured.
        ready: on CUDA, when the device will have computed them; `None` for rows that nobody sent on their way.
    """

    site: Site
    padded: Padded
    values: Tensor
    measured: Measured | None = None
    ready: "torch.cuda.Event | None" = None

    def leave(self) -> None:
        """Send the rows on their way to the CPU, where they are when somebody has waited for them."""
        if self.values.is_cuda:
            self.ready = _event(torch.cuda.current_stream(self.values.device))
        else:
            self._arrive(self.values.cpu())

    def wait(self) -> None:
        """Return when the rows are there.

        Raises:
            DataError: a value was too large for the storage type.
        """
        if self.ready is not None:
            self._land(self.ready)
            self.ready = None
        if self.measured is not None and self.measured.lost:
            raise DataError(_overflow(self.site, self.measured))

    def _land(self, ready: "torch.cuda.Event") -> None:
        """Copy the rows from the device, in whatever thread has time for it; nothing but their own forward keeps it waiting.

        On another stream, because the next forwards stand in the device's usual one, and through pinned memory, which the device
        writes to by itself and whose pieces torch keeps for the next rows. So a thread that lands takes one piece of it, and
        whoever captures waits neither for the copy nor for the memory.
        """
        ready.synchronize()
        stream = torch.cuda.Stream(self.values.device)  # type: ignore[no-untyped-call] # torch gives it no types
        with torch.cuda.stream(stream):
            host = _pinned(self.values)
            host.copy_(self.values, non_blocking=True)
            _event(stream).synchronize()
            self._arrive(host)

    def _arrive(self, values: Tensor) -> None:
        self.values = values
        if self.measured is not None:
            self.measured = self.measured.landed(values)

    def buffer(self) -> "np.ndarray":
        """The bytes of the rows, without a copy where they stand one after another."""
        return self.values.contiguous().view(-1).view(torch.uint8).numpy()

    def each(self) -> list[Tensor]:
        """The value of each prompt, batch axis dropped."""
        layout, lengths = cast(Layout, self.site.layout), self.padded.lengths
        shapes = [layout.shape(length) for length in lengths]
        sizes = [layout.rows(length) * (layout.row_bytes // ITEM_BYTES[layout.dtype]) for length in lengths]
        return [flat.reshape(shape) for flat, shape in zip(torch.split(self.values.reshape(-1), sizes), shapes, strict=True)]


def _event(stream: "torch.cuda.Stream") -> "torch.cuda.Event":
    """When a stream has done what it has now; a thread that waits for it leaves its core to others."""
    event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call] # torch gives it no types
    event.record(stream)
    return event


def _pinned(values: Tensor) -> Tensor:
    """Host memory for these values: pinned, or, where the host has no more of that, plain, and the copy is slower."""
    try:
        return torch.empty(values.shape, dtype=values.dtype, device="cpu", pin_memory=True)
    except RuntimeError:  # as torch words it, in many ways
        return torch.empty(values.shape, dtype=values.dtype, device="cpu")


def _overflow(site: Site, measured: Measured) -> str:
    dtype = cast(Layout, site.layout).dtype
    largest = {name: torch.finfo(getattr(torch, name)).max for name in (dtype, "float16", "bfloat16", "float32")}
    fitting = [f"`dtype: {name}`" for name, most in largest.items() if name != dtype and most >= measured.reach]
    lost = f"{measured.lost} value{'s' * (measured.lost > 1)}"
    return (
        f"{site.tap.name}: {lost} too large for {dtype}, whose largest is {largest[dtype]:g} (the finite ones reach {measured.reach:g}); "
        f"use {' or '.join(fitting) or '`dtype: float64`'}"
    )
