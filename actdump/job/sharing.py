"""Which part next: the parts of a plan shared out among the workers."""

from collections.abc import Callable, Iterator, Sequence
from time import monotonic, sleep

from actdump import store
from actdump.errors import Stopped
from actdump.job.underway import Job
from actdump.plan import Part, Plan

# A worker that has waited for some time waits this share of it before it looks again, but not longer than so many seconds: many that
# wait for the last parts, on a file system that all of them share, keep its server busy otherwise.
PACE, LONGEST = 0.05, 5.0
PATIENCE = 600.0  # seconds without a new part, after which a worker that may not help gives the others up


def shared_out(job: Job, plan: Plan, crew: store.Crew, finish: Callable[[], None]) -> Iterator[tuple[Part, store.Lock]]:
    """The parts for this worker, each with its lock, until all parts are done, by whomever.

    A worker takes its own parts first and then any that nobody has. Where others have all that is left, it waits: if one of
    them dies, its part is free again. Without locks it keeps to its own parts, and waits as long as parts of others come.

    Args:
        finish: returns when the parts handed out so far are done.

    Raises:
        Stopped: asked to stop; or there are no locks, and the others seem to have stopped.
    """
    left = store.missing(job.folder, plan, plan.parts)
    store.check_space(job.folder, sum(part.bytes for part in left) - store.being_written(job.folder))
    undone = set(left)
    job.watcher.planned(plan, [part for part in plan.parts if part not in undone])
    since: float | None = None
    while left:
        own = set()
        for part, claim in _claimed(job, plan, crew, left):
            own.add(part)
            yield part, claim
        finish()
        still = store.missing(job.folder, plan, [part for part in left if part not in own])
        for part in set(left).difference(still, own):
            job.watcher.elsewhere(part)
        since = _waited(job, crew, still, since) if still == left else None
        left = still


def _claimed(job: Job, plan: Plan, crew: store.Crew, parts: Sequence[Part]) -> Iterator[tuple[Part, store.Lock]]:
    """Those of the parts that nobody has and nobody has done."""
    for part in job.worker.order(parts):
        if (crew.locks or job.worker.owns(part)) and (claim := crew.claim(part)) is not None:
            if store.done(job.folder, part, plan.digest):
                claim.remove()
            else:
                yield part, claim


def _waited(job: Job, crew: store.Crew, parts: Sequence[Part], since: float | None) -> float:
    """Wait a moment for parts that others have; since when nothing has come."""
    if since is None:
        job.watcher.step("waiting for other workers")
        since = monotonic()
    if not crew.locks and monotonic() - since > PATIENCE:
        raise Stopped(f"{job.folder.root}: this worker's share is done, and {len(parts)} parts of others are not")
    look = monotonic() + min(LONGEST, PACE * (monotonic() - since))
    while True:
        job.check_stop()
        sleep(store.WAIT)
        if monotonic() >= look:
            return since
