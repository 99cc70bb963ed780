"""The probe: tiny forwards that label the axes of every site, count its calls, and show that a prompt can be cut out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from actdump.engine.agreement import REMEDY, filled, same_bits, verified
from actdump.engine.axes import ALONE, TOGETHER, Fault, labelled
from actdump.engine.capture import stream
from actdump.engine.hooks import Unfit, read, which_call
from actdump.engine.site import Axis, Feed, Site, cut_out
from actdump.engine.tiny import ROW, observe, ports, probe_ids
from actdump.errors import ActdumpError, AddressError, UsageError
from actdump.plan import Batch
from actdump.tap import Selection

FEW = 16  # different numbers in the value of a prompt of ALONE
FILLED_UP = (
    "what fills up a padded row has a part in the prompt's value, in spite of the mask, as where a convolution reaches beyond its end; "
    + REMEDY
)


@dataclass(frozen=True)
class Probe:
    """What the probe found: sites with their axes, taps that cannot be captured, and how to run the model.

    Attributes:
        runs: for each tap, in the order given, a site or a fault.
    """

    runs: tuple[Site | Fault, ...]
    feed: Feed

    @property
    def sites(self) -> list[Site]:
        """The sites, where every tap can be captured.

        Raises:
            AddressError: some cannot; the message lists them all.
        """
        faults = [str(run) for run in self.runs if isinstance(run, Fault)]
        if faults:
            raise AddressError("\n".join(faults))
        return [run for run in self.runs if isinstance(run, Site)]


def probe(
    model: nn.Module,
    sites: Sequence[Site],
    feed: Feed,
    *,
    tokens: Selection | None = None,
    dtype: str | None = None,
    apart: bool = False,
) -> Probe:
    """Label the axes of every site and count its calls with tiny forwards, and find out whether padding needs a mask.

    Two forwards of different shape give the axes. Then, unless the model is on the meta device, the same prompt is compared
    alone and inside a batch whose other tokens are changed: where no bit moves without a mask, no mask is needed; where one
    does, the mask is used. Either way the prompt's value in the batch must be its value alone, or the tap is a fault. Where a model
    that is given no mask makes its own of the pad id, prompts that have it among their tokens get batches without padding.

    Measured (tests/test_zoo.py): causal and recurrent models need no mask, whatever their positions (learned, rotary, ALiBi),
    windows, experts or scans, because nothing of a token comes from what follows it; models that look both ways need one. A
    mask that is used without need costs time and changes no value, so every doubt ends with the mask: experts are one on CPUs where
    the last bits of a token depend on how many tokens its expert is given.

    Args:
        apart: every prompt will run in a batch of its own, so nothing needs to be shown about batches.
        tokens: the selection of taps that name none and have a token axis.
        dtype: the storage type of taps that name none and hold floating point numbers.

    Raises:
        UsageError: the model does not run on token ids alone, or replaces modules of its own in a forward.
    """
    before = _modules(model)
    found = _probe(model, sites, feed, tokens, dtype, apart)
    if replaced := [path for path, module in _modules(model).items() if before.get(path, module) is not module]:
        raise UsageError(
            f"{type(model).__name__} replaces modules of its own in a forward (`{replaced[0]}`), so that what it computes for a "
            "prompt depends on the prompts before it; change its config so that it stays as it is, as BigBird does with "
            "`attention_type: original_full`"
        )
    return found


def _modules(model: nn.Module) -> dict[str, nn.Module]:
    return dict(model.named_modules(remove_duplicate=False))


def _probe(
    model: nn.Module, sites: Sequence[Site], feed: Feed, tokens: Selection | None, dtype: str | None, apart: bool
) -> Probe:
    ids = probe_ids(feed)
    together = ids["together"]
    alone = observe(model, sites, feed, ids["alone"], first=True)
    batch = observe(model, sites, feed, together)
    runs = tuple(labelled(site, tokens, dtype, *seen) for site, *seen in zip(sites, alone, batch, strict=True))
    if feed.device.type == "meta" or apart:
        return Probe(runs, replace(feed, masked=not apart))
    found = [run if isinstance(run, Site) else None for run in runs]
    batch_values = _row_values(found, batch)
    changed = _row_values(found, observe(model, sites, feed, ids["changed"], like=batch))
    coarse = any(map(_coarse, found, batch_values))
    masked = not all(map(same_bits, batch_values, changed)) or (coarse and _looks_around(model, feed, ids))
    alone_values = _row_values(found, alone, ALONE, 0)
    batches = [batch_values]
    if masked:
        batches = [
            _row_values(found, observe(model, sites, feed, ids[name], _mask(together), like=batch))
            for name in ("changed", "filled")
        ]
    wide = _is_wide(model)
    checked = tuple(verified(*each, wide) for each in zip(runs, alone_values, batches[0], strict=True))
    if masked:
        checked = _unfilled(model, feed, ids, checked, batches)
    reads_pad = masked and _reads_pad(model, found, feed, ids["alone"])
    return Probe(checked, replace(feed, masked=masked, reads_pad=reads_pad))


def probe_width(model: nn.Module, sites: Sequence[Site], feed: Feed, width: int) -> None:
    """Compare a prompt alone and in a batch of two that is so many tokens wide; the other prompt is this one, again and again.

    It shows what begins beyond the width of the probe's batches: rotary tables of another kind, buckets, experts that are full. What
    ends such a forward is told by the run, which has batches like it.

    Args:
        sites: probed sites.

    Raises:
        AddressError: taps whose value there is another; the message lists them all.
    """
    if width <= TOGETHER[1]:
        return
    prompt = probe_ids(feed)["alone"]
    long = prompt.repeat(1, -(-width // ALONE[1]))[:, :width]
    short = torch.full_like(long, feed.pad)
    short[:, : ALONE[1]] = prompt
    mask = torch.ones((2, width), dtype=torch.long)
    mask[1, ALONE[1] :] = 0
    # The forwards end as those of a run do: when every site was called as often as in the probe.
    like = None if any(site.late for site in sites) else [[None] * cast(int, site.calls) for site in sites]
    try:
        alone = observe(model, sites, feed, prompt, like=like)
        batch = observe(model, sites, feed, torch.cat([long, short]), mask if feed.masked else None, like=like)
    except ActdumpError:
        return
    values = zip(_row_values(sites, alone, ALONE, 0), _row_values(sites, batch, (2, width), 1), strict=True)
    wide = _is_wide(model)
    checked = (verified(site, *pair, wide) for site, pair in zip(sites, values, strict=True))
    if faults := [str(run) for run in checked if isinstance(run, Fault)]:
        both = Batch((0, 1), tuple(tuple(ids.tolist()) for ids in (long[0], prompt[0])))
        with torch.no_grad():
            together = stream(model, sites, feed, both, lambda _: None)
        if together:  # and not, as a run does where a forward leaves traces, one by one
            raise AddressError("\n".join(faults))


def _is_wide(model: nn.Module) -> bool:
    """Whether a model computes in wide floats throughout."""
    return all(weight.dtype in (torch.float32, torch.float64) for weight in model.parameters())


def _mask(ids: Tensor) -> Tensor:
    """A mask for ids of the shape TOGETHER that hides what fills up the row of the prompt of ALONE."""
    mask = torch.ones_like(ids)
    mask[ROW, ALONE[1] :] = 0
    return mask


def _unfilled(
    model: nn.Module,
    feed: Feed,
    ids: Mapping[str, Tensor],
    runs: Sequence[Site | Fault],
    batches: Sequence[Sequence[Tensor | None]],
) -> tuple[Site | Fault, ...]:
    """The sites whose value what fills rows up has no part in, in spite of the mask; faults for the others.

    Args:
        batches: the values of the prompt of ALONE, cut out of two batches that fill its row up with other tokens.
    """
    concerned = [not same_bits(*pair) for pair in zip(*batches, strict=True)]
    if not any(concerned) or not _fills(model, feed, ids):
        return tuple(runs)
    return tuple(
        Fault(run.tap, FILLED_UP) if isinstance(run, Site) and touched else run
        for run, touched in zip(runs, concerned, strict=True)
    )


def _fills(model: nn.Module, feed: Feed, ids: Mapping[str, Tensor]) -> bool:
    """Whether any module takes what fills rows up into a prompt's value, in spite of the mask: the bits of what it is given stay, and
    what it gives is another value."""
    sites = [*ports(model, "input"), *ports(model, "output")]
    alone, together = (observe(model, sites, feed, ids[name]) for name in ("alone", "together"))
    batches = (observe(model, sites, feed, ids[name], _mask(ids[name]), like=together) for name in ("changed", "filled"))
    found = _labelled(sites, alone, together)
    values = list(zip(_row_values(found, alone, ALONE, 0), *(_row_values(found, batch) for batch in batches), strict=True))
    given, gave = values[: len(sites) // 2], values[len(sites) // 2 :]
    return any(
        one is not None and same_bits(one, other) and filled(*result)
        for (_, one, other), result in zip(given, gave, strict=True)
    )


def _labelled(sites: Sequence[Site], alone: Sequence[list[Any]], together: Sequence[list[Any]]) -> list[Site | None]:
    runs = [labelled(site, None, None, *seen) for site, *seen in zip(sites, alone, together, strict=True)]
    return [run if isinstance(run, Site) else None for run in runs]


def _reads_pad(model: nn.Module, sites: Sequence[Site | None], feed: Feed, ids: Tensor) -> bool:
    """Whether a prompt with the pad id among its tokens has other values where a mask says that all of it is to be looked at.

    First, in the middle or last, because some models take only what stands at an end for padding.
    """
    bound = [site for site in sites if site is not None]
    for place in (0, ALONE[1] // 2, ALONE[1] - 1):
        padded = ids.clone()
        padded[0, place] = feed.pad
        without, full = (observe(model, bound, feed, padded, mask) for mask in (None, torch.ones_like(padded)))
        if not all(map(same_bits, _row_values(bound, without, ALONE, 0), _row_values(bound, full, ALONE, 0))):
            return True
    return False


def _row_values(
    sites: Sequence[Site | None], seen: Sequence[list[Any]], shape: tuple[int, int] = TOGETHER, row: int = ROW
) -> list[Tensor | None]:
    return [None if site is None else _probed_value(site, held, shape, row) for site, held in zip(sites, seen, strict=True)]


def _probed_value(site: Site, seen: list[Any], shape: tuple[int, int], row: int) -> Tensor | None:
    """The value of the prompt of ALONE, cut out of what a probe of that shape gave; `None` where the cut does not fit."""
    try:
        value, _ = read(site.tap, seen[which_call(site, len(seen), len(seen))])
    except (Unfit, IndexError):
        return None
    axes = cast(tuple[Axis, ...], site.axes)
    if not isinstance(value, Tensor) or value.shape != tuple(axis.size(*shape) for axis in axes):
        return None
    return cut_out(value, axes, shape, row, ALONE[1])


def _coarse(site: Site | None, value: Tensor | None) -> bool:
    """Whether a value can stay the same while what it was made from moves: no floats, or few that differ, as of a step or a ReLU."""
    return (
        site is not None and value is not None and (not value.is_floating_point() or len(set(value.flatten().tolist())) < FEW)
    )


def _looks_around(model: nn.Module, feed: Feed, ids: Mapping[str, Tensor]) -> bool:
    """Whether at the output of any module a prompt's value moves with the batch around it."""
    sites = ports(model, "output")
    alone, together, changed = (observe(model, sites, feed, ids[name]) for name in ("alone", "together", "changed"))
    found = _labelled(sites, alone, together)
    return not all(map(same_bits, _row_values(found, together), _row_values(found, changed)))
