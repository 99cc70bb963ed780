"""How torch and Python say that memory ran out."""

# How the errors that torch raises as bare RuntimeErrors begin to speak of memory: CPU, cuBLAS, MPS and pinned host memory.
_WORDS = ("can't allocate memory", "ALLOC_FAILED", "out of memory")


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on the device or the host."""
    import torch

    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(words in str(error) for words in _WORDS)
