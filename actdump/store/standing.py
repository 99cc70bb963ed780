"""What is in a folder: a plan, parts that are done, a finished dump, or something else."""

import json
import os
from typing import Any

from actdump.errors import DataError, OccupiedError, StorageError
from actdump.format import VERSION, Folder, Shard, plan_from_json, plan_to_json, shard_from_json
from actdump.inputs import Stamps
from actdump.plan import Part, Plan
from actdump.store.files import free_space, standing_place, storage, to_json, write_atomically


def load_plan(folder: Folder) -> tuple[Plan, dict[str, Any]] | None:
    """The plan in a folder and the stamps of the files that it was made from; `None` where there is no plan.

    Raises:
        DataError: the file is not a plan of this format.
    """
    if not folder.plan.is_file():
        return None
    try:
        value = json.loads(folder.plan.read_bytes())
        return plan_from_json(value), value["stamps"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder.plan}: not a plan: {error}; remove the folder, or use another") from None
    except DataError as error:
        raise DataError(f"{folder.plan}: {error}") from None


def done(folder: Folder, part: Part, digest: str) -> Shard | None:
    """The record of a part that is done: its record is there, and its shard has the recorded size."""
    try:
        shard = shard_from_json(json.loads(folder.record(part.number).read_bytes()))
        size = folder.shard(part.number).stat().st_size
    except (OSError, ValueError, KeyError, TypeError, DataError):
        return None
    return shard if shard.digest == digest and size == shard.bytes else None


def complete(folder: Folder, plan: Plan) -> bool:
    """Whether the dump is sealed, and its shards are there with their sizes and records."""
    try:
        manifest = json.loads(folder.manifest.read_bytes())
        if manifest["format"] != VERSION or manifest["digest"] != plan.digest or not has_prompts(folder, plan):
            return False
        sizes = {shard["number"]: shard["bytes"] for shard in manifest["shards"]}
        with os.scandir(folder.shards) as entries:
            found = {entry.name: entry.stat().st_size for entry in entries}
        whole = (found.get(folder.shard(part.number).name) == sizes.get(part.number, -1) for part in plan.parts)
        return all(whole) and all(folder.record(part.number).name in found for part in plan.parts)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def restamp(folder: Folder, plan: Plan, stamps: Stamps, now: Stamps) -> None:
    """Note the times of inputs that were touched and found to be the same, so that they are not read again each time."""
    if now != stamps:
        write_atomically(folder.plan, to_json({**plan_to_json(plan), "stamps": now}))


def check_free(folder: Folder, *, overwrite: bool) -> None:
    """Make sure that a new dump may be written into the folder.

    Raises:
        OccupiedError: the folder holds something else.
        StorageError: the folder, or where it would be made, is not one that can be written to.
    """
    root = folder.root
    if root.exists() and not root.is_dir():
        raise OccupiedError(f"{root} is a file; the output is a folder")
    if root.is_dir():
        foreign = [path.name for path in root.iterdir() if not folder.written_by_us(path)]
        ours = folder.plan.exists()
        if foreign and not ours and not overwrite:
            raise OccupiedError(
                f"{root} holds other things ({', '.join(sorted(foreign)[:3])}); choose an empty or a new folder"
            )
        if not ours and any(path.exists() for path in (folder.manifest, folder.prompts, folder.shards)):
            raise OccupiedError(f"{root} holds files with the names of a dump's, but no plan.json; choose another folder")
    ancestor = standing_place(root)
    if not ancestor.is_dir():
        raise StorageError(f"{root}: cannot be made, because {ancestor} is a file")
    if not os.access(ancestor, os.W_OK | os.X_OK):
        raise StorageError(f"{root}: cannot be written: {ancestor} is read-only for you")


def check_space(folder: Folder, needed: int) -> None:
    """Make sure that the file system has room.

    Raises:
        StorageError: it has not.
    """
    free = free_space(folder.root)
    if needed > free:
        raise StorageError(
            f"{folder.root}: the dump needs {needed:,} bytes, and {free:,} are free; make room, or choose another folder"
        )


def clear(folder: Folder) -> None:
    """Remove what a dump consists of, the manifest first and the plan last; leave everything else."""
    with storage(folder.root, "cleared"):
        folder.manifest.unlink(missing_ok=True)
        for path in sorted(folder.shards.iterdir()) if folder.shards.is_dir() else ():
            if folder.written_by_us(path):
                path.unlink()
        if folder.shards.is_dir() and not any(folder.shards.iterdir()):
            folder.shards.rmdir()
        for path in (folder.prompts, folder.tokens, folder.plan):
            path.unlink(missing_ok=True)


def has_tokens(folder: Folder, plan: Plan) -> bool:
    """Whether the spooled token ids of the plan's prompts, and prompts.jsonl, are there, whole."""
    whole = folder.tokens.is_file() and folder.tokens.stat().st_size == 4 * (plan.tokens + plan.prompts)
    return whole and has_prompts(folder, plan)


def has_prompts(folder: Folder, plan: Plan) -> bool:
    """Whether prompts.jsonl is there with its size."""
    return folder.prompts.is_file() and folder.prompts.stat().st_size == plan.facts["prompts"]["bytes"]
