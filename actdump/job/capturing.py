"""The parts of a plan: capture, batch by batch, and write."""

from collections.abc import Mapping
from typing import Any

from actdump import store
from actdump.errors import DataError, Stopped
from actdump.job import heap
from actdump.job.bound import Bound
from actdump.job.memory import Room
from actdump.job.provenance import now
from actdump.job.sharing import shared_out
from actdump.job.underway import Job
from actdump.plan import Batch, Plan, batches
from actdump.statistics import Statistics, merged

Seen = dict[str, list[Statistics]]  # for each floating point tap, the statistics of its batches so far


def write_parts(job: Job, plan: Plan, bound: Bound, crew: store.Crew, around: Mapping[str, Any]) -> None:
    """Make the parts that are not done, with the other workers; when it returns, all are done.

    Args:
        around: what the records say of the circumstances.
    """
    folder, room = job.folder, Room(bound)
    with store.Pendings() as pendings, store.Writer() as writer:  # the writer ends before what it writes to is closed
        try:
            for part, claim in shared_out(job, plan, crew, writer.finish):
                shard = pendings.begin(folder, plan, part, store.part_tokens(folder, plan, part))
                seen: Seen = {}
                counts = _capture_part(job, plan, room, shard, writer, seen)
                writer.do(_seal, shard, claim, seen, {**around, **counts})
                heap.trim()
        except Stopped:
            writer.finish()  # a part that is whole is finished
            raise


def _capture_part(job: Job, plan: Plan, room: Room, shard: store.Pending, writer: store.Writer, seen: Seen) -> dict[str, int]:
    """Capture a part batch by batch, and hand the rows to the writer; how many batches it took, and how many of them were halved."""
    import torch

    cut = batches(shard.lengths, plan.budget)
    room.next_part()
    with torch.inference_mode():
        for places in cut:
            job.check_stop()
            numbers = tuple(shard.part.first + place for place in places)
            for captured in room.captures(Batch(numbers, tuple(shard.ids[place].tolist() for place in places))):
                writer.do(_put, job, shard, captured, seen)
            job.watcher.batch(len(places), sum(shard.lengths[place] for place in places))
    return {"batches": len(cut), "halved": room.halved}


def _put(job: Job, shard: store.Pending, captured: Any, seen: Seen) -> None:
    """In the writer's thread: wait for the rows of a batch, look at them, and write them."""
    captured.wait()
    numbers = captured.padded.batch.numbers
    for site, statistics in enumerate(captured.statistics()):
        if statistics is None:
            continue
        name = shard.plan.columns[site].name
        if statistics.nonfinite and job.spec.nonfinite == "error":
            prompt = numbers[captured.nonfinite(site)[0]]
            raise DataError(
                f"{name}: the model itself made {statistics.nonfinite} values NaN or infinite in one batch, some of them for prompt "
                f"{prompt}; try another `model.dtype`, or keep them with `nonfinite: report`"
            )
        seen.setdefault(name, []).append(statistics)
    shard.put([number - shard.part.first for number in numbers], captured.buffers())
    captured.give_back()


def _seal(shard: store.Pending, claim: store.Lock, seen: Seen, written: Mapping[str, Any]) -> None:
    shard.seal({name: merged(each) for name, each in seen.items()}, {**written, "finished": now()})
    claim.remove()
