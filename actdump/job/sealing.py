"""The end of a run: the audit, and the manifest that seals the dump."""

import logging
from collections.abc import Mapping
from dataclasses import replace
from time import monotonic
from typing import Any

from actdump import store
from actdump.errors import DataError
from actdump.format import Manifest
from actdump.job.bound import Bound
from actdump.job.provenance import now, placed
from actdump.job.underway import Job
from actdump.memory import memory_for
from actdump.plan import Plan
from actdump.reader import Dump

log = logging.getLogger(__name__)


def seal(job: Job, plan: Plan, bound: Bound, around: Mapping[str, Any]) -> bool:
    """Audit what was written and seal it; whether all parts were there.

    Args:
        around: what the manifest says of the circumstances.

    Raises:
        DataError: values are wrong.
    """
    gathered = store.gathered(job.folder, plan)
    if gathered is None:
        return False
    audited = _audited(job, plan, bound, gathered)
    made = {
        **around, "model": placed(job.spec.model),
        "started": job.started, "finished": now(), "seconds": round(monotonic() - job.began, 3),
    }  # fmt: skip
    manifest = replace(gathered, made=made, audit=audited)
    store.seal(job.folder, manifest)
    store.sweep(job.folder)
    for name, statistics in manifest.statistics.items():
        if statistics.nonfinite:
            log.warning(
                "%s: %d of %d values are NaN or infinite; the model itself made them so",
                name,
                statistics.nonfinite,
                statistics.values,
            )
    return True


def _audited(job: Job, plan: Plan, bound: Bound, gathered: Manifest) -> dict[str, Any] | None:
    """Audit what was written, before it is sealed.

    Raises:
        DataError: values are wrong.
    """
    if job.spec.audit == 0:
        return None
    from actdump import audit

    job.watcher.step("auditing")
    dump = Dump(job.folder, gathered)
    with memory_for("the audit", "the parts are done, so `--set audit=0` seals the dump without one"):
        found = audit.compare(dump, bound.module, audit.choose(dump, plan, job.spec.audit), job.check_stop)
    if found.faults:
        raise DataError(
            f"{found.told}\n{job.folder.root}: the audit found values that are not those of the prompts run alone, so the dump is "
            "not sealed. The same command audits the same files again; remove the folder to make them anew. If they are wrong "
            "again, it is a fault of actdump: please report it; `batch: {prompts: 1}` may avoid it"
        )
    return audit.to_json(found)
