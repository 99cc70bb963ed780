"""Memory that forwards on a CPU free: kept for the next ones, and given back when it has become much."""

import ctypes
import os
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    import torch

# For each of glibc's thresholds, its number in malloc.h and the bytes that it becomes.
KEPT = {"trim_threshold": (-1, 1 << 30), "mmap_threshold": (-3, 32 << 20)}
MUCH = 1.25  # times the memory that was held when last nothing was kept
STATM = Path("/proc/self/statm")


class Freed:
    """The memory that forwards free in a block, which gives it all back at its end.

    glibc gives the activations of a forward back to the system, which hands them out again page by page, each filled with zeros. Kept,
    they cost 0.27 million page faults where there were 0.7 to 3.0 million, and 4 % less time (measured on two cores: SmolLM2 in
    float32, three layers of 512 prompts, two forwards side by side).

    But they fall to pieces around small blocks that stay: forwards of 10 MB came to keep 90 to 150 MB in each of two threads, and a
    run of 8 GB peaked 115 to 270 MB above one of 100 MB. With a limit it was 100 to 150 MB, in the same time.

    Other C libraries are left as they are, and so is what the environment sets.
    """

    def __init__(self, device: "torch.device") -> None:
        self._libc = _glibc() if device.type == "cpu" else None
        if self._libc is None:
            return
        for name, (parameter, value) in KEPT.items():
            if f"MALLOC_{name.upper()}_" not in os.environ and name not in os.environ.get("GLIBC_TUNABLES", ""):
                self._libc.mallopt(parameter, value)
        self._least = _held()

    def limit(self) -> None:
        """Give back what is free, if this process has come to hold much more than when last it did."""
        if self._libc is not None and _held() > MUCH * self._least:
            self._give_back()

    def _give_back(self) -> None:
        if self._libc is not None:
            self._libc.malloc_trim(0)
            self._least = _held()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._give_back()


def _glibc() -> ctypes.CDLL | None:
    """The C library, if it is glibc, on a system that tells what a process holds."""
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "mallopt") and STATM.exists() else None


def _held() -> int:
    """Pages of memory that this process holds and that are of no file."""
    _, resident, of_files, *_ = map(int, STATM.read_text().split())
    return resident - of_files
