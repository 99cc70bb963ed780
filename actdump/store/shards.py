"""Shards being written: the header first, rows at their final places as they come."""

import json
import os
from collections.abc import Mapping, Sequence
from threading import Lock
from typing import TYPE_CHECKING, Any

from actdump.format import OFFSETS, TOKENS, VERSION, Folder, Shard, shard_layout, shard_to_json, temporary
from actdump.inputs import sha256
from actdump.plan import Plan, Span
from actdump.statistics import Statistics
from actdump.store.files import storage, to_json, write, write_atomically
from actdump.store.locks import me
from actdump.store.standing import finished

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]


class ShardFile:
    """A shard being written, then sealed or discarded."""

    def __init__(self, folder: Folder, plan: Plan, span: Span, ids: "Sequence[Array]") -> None:
        import numpy as np

        lengths = list(map(len, ids))
        self.span = span
        self._folder, self._digest = folder, plan.digest
        self._final = folder.shard(span.number)
        self._hidden = temporary(self._final, me())
        self._layout = shard_layout(plan.columns, lengths, metadata(plan, span))
        self._offsets = {
            column.name: np.cumsum([0, *map(column.layout.rows, lengths)], dtype=np.int64) for column in plan.columns
        }
        self._row_bytes = {column.name: column.layout.row_bytes for column in plan.columns}
        with storage(self._final):
            folder.shards.mkdir(exist_ok=True)
            self._descriptor = os.open(self._hidden, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
        self._closed, self._closing = False, Lock()
        try:
            self._begin(ids)
        except BaseException:
            self.discard()
            raise

    def _begin(self, ids: "Sequence[Array]") -> None:
        import numpy as np

        with storage(self._final):
            os.ftruncate(self._descriptor, self._layout.size)
            write(self._descriptor, self._layout.header, 0)
            for name, offsets in self._offsets.items():
                self._place(name + OFFSETS, offsets)
            self._place(TOKENS, np.concatenate(ids).astype("<i4"))
            self._place(TOKENS + OFFSETS, np.cumsum([0, *map(len, ids)], dtype=np.int64))

    def _place(self, name: str, values: "Array") -> None:
        write(self._descriptor, values.tobytes(), self._layout.tensors[name].start)

    def sizes(self) -> "Array":
        """How many bytes the rows of each prompt have."""
        import numpy as np

        each = [np.diff(offsets) * self._row_bytes[name] for name, offsets in self._offsets.items()]
        return np.asarray(np.sum(each, axis=0))

    def put(self, name: str, place: int, view: memoryview) -> int:
        """Write the rows of one prompt, by its place in the shard, at one tap; they stand first in the view. How many bytes they have."""
        offsets, size = self._offsets[name], self._row_bytes[name]
        first, last = int(offsets[place]) * size, int(offsets[place + 1]) * size
        write(self._descriptor, view[: last - first], self._layout.tensors[name].start + first)
        return last - first

    def flush(self) -> None:
        """Bring what was put so far to the device; nothing is left to do once the shard is sealed, or gone."""
        with self._closing, storage(self._final):
            if not self._closed:
                os.fsync(self._descriptor)

    def seal(self, statistics: Mapping[str, Statistics], written: Mapping[str, Any]) -> None:
        """Flush, hash, rename, and write the record: the shard is finished."""
        self.flush()
        with storage(self._final):
            digest = sha256(self._hidden)
            if finished(self._folder, self.span, self._digest) is not None:  # another run's, or another worker's without locks
                self.discard()
                return
            self._close()
            os.replace(self._hidden, self._final)
        span = self.span
        rows = {name: int(offsets[-1]) for name, offsets in self._offsets.items()}
        place = span.number, self._digest, span.first, span.prompts, span.tokens
        shard = Shard(*place, self._layout.size, digest, rows, statistics, written)
        # What flushes the record's name flushes the shard's; a record whose shard is not there counts for nothing.
        write_atomically(self._folder.record(span.number), to_json(shard_to_json(shard)))

    def discard(self) -> None:
        """Forget the shard; nothing of it stays. Harmless on a sealed one."""
        self._close()
        self._hidden.unlink(missing_ok=True)

    def _close(self) -> None:
        with self._closing:
            if not self._closed:
                self._closed = True
                os.close(self._descriptor)


def metadata(plan: Plan, span: Span) -> dict[str, str]:
    """What a shard says of itself, for whoever opens it with the safetensors library alone."""
    about = (
        "activations: for each tap `name`, rows of consecutive prompts; prompt i has rows name.offsets[i] to name.offsets[i+1]"
    )
    names = {column.name: [column.resolved, *map(str, column.axes)] for column in plan.columns}
    return {
        "actdump": f"format {VERSION}: {about}",
        "digest": plan.digest,
        "shard": f"{span.number} of {len(plan.shards)}",
        "first_prompt": str(span.first),
        "taps": json.dumps(names, ensure_ascii=False),
    }
