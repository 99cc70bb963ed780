"""A dump being written: the plan and the tokens first, shards at their final offsets, the manifest last.

Every file is written under a temporary name in its own folder, flushed to the device, and renamed; so a file with its final
name is whole. A part is done when its record is there, which is written after its shard.
"""

import json
import os
import shutil
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from actdump.errors import DataError, OccupiedError, StorageError
from actdump.format import (
    OFFSETS,
    TEMPORARY,
    TOKENS,
    VERSION,
    Folder,
    Manifest,
    Shard,
    manifest_to_json,
    plan_from_json,
    shard_from_json,
    shard_layout,
    shard_to_json,
    temporary,
)
from actdump.inputs import sha256 as file_sha256
from actdump.plan import Column, Cutter, Part, Plan

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

AHEAD = 2  # batches that may wait for the writer


@contextmanager
def storage(path: Path, doing: str = "written") -> Iterator[None]:
    """Word what the file system refuses."""
    try:
        yield
    except OSError as error:
        where = error.filename or path
        raise StorageError(f"{where}: cannot be {doing}: {error.strerror or error}") from error


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that it is there whole, or not at all."""
    with storage(path), _renamed(path) as descriptor:
        _write(descriptor, content)


@contextmanager
def _renamed(path: Path) -> Iterator[int]:
    """A new file under a temporary name; flushed and renamed when the block ends well, and removed when it does not."""
    hidden = temporary(path, os.getpid())
    descriptor = os.open(hidden, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        yield descriptor
        os.fsync(descriptor)
        os.replace(hidden, path)
        _flush_folder(path.parent)
    except BaseException:
        hidden.unlink(missing_ok=True)
        raise
    finally:
        os.close(descriptor)


def _flush_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write(descriptor: int, content: bytes | memoryview, offset: int | None = None) -> None:
    view = memoryview(content).cast("B")
    while view:
        written = os.write(descriptor, view) if offset is None else os.pwrite(descriptor, view, offset)
        offset = None if offset is None else offset + written
        view = view[written:]


def _json(value: object) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()


# ------------------------------------------------------------------------------------------------ what is in the folder


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
        if manifest["format"] != VERSION or manifest["digest"] != plan.digest or not _has_prompts(folder, plan):
            return False
        sizes = {shard["number"]: shard["bytes"] for shard in manifest["shards"]}
        with os.scandir(folder.shards) as entries:
            found = {entry.name: entry.stat().st_size for entry in entries}
        whole = (found.get(folder.shard(part.number).name) == sizes.get(part.number, -1) for part in plan.parts)
        return all(whole) and all(folder.record(part.number).name in found for part in plan.parts)
    except (OSError, ValueError, KeyError, TypeError):
        return False


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
    ancestor = _standing_place(root)
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


def free_space(path: Path) -> int:
    """The free bytes where a folder is, or would be made."""
    return shutil.disk_usage(_standing_place(path)).free


def _standing_place(path: Path) -> Path:
    """The nearest folder above a path that is there."""
    return next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists())


def sweep(folder: Folder) -> None:
    """Remove temporary files of processes that are gone."""
    for path, process in _temporaries(folder):
        if not _alive(process):
            path.unlink(missing_ok=True)


def busy(folder: Folder) -> bool:
    """Whether a process of this machine is writing into the folder."""
    return any(_alive(process) for _, process in _temporaries(folder))


def _temporaries(folder: Folder) -> Iterator[tuple[Path, int]]:
    for place in (folder.root, folder.shards):
        for path in place.glob(".*.actdump-tmp") if place.is_dir() else ():
            if found := TEMPORARY.fullmatch(path.name):
                yield path, int(found[2])


def _alive(process: int) -> bool:
    if process == os.getpid():
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


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


# ------------------------------------------------------------------------------------------------- the plan, the tokens


class Intake:
    """Prompts on their way into the dump: token ids and lines are spooled to disk, parts are cut. Memory does not grow.

    Use as a context manager, then `commit`.
    """

    def __init__(self, folder: Folder, cutter: Cutter) -> None:
        self.folder = folder
        self.cutter = cutter
        self.tokens_hash, self.lines_hash, self.lines_bytes = sha256(), sha256(), 0
        self.tokens = self._open(folder.tokens)
        self.lines = self._open(folder.prompts)

    def _open(self, final: Path) -> Any:
        with storage(final):
            return temporary(final, os.getpid()).open("wb")

    def add(self, number: int, id: str, ids: Sequence[int], content: Mapping[str, Any], fields: Mapping[str, Any]) -> None:
        """Take the next prompt."""
        words = array("i", (len(ids), *ids)).tobytes()
        self.tokens_hash.update(words)
        line: dict[str, Any] = {"number": number, "id": id, "tokens": len(ids), "shard": self.cutter.add(len(ids)), **content}
        if fields:
            line["fields"] = dict(fields)
        text = json.dumps(line, ensure_ascii=False).encode() + b"\n"
        self.lines_hash.update(text)
        self.lines_bytes += len(text)
        with storage(self.folder.root):
            self.tokens.write(words)
            self.lines.write(text)

    @property
    def facts(self) -> dict[str, Any]:
        """What came in: sha256 of the token ids, and size and sha256 of prompts.jsonl."""
        lines = {"bytes": self.lines_bytes, "sha256": self.lines_hash.hexdigest()}
        return {"tokens": self.tokens_hash.hexdigest(), "prompts": lines}

    def commit(self, plan: Plan | None, stamps: Mapping[str, Any], to_json: Callable[[Plan], dict[str, Any]]) -> None:
        """Write the plan (`None`: it is there already), then give tokens and prompts their names."""
        with storage(self.folder.root):
            for file in (self.tokens, self.lines):
                file.flush()
                os.fsync(file.fileno())
        if plan is not None:
            write_atomically(self.folder.plan, _json({**to_json(plan), "stamps": stamps}))
        with storage(self.folder.root):
            for final in (self.folder.tokens, self.folder.prompts):
                os.replace(temporary(final, os.getpid()), final)
            _flush_folder(self.folder.root)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for file, final in ((self.tokens, self.folder.tokens), (self.lines, self.folder.prompts)):
            file.close()
            temporary(final, os.getpid()).unlink(missing_ok=True)


def has_tokens(folder: Folder, plan: Plan) -> bool:
    """Whether the spooled token ids of the plan's prompts, and prompts.jsonl, are there, whole."""
    whole = folder.tokens.is_file() and folder.tokens.stat().st_size == 4 * (plan.tokens + plan.prompts)
    return whole and _has_prompts(folder, plan)


def _has_prompts(folder: Folder, plan: Plan) -> bool:
    """Whether prompts.jsonl is there with its size."""
    return folder.prompts.is_file() and folder.prompts.stat().st_size == plan.facts["prompts"]["bytes"]


def part_tokens(folder: Folder, plan: Plan, part: Part) -> "list[Array]":
    """The token ids of each prompt of a part."""
    import numpy as np

    before = sum(earlier.tokens + earlier.prompts for earlier in plan.parts[: part.number])
    words = np.fromfile(folder.tokens, dtype="<i4", count=part.tokens + part.prompts, offset=4 * before)
    prompts, place = [], 0
    for _ in range(part.prompts):
        length = int(words[place])
        prompts.append(words[place + 1 : place + 1 + length])
        place += 1 + length
    return prompts


# --------------------------------------------------------------------------------------------------------------- shards


class Pending:
    """A shard being written: header first, rows at their final places as they come, then sealed or discarded."""

    def __init__(self, folder: Folder, plan: Plan, part: Part, ids: "Sequence[Array]") -> None:
        import numpy as np

        lengths = [len(prompt) for prompt in ids]
        self.folder, self.plan, self.part = folder, plan, part
        self.final = folder.shard(part.number)
        self.hidden = temporary(self.final, os.getpid())
        self.layout = shard_layout(plan.columns, lengths, metadata(plan, part))
        self.lengths = lengths
        self.closed = False
        self.offsets = [np.cumsum([0, *map(column.layout.rows, lengths)], dtype=np.int64) for column in plan.columns]
        with storage(self.hidden):
            folder.shards.mkdir(exist_ok=True)
            self.descriptor = os.open(self.hidden, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            self._begin(ids)
        except BaseException:
            self.discard()
            raise

    def _begin(self, ids: "Sequence[Array]") -> None:
        import numpy as np

        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(self.descriptor, 0, self.layout.size)
            else:  # macOS
                os.ftruncate(self.descriptor, self.layout.size)
        except OSError as error:
            raise StorageError(f"{self.final}: {self.layout.size:,} bytes cannot be allocated: {error.strerror}") from error
        with storage(self.hidden):
            _write(self.descriptor, self.layout.header, 0)
            for column, offsets in zip(self.plan.columns, self.offsets, strict=True):
                self._place(column.name + OFFSETS, offsets)
            self._place(TOKENS, np.concatenate(ids).astype("<i4"))
            self._place(TOKENS + OFFSETS, np.cumsum([0, *self.lengths], dtype=np.int64))

    def _place(self, name: str, values: "Array") -> None:
        _write(self.descriptor, values.tobytes(), self.layout.tensors[name].start)

    def put(self, places: Sequence[int], buffers: "Iterable[Array]") -> None:
        """Write the rows of one batch: for each column, the bytes of all its prompts one after another.

        Args:
            places: the places of the batch's prompts in the part, in the batch's order.
        """
        with storage(self.hidden):
            for column, offsets, buffer in zip(self.plan.columns, self.offsets, buffers, strict=True):
                self._put(column, offsets, places, buffer.data)

    def _put(self, column: Column, offsets: "Array", places: Sequence[int], view: memoryview) -> None:
        start, size = self.layout.tensors[column.name].start, column.layout.row_bytes
        taken = 0
        for place in places:
            first, last = int(offsets[place]) * size, int(offsets[place + 1]) * size
            _write(self.descriptor, view[taken : taken + last - first], start + first)
            taken += last - first
        if taken != len(view):
            raise DataError(f"{column.name}: a batch gave {len(view)} bytes where {taken} were planned")

    def seal(self, written: Mapping[str, Any]) -> Shard:
        """Flush, hash, rename, and write the record: the part is done."""
        with storage(self.final):
            os.fsync(self.descriptor)
            digest = file_sha256(self.hidden)
            self._close()
            os.replace(self.hidden, self.final)
            _flush_folder(self.final.parent)
        part = self.part
        rows = {column.name: int(offsets[-1]) for column, offsets in zip(self.plan.columns, self.offsets, strict=True)}
        shard = Shard(
            part.number, self.plan.digest, part.first, part.prompts, part.tokens, self.layout.size, digest, rows, written
        )
        write_atomically(self.folder.record(part.number), _json(shard_to_json(shard)))
        return shard

    def discard(self) -> None:
        """Forget the shard; nothing of it stays. Harmless on a sealed one."""
        self._close()
        self.hidden.unlink(missing_ok=True)

    def _close(self) -> None:
        if not self.closed:
            self.closed = True
            os.close(self.descriptor)


class Pendings:
    """The shards being written; those that are not sealed when the block ends are discarded."""

    def __init__(self) -> None:
        self._open: list[Pending] = []

    def begin(self, folder: Folder, plan: Plan, part: Part, ids: "Sequence[Array]") -> Pending:
        """Begin the shard of a part."""
        self._open = [*(shard for shard in self._open if not shard.closed), Pending(folder, plan, part, ids)]
        return self._open[-1]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for shard in self._open:
            shard.discard()


def metadata(plan: Plan, part: Part) -> dict[str, str]:
    """What a shard says of itself, for whoever opens it with the safetensors library alone."""
    about = (
        "activations: for each tap `name`, rows of consecutive prompts; prompt i has rows name.offsets[i] to name.offsets[i+1]"
    )
    names = {column.name: [column.resolved, *map(str, column.axes)] for column in plan.columns}
    return {
        "actdump": f"format {VERSION}: {about}",
        "digest": plan.digest,
        "part": f"{part.number} of {len(plan.parts)}",
        "first_prompt": str(part.first),
        "taps": json.dumps(names, ensure_ascii=False),
    }


class Writer:
    """One thread that does tasks in order, a few at most waiting; what goes wrong there is raised at the next call here."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="actdump-writer")
        self._waiting: deque[Future[Any]] = deque()

    def do(self, task: Callable[..., Any], *args: Any) -> None:
        """Let the thread do this; waits while too much is waiting there."""
        while self._waiting and (len(self._waiting) >= AHEAD or self._waiting[0].done()):
            self._waiting.popleft().result()
        self._waiting.append(self._thread.submit(task, *args))

    def finish(self) -> None:
        """Return when all is done."""
        while self._waiting:
            self._waiting.popleft().result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._thread.shutdown(wait=True, cancel_futures=kind is not None)


# -------------------------------------------------------------------------------------------------------------- sealing


def seal(folder: Folder, plan: Plan, made: Mapping[str, Any]) -> Manifest:
    """Write the manifest of a dump whose parts are all done; its spooled tokens go.

    Raises:
        DataError: a part is not done.
    """
    shards = [done(folder, part, plan.digest) for part in plan.parts]
    missing = [part.number for part, shard in zip(plan.parts, shards, strict=True) if shard is None]
    if missing:
        raise DataError(f"{folder.root}: parts {missing[:10]} are not done, so the dump cannot be sealed")
    found = tuple(replace(shard, written={}) for shard in shards if shard is not None)
    size = sum(shard.bytes for shard in found)
    manifest = Manifest(plan.digest, plan.columns, found, plan.prompts, plan.tokens, size, plan.facts, made)
    write_atomically(folder.manifest, _json(manifest_to_json(manifest)))
    folder.tokens.unlink(missing_ok=True)
    return manifest
