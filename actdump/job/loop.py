"""From a spec to a sealed dump: the loop that ties plan, engine and store together."""

import gc
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any, Literal

from actdump import inputs, store
from actdump.errors import DataError, OccupiedError, Stopped
from actdump.format import Folder, Manifest, manifest_from_json, plan_to_json
from actdump.job import heap
from actdump.job.bound import Bound, bind, bind_early, budget_for
from actdump.job.feeding import cut, standard_input, tokenised, tokenizer_for
from actdump.job.provenance import circumstances, now, placed
from actdump.job.watching import Silent, Watcher
from actdump.plan import Batch, Plan, batches, make
from actdump.reader import Dump
from actdump.spec import Spec
from actdump.statistics import Statistics, merged

log = logging.getLogger(__name__)

if TYPE_CHECKING:
    from actdump.model import Source


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
        found = _standing(spec, sources, folder, overwrite)
        if found is not None and store.complete(folder, found):
            return Outcome("up to date", _manifest(folder), folder.manifest, monotonic() - began)
        return _go_on(_Job(spec, folder, watcher, stopping, began), sources, found, stdin)


def _standing(spec: Spec, sources: inputs.Inputs, folder: Folder, overwrite: bool) -> Plan | None:
    """The plan in the folder, if it is that of this very spec; `None` where a new one is to be made."""
    store.check_free(folder, overwrite=overwrite)
    try:
        loaded = store.load_plan(folder)
    except DataError:
        if not overwrite:
            raise
        return None
    if loaded is None:
        return None
    plan, stamps = loaded
    differs = _difference(spec.decisive(), plan.facts["spec"])
    if differs is None and not sources.same(stamps, plan.facts["inputs"]):
        source = "standard input" if spec.prompts.file == "-" else "the prompt file"
        differs = f"the model's files or {source} have changed"
    if differs is None:
        return plan
    if not overwrite:
        raise OccupiedError(
            f"{folder.root} holds another dump: {differs}; choose another output, or replace it with --overwrite"
        )
    return None


def _difference(now: object, before: object, key: str = "") -> str | None:
    """The first place where two specs differ, in words."""
    if now == before:
        return None
    if isinstance(now, dict) and isinstance(before, dict):
        names = [name for name in {**before, **now} if now.get(name) != before.get(name)]
        return _difference(now.get(names[0]), before.get(names[0]), f"{key}.{names[0]}".lstrip("."))
    if isinstance(now, list) and isinstance(before, list):
        if len(now) != len(before):
            return f"`{key}` had {len(before)} entries and has {len(now)}"
        place = next(place for place in range(len(now)) if now[place] != before[place])
        return _difference(now[place], before[place], f"{key}[{place}]")
    return f"`{key}` was {_short(before)} and is {_short(now)}"


def _short(value: object) -> str:
    text = "not given" if value is None else str(value)
    return text if len(text) <= 120 else text[:117] + "…"


def _manifest(folder: Folder) -> Manifest:
    return manifest_from_json(json.loads(folder.manifest.read_bytes()))


@dataclass
class _Job:
    """A run that is under way."""

    spec: Spec
    folder: Folder
    watcher: Watcher
    stopping: Callable[[], bool]
    began: float
    started: str = field(default_factory=lambda: now())


def _go_on(job: _Job, sources: inputs.Inputs, found: Plan | None, stdin: Path | None) -> Outcome:
    """Make what is missing. Mistakes in addresses and prompts are found before the weights are loaded."""
    try:
        with sources.hashing() as hashes:
            source = _source(job)
            if found is not None and store.has_tokens(job.folder, found):
                plan, bound = found, _loaded(job, source)
            else:
                plan, bound = _take_in(job, source, sources, hashes, stdin, found)
        if plan.columns != bound.columns:
            raise DataError(
                f"{job.folder.root}: the model's shapes are not those of the plan in the folder; use the versions that made it"
            )
        return _write_parts(job, plan, bound)
    finally:
        gc.unfreeze()


@contextmanager
def _uncollected() -> Iterator[None]:
    """Keep the garbage collector still, and later from looking at what came: until `gc.unfreeze`.

    What is imported and loaded stays. Looking through it again and again in vain took a sixth of the time to the first batch.
    """
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if collecting:
            gc.enable()


@_uncollected()
def _source(job: _Job) -> "Source":
    from actdump import model

    job.watcher.step("reading the model's config")
    source = model.find(job.spec.model)
    bind_early(job.spec, source)
    return source


@_uncollected()
def _loaded(job: _Job, source: "Source") -> Bound:
    from actdump import model

    job.watcher.step("loading the model")
    bound = bind(job.spec, source, model.load(source))
    _check_stop(job)
    return bound


def _take_in(
    job: _Job,
    source: "Source",
    sources: inputs.Inputs,
    hashes: Callable[[], dict[str, str]],
    stdin: Path | None,
    found: Plan | None,
) -> tuple[Plan, Bound]:
    """Tokenise all prompts, load the model, and write plan, tokens and prompts; with a plan found, only what is missing."""
    folder = job.folder
    job.watcher.step("tokenising")
    with _uncollected():
        tokenizer = tokenizer_for(job.spec, source)
    with store.storage(folder.root, "made"):
        folder.root.mkdir(parents=True, exist_ok=True)
    store.sweep(folder)
    with store.Intake(folder) as intake:
        for prompts, ids in tokenised(job.spec, source, tokenizer, stdin):
            _check_stop(job)
            intake.add(prompts, ids)
        bound = _loaded(job, source)
        parts = cut(job.spec, bound, intake.lengths, stdin)
        intake.place(parts)
        facts = facts_of(job.spec, bound, hashes(), intake.facts)
        plan = make(facts, bound.columns, parts, found.budget if found else budget_for(job.spec, source))
        if found is not None and plan.digest != found.digest:
            raise DataError(
                f"{folder.root}: the prompts' tokens are not those of the plan in the folder; use the versions that made it"
            )
        if found is None:
            store.check_space(folder, sum(part.bytes for part in plan.parts))
            store.clear(folder)
        intake.commit(plan if found is None else None, sources.stamps(), plan_to_json)
    return plan, bound


def facts_of(spec: Spec, bound: Bound, hashes: Mapping[str, str], taken: Mapping[str, Any]) -> dict[str, Any]:
    config: Any = bound.module.config
    return {
        "spec": spec.decisive(),
        "inputs": dict(hashes),
        **taken,
        "model": {
            "name": spec.model.source or str(config.model_type),
            "commit": bound.source.commit,
            "class": type(bound.module).__name__,
            "dtype": str(bound.source.dtype).removeprefix("torch."),
            "attn_implementation": getattr(config, "_attn_implementation", None),
            "masked": bound.feed.masked,
        },
    }


def _write_parts(job: _Job, plan: Plan, bound: Bound) -> Outcome:
    folder = job.folder
    store.sweep(folder)
    finished = [part for part in plan.parts if store.done(folder, part, plan.digest)]
    waiting = sorted(set(plan.parts).difference(finished), key=lambda part: part.number)
    store.check_space(folder, sum(part.bytes for part in waiting))
    job.watcher.planned(plan, finished)
    around = circumstances(bound)
    with store.Pendings() as pendings, store.Writer() as writer:  # the writer ends before what it writes to is closed
        for part in waiting:
            shard = pendings.begin(folder, plan, part, store.part_tokens(folder, plan, part))
            seen: Seen = {}
            count = _capture_part(job, plan, bound, shard, writer, seen)
            writer.do(_seal, shard, seen, {**around, "batches": count})
            heap.trim()
        writer.finish()
    audited = _audited(job, plan, bound)
    made = {
        **around, "model": placed(job.spec.model),
        "started": job.started, "finished": now(), "seconds": round(monotonic() - job.began, 3),
    }  # fmt: skip
    manifest = replace(store.gathered(folder, plan, made), audit=audited)
    store.seal(folder, manifest)
    for name, statistics in manifest.statistics.items():
        if statistics.nonfinite:
            log.warning(
                "%s: %d of %d values are NaN or infinite; the model itself made them so",
                name,
                statistics.nonfinite,
                statistics.values,
            )
    return Outcome("done", manifest, folder.manifest, monotonic() - job.began)


def _audited(job: _Job, plan: Plan, bound: Bound) -> dict[str, Any] | None:
    """Audit what was written, before it is sealed.

    Raises:
        DataError: values are wrong.
    """
    if job.spec.audit == 0:
        return None
    from actdump import audit

    _check_stop(job)
    job.watcher.step("auditing")
    dump = Dump(job.folder, store.gathered(job.folder, plan, {}))
    found = audit.compare(dump, bound.module, audit.choose(dump, plan, job.spec.audit))
    if found.faults:
        raise DataError(
            f"{found.told}\n{job.folder.root}: the audit found values that are not those of the prompts run alone, so the dump is "
            "not sealed. The same command audits the same files again; remove the folder to make them anew. If they are wrong "
            "again, it is a fault of actdump: please report it; `batch: {prompts: 1}` may avoid it"
        )
    return audit.to_json(found)


Seen = dict[str, list[Statistics]]  # for each floating point tap, the statistics of its batches so far


def _capture_part(job: _Job, plan: Plan, bound: Bound, shard: store.Pending, writer: store.Writer, seen: Seen) -> int:
    """Capture a part batch by batch, and hand the rows to the writer; the number of batches."""
    import torch

    from actdump import engine

    cut, blocks = batches(shard.lengths, plan.budget), engine.Blocks()
    with torch.inference_mode():
        for places in cut:
            _check_stop(job)
            numbers = tuple(shard.part.first + place for place in places)
            batch = Batch(numbers, tuple(shard.ids[place].tolist() for place in places))
            captured = engine.capture(bound.module, bound.sites, bound.feed, batch, blocks=blocks)
            writer.do(_put, job, shard, places, captured, seen)
            job.watcher.batch(len(places), sum(batch.lengths))
    return len(cut)


def _check_stop(job: _Job) -> None:
    if job.stopping():
        raise Stopped(f"{job.folder.root}: stopped before the end; the same command goes on with it")


def _put(job: _Job, shard: store.Pending, places: Sequence[int], captured: Any, seen: Seen) -> None:
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


def _seal(shard: store.Pending, seen: Seen, written: Mapping[str, Any]) -> None:
    shard.seal({name: merged(each) for name, each in seen.items()}, {**written, "finished": now()})
