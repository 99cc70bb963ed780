"""Shards being written, and the manifest that seals the dump."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from threading import Lock
from typing import TYPE_CHECKING, Any, Self

from actdump.errors import DataError
from actdump.format import (
    OFFSETS,
    TOKENS,
    VERSION,
    Folder,
    Manifest,
    Shard,
    manifest_to_json,
    shard_layout,
    shard_to_json,
    temporary,
)
from actdump.inputs import sha256 as file_sha256
from actdump.plan import Part, Plan
from actdump.statistics import Statistics, merged
from actdump.store.files import storage, to_json, write, write_atomically
from actdump.store.locks import me
from actdump.store.standing import done

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

FLUSH = 64 << 20  # bytes after which what was put is flushed, if the writer has nothing else to do


class Pending:
    """A shard being written: header first, rows at their final places as they come, then sealed or discarded."""

    def __init__(self, folder: Folder, plan: Plan, part: Part, ids: "Sequence[Array]") -> None:
        import numpy as np

        lengths = [len(prompt) for prompt in ids]
        self.folder, self.plan, self.part = folder, plan, part
        self.final = folder.shard(part.number)
        self.hidden = temporary(self.final, me())
        self.layout = shard_layout(plan.columns, lengths, metadata(plan, part))
        self.ids, self.lengths = ids, lengths
        self.missing = set(range(len(ids)))
        self.closed = False
        self.columns = {column.name: column for column in plan.columns}
        self.offsets = {
            name: np.cumsum([0, *map(column.layout.rows, lengths)], dtype=np.int64) for name, column in self.columns.items()
        }
        sizes = [np.diff(self.offsets[name]) * column.layout.row_bytes for name, column in self.columns.items()]
        self._sizes = np.sum(sizes, axis=0)  # bytes of each prompt
        self._unflushed, self._counting = 0, Lock()
        with storage(self.final):
            folder.shards.mkdir(exist_ok=True)
            self.descriptor = os.open(self.hidden, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            self._begin(ids)
        except BaseException:
            self.discard()
            raise

    def _begin(self, ids: "Sequence[Array]") -> None:
        import numpy as np

        with storage(self.final):
            os.ftruncate(self.descriptor, self.layout.size)
            write(self.descriptor, self.layout.header, 0)
            for name, offsets in self.offsets.items():
                self._place(name + OFFSETS, offsets)
            self._place(TOKENS, np.concatenate(ids).astype("<i4"))
            self._place(TOKENS + OFFSETS, np.cumsum([0, *self.lengths], dtype=np.int64))

    def _place(self, name: str, values: "Array") -> None:
        write(self.descriptor, values.tobytes(), self.layout.tensors[name].start)

    def put(self, name: str, places: Sequence[int], buffer: "Array") -> None:
        """Write the rows of one batch at one tap. Several threads can do it at once, for different batches.

        Args:
            places: the places of the batch's prompts in the part, in the batch's order.
            buffer: the bytes of the rows, one prompt after another.
        """
        offsets, size = self.offsets[name], self.columns[name].layout.row_bytes
        start, view = self.layout.tensors[name].start, buffer.data
        taken = 0
        with storage(self.final):
            for place in places:
                first, last = int(offsets[place]) * size, int(offsets[place + 1]) * size
                write(self.descriptor, view[taken : taken + last - first], start + first)
                taken += last - first
        if taken != len(view):
            raise DataError(f"{name}: a batch gave {len(view)} bytes where {taken} were planned")

    def complete(self, places: Sequence[int]) -> None:
        """The rows of these prompts were put at every tap. Several threads can say so at once, as of `put`."""
        with self._counting:
            self.missing.difference_update(places)
            self._unflushed += int(self._sizes[list(places)].sum())

    @property
    def wants_flush(self) -> bool:
        """Whether so much was completed since the last flush that the one before the seal would take long."""
        return self._unflushed >= FLUSH

    def flush(self) -> None:
        """Bring what was put so far to the device."""
        self._unflushed = 0
        with storage(self.final):
            os.fsync(self.descriptor)

    def seal(self, statistics: Mapping[str, Statistics], written: Mapping[str, Any]) -> Shard:
        """Flush, hash, rename, and write the record: the part is done.

        Args:
            statistics: what the values of each floating point tap look like.
            written: who wrote it and how.

        Raises:
            DataError: rows of some prompts never came.
        """
        if self.missing:
            raise DataError(f"{self.final}: the rows of {len(self.missing)} prompts never came, so the shard is not sealed")
        with storage(self.final):
            os.fsync(self.descriptor)
            digest = file_sha256(self.hidden)
            if (earlier := done(self.folder, self.part, self.plan.digest)) is not None:  # another worker's; there are no locks
                self.discard()
                return earlier
            self._close()
            os.replace(self.hidden, self.final)
        part = self.part
        rows = {name: int(offsets[-1]) for name, offsets in self.offsets.items()}
        place = part.number, self.plan.digest, part.first, part.prompts, part.tokens
        shard = Shard(*place, self.layout.size, digest, rows, statistics, written)
        # What flushes the record's name flushes the shard's; a record whose shard is not there counts for nothing.
        write_atomically(self.folder.record(part.number), to_json(shard_to_json(shard)))
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


def gathered(folder: Folder, plan: Plan) -> Manifest | None:
    """The manifest of a dump whose parts are all done, from their records, before it says how it was made; `None` if one is not."""
    found = [shard for part in plan.parts if (shard := done(folder, part, plan.digest)) is not None]
    if len(found) < len(plan.parts):
        return None
    size = sum(shard.bytes for shard in found)
    statistics = {name: merged([shard.statistics[name] for shard in found]) for name in found[0].statistics}
    bare = tuple(replace(shard, statistics={}, written={}) for shard in found)
    return Manifest(plan.digest, plan.columns, bare, plan.prompts, plan.tokens, size, statistics, plan.facts, {})


def seal(folder: Folder, manifest: Manifest) -> None:
    """Write the manifest: the dump is complete; its spooled tokens go."""
    write_atomically(folder.manifest, to_json(manifest_to_json(manifest)))
    folder.tokens.unlink(missing_ok=True)
