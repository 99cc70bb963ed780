"""The probe: tiny forwards that label the axes of every site, count its calls, and show that a prompt can be cut out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from actdump.address import parse
from actdump.engine.axes import ALONE, TOGETHER, Fault, axes_of, labelled
from actdump.engine.hooks import Stop, Unfit, copied, described, hooked, read, which_call
from actdump.engine.site import Axis, Feed, Site, bind, cut_out, fits, shape_text
from actdump.errors import ActdumpError, AddressError, UsageError
from actdump.plan import Layout
from actdump.tap import Selection, Tap

# The row of TOGETHER that begins with the prompt of ALONE: not the first, the last or the middle one, so that a stray [0] or
# [-1] and a reversed batch would show.
ROW = 1
# Relative errors per vector up to which two values are one value computed in two batch shapes. Measured over every module of
# the zoo, of SmolLM2 and of MiniLM (tests/test_zoo.py): float32 at worst 2e-5, bfloat16 0.1 (0.03 for 99 of 100, 0.016 for the
# median of the worst module), float16 0.013. A value that hangs on its neighbours is off by its own size, perhaps for a few
# tokens only, as with a router that drops what exceeds its capacity; so with wide floats every vector has to agree. With
# narrow ones an expert can be chosen otherwise on a near tie, so some vectors may be anything.
ALIKE_WIDE = 0.01
ALIKE_NARROW = 0.25
MEDIAN_NARROW = 0.05
STRAYS = 0.25  # the share of vectors, or of integers, that may be anything with narrow floats


@dataclass(frozen=True)
class Probe:
    """What the probe found: sites with their axes, taps that cannot be captured, and how to run the model.

    Attributes:
        runs: for each tap, in the order given, a site or a fault.
        verified: whether values were compared, not shapes alone (they cannot be on the meta device).
    """

    runs: tuple[Site | Fault, ...]
    feed: Feed
    verified: bool

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
    does, the mask is used. Either way the prompt's value in the batch must be its value alone, or the tap is a fault.

    Measured (tests/test_zoo.py): causal and recurrent models need no mask, whatever their positions (learned, rotary, ALiBi),
    windows, experts or scans, because nothing of a token comes from what follows it; models that look both ways need one. A
    mask that is used without need costs time and changes no value, so every doubt ends with the mask: experts are one on CPUs where
    the last bits of a token hang on how many tokens its expert is given.

    Args:
        apart: every prompt will run in a batch of its own, so nothing needs to be shown about batches.
        tokens: the selection of taps that name none and have a token axis.
        dtype: the storage type of taps that name none and hold floating point numbers.

    Raises:
        UsageError: the model does not run on token ids alone.
    """
    ids = _probe_ids(feed)
    together = ids["together"]
    alone = _observe(model, sites, feed, ids["alone"])
    batch = _observe(model, sites, feed, together)
    runs = tuple(labelled(site, tokens, dtype, *seen) for site, *seen in zip(sites, alone, batch, strict=True))
    if feed.device.type == "meta" or apart:
        return Probe(runs, replace(feed, masked=not apart), verified=False)
    found = [run if isinstance(run, Site) else None for run in runs]
    batch_values = _row_values(found, batch)
    changed = _row_values(found, _observe(model, sites, feed, ids["changed"], like=batch))
    masked = not all(map(_same_bits, batch_values, changed)) or (any(map(_coarse, found)) and _looks_around(model, feed, ids))
    if masked:
        mask = torch.ones(TOGETHER, dtype=torch.long)
        mask[ROW, ALONE[1] :] = 0
        batch_values = _row_values(found, _observe(model, sites, feed, ids["changed"], mask, like=batch))
    alone_values = [
        None if site is None else _probed_value(site, seen, ALONE, 0) for site, seen in zip(found, alone, strict=True)
    ]
    wide = all(weight.dtype in (torch.float32, torch.float64) for weight in model.parameters())
    checked = tuple(_verified(*each, wide) for each in zip(runs, alone_values, batch_values, strict=True))
    return Probe(checked, replace(feed, masked=masked), verified=True)


def _probe_ids(feed: Feed) -> dict[str, Tensor]:
    """Token ids for the probes; `changed` differs from `together` in everything but the row's own prompt."""
    generator = torch.Generator().manual_seed(0)
    low = feed.vocabulary // 4 if feed.vocabulary >= 8 else 0
    together, changed = (torch.randint(low, feed.vocabulary, TOGETHER, generator=generator) for _ in range(2))
    together[together == feed.pad] = low
    prompt = together[ROW, : ALONE[1]]
    changed[ROW, : ALONE[1]] = prompt
    changed[ROW, ALONE[1] :] = feed.pad
    return {"alone": prompt[None], "together": together, "changed": changed}


def _observe(
    model: nn.Module,
    sites: Sequence[Site],
    feed: Feed,
    ids: Tensor,
    mask: Tensor | None = None,
    *,
    like: Sequence[list[Any]] | None = None,
) -> list[list[Any]]:
    """Run one forward; for each site, what its port held at each call.

    Args:
        like: what another forward gave; this one ends when every site was called as often. Without it, it runs to its end.
    """
    seen: list[list[Any]] = [[] for _ in sites]
    missing = {place for place, calls in enumerate(like or ()) if calls}

    def keep(place: int, held: Any) -> None:
        seen[place].append(copied(held))
        if like is not None and len(seen[place]) == len(like[place]):
            missing.discard(place)
            if not missing:
                raise Stop

    with torch.no_grad(), hooked(sites, keep):
        try:
            model(**feed.arguments(ids, mask))
        except Stop:
            pass
        except ActdumpError:
            raise
        except Exception as error:  # a model's code can raise anything; it is told in full, and chained
            raise UsageError(
                f"{type(model).__name__} does not run on token ids alone: {type(error).__name__}: {error}"
            ) from error
        finally:
            feed.state.restored()
    return seen


# ---------------------------------------------------------------------------------------------------------- does the cut hold?


def _row_values(sites: Sequence[Site | None], seen: Sequence[list[Any]]) -> list[Tensor | None]:
    return [None if site is None else _probed_value(site, held, TOGETHER, ROW) for site, held in zip(sites, seen, strict=True)]


def _probed_value(site: Site, seen: list[Any], shape: tuple[int, int], row: int) -> Tensor | None:
    """The value of the prompt of ALONE, cut out of what a probe of that shape gave; `None` where the cut does not fit."""
    try:
        value, _ = read(site.tap, seen[which_call(site, len(seen), len(seen))])
    except (Unfit, IndexError):
        return None
    if not isinstance(value, Tensor) or not fits(site, value, shape):
        return None
    return cut_out(value, cast(tuple[Axis, ...], site.axes), shape, row, ALONE[1])


def _same_bits(one: Tensor | None, other: Tensor | None) -> bool:
    return one is None or other is None or torch.equal(one.nan_to_num(), other.nan_to_num())


def _coarse(site: Site | None) -> bool:
    """Whether what a site holds are no floats, so that it can stay the same while what it was made from moves."""
    return site is not None and not getattr(torch, cast(Layout, site.layout).dtype).is_floating_point


def _looks_around(model: nn.Module, feed: Feed, ids: Mapping[str, Tensor]) -> bool:
    """Whether at the output of any module a prompt's value moves with the batch around it."""
    sites = _outputs(model)
    alone, together, changed = (_observe(model, sites, feed, ids[name]) for name in ("alone", "together", "changed"))
    runs = [labelled(site, None, None, *seen) for site, *seen in zip(sites, alone, together, strict=True)]
    found = [run if isinstance(run, Site) else None for run in runs]
    return not all(map(_same_bits, _row_values(found, together), _row_values(found, changed)))


def _verified(run: Site | Fault, alone: Tensor | None, batch: Tensor | None, wide: bool) -> Site | Fault:
    if isinstance(run, Fault):
        return run
    if alone is None or batch is None or alone.shape != batch.shape:
        return Fault(run.tap, "its shape depends on the values in the batch, so a prompt's own value cannot be cut out")
    if unlike := _unlikeness(alone, batch, wide):
        return Fault(
            run.tap,
            f"{shape_text(run.axes or ())} cut out of a padded batch is not the value of the prompt run alone ({unlike}); "
            "its order, or its dependence on the other prompts, cannot be undone. `batch: {prompts: 1}` runs every prompt alone",
        )
    return run


def _unlikeness(alone: Tensor, batch: Tensor, wide: bool) -> str | None:
    """How two values of one prompt differ more than another batch shape explains; `None` where they do not."""
    strays = 0.0 if wide else STRAYS
    if not alone.is_floating_point():
        share = (alone != batch).double().mean().item() if alone.numel() else 0.0
        return f"{share:.0%} of the integers differ" if share > strays else None
    error = _errors(alone, batch)
    if not len(error):
        return None
    share = (error > (ALIKE_WIDE if wide else ALIKE_NARROW)).double().mean().item()
    if share > strays or (not wide and error.median() > MEDIAN_NARROW):
        return f"{share:.0%} of its vectors are others, the worst by {error.max():.2g} of its length"
    return None


def _errors(alone: Tensor, batch: Tensor) -> Tensor:
    """The relative error of every vector, which the last axis holds."""
    width = alone.shape[-1] if alone.ndim > 1 else alone.numel()
    one, other = (value.double().nan_to_num(0.0, 1e100, -1e100).reshape(-1, width) for value in (alone, batch))
    difference = (one - other).norm(dim=1)
    return torch.where(difference == 0, 0.0, difference / one.norm(dim=1))


def _outputs(model: nn.Module) -> list[Site]:
    """The outputs of all modules."""
    paths = [path for path, _ in model.named_modules(remove_duplicate=False)]
    return bind(model, [Tap(path, parse(f"{path}.output" if path else "output")) for path in paths])


def outline(model: nn.Module, feed: Feed) -> list[tuple[str, str, str]]:
    """Every module of a model in its order: resolved path, class, and its output in words, with named axes.

    Where the model does not run as it is (on the meta device, say), the outputs are left empty.
    """
    sites = _outputs(model)
    ids = _probe_ids(feed)
    try:
        alone, together = (_observe(model, sites, feed, ids[name]) for name in ("alone", "together"))
    except UsageError:
        alone = together = [[] for _ in sites]
    return [
        (site.tap.address.path, type(site.module).__name__, _outlined(*seen))
        for site, *seen in zip(sites, alone, together, strict=True)
    ]


def _outlined(alone: list[Any], together: list[Any]) -> str:
    if not alone or len(alone) != len(together):
        return "" if not alone else "runs a varying number of times"
    text = _words(alone[0], together[0])
    return text if len(alone) == 1 else f"{text}, {len(alone)} times"


def _words(alone: Any, together: Any) -> str:
    """What two probes gave, in words: `(batch, token, 768)`."""
    if isinstance(alone, Tensor) and isinstance(together, Tensor):
        try:
            return shape_text(axes_of(tuple(alone.shape), tuple(together.shape)))
        except Unfit:
            return f"{tuple(alone.shape)} or {tuple(together.shape)}"
    if isinstance(alone, Mapping) and isinstance(together, Mapping):
        return ", ".join(f"{key} {_words(alone[key], together.get(key))}" for key in alone)
    if isinstance(alone, tuple | list) and isinstance(together, tuple | list):
        return "[" + ", ".join(map(_words, alone, together)) + "]"
    return described(alone)
