"""How far a value may be from that of the prompt alone: errors of tokens, and limits that were measured."""

from collections.abc import Collection

import torch
from torch import Tensor

from actdump.tokenwise import by_token, capped

# Relative errors of tokens up to which another batch shape needs no further proof, by the dtype of the model. Measured on a CPU (torch
# 2.13, transformers 5.23), padded batches against prompts run alone, all modules, input and output. Real weights, SmolLM2 and MiniLM:
# float32, 99.9 % of tokens below 5.2e-6, worst 1.7e-5 (the first token, a massive activation, in the MLPs of layers 9 and 10);
# bfloat16, 99.9 % below 0.040, worst 0.098 (attention of layer 7, logits); float16, 99.9 % below 0.0042, worst 0.013. Tiny seeded
# models of 28 families: 1.5e-6, 0.032, 0.0068. What lies above gets a second look, so a limit need not hold the very worst. On the
# other side: the residual stream of SmolLM2 one block too late is off by 0.22 or more at the median token, whatever the block.
# float64 was not measured; it is float32's limit, scaled by their spacings.
LIMITS = {torch.float64: 2e-13, torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.01}


def limit(computed: torch.dtype, within: Collection[torch.dtype], stored: torch.dtype) -> float:
    """The largest relative error of a token that needs no second look.

    Args:
        computed: the dtype of the value in the model.
        within: those of the model's parameters; a float32 value in a bfloat16 model was rounded before.
    """
    if not computed.is_floating_point:
        return 0.0
    # Two numbers that are nearly the same can be rounded to neighbours: a spacing apart, at most `eps` of their size.
    narrowed = torch.finfo(stored).eps if torch.finfo(stored).eps > torch.finfo(computed).eps else 0.0
    return max(LIMITS.get(dtype, 0.0) for dtype in (computed, *within)) + narrowed


def errors(value: Tensor, expected: Tensor, axis: int | None) -> Tensor:
    """The error of every token: the norm of the difference, relative to the larger of the two; of integers the share that differs.

    Args:
        axis: the axis that counts tokens; `None` where the value is one whole.
    """
    one, other = (by_token(each, axis).double() for each in (value, expected))
    same = (one == other) | (one.isnan() & other.isnan())
    if not value.is_floating_point():
        return 1 - same.double().mean(1)
    difference = torch.where(same, 0.0, one - other).norm(dim=1)
    size = torch.maximum(*(torch.where(each.isfinite(), each, 0.0).norm(dim=1) for each in (one, other)))
    return capped(torch.where(difference == 0, 0.0, difference / size))
