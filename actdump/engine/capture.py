"""Captures: one forward for one batch, each prompt's value cut out as if it had run alone."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import chain, groupby
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from actdump.address import Index, Item, Nth, Selection, Slice, Tap, written
from actdump.engine.blocks import Blocks
from actdump.engine.hooks import Stop, Unfit, copied, described, hooked, not_a_tensor, read, which_call
from actdump.engine.measure import Measured, joined, measure
from actdump.engine.site import Axis, Feed, Site, cut_out, fits, shape_text
from actdump.errors import AddressError, DataError
from actdump.plan import ITEM_BYTES, Batch, Layout
from actdump.statistics import Statistics


@dataclass
class Padded:
    """A batch as the model sees it: right-padded rows of token ids."""

    batch: Batch
    lengths: tuple[int, ...] = field(init=False)
    width: int = field(init=False)
    _indices: dict[tuple[Selection, torch.device], Tensor | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.lengths = self.batch.lengths
        self.width = max(self.lengths)

    @property
    def even(self) -> bool:
        """Whether no row is padded."""
        return min(self.lengths) == self.width

    def tensors(self, feed: Feed) -> tuple[Tensor, Tensor | None]:
        """The ids (batch, token), and the mask where padding needs one."""
        if self.even:
            return torch.tensor([list(ids) for ids in self.batch.ids]), None
        ids = torch.full((len(self.lengths), self.width), feed.pad)
        for row, prompt in zip(ids, self.batch.ids, strict=True):
            row[: len(prompt)] = torch.tensor(list(prompt))
        mask = torch.arange(self.width) < torch.tensor(self.lengths)[:, None] if feed.masked else None
        return ids, mask.long() if mask is not None else None

    def index(self, selection: Selection, device: torch.device) -> Tensor | None:
        """The places in `(batch*token)` rows that a selection keeps; `None` where it keeps every row."""
        key = selection, device
        if key not in self._indices:
            everything = self.even and selection in ("all", "mean")
            self._indices[key] = None if everything else torch.tensor(self._places(selection), dtype=torch.long).to(device)
        return self._indices[key]

    def places_of_rows(self, site: Site) -> "np.ndarray | None":
        """For each row that a site keeps, the place of its token in its prompt; `None` where a row is no token's."""
        several = site.selection == "mean" or isinstance(site.selection, tuple)  # a row is of several tokens
        if site.token_axis != 0 or several or cast(Layout, site.layout).flat:
            return None
        kept = cast(Slice, site.shape[0])
        places = (kept.of(length) if site.selection == "all" else positions(site.selection, length) for length in self.lengths)
        return np.fromiter(chain.from_iterable(places), dtype=np.int64)

    def _places(self, selection: Selection) -> list[int]:
        starts = range(0, self.width * len(self.lengths), self.width)
        return [
            start + place for start, length in zip(starts, self.lengths, strict=True) for place in positions(selection, length)
        ]


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


@dataclass
class Captured:
    """What one forward gave: for each site, the rows of all prompts of the batch, in the batch's order.

    Call `wait` before reading; on CUDA the copies may still be on their way. Call `give_back` when the rows are no longer needed:
    rows on their way into a file stand in memory that is used again.
    """

    sites: Sequence[Site]
    padded: Padded
    rows: list[Tensor]
    measured: list[Measured | None]
    ready: "torch.cuda.Event | None" = None
    give_back: Callable[[], None] = lambda: None

    def wait(self) -> None:
        """Return when the rows are there.

        Raises:
            DataError: a finite value became infinite in the cast to the storage type.
        """
        if self.ready is not None:
            self.ready.synchronize()
        for site, measured in zip(self.sites, self.measured, strict=True):
            if measured is not None and measured.lost:
                raise DataError(_overflow(site, measured))

    def buffers(self) -> "list[np.ndarray]":
        """The bytes of each site's rows, one prompt after another, without a copy."""
        return [rows.contiguous().view(-1).view(torch.uint8).numpy() for rows in self.rows]

    def statistics(self) -> list[Statistics | None]:
        """What the values of each site look like; `None` where nobody measured, or where they are no floating point numbers."""
        return [
            None if measured is None else measured.statistics(self.padded.places_of_rows(site))
            for site, measured in zip(self.sites, self.measured, strict=True)
        ]

    def nonfinite(self, site: int) -> list[int]:
        """The prompts, by their place in the batch, in whose values at a site not all are finite."""
        each = values(self.sites[site], self.rows[site], self.padded.lengths)
        return [place for place, value in enumerate(each) if not value.isfinite().all()]


def _overflow(site: Site, measured: Measured) -> str:
    dtype = cast(Layout, site.layout).dtype
    largest = {name: torch.finfo(getattr(torch, name)).max for name in (dtype, "float16", "bfloat16", "float32")}
    fitting = [f"`dtype: {name}`" for name, most in largest.items() if name != dtype and most >= measured.reach]
    lost = f"{measured.lost} finite value{'s' * (measured.lost > 1)}"
    return (
        f"{site.tap.name}: {lost} too large for {dtype}, whose largest is {largest[dtype]:g} (they reach {measured.reach:g}); "
        f"use {' or '.join(fitting) or '`dtype: float64`'}"
    )


def capture(model: nn.Module, sites: Sequence[Site], feed: Feed, batch: Batch, *, blocks: Blocks | None = None) -> Captured:
    """Run one forward for one batch and keep what the sites ask for; the forward ends when every site has fired.

    Where a forward on padded rows changes what the model keeps (see `State`), its values belong to no prompt alone: then each
    length of the batch gets a forward of its own, from the same state.

    Args:
        sites: probed sites.
        blocks: memory for rows on their way into a file. Then floating point rows are measured, and all are brought to the CPU;
            from CUDA through pinned memory on a side stream, while the forward goes on.

    Raises:
        DataError: a value does not have the shape that the probe promised, or a site did not fire.
    """
    padded = Padded(batch)
    catch = _Catch(sites, padded, blocks)
    arguments = feed.arguments(*padded.tensors(feed))
    try:
        with suppress(Stop), hooked(sites, catch.seen):
            model(**arguments)
    finally:
        changed = feed.state.restored()
    if changed and not padded.even:
        catch.give_back()
        pieces = [capture(model, sites, feed, each, blocks=blocks) for each in _evened(batch)]
        return _joined(sites, padded, pieces)
    return catch.captured()


def _evened(batch: Batch) -> Iterator[Batch]:
    """A batch as batches without padding: its runs of prompts of one length."""
    for _, run in groupby(zip(batch.numbers, batch.ids, strict=True), key=lambda prompt: len(prompt[1])):
        numbers, ids = zip(*run, strict=True)
        yield Batch(numbers, ids)


def _joined(sites: Sequence[Site], padded: Padded, pieces: Sequence[Captured]) -> Captured:
    for piece in pieces:
        if piece.ready is not None:
            piece.ready.synchronize()
    rows = [torch.cat(each) for each in zip(*(piece.rows for piece in pieces), strict=True)]
    figures = zip(*(piece.measured for piece in pieces), strict=True)
    measured = [joined(found) if (found := [one for one in each if one is not None]) else None for each in figures]
    for piece in pieces:
        piece.give_back()
    return Captured(sites, padded, rows, measured)


class _Catch:
    """One forward being watched."""

    def __init__(self, sites: Sequence[Site], padded: Padded, blocks: Blocks | None) -> None:
        self.sites = sites
        self.padded = padded
        self.blocks = blocks
        self.block = blocks.take([cast(Layout, site.layout) for site in sites], padded.lengths) if blocks is not None else None
        self.calls = [0] * len(sites)
        self.rows: list[Tensor | None] = [None] * len(sites)
        self.measured: list[Measured | None] = [None] * len(sites)
        self.waiting = len(sites)
        self.side: torch.cuda.Stream | None = None

    def seen(self, place: int, held: Any) -> None:
        site = self.sites[place]
        call = self.calls[place]
        self.calls[place] += 1
        if call != site.wanted:
            return
        value = held if site.bare and isinstance(held, Tensor) else read(site.tap, held)[0]
        self.rows[place] = self._kept(place, site, _rows(site, value, self.padded))
        self.waiting -= 1
        if self.waiting == 0:
            raise Stop

    def _kept(self, place: int, site: Site, computed: Tensor) -> Tensor:
        """Rows in their storage type, measured if asked for, or if the cast could make them infinite, and landed."""
        if self.block is not None and computed.is_cpu:
            rows = self.block.pieces[place].view(site.dtype).view(computed.shape).copy_(computed)
        else:
            rows = computed.to(site.dtype)
        if (self.block is not None and rows.is_floating_point()) or _narrower(rows, computed):
            measured = measure(rows, computed, cast(Layout, site.layout))
            norms, figures = self._landed(measured.norms), self._landed(measured.figures)
            self.measured[place] = replace(measured, norms=norms, figures=figures)
        return self._landed(rows)

    def _landed(self, rows: Tensor) -> Tensor:
        if rows.is_cpu or self.block is None:
            return rows
        if rows.device.type != "cuda":
            return rows.cpu()
        if self.side is None:
            self.side = _side_stream(rows.device)
        self.side.wait_stream(torch.cuda.current_stream(rows.device))
        with torch.cuda.stream(self.side):
            host = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True)
            host.copy_(rows, non_blocking=True)
        rows.record_stream(self.side)
        return host

    def give_back(self) -> None:
        if self.blocks is not None and self.block is not None:
            self.blocks.give_back(self.block)

    def captured(self) -> Captured:
        for site, rows in zip(self.sites, self.rows, strict=True):
            if rows is None:
                raise DataError(f"{site.tap.name}: its module did not run in this forward, though it did in the probe")
        ready = self.side.record_event() if self.side else None
        return Captured(self.sites, self.padded, cast(list[Tensor], self.rows), self.measured, ready, self.give_back)


def _narrower(rows: Tensor, computed: Tensor) -> bool:
    """Whether a cast could have made finite values infinite."""
    return rows.dtype != computed.dtype and torch.finfo(rows.dtype).max < torch.finfo(computed.dtype).max


_SIDES: dict[torch.device, "torch.cuda.Stream"] = {}


def _side_stream(device: torch.device) -> "torch.cuda.Stream":
    if device not in _SIDES:
        _SIDES[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call] # torch gives it no types
    return _SIDES[device]


def _rows(site: Site, value: Any, padded: Padded) -> Tensor:
    """The rows that all prompts of the batch give at a site: a copy, never a view of the model's tensor."""
    shape = len(padded.lengths), padded.width
    if not isinstance(value, Tensor) or not fits(site, value, shape):
        raise DataError(
            f"{site.tap.name}: the probe found {shape_text(site.axes or ())}, but for {shape[0]} prompts of "
            f"{shape[1]} tokens it is {described(value)}"
        )
    if site.rowwise:
        return _gathered(site, value, padded)
    if [axis.batch for axis in site.axes or ()][:1] == [True] and site.token_axis is None and not site.index:
        return value.clone(memory_format=torch.contiguous_format)
    return torch.cat([_one_value(site, value, shape, row, length).reshape(-1) for row, length in enumerate(padded.lengths)])


def _gathered(site: Site, value: Tensor, padded: Padded) -> Tensor:
    """The fast way, for `(batch, token, …)` and `(batch*token, …)`: one gather."""
    leading = 1 if cast(tuple[Axis, ...], site.axes)[0].token else 2
    flat = value.reshape(-1, *value.shape[leading:])
    index = padded.index(site.selection, value.device)
    if site.selection != "mean":
        return flat.clone(memory_format=torch.contiguous_format) if index is None else flat.index_select(0, index)
    rows = flat if index is None else flat.index_select(0, index)
    return torch.stack([prompt.mean(0) for prompt in torch.split(rows, list(padded.lengths))])


def _one_value(site: Site, value: Tensor, shape: tuple[int, int], row: int, length: int) -> Tensor:
    """The general way: one prompt's value cut out, indexed, its tokens selected."""
    one = cut_out(value, cast(tuple[Axis, ...], site.axes), shape, row, length)
    for item in site.index:
        one = one[_tensor_index(item)]
    if site.dropped is not None:
        one = one.squeeze(site.dropped)
    axis, selection = site.token_axis, site.selection
    if axis is None or selection == "all":
        return one
    if selection == "mean":
        return one.mean(axis)
    return one.index_select(axis, torch.tensor(positions(selection, length), dtype=torch.long, device=one.device))


def _tensor_index(item: Item) -> Any:
    if isinstance(item, Nth):
        return item.number
    entries = cast(Index, item).entries
    return tuple(slice(entry.start, entry.stop, entry.step) if isinstance(entry, Slice) else entry for entry in entries)


def values(site: Site, rows: Tensor, lengths: Sequence[int]) -> list[Tensor]:
    """Split captured rows into the value of each prompt, batch axis dropped."""
    layout = cast(Layout, site.layout)
    shapes = [layout.shape(length) for length in lengths]
    sizes = [layout.rows(length) * (layout.row_bytes // ITEM_BYTES[layout.dtype]) for length in lengths]
    return [flat.reshape(shape) for flat, shape in zip(torch.split(rows.reshape(-1), sizes), shapes, strict=True)]


# ------------------------------------------------------------------------------------------------- values whole, for the trace


def capture_whole(
    model: nn.Module, sites: Sequence[Site], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[list[Any], list[int]]:
    """Run one forward on the model's own arguments, and keep the values whole, as they are, with every axis.

    The forward ends early where the number of calls of every site is known; otherwise it runs to its end, to count them.

    Returns:
        For each site its value (a structure, where the address stops at one), and how often its module ran.

    Raises:
        AddressError: a module never ran, or ran more than once, or an item leads nowhere.
    """
    kept: list[dict[int, Any]] = [{} for _ in sites]
    calls = [0] * len(sites)
    known = all(site.calls is not None for site in sites)
    wanted = [_wanted_call(site) if known else None for site in sites]

    def seen(place: int, held: Any) -> None:
        if wanted[place] in (None, calls[place]):
            kept[place][calls[place]] = copied(_whole(sites[place].tap, held))
        calls[place] += 1
        if known and all(kept):
            raise Stop

    with suppress(Stop), hooked(sites, seen):
        model(*args, **kwargs)
    if known and not all(kept):  # a module ran less often than it did before: count again
        return capture_whole(model, [replace(site, calls=None) for site in sites], args, kwargs)
    if not known:
        sites = [replace(site, calls=count) for site, count in zip(sites, calls, strict=True)]
    return [values[_wanted_call(site)] for site, values in zip(sites, kept, strict=True)], [
        cast(int, site.calls) for site in sites
    ]


def _wanted_call(site: Site) -> int:
    """The place of the wanted call in a forward whose calls were counted."""
    try:
        return which_call(site, cast(int, site.calls), cast(int, site.calls))
    except Unfit as reason:
        raise AddressError(f"{site.tap.name}: {reason}") from None


def _whole(tap: Tap, held: Any) -> Any:
    try:
        if tap.address.port in ("inputs", "outputs") and not tap.address.items:
            return held
        value, index = read(tap, held)
        if value is None:
            raise Unfit(not_a_tensor(value, held))
        for item in index:
            if not isinstance(item, Nth | Index):
                raise Unfit(f"`{written(item)}` cannot follow a tensor")
            value = value[_tensor_index(item)]
    except (Unfit, IndexError) as reason:
        raise AddressError(f"{tap.name}: {reason}") from None
    return value
