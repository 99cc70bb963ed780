"""A batch as the model sees it, and where in it the tokens stand that a selection keeps."""

from collections.abc import Sequence
from itertools import chain
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from actdump.address import Slice
from actdump.engine.measure import Early
from actdump.engine.site import Feed, Site, sent
from actdump.plan import Batch, Layout
from actdump.tap import Selection


class Padded:
    """A batch as the model sees it: right-padded rows of token ids.

    Attributes:
        lengths: the number of tokens of each prompt.
        width: the largest of them.
        even: whether no row is padded.
    """

    def __init__(self, batch: Batch) -> None:
        self.batch = batch
        self.lengths = batch.lengths
        self.width = max(self.lengths)
        self.even = min(self.lengths) == self.width
        self._shapes: dict[int, tuple[int, ...]] = {}
        self._indices: dict[tuple[Selection, torch.device], Tensor] = {}
        self._early: dict[tuple[Selection, object], Early] = {}

    def tensors(self, feed: Feed) -> tuple[Tensor, Tensor | None]:
        """The ids (batch, token), and the mask where padding needs one."""
        if self.even:
            return _tensor(self.batch.ids), None
        ids = torch.full((len(self.lengths), self.width), feed.pad, device="cpu")
        for row, prompt in zip(ids, self.batch.ids, strict=True):
            row[: len(prompt)] = _tensor(list(prompt))
        mask = torch.arange(self.width, device="cpu") < _tensor(self.lengths)[:, None] if feed.masked else None
        return ids, mask.long() if mask is not None else None

    def misread(self, feed: Feed) -> bool:
        """Whether the model would take tokens of these prompts for padding, and otherwise so than it does for one prompt alone."""
        return feed.reads_pad and not self.even and any(feed.pad in prompt for prompt in self.batch.ids)

    def shape(self, site: Site) -> tuple[int, ...]:
        """The shape of the tensor at a site. Asked for in every hook, so it is kept for the sites that share a tuple of axes."""
        shape = self._shapes.get(id(site.axes))
        if shape is None:
            shape = tuple(axis.size(len(self.lengths), self.width) for axis in site.axes or ())
            self._shapes[id(site.axes)] = shape
        return shape

    def index(self, selection: Selection, device: torch.device) -> Tensor:
        """The places in `(batch*token)` rows that a selection keeps."""
        key = selection, device
        if key not in self._indices:
            self._indices[key] = sent(_tensor(self._kept(selection)), device)
        return self._indices[key]

    def _kept(self, selection: Selection) -> list[int]:
        starts = range(0, self.width * len(self.lengths), self.width)
        return [
            start + place for start, length in zip(starts, self.lengths, strict=True) for place in positions(selection, length)
        ]

    def early(self, site: Site) -> Early | None:
        """Which of the rows that a site keeps are of the first tokens; `None` where a row is no token's."""
        several = site.selection == "mean" or isinstance(site.selection, tuple)  # a row is of several tokens
        if site.token_axis != 0 or several or cast(Layout, site.layout).flat:
            return None
        key = site.selection, site.shape[0]
        if key not in self._early:
            kept = cast(Slice, site.shape[0])
            each = (
                kept.of(length) if site.selection == "all" else positions(site.selection, length) for length in self.lengths
            )
            self._early[key] = Early(np.fromiter(chain.from_iterable(each), dtype=np.int64))
        return self._early[key]


def _tensor(numbers: Sequence[Any]) -> Tensor:
    """On the CPU, whatever `torch.set_default_device` says."""
    return torch.tensor(numbers, dtype=torch.long, device="cpu")


def positions(selection: Selection, length: int) -> Sequence[int]:
    """Which tokens of a prompt of that length a selection keeps, or takes the mean of.

    Raises:
        IndexError: it asks for a position that the prompt does not have.
    """
    match selection:
        case "all" | "mean":
            return range(length)
        case "first":
            return (0,)
        case "last":
            return (length - 1,)
        case Slice():
            return selection.of(length)
        case _:
            return [range(length)[position] for position in selection]
