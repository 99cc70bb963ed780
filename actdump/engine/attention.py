"""Which kernels torch computes attention with on CUDA."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch.backends import cuda


@contextmanager
def any_shape() -> Iterator[None]:
    """While the block runs, attention is computed by kernels that take a batch of any shape as it comes.

    cuDNN's, which torch prefers on some GPUs, builds a plan for each number and length of prompts that it did not see before
    (https://github.com/pytorch/pytorch/pull/155958), and in a run nearly every batch is such a one. Measured on an H100 (torch 2.11,
    bfloat16): 70 to 100 ms for a plan, beside 113 ms for the whole forward of a model of 7 billion parameters and 4,096 tokens. That
    takes as long without cuDNN where prompts have up to 2,000 tokens, and some 6 % longer where they have 4,096.
    """
    before = cuda.cudnn_sdp_enabled()  # type: ignore[no-untyped-call] # torch gives it no types
    cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        cuda.enable_cudnn_sdp(before)
