"""What is in a folder: a plan, parts that are done, a finished dump, or something else."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from actdump.errors import DataError, OccupiedError, StorageError
from actdump.format import VERSION, Folder, Shard, plan_from_json, plan_to_json, shard_from_json
from actdump.inputs import Stamps, sha256
from actdump.plan import Part, Plan
from actdump.statistics import Statistics
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
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{folder.plan}: not a plan: {error}; use another folder, or, if it is this spec's dump, --repair"
        ) from None
    except DataError as error:
        raise DataError(f"{folder.plan}: {error}; --repair makes it again, if it is this spec's") from None


def done(folder: Folder, part: Part, digest: str) -> Shard | None:
    """The record of a part that is done: its record is there, and its shard has the recorded size."""
    try:
        shard = shard_from_json(json.loads(folder.record(part.number).read_bytes()))
        size = folder.shard(part.number).stat().st_size
    except (OSError, ValueError, KeyError, TypeError, AttributeError, DataError):
        return None
    return shard if shard.digest == digest and size == shard.bytes else None


def missing(folder: Folder, plan: Plan, parts: Sequence[Part]) -> list[Part]:
    """Those of the parts that are not done."""
    return [part for part in parts if done(folder, part, plan.digest) is None]


def statistics(folder: Folder, plan: Plan) -> Iterator[Mapping[str, Statistics]]:
    """The statistics of the parts that are done."""
    for part in plan.parts:
        if (shard := done(folder, part, plan.digest)) is not None:
            yield shard.statistics


def complete(folder: Folder, plan: Plan) -> bool:
    """Whether the dump is sealed, and its shards are there with their sizes and records."""
    try:
        manifest = json.loads(folder.manifest.read_bytes())
        if manifest["format"] != VERSION or manifest["digest"] != plan.digest or not has_prompts(folder, plan):
            return False
        sizes = {shard["number"]: shard["bytes"] for shard in manifest["shards"]}
        with os.scandir(folder.shards) as entries:
            found = {
                entry.name: entry.stat().st_size for entry in entries if not entry.name.startswith(".")
            }  # locks come and go
        whole = (found.get(folder.shard(part.number).name) == sizes.get(part.number, -1) for part in plan.parts)
        return all(whole) and all(folder.record(part.number).name in found for part in plan.parts)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def restamp(folder: Folder, plan: Plan, stamps: Stamps, now: Stamps) -> None:
    """Note the times of inputs that were touched and found to be the same, so that they are not read again each time.

    Reading them may have taken long, and another run may have replaced the dump meanwhile.
    """
    if now != stamps and (standing := load_plan(folder)) is not None and standing[0].digest == plan.digest:
        with suppress(StorageError):  # of a folder that is read-only, they are read each time
            write_atomically(folder.plan, to_json({**plan_to_json(plan), "stamps": now}))


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
        if not ours and any(path.exists() for path in (folder.plan, folder.manifest, folder.prompts, folder.shards)):
            plan = "a plan.json that is not actdump's" if folder.plan.exists() else "no plan.json"
            remedy = "if it is this spec's dump, run with --repair" if origins(folder) else "remove them"
            raise OccupiedError(
                f"{root} holds files with the names of a dump's, but {plan}; choose another folder, or {remedy}"
            )
    ancestor = standing_place(root)
    if not ancestor.is_dir():
        raise StorageError(f"{root}: cannot be made, because {ancestor} is a file")


def _is_plan(path: Path) -> bool:
    """Whether a file is a plan of some version of actdump, and not somebody's who uses that name as well."""
    with storage(path, "read"), suppress(FileNotFoundError, ValueError, KeyError, TypeError):
        value = json.loads(path.read_bytes())
        return isinstance(value["format"], int) and isinstance(value["digest"], str)
    return False


def check_writable(folder: Folder) -> None:
    """Make sure that the folder can be written, or made.

    Raises:
        StorageError: it cannot.
    """
    root, ancestor = folder.root, standing_place(folder.root)
    if not os.access(ancestor, os.W_OK | os.X_OK):
        raise StorageError(f"{root}: cannot be written: {ancestor} is read-only for you")


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
    paths = folder.shards.iterdir() if folder.shards.is_dir() else ()
    found = (path.stat() for path in paths if folder.written_by_us(path))
    return sum(status.st_size for status in found if status.st_nlink == 1)


def origins(folder: Folder) -> set[tuple[int, str]]:
    """The formats, and the digests of the plans, that the manifest and the records in a folder were written under, if readable."""
    found = set()
    for path in (folder.manifest, *folder.shards.glob("[0-9]*.json")):
        with suppress(OSError, ValueError, KeyError, TypeError):
            value = json.loads(path.read_bytes())
            found.add((value["format"], value["digest"]))
    return found


def clear(folder: Folder, plan: Plan) -> None:
    """Remove what a dump consists of, the manifest first and the plan last; leave everything else, and parts that the plan has done."""
    done_parts = [part.number for part in plan.parts if done(folder, part, plan.digest)]
    kept = {path for number in done_parts for path in (folder.shard(number), folder.record(number))}
    with storage(folder.root, "cleared"):
        folder.manifest.unlink(missing_ok=True)
        for path in sorted(folder.shards.iterdir()) if folder.shards.is_dir() else ():
            if folder.written_by_us(path) and path not in kept:
                path.unlink()
        if folder.shards.is_dir() and not folder.shards.is_symlink() and not any(folder.shards.iterdir()):
            folder.shards.rmdir()
        for path in (folder.prompts, folder.tokens, folder.plan):
            path.unlink(missing_ok=True)


def reopen(folder: Folder, parts: Iterable[Part]) -> None:
    """Give up parts of a dump, so that they are not done, and the dump is not complete.

    Records go first: without a manifest, what records say is done would be taken into a new one.
    """
    with storage(folder.root, "repaired"):
        for part in parts:
            folder.record(part.number).unlink(missing_ok=True)
        folder.manifest.unlink(missing_ok=True)


def has_tokens(folder: Folder, plan: Plan) -> bool:
    """Whether the spooled token ids of the plan's prompts, and prompts.jsonl, are there, and every byte is as it was written."""
    whole = folder.tokens.is_file() and folder.tokens.stat().st_size == 4 * (plan.tokens + plan.prompts)
    if not whole or not has_prompts(folder, plan):
        return False
    facts = plan.facts
    return (sha256(folder.tokens), sha256(folder.prompts)) == (facts["tokens"], facts["prompts"]["sha256"])


def has_prompts(folder: Folder, plan: Plan) -> bool:
    """Whether prompts.jsonl is there with its size."""
    return folder.prompts.is_file() and folder.prompts.stat().st_size == plan.facts["prompts"]["bytes"]
