"""Whether a prompt's value cut out of a batch is its value alone."""

import torch
from torch import Tensor

from actdump.engine.axes import Fault
from actdump.engine.site import Site, shape_text

# Relative errors per vector up to which two values are one value computed in two batch shapes. Measured over every module of
# the zoo, of SmolLM2 and of MiniLM (tests/test_zoo.py): float32 at worst 2e-5, bfloat16 0.1 (0.03 for 99 of 100, 0.016 for the
# median of the worst module), float16 0.013. A value that depends on its neighbours is off by its own size, perhaps for a few
# tokens only, as with a router that drops what exceeds its capacity; so with wide floats every vector has to agree. With
# narrow ones an expert can be chosen otherwise on a near tie, so some vectors may be anything.
ALIKE_WIDE = 0.01
ALIKE_NARROW = 0.25
MEDIAN_NARROW = 0.05
STRAYS = 0.25  # the share of vectors, or of integers, that may be anything with narrow floats

# What fills a row up has a part in a vector that moves with it, farther than rounding does, and that is not what it is alone either;
# by the vectors that do not move, rounding is known. So padding shows whose part is smaller than the limits above, as in ConvBERT.
FILLED = 3.0
FILLED_WIDE = 2e-4  # ten times the worst error above
FILLED_NARROW = 2.0  # spacings of the type at 1

REMEDY = "run such prompts one by one (in a spec: `batch: {prompts: 1}`)"


def same_bits(one: Tensor | None, other: Tensor | None) -> bool:
    """Whether two values are the same, bit by bit, as far as both are there. A NaN is like nothing, because it may hide anything."""
    return one is None or other is None or torch.equal(one, other)


def verified(run: Site | Fault, alone: Tensor | None, batch: Tensor | None, wide: bool) -> Site | Fault:
    """The site, if a prompt's value cut out of a batch is its value alone; a fault otherwise.

    Args:
        wide: whether the model computes in float32 or float64 throughout.
    """
    if isinstance(run, Fault):
        return run
    if alone is None or batch is None or alone.shape != batch.shape:
        return Fault(run.tap, "its shape depends on the values in the batch, so a prompt's own value cannot be cut out")
    if unlike := _unlikeness(alone, batch, wide):
        return Fault(
            run.tap,
            f"{shape_text(run.axes or ())} cut out of a padded batch is not the value of the prompt run alone ({unlike}); "
            f"its order, or its dependence on the other prompts, cannot be undone; {REMEDY}",
        )
    return run


def _moved(one: Tensor, other: Tensor) -> Tensor:
    """Which vectors differ in any bit."""
    return (_vectors(one) != _vectors(other)).any(1)


def filled(alone: Tensor | None, batch: Tensor | None, other: Tensor | None) -> bool:
    """Whether what fills a row up has a part in a prompt's value.

    Args:
        alone: the value of the prompt alone.
        batch, other: what was cut out of two padded batches of one shape, with a mask, whose rows are filled up with other tokens.
    """
    if alone is None or batch is None or other is None or alone.shape != batch.shape or not alone.is_floating_point():
        return False
    alone, batch, other = alone.cpu(), batch.cpu(), other.cpu()
    concerned, error, apart = _moved(batch, other), _errors(alone, batch), _errors(batch, other)
    still = error[~concerned]
    wide = alone.dtype in (torch.float32, torch.float64)
    if not wide and not len(still):
        return False  # nothing to measure it by
    least = FILLED_WIDE if wide else FILLED_NARROW * torch.finfo(alone.dtype).eps
    limit = max(least, FILLED * float(still.max())) if len(still) else least
    return bool((torch.minimum(error, apart)[concerned] > limit).any())


def _unlikeness(alone: Tensor, batch: Tensor, wide: bool) -> str | None:
    """How two values of one prompt differ more than another batch shape explains; `None` where they do not."""
    strays = 0.0 if wide else STRAYS
    alone, batch = alone.cpu(), batch.cpu()  # not every accelerator knows float64
    if not alone.is_floating_point():
        share = (alone != batch).double().mean().item()
        return f"{share:.0%} of the integers differ" if share > strays else None
    error = _errors(alone, batch)
    share = (error > (ALIKE_WIDE if wide else ALIKE_NARROW)).double().mean().item()
    if share > strays or (not wide and error.median() > MEDIAN_NARROW):
        return f"{share:.0%} of its vectors are others, the worst by {error.max():.2g} of its length"
    return None


def _errors(alone: Tensor, batch: Tensor) -> Tensor:
    """The relative error of every vector; the last axis holds them."""
    one, other = (_vectors(value).double().nan_to_num(0.0, 1e100, -1e100) for value in (alone, batch))
    difference = (one - other).norm(dim=1)
    return torch.where(difference == 0, 0.0, difference / one.norm(dim=1))


def _vectors(value: Tensor) -> Tensor:
    return value.reshape(-1, value.shape[-1] if value.ndim > 1 else value.numel())
