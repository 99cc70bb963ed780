"""Repairs: every byte of what a folder holds is compared with what was recorded of it."""

import logging
from collections.abc import Sequence

from actdump import reader, store, verify
from actdump.errors import DataError, MissingError
from actdump.format import Folder, Manifest
from actdump.job.underway import Damage, Job
from actdump.plan import Plan, Span

log = logging.getLogger(__name__)


def look_over(job: Job, plan: Plan) -> None:
    """Look for damage in a finished dump, or in the finished shards of an unfinished one, and tell it. Changes nothing.

    Raises:
        Stopped: asked to stop.
    """
    job.watcher.step("comparing every byte with what was recorded of it")
    job.damage = _damage(job, plan, plan.shards)
    for fault in job.damage.faults:
        log.warning("%s", fault)


def give_up(job: Job, plan: Plan) -> None:
    """What is damaged is not done, and a dump with damage, or with parts missing, is not complete.

    Only now that the model is there, because the dump can be read until then. Looks again at what was damaged: another worker may
    have made it anew in the meantime.
    """
    damage = _damage(job, plan, job.damage.shards) if job.damage.faults else job.damage
    spooled = job.folder.tokens.exists()  # for prompts.jsonl, which may be all that was damaged; the seal removes it
    if damage.faults or spooled or not store.complete(job.folder, plan):
        store.reopen(job.folder, damage.shards)


def _damage(job: Job, plan: Plan, spans: Sequence[Span]) -> Damage:
    folder = job.folder
    manifest, faults = _manifest(folder, plan)
    damaged = []
    for span in spans:
        job.check_stop()
        shard = store.finished(folder, span, plan.digest) if manifest is None else manifest.shards[span.number]
        if shard is not None and (found := verify.shard_faults(folder, shard)):
            faults += found
            damaged.append(span)
    if manifest is not None or folder.prompts.exists():
        faults += verify.prompts_faults(folder, plan.facts)
    return Damage(tuple(faults), tuple(damaged))


def _manifest(folder: Folder, plan: Plan) -> tuple[Manifest | None, list[str]]:
    """The manifest, if it is there and agrees with the plan; and what is wrong with it."""
    try:
        manifest = reader.open_dump(folder.root).manifest
    except MissingError:
        return None, []
    except DataError as error:
        return None, [str(error)]
    faults = verify.manifest_faults(folder, manifest, plan)
    return (None if faults else manifest), faults
