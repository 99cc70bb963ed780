"""When a run is to stop: the signals that ask for it, and the time after which it stops by itself."""

import os
import re
import signal
from contextlib import suppress
from time import monotonic
from types import FrameType, TracebackType
from typing import Any, Self

from actdump.errors import UsageError

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


def hold() -> None:
    """Let these signals wait until it is known what they mean, because a command is loaded first.

    After a run they do nothing: it is over, whatever the time limit of its job, and the process about to end.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    for number in STOPPING:
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, _nothing)


def _nothing(_: int, __: FrameType | None) -> None:
    pass


def let_go() -> None:
    """Let them come, with those that waited, and do what they usually do."""
    for number in STOPPING:
        if signal.getsignal(number) is _nothing:
            signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)


def ignore() -> None:
    """Be deaf to those that a scheduler sends, because the process ends: Python gives up its handlers long before it is gone."""
    for number in STOPPING:
        if number != signal.SIGINT:
            signal.signal(number, signal.SIG_IGN)


def seconds(text: str) -> float:
    """A duration in seconds: `90s`, `55m`, `1h30m`, `3600`.

    Raises:
        UsageError: it is none.
    """
    found = re.fullmatch(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", f"{text}s" if text.isdecimal() else text)
    total = sum(int(count or 0) * unit for count, unit in zip(found.groups(), (3600, 60, 1), strict=True)) if found else 0
    if total == 0:
        raise UsageError(f"--stop-after: `{text}` is not a time; write 55m, 90s, 1h30m or a number of seconds")
    return float(total)


class StopSignals:
    """While the block runs, signals only set a flag; a second Ctrl-C raises KeyboardInterrupt.

    Some schedulers send SIGTERM and some what they are told to; NCCL may catch SIGUSR1, so SIGUSR2 does the same.
    """

    def __init__(self) -> None:
        self._asked = self._interrupted = False
        self._end: float | None = None
        self._before: dict[signal.Signals, Any] = {}

    def ask_after(self, seconds: float) -> None:
        """Ask for a stop after so many seconds without a signal."""
        self._end = monotonic() + seconds

    @property
    def asked(self) -> bool:
        """Whether to stop."""
        return self._asked or (self._end is not None and monotonic() >= self._end)

    def __enter__(self) -> Self:
        for number in STOPPING:
            self._before[number] = signal.signal(number, self._handle)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)
        return self

    def _handle(self, number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT and self._interrupted:
            raise KeyboardInterrupt
        self._asked, self._interrupted = True, self._interrupted or number == signal.SIGINT
        if number == signal.SIGINT and os.isatty(2):  # at once, amid whatever is being written
            with suppress(OSError):  # of a terminal that is gone: what is raised here is raised amid the run
                os.write(2, b"\nstopping, and keeping what is done; Ctrl-C again stops at once\n")

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
