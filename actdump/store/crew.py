"""The workers at work in a folder."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from time import sleep
from typing import Self

from actdump.format import WORKER, Folder
from actdump.plan import Part
from actdump.store.files import storage
from actdump.store.locks import Lock, NoLocksError, gone, me, number_and_host

log = logging.getLogger(__name__)

WAIT = 0.2  # seconds between two looks at what another worker does


class Crew:
    """The workers at work in a folder, and this one among them.

    There is a lock for whoever decides about the folder as a whole (makes the plan, seals the dump), one that each worker holds
    as long as it works, and one for each part.

    Attributes:
        locks: whether the file system has locks; without them every worker keeps to its own share.
    """

    def __init__(self, folder: Folder) -> None:
        self.folder = folder
        self.locks = True
        self._held: list[Lock] = []

    @contextmanager
    def deciding(self, waiting: Callable[[], None]) -> Iterator[None]:
        """While the block runs, no other worker decides about the folder.

        Args:
            waiting: called again and again while another worker does.
        """
        while (lock := self._take(self.folder.lock)) is None:
            waiting()
            sleep(WAIT)
        try:
            yield
        finally:
            lock.remove()

    def join(self) -> None:
        """Be seen to work here."""
        self._take(self.folder.worker(me()))

    def others(self) -> list[str]:
        """The names of the other workers that are at work here."""
        found = [WORKER.fullmatch(path.name) for path in self.folder.root.iterdir()]
        return [name for each in found if each and (name := each["process"]) != me() and not gone(self.folder, name)]

    def claim(self, part: Part) -> Lock | None:
        """Take a part; `None` while another worker has it."""
        return self._take(self.folder.claim(part.number))

    def _take(self, path: Path) -> Lock | None:
        if not self.locks:
            return Lock(path, None)
        with storage(path):
            if not path.parent.is_dir():
                path.parent.mkdir(parents=True, exist_ok=True)
            try:
                lock = Lock.take(path, me())
            except FileNotFoundError:  # the folder: another worker made it, failed, and removed it
                return None
            except NoLocksError:
                path.unlink(missing_ok=True)
                self.locks = False
                log.warning("%s: this file system has no locks, so every worker keeps to its own share", self.folder.root)
                return Lock(path, None)
        self._held = [*(each for each in self._held if each.held), *([lock] if lock else [])]
        return lock

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for lock in self._held:
            lock.remove()
        with suppress(OSError):  # it holds something, as it does unless nothing came of the run
            self.folder.root.rmdir()


def at_work(folder: Folder) -> dict[int, tuple[int, str]]:
    """Which parts are being worked on, and the process id and host of who does."""
    found = {}
    for path in folder.shards.glob(".*.actdump-lock"):
        with suppress(OSError, ValueError):  # it may be gone already, or not be signed yet
            if Lock.is_taken(path):
                found[int(path.name[1:].partition(".")[0])] = number_and_host(path.read_text())
    return found
