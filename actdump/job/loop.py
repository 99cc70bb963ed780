"""From a spec to a sealed dump: the loop that ties plan, engine and store together."""

import gc
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Literal

from actdump import inputs, store
from actdump.errors import DataError
from actdump.format import Folder, Manifest, manifest_from_json
from actdump.job.capturing import write_parts
from actdump.job.feeding import standard_input
from actdump.job.planning import loaded, source_of, take_in
from actdump.job.provenance import circumstances
from actdump.job.sealing import sealed
from actdump.job.standing import standing
from actdump.job.underway import Job
from actdump.job.watching import Silent, Watcher
from actdump.plan import Plan
from actdump.spec import Spec


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
    watcher: Watcher | None = None,
    stopping: Callable[[], bool] = lambda: False,
) -> Outcome:
    """Make a dump, go on with an unfinished one, or find that it is up to date.

    Args:
        overwrite: replace another dump in the folder.
        stopping: asked after every batch; `True` ends the run.

    Raises:
        OccupiedError: the folder holds something else.
        Stopped: asked to stop; finished parts stay, and the same run goes on.
        ActdumpError: see the subclasses.
    """
    began = monotonic()
    watcher = watcher or Silent()
    folder = Folder(root)
    with standard_input(spec) as stdin:
        sources = inputs.of(spec, stdin)
        found = standing(spec, sources, folder, overwrite)
        if found is not None and store.complete(folder, found):
            return Outcome("up to date", _manifest(folder), folder.manifest, monotonic() - began)
        return _go_on(Job(spec, folder, watcher, stopping, began), sources, found, stdin)


def _manifest(folder: Folder) -> Manifest:
    return manifest_from_json(json.loads(folder.manifest.read_bytes()))


def _go_on(job: Job, sources: inputs.Inputs, found: Plan | None, stdin: Path | None) -> Outcome:
    """Make what is missing. Mistakes in addresses and prompts are found before the weights are loaded."""
    try:
        with sources.hashing() as hashes:
            source = source_of(job)
            if found is not None and store.has_tokens(job.folder, found):
                plan, bound = found, loaded(job, source)
            else:
                plan, bound = take_in(job, source, sources, hashes, stdin, found)
        if plan.columns != bound.columns:
            raise DataError(
                f"{job.folder.root}: the model's shapes are not those of the plan in the folder; use the versions that made it"
            )
        around = circumstances(bound)
        write_parts(job, plan, bound, around)
        return Outcome("done", sealed(job, plan, bound, around), job.folder.manifest, monotonic() - job.began)
    finally:
        gc.unfreeze()
