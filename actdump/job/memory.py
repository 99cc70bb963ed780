"""Memory that runs out: a batch that does not fit on the device is halved, and the run goes on."""

import logging
from collections.abc import Callable
from math import inf
from typing import TYPE_CHECKING

from actdump.errors import ActdumpError
from actdump.memory import first_sentences, out_of_memory
from actdump.plan import Batch

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)


class Room:
    """What fits into a device's memory, learnt from the batches that did not.

    Attributes:
        halved: how many of the part's planned batches had to be run in pieces.
    """

    def __init__(self, device: "torch.device", settle: Callable[[], bool]) -> None:
        """
        Args:
            settle: returns when nothing that was captured before is in that memory any more; whether something may have been.
        """
        self.device, self._settle = device, settle
        self._told = False
        self.next_part()

    def next_part(self) -> None:
        """Try whole batches again: memory may have been short for a while only, because another program had it."""
        self.halved = 0
        self._too_large = inf  # padded tokens
        self._crowded = False  # a batch fitted only when the rows of those before it were gone

    def halving(self, batch: Batch, do: Callable[[Batch], None]) -> None:
        """Do something with a batch whole; with its halves, and halves of those, where it does not fit.

        Raises:
            ActdumpError: a prompt does not fit even alone.
        """
        self.halved += self._pieces(batch, do) > 1

    def _pieces(self, batch: Batch, do: Callable[[Batch], None]) -> int:
        """Do it; in how many pieces."""
        if self._fits(batch, do):
            return 1
        middle = len(batch.numbers) // 2
        halves = (slice(middle), slice(middle, None))
        return sum(self._pieces(Batch(batch.numbers[half], batch.ids[half]), do) for half in halves)

    def _fits(self, batch: Batch, do: Callable[[Batch], None]) -> bool:
        """Do it with a batch whole, if it fits, at the latest when what was captured before it is out of the way."""
        padded, alone = len(batch.numbers) * max(batch.lengths), len(batch.numbers) == 1
        if padded >= self._too_large and not alone:
            return False
        if self._crowded:
            self._settle()
        while (lack := _lacking(batch, do)) is not None:
            crowded = self._settle()
            _free(self.device)
            if crowded:
                self._crowded = True
                continue
            if alone:
                raise ActdumpError(_too_long(self.device, batch, lack))
            self._tell(batch, lack)
            self._too_large = padded
            return False
        return True

    def _tell(self, batch: Batch, lack: str) -> None:
        if not self._told:
            self._told = True
            size = f"{len(batch.numbers)} prompts of up to {max(batch.lengths):,} tokens"
            log.warning(
                "a batch of %s does not fit into the memory of %s, and is halved, as others will be; the shards' records count "
                "them (%s)", size, self.device, lack,
            )  # fmt: skip


def _lacking(batch: Batch, do: Callable[[Batch], None]) -> str | None:
    """Do it; what memory said if it ran out. Its error, which holds on to the forward's tensors, is gone by the return."""
    try:
        do(batch)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        return first_sentences(error)
    return None


def _free(device: "torch.device") -> None:
    """Give the allocator's pieces back: the batch may have failed because none of them was large enough."""
    import torch

    if device.type == "cuda":
        torch.cuda.empty_cache()


def _too_long(device: "torch.device", batch: Batch, lack: str) -> str:
    return (
        f"prompt {batch.numbers[0]} of {batch.lengths[0]:,} tokens does not fit into the memory of {device} even alone: "
        f"{lack}; use a device with more, a smaller `model.dtype`, or `tokenizer.max_length` with `truncation`"
    )
