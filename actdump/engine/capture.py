"""Captures: one forward for one batch, each prompt's value cut out as if it had run alone."""

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any, cast

import torch
from torch import Tensor, nn

from actdump.engine.hooks import Hooks, Stop, Unfit, described, read, tensor_index, times
from actdump.engine.measure import measure
from actdump.engine.padded import Padded, positions
from actdump.engine.rows import Rows
from actdump.engine.site import Axis, Feed, Site, cut_out, shape_text
from actdump.errors import DataError
from actdump.plan import Batch, Layout

Sink = Callable[[Rows], None]


def capture(model: nn.Module, sites: Sequence[Site], feed: Feed, batch: Batch) -> list[Rows]:
    """Run one forward for one batch and keep what the sites ask for, on the device; the forward ends when every site has fired.

    Where a forward on padded rows changes what the model keeps (see `State`), its values belong to no prompt alone: then each
    length of the batch gets a forward of its own, from the same state. So it does where the model would take tokens for padding.

    Args:
        sites: probed sites.

    Returns:
        The rows of each site.

    Raises:
        DataError: a value does not have the shape that the probe promised, or a site did not fire.
    """
    padded = Padded(batch)
    catch = _Catch(sites, padded, None)
    if _ran(model, feed, catch):
        return cast(list[Rows], catch.rows)
    pieces = zip(*(capture(model, sites, feed, each) for each in evened(batch)), strict=True)
    return [_joined(padded, piece) for piece in pieces]


def stream(model: nn.Module, sites: Sequence[Site], feed: Feed, batch: Batch, sink: Sink) -> bool:
    """Run one forward for one batch as `capture` does, and hand the rows of each site over as soon as they are there.

    Floating point rows are measured. On a CPU the sink finds rows that are still in its cache. On CUDA they are on their way:
    whoever has time for it waits for them (`Rows.wait`), while the forward goes on. From other accelerators they are brought here.

    Returns:
        Whether the rows are those of the prompts alone. If not (see `capture`), they are to be forgotten, and each batch of
        `evened` is to be streamed in their place.

    Raises:
        DataError: as for `capture`.
    """
    return _ran(model, feed, _Catch(sites, Padded(batch), sink))


def evened(batch: Batch) -> Iterator[Batch]:
    """A batch as batches without padding: its runs of prompts of one length."""
    for _, run in groupby(zip(batch.numbers, batch.ids, strict=True), key=lambda prompt: len(prompt[1])):
        numbers, ids = zip(*run, strict=True)
        yield Batch(numbers, ids)


def _joined(padded: Padded, pieces: Sequence[Rows]) -> Rows:
    for piece in pieces:
        piece.wait()
    return Rows(pieces[0].site, padded, torch.cat([piece.values.flatten() for piece in pieces]))


def _ran(model: nn.Module, feed: Feed, catch: "_Catch") -> bool:
    """Run the forward that a catch watches; whether what it caught is that of the prompts alone."""
    if catch.padded.misread(feed):
        return False
    arguments = feed.arguments(*catch.padded.tensors(feed))
    try:
        with Hooks(catch.sites, catch.seen):
            model(**arguments)
    except Stop:
        pass
    finally:
        changed = feed.state.restored()
    if changed and not catch.padded.even:
        return False
    catch.finish()
    return True


class _Catch:
    """One forward being watched."""

    def __init__(self, sites: Sequence[Site], padded: Padded, sink: Sink | None) -> None:
        self.sites = sites
        self.padded = padded
        self.sink = sink
        self.rows: list[Rows | None] = [None] * len(sites)
        self._calls = [0] * len(sites)
        self._copies: list[tuple[int, Tensor]] = []
        self._left = len(sites)
        self._plain = sink is None and padded.even

    def seen(self, place: int, held: Any) -> None:
        site, call = self.sites[place], self._calls[place]
        self._calls[place] = call + 1
        if call != site.wanted:
            return
        if self._plain and site.plain and isinstance(held, Tensor):  # looked at afterwards: in a small forward every line shows
            self._copies.append((place, held.clone()))
        else:
            self._take(place, held)
        self._left -= 1
        if not self._left and not any(site.late for site in self.sites):
            raise Stop

    def _take(self, place: int, held: Any) -> None:
        site = self.sites[place]
        try:
            value = held if site.bare and isinstance(held, Tensor) else read(site.tap, held)[0]
        except Unfit as error:
            raise DataError(f"{site.tap.name}: in this forward, unlike in the probe, {error}") from None
        rows = self._kept(site, _gathered(site, value, self.padded))
        if self.sink is None:
            self.rows[place] = rows
        else:
            self.sink(rows)

    def _kept(self, site: Site, computed: Tensor) -> Rows:
        """Rows in their storage type; measured if they are on their way, or if the cast could make them infinite."""
        stored = computed
        if computed.dtype != site.dtype:
            stored = computed.to(
                site.dtype, memory_format=torch.contiguous_format
            )  # as it is copied from the device, and written
        rows = Rows(site, self.padded, stored)
        if (self.sink is not None and stored.is_floating_point()) or (stored is not computed and _narrower(stored, computed)):
            rows.measured = measure(stored, computed, cast(Layout, site.layout), self.padded.early(site))
        if self.sink is not None and not stored.is_cpu:
            rows.leave()
        return rows

    def finish(self) -> None:
        """Look at what was only copied.

        Raises:
            DataError: a site did not fire, or not as often as in the probe, or what it held has another shape.
        """
        for site, count in zip(self.sites, self._calls, strict=True):
            if count != site.calls:
                self._check_calls(site, count)
        for place, copy in self._copies:
            site = self.sites[place]
            if copy.dtype == site.dtype and copy.shape == self.padded.shape(site):
                self.rows[place] = Rows(site, self.padded, copy)
            else:
                self._take(place, copy)

    def _check_calls(self, site: Site, count: int) -> None:
        """Make sure that the wanted call was made, and, if it is not counted from the first, is the one that the probe found; a
        forward may stop before the others.

        Raises:
            DataError: it was not, or is not.
        """
        if count <= site.wanted:
            ran, before = times(count) if count else "not once", times(cast(int, site.calls))
            raise DataError(f"{site.tap.name}: its module ran {ran} in this forward, and {before} in the probe")
        if site.late or (site.tap.call is None and count > cast(int, site.calls)):
            ran, before = times(count), times(cast(int, site.calls))
            raise DataError(
                f"{site.tap.name}: its module ran {ran} for prompts of {self.padded.width} tokens and {before} in the probe, "
                "so its calls cannot be told apart; name one that counts from the first, such as `call: 0`"
            )


def _narrower(rows: Tensor, computed: Tensor) -> bool:
    """Whether a cast could have made finite values infinite."""
    return torch.finfo(rows.dtype).max < torch.finfo(computed.dtype).max


def _gathered(site: Site, value: Any, padded: Padded) -> Tensor:
    """The rows that all prompts of the batch give at a site: a copy, or the model's own tensor where a cast will copy it."""
    if not isinstance(value, Tensor) or value.shape != padded.shape(site):
        raise DataError(
            f"{site.tap.name}: the probe found {shape_text(site.axes or ())}, but for {len(padded.lengths)} prompts of "
            f"{padded.width} tokens it is {described(value)}"
        )
    if site.whole or (padded.even and site.everything):
        if value.dtype != site.dtype:
            return value
        return value.clone() if value.is_contiguous() else value.contiguous()
    if site.rowwise:
        return _by_index(site, value, padded)
    shape = len(padded.lengths), padded.width
    return torch.cat([_one_value(site, value, shape, row, length).reshape(-1) for row, length in enumerate(padded.lengths)])


def _by_index(site: Site, value: Tensor, padded: Padded) -> Tensor:
    """The fast way, for `(batch, token, …)` and `(batch*token, …)`: one gather."""
    leading = 1 if cast(tuple[Axis, ...], site.axes)[0].token else 2
    rows = value.reshape(-1, *value.shape[leading:]).index_select(0, padded.index(site.selection, value.device))
    if site.selection != "mean":
        return rows
    return torch.stack([_mean(site, one, 0) for one in torch.split(rows, list(padded.lengths))])


def _mean(site: Site, value: Tensor, axis: int) -> Tensor:
    """In a type that holds both what is computed and what is stored, so that it is rounded once."""
    narrow, wide = sorted((value.dtype, site.dtype), key=lambda dtype: dtype.itemsize)
    return value.mean(axis, dtype=wide if narrow.itemsize < wide.itemsize else torch.promote_types(narrow, wide))


def _one_value(site: Site, value: Tensor, shape: tuple[int, int], row: int, length: int) -> Tensor:
    """The general way: one prompt's value cut out, indexed, its tokens selected."""
    one = cut_out(value, cast(tuple[Axis, ...], site.axes), shape, row, length)
    for item in site.index:
        one = one[tensor_index(item)]
    if site.dropped is not None:
        one = one.squeeze(site.dropped)
    axis, selection = site.token_axis, site.selection
    if axis is None or selection == "all":
        return one
    if selection == "mean":
        return _mean(site, one, axis)
    return one.index_select(axis, torch.tensor(positions(selection, length), dtype=torch.long, device=one.device))
