"""A command in a process of its own: how long it took, and the most memory that it held.

Runs as a program, too: a small process that starts the command and waits for it. A process begins with its parent's peak as its
own, and that of a process with torch in it would hide what is measured.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter

from benchmarks.rounds import Run

CLI = "from actdump.cli import main; main()"


@dataclass(frozen=True)
class Ended:
    """A process that ended well: seconds, the peak of its resident memory in bytes, and what it printed."""

    seconds: float
    peak: int
    output: str


def run(command: Sequence[str]) -> Ended:
    """Run a command.

    Raises:
        RuntimeError: it failed; the message is what it said.
    """
    waiter = [sys.executable, __file__, *command]
    usual = {
        name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"
    }  # or each one compiles anew
    done = subprocess.run(waiter, stdin=subprocess.DEVNULL, capture_output=True, text=True, env=usual)
    *printed, last = done.stdout.splitlines()
    seconds, peak, code = json.loads(last)
    if code != 0:
        raise RuntimeError(f"{' '.join(command)} ended with {code}: {done.stderr[-2000:]}")
    return Ended(seconds, peak, "\n".join(printed))


def python(code: str, *arguments: str) -> Ended:
    """Run a piece of Python."""
    return run([sys.executable, "-c", code, *arguments])


def timed_python(code: str, *arguments: str) -> Run:
    """A side that is a process of its own."""
    return lambda: python(code, *arguments).seconds


def actdump(*arguments: str) -> Ended:
    """Run the command `actdump`."""
    return python(CLI, *arguments)


def _wait(command: Sequence[str]) -> None:
    began = perf_counter()
    process = subprocess.Popen(command)
    _, status, usage = os.wait4(process.pid, 0)
    unit = 1 if sys.platform == "darwin" else 1024
    ended = [perf_counter() - began, usage.ru_maxrss * unit, os.waitstatus_to_exitcode(status)]
    print("\n" + json.dumps(ended), flush=True)


if __name__ == "__main__":
    _wait(sys.argv[1:])
