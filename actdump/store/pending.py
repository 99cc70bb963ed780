"""Parts being written: each is a few shards, which are filled together, because their prompts are batched together."""

from collections.abc import Mapping, Sequence
from threading import Lock
from typing import TYPE_CHECKING, Any, Self

from actdump.errors import DataError
from actdump.format import Folder
from actdump.plan import Part, Plan
from actdump.statistics import Statistics
from actdump.store.files import storage
from actdump.store.shards import ShardFile

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

FLUSH = 64 << 20  # bytes after which what was put is flushed, if the writer has nothing else to do


class Pending:
    """A part being written, shard by shard.

    Attributes:
        ids: the token ids of its prompts; lengths: how many each has.
    """

    def __init__(self, folder: Folder, plan: Plan, part: Part, ids: "Sequence[Array]") -> None:
        import numpy as np

        self.folder, self.part = folder, part
        self.ids, self.lengths = ids, list(map(len, ids))
        self._missing, self._unsealed = set(range(len(ids))), set(range(len(part.shards)))
        self._files: list[ShardFile] = []
        self._where: list[tuple[ShardFile, int]] = []  # of each prompt
        self._unflushed, self._counting = 0, Lock()
        try:
            for span in part.shards:
                begin = len(self._where)
                file = ShardFile(folder, plan, span, ids[begin : begin + span.prompts])
                self._files.append(file)
                self._where += [(file, place) for place in range(span.prompts)]
        except BaseException:
            self.discard()
            raise
        self._sizes = np.concatenate([file.sizes() for file in self._files])

    def put(self, name: str, places: Sequence[int], buffer: "Array") -> None:
        """Write the rows of one batch at one tap. Several threads can do it at once, for different batches.

        Args:
            places: the places of the batch's prompts in the part, in the batch's order.
            buffer: the bytes of the rows, one prompt after another.
        """
        view, taken = buffer.data, 0
        with storage(self.folder.shards):
            for place in places:
                file, inside = self._where[place]
                taken += file.put(name, inside, view[taken:])
        if taken != len(view):
            raise DataError(f"{name}: a batch gave {len(view)} bytes where {taken} were planned")

    def complete(self, places: Sequence[int]) -> None:
        """The rows of these prompts were put at every tap. Several threads can say so at once, as of `put`."""
        with self._counting:
            self._missing.difference_update(places)
            self._unflushed += int(self._sizes[list(places)].sum())

    @property
    def wants_flush(self) -> bool:
        """Whether so much was completed since the last flush that the one before the seal would take long."""
        return self._unflushed >= FLUSH

    def flush(self) -> None:
        """Bring what was put so far to the device."""
        self._unflushed = 0
        for file in self._files:
            file.flush()

    def seal(self, place: int, statistics: Mapping[str, Statistics], written: Mapping[str, Any]) -> bool:
        """Flush, hash and rename one of the shards, and write its record. Several threads can do it at once, for different shards.

        Args:
            place: of the shard in the part.
            statistics: what the values of each floating point tap look like, in the whole part; for the record of its first shard.
            written: who wrote it and how.

        Returns:
            Whether it was the last, so that the part is done.

        Raises:
            DataError: rows of some prompts never came.
        """
        if self._missing:
            raise DataError(
                f"{self.folder.root}: the rows of {len(self._missing)} prompts never came, so part {self.part.number} is not sealed"
            )
        self._files[place].seal(statistics, written)
        with self._counting:
            self._unsealed.discard(place)
            return self.sealed

    @property
    def sealed(self) -> bool:
        """Whether all shards are: the part is done."""
        return not self._unsealed

    def discard(self) -> None:
        """Forget the part; nothing of it stays but the shards that are sealed."""
        for file in self._files:
            file.discard()


class Pendings:
    """The parts being written; what is not sealed when the block ends is discarded."""

    def __init__(self) -> None:
        self._open: list[Pending] = []

    def begin(self, folder: Folder, plan: Plan, part: Part, ids: "Sequence[Array]") -> Pending:
        """Begin the shards of a part."""
        self._open = [*(part for part in self._open if not part.sealed), Pending(folder, plan, part, ids)]
        return self._open[-1]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for part in self._open:
            part.discard()
