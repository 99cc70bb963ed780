"""The heap of the C library, which keeps what was freed."""

import ctypes
from contextlib import suppress


def trim() -> None:
    """Give freed memory back to the system.

    Batches of ever new shapes leave glibc's heap full of holes, and a long run would grow by hundreds of megabytes. Other C
    libraries have no `malloc_trim`, and need none. See malloc_trim(3).
    """
    with suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
