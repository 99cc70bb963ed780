"""Stop signals: the first Ctrl-C (or SIGTERM) asks for a stop after the batch in hand, the second Ctrl-C ends at once."""

import os
import signal
import sys
from types import FrameType, TracebackType
from typing import Any, Self

STOPPING = (signal.SIGINT, signal.SIGTERM)


class StopSignals:
    """While the block runs, signals only set a flag; a second SIGINT raises KeyboardInterrupt."""

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        for number in STOPPING:
            self._before[number] = signal.signal(number, self._handle)
        return self

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True
        os.write(sys.stderr.fileno(), b"\nstopping after the batch in hand; Ctrl-C again ends at once\n")

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
