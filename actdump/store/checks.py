"""What must hold before a dump is written into a folder."""

import json
import os
from contextlib import suppress
from pathlib import Path

from actdump.errors import OccupiedError, StorageError
from actdump.format import Folder
from actdump.store.files import free_space, standing_place, storage
from actdump.store.standing import origins


def check_free(folder: Folder, *, overwrite: bool, repair: bool = False) -> None:
    """Make sure that a new dump may be written into the folder.

    Args:
        repair: a dump that lost its plan may be there.

    Raises:
        OccupiedError: the folder holds something else.
        StorageError: where the folder would be made is a file.
    """
    root = folder.root
    if root.is_symlink() and not root.exists():
        raise OccupiedError(f"{root} is a link to {root.readlink()}, which is not there; make that folder, or choose another")
    if root.exists() and not root.is_dir():
        raise OccupiedError(f"{root} is a file; the output is a folder")
    if root.is_dir():
        foreign = [path.name for path in root.iterdir() if not folder.written_by_us(path)]
        ours = _is_plan(folder.plan) or ((repair or folder.plan.exists()) and bool(origins(folder)))
        if foreign and not ours and not overwrite:
            raise OccupiedError(
                f"{root} holds other things ({', '.join(sorted(foreign)[:3])}); choose an empty or a new folder"
            )
        named = [path.name for path in (folder.plan, folder.manifest, folder.prompts, folder.shards) if path.exists()]
        if named and not ours:
            plan = "a plan.json that is not actdump's" if folder.plan.exists() else "no plan.json"
            remedy = "if it is this spec's dump, run with --repair" if origins(folder) else "remove them"
            raise OccupiedError(
                f"{root} holds files with the names of a dump's ({', '.join(named)}), but {plan}; choose another folder, or {remedy}"
            )
    _standing_folder(root)


def _is_plan(path: Path) -> bool:
    """Whether a file is a plan of some version of actdump, and not somebody's who uses that name as well."""
    with storage(path, "read"), suppress(FileNotFoundError, ValueError, KeyError, TypeError):
        value = json.loads(path.read_bytes())
        return isinstance(value["format"], int) and isinstance(value["digest"], str)
    return False


def check_writable(*folders: Path) -> None:
    """Make sure that folders can be written, or made.

    Raises:
        StorageError: one cannot.
    """
    for folder in folders:
        ancestor = _standing_folder(folder)
        if not os.access(ancestor, os.W_OK | os.X_OK):
            raise StorageError(f"{folder}: cannot be written: {ancestor} is read-only for you")


def _standing_folder(path: Path) -> Path:
    """The nearest folder above a path that is there.

    Raises:
        StorageError: a file stands where a folder would.
    """
    place = standing_place(path)
    if not place.is_dir():
        raise StorageError(f"{path}: cannot be made, because {place} is a file")
    return place


def check_space(folder: Folder, needed: int) -> None:
    """Make sure that the file system has room.

    Raises:
        StorageError: it has not.
    """
    free = free_space(folder.shards)  # which may stand on another disk
    if needed > free:
        raise StorageError(
            f"{folder.root}: the dump needs {needed:,} bytes, and {free:,} are free; make room, or choose another folder"
        )


def taken(folder: Folder) -> int:
    """How many bytes the parts of a dump take, which a new plan either keeps or makes room of; none where they are linked elsewhere."""
    size = 0
    for path in folder.shards.iterdir() if folder.shards.is_dir() else ():
        with suppress(FileNotFoundError):  # another run is at work, and it has its final name now
            status = path.stat()
            size += status.st_blocks * 512 if folder.written_by_us(path) and status.st_nlink == 1 else 0
    return size
