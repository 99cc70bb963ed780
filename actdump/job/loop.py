"""From a spec to a sealed dump: the loop that ties plan, engine and store together."""

import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any, Literal

from actdump import inputs, reader, store
from actdump.errors import ActdumpError, DataError, Stopped
from actdump.format import Folder, Manifest
from actdump.job.bound import Bound
from actdump.job.capturing import write_parts
from actdump.job.feeding import standard_input
from actdump.job.planning import check_same, planned
from actdump.job.provenance import circumstances
from actdump.job.repair import give_up, look_over
from actdump.job.sealing import seal
from actdump.job.standing import check_finite, standing
from actdump.job.underway import Job, check_stop
from actdump.job.watching import Silent, Watcher
from actdump.plan import Plan
from actdump.spec import Spec
from actdump.worker import Worker

TRIES = 3  # to seal: another worker that repairs can give up parts that were done


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    state: Literal["done", "up to date"]
    manifest: Manifest
    path: Path
    seconds: float


def run(
    spec: Spec,
    root: Path,
    *,
    overwrite: bool = False,
    repair: bool = False,
    worker: Worker | None = None,
    watcher: Watcher | None = None,
    stopping: Callable[[], bool] = lambda: False,
) -> Outcome:
    """Make a dump, go on with an unfinished one, or find that it is up to date.

    Any number of processes can do this at once, for the same spec and folder: they share the parts out. Each returns when the
    dump is sealed.

    Args:
        overwrite: replace another dump in the folder.
        repair: compare every byte of what is there with what was recorded of it, and make again what differs.
        worker: which of them this is, if that is known.
        stopping: asked after every batch, and again and again while the run waits or forwards run side by side; `True` ends the run.

    Raises:
        OccupiedError: the folder holds something else.
        Stopped: asked to stop; finished parts stay, and the same run goes on.
        ActdumpError: see the subclasses.
    """
    began, folder = monotonic(), Folder(root)
    try:
        with standard_input(spec, lambda: check_stop(folder, stopping)) as stdin:
            sources = inputs.of(spec, stdin)
            job = Job(spec, folder, sources, stdin, worker or Worker(), overwrite, watcher or Silent(), stopping, began, repair)
            found = standing(job)
            if repair and found is not None:
                look_over(job, found)
            if found is not None and not job.damage.faults and store.complete(job.folder, found):
                return _ended(job, "up to date")
            store.check_writable(job.folder.root, job.folder.shards)
            return _go_on(job)
    except Stopped as stop:
        raise Stopped(f"{stop}, {_kept(folder)}; the same command goes on with it") from None


def _kept(folder: Folder) -> str:
    """What a run that was stopped leaves, in words."""
    if not folder.plan.exists():
        return "with nothing written yet"
    try:
        status = store.status(folder)
    except ActdumpError:  # the next run tells it; this one was asked to stop
        return "with what was done kept"
    if not status.prompts_done:
        return f"with none of {status.prompts:,} prompts kept, because parts are kept whole (smaller ones with `shard: {{tokens: …}}`)"
    return f"with {status.prompts_done:,} of {status.prompts:,} prompts kept"


def _sealed(job: Job, plan: Plan, bound: Bound, crew: store.Crew, around: Mapping[str, Any]) -> bool:
    """Make the parts that are missing, and seal the dump, unless another worker did; whether it is sealed then."""
    write_parts(job, plan, bound, crew, around)
    with crew.deciding(job.check_stop):
        return store.complete(job.folder, plan) or seal(job, plan, bound, around)


def _ended(job: Job, state: Literal["done", "up to date"]) -> Outcome:
    manifest = reader.open_dump(job.folder.root).manifest
    check_finite(job.spec, job.folder, [manifest.statistics])
    return Outcome(state, manifest, job.folder.manifest, monotonic() - job.began)


def _go_on(job: Job) -> Outcome:
    """Make what is missing, with the other workers; the last of them seals the dump."""
    try:
        with store.Crew(job.folder) as crew:
            plan, bound = planned(job, crew)
            if bound is None:
                return _ended(job, "up to date")
            check_same(job, plan, bound)
            with crew.deciding(job.check_stop):
                give_up(job, plan)
            check_finite(job.spec, job.folder, store.statistics(job.folder, plan))
            around = circumstances(bound)
            for _ in range(TRIES):
                if _sealed(job, plan, bound, crew, around):
                    return _ended(job, "done")
            raise DataError(
                f"{job.folder.root}: parts that were done are gone, again and again; does anything remove files there?"
            )
    finally:
        gc.unfreeze()
