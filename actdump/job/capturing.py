"""The parts of a plan: capture, batch by batch, and write."""

from collections.abc import Mapping, Sequence
from typing import Any

from actdump import store
from actdump.errors import DataError, Stopped
from actdump.job import heap
from actdump.job.bound import Bound
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
    folder = job.folder
    with store.Pendings() as pendings, store.Writer() as writer:  # the writer ends before what it writes to is closed
        try:
            for part, claim in shared_out(job, plan, crew, writer.finish):
                shard = pendings.begin(folder, plan, part, store.part_tokens(folder, plan, part))
                seen: Seen = {}
                count = _capture_part(job, plan, bound, shard, writer, seen)
                writer.do(_seal, shard, claim, seen, {**around, "batches": count})
                heap.trim()
        except Stopped:
            writer.finish()  # a part that is whole is finished
            raise


def _capture_part(job: Job, plan: Plan, bound: Bound, shard: store.Pending, writer: store.Writer, seen: Seen) -> int:
    """Capture a part batch by batch, and hand the rows to the writer; the number of batches."""
    import torch

    from actdump import engine

    cut, blocks = batches(shard.lengths, plan.budget), engine.Blocks()
    with torch.inference_mode():
        for places in cut:
            job.check_stop()
            numbers = tuple(shard.part.first + place for place in places)
            batch = Batch(numbers, tuple(shard.ids[place].tolist() for place in places))
            captured = engine.capture(bound.module, bound.sites, bound.feed, batch, blocks=blocks)
            writer.do(_put, job, shard, places, captured, seen)
            job.watcher.batch(len(places), sum(batch.lengths))
    return len(cut)


def _put(job: Job, shard: store.Pending, places: Sequence[int], captured: Any, seen: Seen) -> None:
    """In the writer's thread: wait for the rows of a batch, look at them, and write them."""
    captured.wait()
    for site, statistics in enumerate(captured.statistics()):
        if statistics is None:
            continue
        name = shard.plan.columns[site].name
        if statistics.nonfinite and job.spec.nonfinite == "error":
            prompt = shard.part.first + places[captured.nonfinite(site)[0]]
            raise DataError(
                f"{name}: the model itself made {statistics.nonfinite} values NaN or infinite in one batch, some of them for prompt "
                f"{prompt}; try another `model.dtype`, or keep them with `nonfinite: report`"
            )
        seen.setdefault(name, []).append(statistics)
    shard.put(places, captured.buffers())
    captured.give_back()


def _seal(shard: store.Pending, claim: store.Lock, seen: Seen, written: Mapping[str, Any]) -> None:
    shard.seal({name: merged(each) for name, each in seen.items()}, {**written, "finished": now()})
    claim.remove()
