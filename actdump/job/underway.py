"""A run that is under way."""

from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread, enumerate
from typing import TypeVar

from actdump.errors import Stopped
from actdump.format import Folder
from actdump.inputs import Inputs
from actdump.job.provenance import now
from actdump.job.watching import Watcher
from actdump.plan import Span
from actdump.spec import Spec
from actdump.worker import Worker

T = TypeVar("T")
LOOK = 0.1  # seconds between two looks whether to stop
_THREAD = "actdump-abandonable"


@dataclass(frozen=True)
class Damage:
    """What of a dump is not as it was written.

    Attributes:
        faults: in words.
        shards: those that are concerned, or whose records are; they have to be made again.
    """

    faults: tuple[str, ...] = ()
    shards: tuple[Span, ...] = ()


@dataclass
class Job:
    """A run that is under way.

    Attributes:
        sources: the files that the dump is made from; stdin: where standard input was kept.
        overwrite: whether to replace another dump.
        stopping: whether somebody asked for a stop.
        began: when it began, on the monotonic clock; started: the same as a date.
        repair: whether to compare every byte that is there; damage: what of it is not as it was written.
    """

    spec: Spec
    folder: Folder
    sources: Inputs
    stdin: Path | None
    worker: Worker
    overwrite: bool
    watcher: Watcher
    stopping: Callable[[], bool]
    began: float
    repair: bool
    damage: Damage = Damage()
    started: str = field(default_factory=now)

    def check_stop(self) -> None:
        """Raises:
        Stopped: asked to stop.
        """
        check_stop(self.folder, self.stopping)

    def patiently(self, do: Callable[[], T]) -> T:
        """Do something slow that leaves nothing behind, as `patiently` does.

        Raises:
            Stopped: asked to stop.
        """
        return patiently(do, self.check_stop)


def check_stop(folder: Folder, stopping: Callable[[], bool]) -> None:
    """Raises:
    Stopped: asked to stop.
    """
    if stopping():
        raise Stopped(f"{folder.root}: stopped before the end")


def patiently(do: Callable[[], T], check_stop: Callable[[], None]) -> T:
    """Do something slow that leaves nothing behind, in a thread, because nothing breaks it off.

    Args:
        check_stop: called again and again; when it raises, the thread is abandoned.
    """
    future: Future[T] = Future()
    Thread(target=_fulfil, args=(future, do), name=_THREAD, daemon=True).start()
    while not wait([future], LOOK).done:
        check_stop()
    return future.result()


def _fulfil(future: "Future[T]", do: Callable[[], T]) -> None:
    try:
        future.set_result(do())
    except BaseException as error:
        future.set_exception(error)


def abandoned() -> bool:
    """Whether a thread that a stop abandoned still runs: the interpreter cannot end well then, only the process can."""
    return any(thread.name == _THREAD for thread in enumerate())
