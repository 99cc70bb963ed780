"""Files that are whole or not there: temporary names, flushes, renames, and what the file system refuses."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from actdump.errors import StorageError
from actdump.format import TEMPORARY, WORKER, Folder, temporary
from actdump.store.locks import Lock, NoLocksError, gone, me

PIECE = 1 << 30  # bytes written at once; macOS refuses more than 2 GiB


@contextmanager
def storage(path: Path, doing: str = "written") -> Iterator[None]:
    """Word what the file system refuses."""
    try:
        yield
    except OSError as error:
        named = Path(error.filename) if error.filename else path
        where = path if TEMPORARY.fullmatch(named.name) else named  # nobody knows the temporary name
        raise StorageError(f"{where}: cannot be {doing}: {error.strerror or error}") from error


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that it is there whole, or not at all."""
    with storage(path), renamed(path) as descriptor:
        write(descriptor, content)


@contextmanager
def renamed(path: Path) -> Iterator[int]:
    """A new file under a temporary name; flushed and renamed when the block ends well, and removed when it does not."""
    hidden = temporary(path, me())
    descriptor = os.open(hidden, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        yield descriptor
        os.fsync(descriptor)
        os.replace(hidden, path)
        flush_folder(path.parent)
    except BaseException:
        hidden.unlink(missing_ok=True)
        raise
    finally:
        os.close(descriptor)


def flush_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write(descriptor: int, content: bytes | memoryview, offset: int | None = None) -> None:
    view = memoryview(content).cast("B")
    while view:
        piece = view[:PIECE]
        written = os.write(descriptor, piece) if offset is None else os.pwrite(descriptor, piece, offset)
        offset = None if offset is None else offset + written
        view = view[written:]


def to_json(value: object) -> bytes:
    """JSON; of a name that is not UTF-8, as of a folder, the escapes that JSON has for it."""
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode(errors="backslashreplace")


def free_space(path: Path) -> int:
    """The free bytes where a folder is, or would be made."""
    return shutil.disk_usage(standing_place(path)).free


def standing_place(path: Path) -> Path:
    """The nearest folder above a path that is there."""
    return next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists())


def sweep(folder: Folder) -> None:
    """Remove what processes left that are gone: temporary files, and their locks."""
    left = {path: process for place in (folder.root, folder.shards) for path, process in _marked(place)}
    dead = {process for process in set(left.values()) if gone(folder, process)}
    for path in sorted(left, key=lambda path: path.name.endswith("worker")):  # last: from another host it alone tells of an end
        if left[path] in dead and path != folder.worker(me()):
            path.unlink(missing_ok=True)
    for path in folder.shards.glob(".*.actdump-lock"):
        with suppress(NoLocksError):
            if (claim := Lock.take(path, me())) is not None:
                claim.remove()


def being_written(folder: Folder) -> int:
    """How many bytes the temporary files of the shards take; they have holes where rows are to come."""
    with suppress(FileNotFoundError):
        return sum(path.stat().st_blocks * 512 for path, _ in _marked(folder.shards))
    return 0  # one of them got its final name


def _marked(place: Path) -> Iterator[tuple[Path, str]]:
    """The files in a folder that are marked with a process, and its name."""
    for path in place.iterdir() if place.is_dir() else ():
        if found := TEMPORARY.fullmatch(path.name) or WORKER.fullmatch(path.name):
            yield path, found["process"]
