"""From prompts to a plan in the folder. Mistakes in addresses and prompts are found before the weights are loaded."""

import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actdump import inputs, store
from actdump.errors import DataError
from actdump.format import plan_to_json
from actdump.job.bound import Bound, bind, bind_early, budget_for
from actdump.job.feeding import cut, tokenised, tokenizer_for
from actdump.job.underway import Job
from actdump.plan import Plan, make
from actdump.spec import Spec

if TYPE_CHECKING:
    from actdump.model import Source


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
def source_of(job: Job) -> "Source":
    from actdump import model

    job.watcher.step("reading the model's config")
    source = model.find(job.spec.model)
    bind_early(job.spec, source)
    return source


@uncollected()
def loaded(job: Job, source: "Source") -> Bound:
    from actdump import model

    job.watcher.step("loading the model")
    bound = bind(job.spec, source, model.load(source))
    job.check_stop()
    return bound


def take_in(
    job: Job,
    source: "Source",
    sources: inputs.Inputs,
    hashes: Callable[[], dict[str, str]],
    stdin: Path | None,
    found: Plan | None,
) -> tuple[Plan, Bound]:
    """Tokenise all prompts, load the model, and write plan, tokens and prompts; with a plan found, only what is missing."""
    folder = job.folder
    job.watcher.step("tokenising")
    with uncollected():
        tokenizer = tokenizer_for(job.spec, source)
    with store.storage(folder.root, "made"):
        folder.root.mkdir(parents=True, exist_ok=True)
    store.sweep(folder)
    with store.Intake(folder) as intake:
        for prompts, ids in tokenised(job.spec, source, tokenizer, stdin):
            job.check_stop()
            intake.add(prompts, ids)
        bound = loaded(job, source)
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
