"""The parts of a plan: capture, batch by batch, and write."""

import os
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING, Any

from actdump import store
from actdump.errors import DataError
from actdump.job.bound import Bound
from actdump.job.freed import Freed
from actdump.job.lanes import Lanes
from actdump.job.memory import Room
from actdump.job.provenance import now
from actdump.job.sharing import shared_out
from actdump.job.underway import Job
from actdump.memory import memory_for, out_of_memory, reworded
from actdump.plan import Batch, Plan, batches
from actdump.statistics import Statistics, merged

if TYPE_CHECKING:
    import torch

    from actdump.engine import Measured, Rows

Seen = dict[str, list[Statistics]]  # for each floating point tap, the statistics of its batches so far, in any order

SEALS = 8  # shards sealed at once beside an accelerator; sha256 takes some 0.9 GB/s of one core, and a 3B model gives 3.9 GB/s


def write_parts(job: Job, plan: Plan, bound: Bound, crew: store.Crew, around: Mapping[str, Any]) -> None:
    """Make the parts that are not done, with the other workers; when it returns, all are done.

    Args:
        around: what the records say of the circumstances.
    """
    folder, device = job.folder, bound.feed.device
    # What runs ends before what it writes to is closed: first the lanes, then the writer.
    seals = _seals() if arrives_later(device) else 0
    with store.Pendings() as pendings, store.Writer(seals) as writer, Freed(device) as freed:
        room = Room(device, writer.settle)
        try:
            with Lanes(bound, job.check_stop) as lanes:
                for part, claim in shared_out(job, plan, crew, writer.finish):
                    pending = pendings.begin(folder, plan, part, store.part_tokens(folder, plan, part))
                    writer.let_go()
                    filling = _Filling(job, bound, pending, writer)
                    counts = _capture_part(job, plan, lanes, room, freed, filling)
                    # Beside it, the lock and the files of the next part would wait for the disk, and the model for them.
                    writer.hold(partial(filling.seal, place, claim, {**around, **counts}) for place in range(len(part.shards)))
        except Exception:  # whatever ends the run, a part that is whole is finished; a second Ctrl-C waits for none
            writer.finish()
            raise


def _capture_part(job: Job, plan: Plan, lanes: Lanes, room: Room, freed: Freed, filling: "_Filling") -> dict[str, int]:
    """Capture a part batch by batch; how many batches it took, and how many of them were halved."""
    import torch

    from actdump import engine

    lengths = filling.pending.lengths
    cut = batches(lengths, plan.budget)
    room.next_part()
    with torch.inference_mode(), engine.any_shape():
        for places, arrivals in lanes.run(filling.captured_in, cut):
            job.check_stop()
            if arrivals is None:
                room.halving(filling.batch(places), filling.take_in)
            else:
                filling.complete(arrivals)
            freed.limit()
            job.watcher.batch(len(places), sum(lengths[place] for place in places))
    return {"batches": len(cut), "halved": room.halved}


def _seals() -> int:
    """How many shards can be sealed at once beside an accelerator: as many as half of the cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(SEALS, max(1, cores // 2))


def arrives_later(device: "torch.device") -> bool:
    """Whether rows are written in the writer's threads, which wait for them, and not where they are captured.

    From an accelerator they arrive while it goes on with the next batch. On a CPU they are there, in its cache. A thread beside
    the forwards would take a core away from them, and whole batches would wait for it: a run that wrote 8 GB (30 taps) peaked
    506 MB above one that wrote 100 MB with the thread, and not above it without.
    """
    return device.type != "cpu"


class _Filling:
    """A part being filled."""

    def __init__(self, job: Job, bound: Bound, pending: store.Pending, writer: store.Writer) -> None:
        self.bound, self.pending, self.writer = bound, pending, writer
        self._seen: Seen = {}
        self._puts: list[Future[None]] = []
        self._later = arrives_later(bound.feed.device)
        self._strict = job.spec.nonfinite == "error"

    def batch(self, places: Sequence[int]) -> Batch:
        """The prompts at these places of the part."""
        numbers = tuple(self.pending.part.first + place for place in places)
        return Batch(numbers, tuple(self.pending.ids[place].tolist() for place in places))

    def take_in(self, batch: Batch) -> None:
        """Capture a batch and write its rows."""
        self.complete(self._captured(self.bound, batch))

    def captured_in(self, lane: Bound, places: Sequence[int]) -> "list[_Arrival]":
        """A batch captured in a lane, where other lanes capture others."""
        import torch

        with torch.inference_mode():  # which holds for a thread
            return self._captured(lane, self.batch(places))

    def complete(self, arrivals: "Sequence[_Arrival]") -> None:
        """Write what is not written yet of a batch, and count it in: one batch after another, whoever captured them."""
        for arrival in arrivals:
            if self._later:
                self._puts.append(self.writer.do(self._complete_later, arrival))
            else:
                arrival.complete(self._seen)
            self.writer.flush(self.pending)

    def _complete_later(self, arrival: "_Arrival") -> None:
        """In the writer's threads, where a lack of memory is that of no batch, and halving one mends nothing."""
        with memory_for("the rows on their way to the disk", "use a smaller `batch.tokens`"):
            arrival.complete(self._seen)

    def seal(self, place: int, claim: store.Lock, written: Mapping[str, Any]) -> None:
        """Seal one of the shards, when all rows are put; with the last of them, the part is done."""
        for put in self._puts:
            put.result()
        seen = {name: merged(each) for name, each in self._seen.items()} if place == 0 else {}
        if self.pending.seal(place, seen, {**written, "finished": now()}):
            claim.remove()

    def _captured(self, bound: Bound, batch: Batch) -> "list[_Arrival]":
        """A batch captured; in several pieces, where it cannot be captured as one."""
        from actdump import engine

        arrival = _Arrival(self.pending, batch, self._strict)
        sink = arrival.waiting.append if self._later else arrival.put
        with reworded(partial(_stuck, batch)):  # memory that runs out is `Room`'s to mend
            whole = engine.stream(bound.module, bound.sites, bound.feed, batch, sink)
        if whole:
            return [arrival]
        return [piece for each in engine.evened(batch) for piece in self._captured(bound, each)]


def _stuck(batch: Batch, error: Exception) -> DataError:
    others = len(batch.numbers) - 1
    beside = f" with {others} other{'s' * (others > 1)} beside it" if others else ""
    return DataError(
        f"the model does not run on prompt {batch.numbers[0]} of {batch.lengths[0]:,} tokens{beside}: {type(error).__name__}: {error}"
    )


class _Arrival:
    """A batch on its way into its part. What was put of one that is not completed will be written over.

    Attributes:
        waiting: rows that are still to be put.
    """

    def __init__(self, pending: store.Pending, batch: Batch, strict: bool) -> None:
        self.waiting: deque[Rows] = deque()
        self._pending, self._strict = pending, strict
        self._places = [number - pending.part.first for number in batch.numbers]
        self._measured: dict[str, Measured] = {}
        self._fault: Exception | None = None

    def put(self, rows: "Rows") -> None:
        """Write the rows of a site. What goes wrong is raised when the batch is complete, and not through the model's forward, which
        would be blamed for it; but for a lack of memory, which is that of the forward too."""
        try:
            self._put(rows)
        except Exception as fault:  # kept, and raised by `complete`
            if out_of_memory(fault):
                raise
            self._fault = self._fault or fault

    def _put(self, rows: "Rows") -> None:
        rows.wait()
        name = rows.site.tap.name
        if rows.measured is not None:
            self._measured[name] = rows.measured
            if self._strict and (count := rows.measured.nonfinite):
                raise DataError(_nonfinite(rows, count))
        self._pending.put(name, self._places, rows.buffer())

    def complete(self, seen: Seen) -> None:
        """Put what is waiting; then the batch is in its part.

        Raises:
            DataError: some values cannot be stored.
            StorageError: the file system refused.
        """
        try:
            while self.waiting:  # what was put is held no more
                self.put(self.waiting.popleft())
        finally:
            self.waiting.clear()  # nor what was not: an error in hand holds on to this
        if self._fault is not None:
            raise self._fault
        # All together: one by one, between the model's modules, each takes five times as long.
        for name, measured in self._measured.items():
            seen.setdefault(name, []).append(measured.statistics())
        self._pending.complete(self._places)


def _nonfinite(rows: "Rows", count: int) -> str:
    values = zip(rows.padded.batch.numbers, rows.each(), strict=True)
    prompt = next(number for number, value in values if not value.float().isfinite().all())
    return (
        f"{rows.site.tap.name}: the model itself made {count} values NaN or infinite in one batch, some of them for "
        f"prompt {prompt}; try another `model.dtype`, or keep them with `nonfinite: report`"
    )
