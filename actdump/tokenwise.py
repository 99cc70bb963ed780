"""Values compared token by token: a vector for each, and relative errors that are numbers whatever the vectors hold.

A norm over a whole prompt would tell of its first token alone, where massive activations stand.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

LARGEST = 2.0  # the relative error of a vector that points the other way, and of one that is not finite where the other is


def by_token(value: "Tensor", axis: int | None) -> "Tensor":
    """A vector for each token, of shape (token, rest).

    Args:
        axis: the axis that counts tokens; `None` where the value is one whole.
    """
    if axis is None:
        return value.reshape(1, -1)
    rows = value.movedim(axis, 0)
    return rows.flatten(1) if rows.ndim > 1 else rows[:, None]


def capped(errors: "Tensor") -> "Tensor":
    """Relative errors, the largest one where they are larger, infinite or NaN."""
    return errors.nan_to_num(LARGEST, LARGEST).clamp_max(LARGEST)
