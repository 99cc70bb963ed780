"""The format on disk: names of files, and plan, shard record and manifest to and from JSON. Pure.

A shard is a safetensors file (https://huggingface.co/docs/safetensors, "Format"): eight bytes with the length of the header,
a JSON header padded with spaces to a multiple of eight, then the tensors without holes. We write the header ourselves,
before any row is known, because every shape is; larger item sizes come first, so that every tensor is aligned.
"""

import json
import math
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from actdump.address import Slice
from actdump.errors import DataError
from actdump.plan import ITEM_BYTES, Budget, Column, Layout, Part, Plan, Span, make
from actdump.statistics import Statistics, statistics_from_json, statistics_to_json

T = TypeVar("T")
VERSION = 2

CODES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32", "int16": "I16",
    "int8": "I8", "uint64": "U64", "uint32": "U32", "uint16": "U16", "uint8": "U8", "bool": "BOOL",
    "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2",
}  # fmt: skip

TOKENS = "tokens"
OFFSETS = ".offsets"


@dataclass(frozen=True)
class Folder:
    """The one owner of every file name in a dump."""

    root: Path

    @property
    def plan(self) -> Path:
        return self.root / "plan.json"

    @property
    def manifest(self) -> Path:
        return self.root / "manifest.json"

    @property
    def prompts(self) -> Path:
        return self.root / "prompts.jsonl"

    @property
    def tokens(self) -> Path:
        """The token ids of all prompts while the dump is being written; gone when it is sealed."""
        return self.root / "plan.tokens"

    @property
    def shards(self) -> Path:
        return self.root / "shards"

    def shard(self, number: int) -> Path:
        return self.shards / f"{number:05d}.safetensors"

    def record(self, number: int) -> Path:
        return self.shards / f"{number:05d}.json"

    @property
    def lock(self) -> Path:
        """The lock of the worker that decides about the folder as a whole."""
        return self.root / ".actdump-lock"

    def claim(self, number: int) -> Path:
        """The lock of the worker that makes a part."""
        return self.shards / f".{number:05d}.actdump-lock"

    def worker(self, process: str) -> Path:
        """The lock that a worker holds as long as it works in the folder."""
        return self.root / f".{process}.actdump-worker"

    def written_by_us(self, path: Path) -> bool:
        """Whether a path is one that a dump consists of, finished or not."""
        inside = path.relative_to(self.root).as_posix()
        return bool(_OURS.fullmatch(inside) or TEMPORARY.fullmatch(path.name))


_PROCESS = r"(?P<process>\d+-[0-9a-f]{8}-.+)"
TEMPORARY = re.compile(rf"\..+?\.{_PROCESS}\.actdump-tmp")
WORKER = re.compile(rf"\.{_PROCESS}\.actdump-worker")
_OURS = re.compile(
    r"plan\.json|manifest\.json|prompts\.jsonl|plan\.tokens|shards|shards/\d{5,}\.(safetensors|json)"
    rf"|\.actdump-lock|shards/\.\d{{5,}}\.actdump-lock|{WORKER.pattern}"
)


def temporary(final: Path, process: str) -> Path:
    """Where a file is written before it gets its final name: in the same folder, hidden, marked with the process's name."""
    return final.with_name(f".{final.name}.{process}.actdump-tmp")


# ---------------------------------------------------------------------------------------------------------- shards


@dataclass(frozen=True)
class Tensor:
    """A tensor in a shard: where its bytes stand in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class ShardLayout:
    """A shard before it is written: its header, and the place of every tensor.

    Attributes:
        header: the first bytes of the file.
        tensors: by name, each with its absolute place in the file.
        size: the size of the whole file in bytes.
    """

    header: bytes
    tensors: Mapping[str, Tensor]
    size: int


def shard_layout(columns: Sequence[Column], lengths: Sequence[int], metadata: Mapping[str, str]) -> ShardLayout:
    """Lay out the shard of prompts with these numbers of tokens."""
    wanted: dict[str, tuple[str, tuple[int, ...]]] = {}
    for column in columns:
        rows = sum(map(column.layout.rows, lengths))
        wanted[column.name] = (column.layout.dtype, (rows, *column.layout.row))
        wanted[column.name + OFFSETS] = ("int64", (len(lengths) + 1,))
    wanted[TOKENS] = ("int32", (sum(lengths),))
    wanted[TOKENS + OFFSETS] = ("int64", (len(lengths) + 1,))
    ordered = sorted(wanted.items(), key=lambda entry: -ITEM_BYTES[entry[1][0]])
    return _packed(ordered, metadata)


def _packed(ordered: Sequence[tuple[str, tuple[str, tuple[int, ...]]]], metadata: Mapping[str, str]) -> ShardLayout:
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    position = 0
    for name, (dtype, shape) in ordered:
        stop = position + math.prod(shape) * ITEM_BYTES[dtype]
        entries[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [position, stop]}
        position = stop
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    header = struct.pack("<Q", len(text)) + text
    tensors = {}
    for name, (dtype, shape) in ordered:
        start, stop = (len(header) + offset for offset in entries[name]["data_offsets"])
        tensors[name] = Tensor(dtype, shape, start, stop)
    return ShardLayout(header, tensors, len(header) + position)


@dataclass(frozen=True)
class Shard:
    """The record of one finished shard.

    Attributes:
        digest: the plan's digest.
        first, prompts, tokens: which prompts it holds, and how many tokens they have.
        bytes: the size of the file; sha256: of the whole file.
        rows: how many rows each tap has.
        statistics: what the values of each floating point tap look like, over the whole part, in the record of its first shard.
        written: who wrote it and how: versions, host, device, batches of the part. Says nothing about the values.
    """

    number: int
    digest: str
    first: int
    prompts: int
    tokens: int
    bytes: int
    sha256: str
    rows: Mapping[str, int]
    statistics: Mapping[str, Statistics] = field(default_factory=dict)
    written: Mapping[str, Any] = field(default_factory=dict)


def shard_to_json(shard: Shard) -> dict[str, Any]:
    return {"format": VERSION, **asdict(shard), "statistics": statistics_to_json(shard.statistics)}


def shard_from_json(value: Mapping[str, Any]) -> Shard:
    return _fields(Shard, {**value, "statistics": statistics_from_json(value["statistics"])})


# ------------------------------------------------------------------------------------------------ plan and manifest


@dataclass(frozen=True)
class Manifest:
    """A finished dump, described.

    Attributes:
        digest: the plan's digest.
        columns: the taps.
        shards: the finished shards in order, without what their records say of the values and of the writing.
        prompts, tokens, bytes: totals; bytes are those of the shard files.
        statistics: what the values of each floating point tap look like, over all shards.
        facts: what the dump was made from: spec, inputs' hashes, model, tokens.
        made: when, where and with what it was made.
        audit: what its audit found; `None` where it was turned off.
    """

    digest: str
    columns: tuple[Column, ...]
    shards: tuple[Shard, ...]
    prompts: int
    tokens: int
    bytes: int
    statistics: Mapping[str, Statistics]
    facts: Mapping[str, Any]
    made: Mapping[str, Any]
    audit: Mapping[str, Any] | None = None


def plan_to_json(plan: Plan) -> dict[str, Any]:
    return {
        "format": VERSION,
        "digest": plan.digest,
        "facts": plan.facts,
        "columns": [column_to_json(column) for column in plan.columns],
        "parts": [[asdict(shard) for shard in part.shards] for part in plan.parts],
        "budget": asdict(plan.budget),
    }


def plan_from_json(value: Mapping[str, Any]) -> Plan:
    _check_version(value)
    columns = tuple(map(column_from_json, value["columns"]))
    parts = tuple(_part(number, part) for number, part in enumerate(value["parts"]))
    plan = make(value["facts"], columns, parts, Budget(**value["budget"]))
    if plan.digest != value["digest"]:
        raise DataError("it changed since it was written (its digest is not that of what it says)")
    return plan


def _part(number: int, shards: list[dict[str, Any]] | dict[str, Any]) -> Part:
    """A part by its shards; in older plans, each is one."""
    return Part(number, tuple(Span(**shard) for shard in (shards if isinstance(shards, list) else [shards])))


def manifest_to_json(manifest: Manifest) -> dict[str, Any]:
    shards = [
        {key: value for key, value in asdict(shard).items() if key not in ("digest", "statistics", "written")}
        for shard in manifest.shards
    ]
    return {
        "format": VERSION,
        "digest": manifest.digest,
        "prompts": manifest.prompts,
        "tokens": manifest.tokens,
        "bytes": manifest.bytes,
        "columns": [column_to_json(column) for column in manifest.columns],
        "shards": shards,
        "statistics": statistics_to_json(manifest.statistics),
        "facts": manifest.facts,
        "made": manifest.made,
        "audit": manifest.audit,
    }


def manifest_from_json(value: Mapping[str, Any]) -> Manifest:
    _check_version(value)
    shards = tuple(_fields(Shard, {**shard, "format": VERSION, "digest": value["digest"]}) for shard in value["shards"])
    columns = tuple(map(column_from_json, value["columns"]))
    statistics = statistics_from_json(value["statistics"])
    return _fields(Manifest, {**value, "columns": columns, "shards": shards, "statistics": statistics})


def column_to_json(column: Column) -> dict[str, Any]:
    plain = asdict(column)
    del plain["layout"]
    dims = [f"token[{dim}]" if isinstance(dim, Slice) else dim for dim in column.layout.dims]
    return {**plain, "axes": list(column.axes), "dims": dims, "dtype": column.layout.dtype}


def column_from_json(value: Mapping[str, Any]) -> Column:
    rest = {key: entry for key, entry in value.items() if key not in ("axes", "dims", "dtype")}
    layout = Layout(tuple(map(_dim, value["dims"])), value["dtype"])
    return Column(**rest, axes=tuple(value["axes"]), layout=layout)


def _dim(value: int | str) -> int | Slice:
    if isinstance(value, int):
        return value
    bounds = value.removeprefix("token[").removesuffix("]").split(":")
    return Slice(*(int(bound) if bound else None for bound in bounds))


def _check_version(value: Mapping[str, Any]) -> None:
    if not isinstance(value, Mapping):
        raise TypeError(f"a JSON {type(value).__name__} where an object is needed")
    if "format" not in value:
        raise ValueError("it has no `format`")
    if value["format"] != VERSION:
        raise DataError(
            f"this is format {value['format']}; this actdump reads format {VERSION}, so use the version that wrote it"
        )


def _fields(kind: type[T], value: Mapping[str, Any]) -> T:
    _check_version(value)
    return kind(**{name: value[name] for name in kind.__dataclass_fields__ if name in value})  # type: ignore[attr-defined] # T is a dataclass
