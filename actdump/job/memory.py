"""Memory that runs out: a batch that does not fit on the device is halved, and the run goes on."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from math import inf
from typing import TYPE_CHECKING

from actdump.errors import ActdumpError
from actdump.job.bound import Bound
from actdump.plan import Batch

if TYPE_CHECKING:
    from actdump.engine import Captured

log = logging.getLogger(__name__)

# How the errors that torch raises as bare RuntimeErrors begin to speak of memory: CPU, cuBLAS, MPS and pinned host memory.
_WORDS = ("can't allocate memory", "ALLOC_FAILED", "out of memory")


class Room:
    """What fits into the device's memory, learnt from the batches that did not.

    Attributes:
        halved: how many of the part's planned batches had to be run in pieces.
    """

    def __init__(self, bound: Bound) -> None:
        self.bound = bound
        self._told = False
        self.next_part()

    def next_part(self) -> None:
        """Try whole batches again: memory may have been short for a while only, because another program had it."""
        from actdump import engine

        self.halved = 0
        self._too_large = inf  # padded tokens
        self._blocks = engine.Blocks()

    def captures(self, batch: Batch) -> "Iterator[Captured]":
        """Capture a batch whole; in halves, and halves of those, where it does not fit.

        Raises:
            ActdumpError: a prompt does not fit even alone.
        """
        pieces = 0
        for captured in self._captures(batch):
            pieces += 1
            yield captured
        self.halved += pieces > 1

    def _captures(self, batch: Batch) -> "Iterator[Captured]":
        captured = self._tried(batch)
        if captured is not None:
            yield captured
            return
        middle = len(batch.numbers) // 2
        for half in (slice(middle), slice(middle, None)):
            yield from self._captures(Batch(batch.numbers[half], batch.ids[half]))

    def _tried(self, batch: Batch) -> "Captured | None":
        """A batch captured, or `None` if it does not fit; the error, which holds on to the forward's tensors, is gone by then."""
        from actdump import engine

        padded, alone = len(batch.numbers) * max(batch.lengths), len(batch.numbers) == 1
        if padded >= self._too_large and not alone:
            return None
        try:
            return engine.capture(self.bound.module, self.bound.sites, self.bound.feed, batch, blocks=self._blocks)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            if alone:
                raise ActdumpError(_too_long(self.bound, batch, error)) from error
            self._tell(batch, error)
        self._too_large = padded
        _free(self.bound)
        return None

    def _tell(self, batch: Batch, error: BaseException) -> None:
        if not self._told:
            self._told = True
            size = f"{len(batch.numbers)} prompts of up to {max(batch.lengths):,} tokens"
            log.warning(
                "a batch of %s does not fit into the memory of %s, and is halved, as others will be; the shards' records count "
                "them (%s)", size, self.bound.feed.device, _short(error),
            )  # fmt: skip


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on the device or the host."""
    import torch

    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(words in str(error) for words in _WORDS)


@contextmanager
def memory(doing: str, remedy: str) -> Iterator[None]:
    """Word an error of memory that halving cannot mend.

    Raises:
        ActdumpError: memory ran out in the block.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise ActdumpError(f"{doing}: out of memory: {_short(error)}; {remedy}") from error


def _free(bound: Bound) -> None:
    """Give the allocator's pieces back: the batch may have failed because none of them was large enough."""
    import torch

    if bound.feed.device.type == "cuda":
        torch.cuda.empty_cache()


def _too_long(bound: Bound, batch: Batch, error: BaseException) -> str:
    return (
        f"prompt {batch.numbers[0]} of {batch.lengths[0]:,} tokens does not fit into the memory of {bound.feed.device} even alone: "
        f"{_short(error)}; use a device with more, a smaller `model.dtype`, or `tokenizer.max_length` with `truncation`"
    )


def _short(error: BaseException) -> str:
    """The first two sentences of an error; torch goes on with a page of advice."""
    line = (str(error).strip() or type(error).__name__).partition("\n")[0]
    return ". ".join(line.split(". ")[:2]).rstrip(".")
