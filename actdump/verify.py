"""What a dump holds, compared with what its manifest, plan and records say: sizes and sha256."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from actdump.errors import DataError
from actdump.format import Folder, Manifest, Shard, plan_from_json, shard_from_json
from actdump.inputs import sha256
from actdump.plan import Plan
from actdump.reader import Dump

T = TypeVar("T")


def faults(dump: Dump) -> list[str]:
    """Compare every file of a dump with the manifest: sizes and sha256. The faults found, in words; none if whole."""
    folder, manifest = dump.folder, dump.manifest
    plan = _read(folder.plan, plan_from_json)
    of_plan, facts = (
        ([plan], manifest.facts) if isinstance(plan, str) else (manifest_faults(folder, manifest, plan), plan.facts)
    )
    in_shards = [fault for shard in manifest.shards for fault in shard_faults(folder, shard)]
    return [*of_plan, *in_shards, *prompts_faults(folder, facts)]


def shard_faults(folder: Folder, shard: Shard) -> list[str]:
    """Compare a shard and its record with what the manifest, or the record itself, says of them; the faults found, in words."""
    return [*_file_faults(folder.shard(shard.number), shard.sha256, shard.bytes), *_record_faults(folder, shard)]


def prompts_faults(folder: Folder, facts: Mapping[str, Any]) -> list[str]:
    """Compare prompts.jsonl with the facts of the plan; the faults found, in words."""
    return _file_faults(folder.prompts, facts["prompts"]["sha256"], facts["prompts"]["bytes"])


def _file_faults(path: Path, digest: str, size: int) -> list[str]:
    try:
        found = path.stat().st_size
        if found != size:
            return [f"{path}: {found:,} bytes, but it had {size:,} when it was written"]
        return [] if sha256(path) == digest else [f"{path}: the bytes changed since it was written (sha256 differs)"]
    except FileNotFoundError:
        return [f"{path}: missing"]
    except OSError as error:
        return [f"{path}: cannot be read: {error.strerror}"]


def _record_faults(folder: Folder, shard: Shard) -> list[str]:
    path = folder.record(shard.number)
    record = _read(path, shard_from_json)
    if isinstance(record, str):
        return [record]
    ours = ("number", "digest", "first", "prompts", "tokens", "bytes", "sha256", "rows")
    wrong = [f"`{name}`" for name in ours if getattr(record, name) != getattr(shard, name)]
    return [f"{path}: {', '.join(wrong)}: not what manifest.json says"] if wrong else []


def manifest_faults(folder: Folder, manifest: Manifest, plan: Plan) -> list[str]:
    """Compare a manifest with the plan, and its totals with its shards; the faults found, in words."""
    planned = [(shard.number, shard.first, shard.prompts, shard.tokens) for shard in plan.shards]
    same = {
        "digest": manifest.digest == plan.digest,
        "columns": manifest.columns == plan.columns,
        "facts": manifest.facts == plan.facts,
        "shards": [(shard.number, shard.first, shard.prompts, shard.tokens) for shard in manifest.shards] == planned,
        "prompts": manifest.prompts == plan.prompts,
        "tokens": manifest.tokens == plan.tokens,
        "bytes": manifest.bytes == sum(shard.bytes for shard in manifest.shards),
    }
    wrong = [f"`{name}`" for name, right in same.items() if not right]
    return [f"{folder.manifest}: {', '.join(wrong)}: not what plan.json says"] if wrong else []


def _read(path: Path, kind: Callable[[Any], T]) -> T | str:
    """What a JSON file holds, or in words why it cannot be read."""
    try:
        return kind(json.loads(path.read_bytes()))
    except FileNotFoundError:
        return f"{path}: missing"
    except OSError as error:
        return f"{path}: cannot be read: {error.strerror}"
    except (ValueError, KeyError, TypeError, AttributeError, DataError) as error:
        return f"{path}: broken: {error if path.stat().st_size else 'the file is empty'}"
