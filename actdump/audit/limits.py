"""How far a value may be from that of the prompt alone: errors of tokens, and limits that were measured."""

from collections.abc import Collection

import torch
from torch import Tensor

LIMITS = {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.01}
LARGEST = 2.0  # the relative error of a vector that points the other way, and of one that is not finite where the other is


def limit(computed: torch.dtype, within: Collection[torch.dtype], stored: torch.dtype) -> float:
    """The largest relative error of a token that needs no second look.

    Args:
        computed: the dtype of the value in the model.
        within: those of the model's parameters; a float32 value in a bfloat16 model was rounded before.
    """
    if not computed.is_floating_point:
        return 0.0
    narrowed = torch.finfo(stored).eps if torch.finfo(stored).eps > torch.finfo(computed).eps else 0.0
    return max(LIMITS.get(dtype, 0.0) for dtype in (computed, *within)) + narrowed


def errors(value: Tensor, expected: Tensor, axis: int | None) -> Tensor:
    """The error of every token: the norm of the difference, relative to the larger of the two; of integers the share that differs.

    Args:
        axis: the axis that counts tokens; `None` where the value is one whole.
    """
    one, other = (_rows(each, axis).double() for each in (value, expected))
    same = (one == other) | (one.isnan() & other.isnan())
    if not value.is_floating_point():
        return 1 - same.double().mean(1)
    difference = torch.where(same, 0.0, one - other).norm(dim=1)
    size = torch.maximum(*(torch.where(each.isfinite(), each, 0.0).norm(dim=1) for each in (one, other)))
    error = torch.where(difference == 0, 0.0, difference / size)
    return error.nan_to_num(LARGEST, LARGEST).clamp_max(LARGEST)


def _rows(value: Tensor, axis: int | None) -> Tensor:
    if axis is None:
        return value.reshape(1, -1)
    rows = value.movedim(axis, 0)
    return rows.flatten(1) if rows.ndim > 1 else rows[:, None]
