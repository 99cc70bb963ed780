"""Lock files, which the kernel frees when their holder dies, and the names of processes. Locks spare work: no value depends on them."""

import errno
import os
import platform
import secrets
from contextlib import suppress
from fcntl import LOCK_NB, LOCK_SH, flock
from pathlib import Path
from typing import TYPE_CHECKING

from actdump.format import Folder

if TYPE_CHECKING:
    from filelock import BaseFileLock

_TOKEN = secrets.token_hex(4)  # process ids repeat: after a restart, and in containers with the same host name
_NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP}


def me() -> str:
    """The name of this process in the names of files: no other process, on any machine, has the same."""
    return f"{os.getpid()}-{_TOKEN}-{platform.node() or 'localhost'}"


def number_and_host(process: str) -> tuple[int, str]:
    """The process id and the host in the name of a process."""
    number, _, host = process.split("-", 2)
    return int(number), host


def gone(folder: Folder, process: str) -> bool:
    """Whether a process that worked in a folder has ended, as far as can be told from here; what it left can be removed.

    A worker holds a lock as long as it works. Without locks, only processes of this machine can be told.
    """
    if process == me():
        return True  # this is an earlier run's
    if folder.worker(process).exists():
        try:
            if (lock := Lock.take(folder.worker(process), process)) is None:
                return False
            lock.free()
            return True
        except NoLocksError:
            pass
    number, host = number_and_host(process)
    return host == platform.node() and not _runs(number)


def _runs(process: int) -> bool:
    if process == os.getpid():
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


class NoLocksError(Exception):
    """The file system has no locks."""


class Lock:
    """A lock file that this process holds; what stands in it is the holder's name."""

    def __init__(self, path: Path, held: "BaseFileLock | None") -> None:
        self.path = path
        self._held = held

    @staticmethod
    def take(path: Path, name: str) -> "Lock | None":
        """Take a lock; `None` while another holds it.

        Raises:
            NoLocksError: the file system has none.
        """
        from filelock import FileLock, Timeout

        def sign(descriptor: int) -> None:
            with suppress(OSError):  # of a full disk the run hears where it matters
                os.ftruncate(descriptor, 0)
                os.write(descriptor, name.encode())

        held = FileLock(path, blocking=False, thread_local=False, fallback_to_soft=False, on_acquired=sign)
        try:
            held.acquire()
        except Timeout:
            return None
        except OSError as error:
            if error.errno in _NO_LOCKS:
                raise NoLocksError from error
            raise
        return Lock(path, held)

    @staticmethod
    def is_taken(path: Path) -> bool:
        """Whether anybody holds a lock: found out without a right to write. Nobody else can take it during the look.

        Raises:
            OSError: it is gone, or the file system has none.
        """
        with path.open("rb") as file:
            try:
                flock(file, LOCK_SH | LOCK_NB)
            except BlockingIOError:
                return True
        return False

    @property
    def held(self) -> bool:
        return self._held is not None

    def free(self) -> None:
        """Let go, and leave the file. Harmless when done already."""
        if self._held is not None:
            self._held.release()
            self._held = None

    def remove(self) -> None:
        """Let go, and remove the file. Harmless when done already."""
        if self._held is not None:
            self.path.unlink(missing_ok=True)  # before: afterwards it may be another's
            self.free()
