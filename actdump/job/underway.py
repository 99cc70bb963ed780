"""A run that is under way."""

from collections.abc import Callable
from dataclasses import dataclass, field

from actdump.errors import Stopped
from actdump.format import Folder
from actdump.job.provenance import now
from actdump.job.watching import Watcher
from actdump.spec import Spec


@dataclass
class Job:
    """A run that is under way.

    Attributes:
        stopping: whether somebody asked for a stop.
        began: when it began, on the monotonic clock; started: the same as a date.
    """

    spec: Spec
    folder: Folder
    watcher: Watcher
    stopping: Callable[[], bool]
    began: float
    started: str = field(default_factory=now)

    def check_stop(self) -> None:
        """Raises:
        Stopped: asked to stop.
        """
        if self.stopping():
            raise Stopped(f"{self.folder.root}: stopped before the end; the same command goes on with it")
