"""How torch and Python say that memory ran out, how it is told, and how other errors of a model are."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from actdump.errors import ActdumpError

# How the errors that torch raises as bare RuntimeErrors begin to speak of memory: CPU, cuBLAS, MPS and pinned host memory.
_WORDS = ("can't allocate memory", "ALLOC_FAILED", "out of memory")


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on the device or the host."""
    import torch

    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(words in str(error) for words in _WORDS)


@contextmanager
def memory_for(doing: str, remedy: str) -> Iterator[None]:
    """Word an error of memory that halving cannot mend.

    Raises:
        ActdumpError: memory ran out in the block.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise ActdumpError(f"{doing}: out of memory: {first_sentences(error)}; {remedy}") from error


@contextmanager
def reworded(say: Callable[[Exception], ActdumpError]) -> Iterator[None]:
    """Word what a model's code raises, which can be anything; memory that it lacks is somebody else's to mend, or to word.

    Raises:
        ActdumpError: what `say` makes of an error that is none of ours, chained to it.
    """
    try:
        yield
    except ActdumpError:
        raise
    except Exception as error:  # told in full, and chained
        if out_of_memory(error):
            raise
        raise say(error) from error


def first_sentences(error: BaseException) -> str:
    """The first two sentences of an error; torch goes on with a page of advice."""
    line = (str(error).strip() or type(error).__name__).partition("\n")[0]
    return ". ".join(line.split(". ")[:2]).rstrip(".")
