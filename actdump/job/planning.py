"""From prompts to a plan in the folder. Mistakes in addresses and prompts are found before the weights are loaded."""

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from actdump import store
from actdump.errors import DataError, OccupiedError, SpecError, UsageError
from actdump.format import VERSION
from actdump.job.bound import Bound, bind, bind_early, budget_for
from actdump.job.feeding import cut, tokenised, tokenizer_for
from actdump.job.repair import look_over
from actdump.job.standing import standing
from actdump.job.underway import Job
from actdump.plan import Plan, digest, make, widest
from actdump.spec import ModelSpec, Spec

if TYPE_CHECKING:
    from actdump.model import Source


LITTLE = 100  # a try costs little, if all prompts have so many times its tokens


@contextmanager
def uncollected() -> Iterator[None]:
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


@uncollected()
def source_of(job: Job, commit: str | None = None) -> "Source":
    """The model before its weights. A device that is not there is found here, and wrong addresses, where the model class can be made
    without weights.

    Args:
        commit: that of the model on the hub, whatever the revision that the spec names has become.
    """
    from actdump import model

    job.watcher.step("reading the model's config")
    spec = job.spec.model if commit is None else job.spec.model.model_copy(update={"revision": commit})
    spec = _on_own_device(spec, job.worker.local)
    model.pick_device(spec.device)
    source = model.find(spec)
    if source.commit is not None:  # so are tokenizer and weights, however much later they are asked for
        source = replace(source, spec=source.spec.model_copy(update={"revision": source.commit}))
    bind_early(job.spec, source)
    return source


def _on_own_device(spec: ModelSpec, local: int | None) -> ModelSpec:
    """Where several devices are seen, and none is named, each worker of a machine takes one of its own."""
    import torch

    device = torch.accelerator.current_accelerator(check_available=True)
    if spec.device != "auto" or spec.device_map is not None or local is None or device is None:
        return spec
    return spec.model_copy(update={"device": f"{device.type}:{local % torch.accelerator.device_count()}"})


@uncollected()
def loaded(job: Job, source: "Source") -> Bound:
    from actdump import model

    job.watcher.step("loading the model")
    module = job.patiently(lambda: model.load(source))
    job.check_stop()
    bound = bind(job.spec, source, module)
    job.check_stop()
    return bound


def planned(job: Job, crew: store.Crew) -> tuple[Plan, Bound | None]:
    """The plan: that in the folder, or a new one, which one worker makes while the others load the model and wait.

    Returns:
        The plan, and the model with the taps bound to it; `None` where another worker finished the dump in the meantime.

    Raises:
        OccupiedError: the folder holds another dump, or another run is at work on one.
    """
    bound = None

    def waiting() -> None:
        nonlocal bound
        if bound is None:
            bound = loaded(job, source)
            job.watcher.step("waiting for another worker")
        job.check_stop()

    with job.sources.hashing() as hashes:
        source = source_of(job)
        with crew.deciding(waiting):
            found = standing(job)
            if found is not None and not job.damage.faults and store.complete(job.folder, found):
                return found, None
            if found is not None and found.facts["model"]["commit"] != source.commit:
                source, bound = source_of(job, found.facts["model"]["commit"]), None
            if found is not None and job.overwrite:
                bound = bound or loaded(job, source)
                found = None if _unlike(found, bound) else found  # that of another model is replaced
            _enter(job, crew, found)
            if found is None or not job.patiently(partial(store.has_tokens, job.folder, found)):
                plan, bound = take_in(job, crew, source, hashes, found, bound)
                if job.repair and found is None:  # a broken plan, made again; nobody looked at the parts yet
                    look_over(job, plan)
                return plan, bound
    bound = bound or loaded(job, source)
    job.sources.check_same()
    return found, bound


def check_same(job: Job, plan: Plan, bound: Bound) -> None:
    """Make sure that what is to be made fits to what is there.

    Raises:
        DataError: the model is another one than the plan was made with.
    """
    if unlike := _unlike(plan, bound):
        raise DataError(
            f"{job.folder.root}: {unlike} are not those of the plan in the folder; use the versions of torch and transformers that "
            "made it (random weights depend on the kind of CPU too), or replace it with --overwrite"
        )


def _unlike(plan: Plan, bound: Bound) -> str | None:
    """What of the model is not as it was when the plan was made, in words."""
    from actdump import model

    if plan.columns != bound.columns:
        return "the model's shapes"
    return "the model's weights" if model.other_weights(plan.facts["model"], bound.module) else None


def _enter(job: Job, crew: store.Crew, found: Plan | None) -> None:
    """Be one of the workers on the plan that was found, or the first on a new one.

    Raises:
        OccupiedError: others are at work on the dump that is to be replaced.
    """
    if found is None and job.folder.plan.exists() and (others := crew.others()):
        number, host = store.number_and_host(others[0])
        raise OccupiedError(
            f"{job.folder.root}: another run (process {number} on {host}) is at work on another dump there; wait, or stop it"
        )
    with store.storage(job.folder.root, "swept"):
        store.sweep(job.folder)
    crew.join()


def take_in(
    job: Job,
    crew: store.Crew,
    source: "Source",
    hashes: Callable[[], dict[str, str]],
    found: Plan | None,
    bound: Bound | None,
) -> tuple[Plan, Bound]:
    """Tokenise all prompts, load the model, and write plan, tokens and prompts; with a plan found, only what is missing."""
    with uncollected():
        tokenizer = tokenizer_for(job.spec, source, job.watcher)
    job.watcher.step("tokenising")
    with store.Intake(job.folder) as intake:
        for prompts, ids in tokenised(job.spec, source, tokenizer, job.stdin):
            job.check_stop()
            intake.add(prompts, ids)
        bound = bound or loaded(job, source)
        _try_longest(bound, max(intake.lengths, default=0))
        _try_widest(job.spec, bound, intake.lengths)
        parts = cut(job.spec, bound, intake.lengths, job.stdin)
        shards = tuple(shard for part in parts for shard in part.shards)
        intake.place(shards)
        facts = facts_of(job.spec, bound, job.patiently(hashes), intake.facts)
        if found is None and not crew.locks:  # another worker may have made the plan in the meantime
            found = standing(job)
            found = None if found is not None and job.overwrite and _unlike(found, bound) else found
        plan = found or make(facts, bound.columns, parts, budget_for(job.spec, bound))
        # How the model is run may be another here (the mask, the attention kernel); a plan that is there stays.
        if plan.shards != shards or _taken_in(plan.facts) != _taken_in(facts):
            raise DataError(
                f"{job.folder.root}: the prompts' tokens are not those of the plan in the folder; use the versions that made it"
            )
        if found is None:
            _make_room(job, plan)
        intake.commit(plan if found is None else None, job.sources.stamps)
    return plan, bound


def _make_room(job: Job, plan: Plan) -> None:
    """Remove from the folder what a new plan does not keep.

    Raises:
        OccupiedError: a broken plan is to be made again, and what is there was made by another one.
    """
    folder = job.folder
    if job.repair and not job.overwrite and store.origins(folder) - {(VERSION, plan.digest)}:
        raise OccupiedError(
            f"{folder.root} holds another dump, or one that was made on another kind of device, and its plan is lost; choose another "
            "output, or replace it with --overwrite"
        )
    store.check_space(folder, sum(part.bytes for part in plan.parts) - store.taken(folder))
    store.clear(folder, plan)


def _try_longest(bound: Bound, tokens: int) -> None:
    """Where `tokenizer.max_length` lets a prompt be longer than the model's config does, see whether it runs, as with rotary positions.

    Raises:
        SpecError: it does not.
    """
    from actdump import engine

    limit = bound.source.positions
    if limit is None or tokens <= limit:
        return
    try:
        engine.try_out(bound.module, bound.sites, bound.feed, tokens)
    except UsageError as error:
        raise SpecError(
            f"tokenizer.max_length: the longest prompt has {tokens:,} tokens, the model's config allows {limit:,}, and more do not "
            f"run: {error}; use at most {limit:,}, with `truncation: true` to cut what is longer"
        ) from error


def _try_widest(spec: Spec, bound: Bound, lengths: Sequence[int]) -> None:
    """Where it costs little beside the run, see that a prompt's value is its own in batches as wide as the widest with padding.

    Raises:
        AddressError: taps whose value is another there.
    """
    from actdump import engine

    width = widest(lengths, budget_for(spec, bound))
    if 0 < 2 * width * LITTLE <= sum(lengths):
        with engine.any_shape():
            engine.probe_width(bound.module, bound.sites, bound.feed, width)


def _taken_in(facts: Mapping[str, Any]) -> str:
    """The digest of what a plan was made from, but for how the model is run."""
    return digest({**facts, "model": None})


def facts_of(spec: Spec, bound: Bound, hashes: Mapping[str, str], taken: Mapping[str, Any]) -> dict[str, Any]:
    from actdump import model

    config: Any = bound.module.config
    return {
        "spec": spec.decisive(),
        "inputs": dict(hashes),
        **taken,
        "model": {
            "name": spec.model.source or str(config.model_type),
            "commit": bound.source.commit,
            "class": type(bound.module).__name__,
            "dtype": bound.dtype,
            "attn_implementation": getattr(config, "_attn_implementation", None),
            "masked": bound.feed.masked,
            "weights": model.fingerprint(bound.module),
            **({"drawn": list(drawn)} if (drawn := model.drawn(bound.module)) else {}),
        },
    }
