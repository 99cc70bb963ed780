"""What is in a folder: a plan, parts that are done, a finished dump, or something else."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

from actdump.errors import DataError, StorageError
from actdump.format import VERSION, Folder, Shard, plan_from_json, plan_to_json, shard_from_json
from actdump.inputs import Stamps, sha256
from actdump.plan import Part, Plan, Span
from actdump.statistics import Statistics
from actdump.store.files import storage, to_json, write_atomically

_GONE = FileNotFoundError, NotADirectoryError
_OTHER = ValueError, KeyError, TypeError  # what reading a file raises that holds something else


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


def finished(folder: Folder, span: Span, digest: str) -> Shard | None:
    """The record of a shard that is finished: the record is there, and the file has the recorded size.

    Raises:
        StorageError: what is there cannot be read.
    """
    path = folder.record(span.number)
    with storage(path, "read"), suppress(*_GONE, *_OTHER, AttributeError, DataError):
        shard = shard_from_json(json.loads(path.read_bytes()))
        size = folder.shard(span.number).stat().st_size
        return shard if shard.digest == digest and size == shard.bytes else None
    return None


def done(folder: Folder, part: Part, digest: str) -> bool:
    """Whether all shards of a part are finished."""
    return all(finished(folder, shard, digest) is not None for shard in part.shards)


def missing(folder: Folder, plan: Plan, parts: Sequence[Part]) -> list[Part]:
    """Those of the parts that are not done."""
    return [part for part in parts if not done(folder, part, plan.digest)]


def statistics(folder: Folder, plan: Plan) -> Iterator[Mapping[str, Statistics]]:
    """The statistics of the parts whose first shard, which has them, is finished."""
    for part in plan.parts:
        if (shard := finished(folder, part.shards[0], plan.digest)) is not None:
            yield shard.statistics


def complete(folder: Folder, plan: Plan) -> bool:
    """Whether the dump is sealed, and its shards are there with their sizes and records.

    Raises:
        StorageError: the manifest or the folder of the shards cannot be read.
    """
    with storage(folder.manifest, "read"), suppress(*_GONE, *_OTHER):
        manifest = json.loads(folder.manifest.read_bytes())
        if manifest["format"] != VERSION or manifest["digest"] != plan.digest or not has_prompts(folder, plan):
            return False
        sizes = {shard["number"]: shard["bytes"] for shard in manifest["shards"]}
        with os.scandir(folder.shards) as entries:
            found = {
                entry.name: entry.stat().st_size for entry in entries if not entry.name.startswith(".")
            }  # locks come and go
        whole = (found.get(folder.shard(shard.number).name) == sizes.get(shard.number, -1) for shard in plan.shards)
        return all(whole) and all(folder.record(shard.number).name in found for shard in plan.shards)
    return False


def restamp(folder: Folder, plan: Plan, stamps: Stamps, now: Stamps) -> None:
    """Note the times of inputs that were touched and found to be the same, so that they are not read again each time.

    Reading them may have taken long, and another run may have replaced the dump meanwhile.
    """
    if now != stamps and (standing := load_plan(folder)) is not None and standing[0].digest == plan.digest:
        with suppress(StorageError):  # of a folder that is read-only, they are read each time
            write_atomically(folder.plan, to_json({**plan_to_json(plan), "stamps": now}))


def origins(folder: Folder) -> set[tuple[int, str]]:
    """The formats, and the digests of the plans, that the manifest and the records in a folder were written under.

    Raises:
        StorageError: one of them cannot be read.
    """
    found = set()
    for path in (folder.manifest, *folder.shards.glob("[0-9]*.json")):
        with storage(path, "read"), suppress(*_GONE, *_OTHER):
            value = json.loads(path.read_bytes())
            found.add((value["format"], value["digest"]))
    return found


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
