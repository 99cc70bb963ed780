"""What a run would do, without doing it."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from actdump import inputs, store
from actdump.format import shard_layout
from actdump.job.bound import Bound, auto_tokens, budget_for, survey
from actdump.job.feeding import cutter_for, standard_input, tokenised
from actdump.job.watching import Silent, Watcher
from actdump.plan import Budget, Plan, batches, make, padded
from actdump.spec import Spec


@dataclass(frozen=True)
class Forecast:
    """What a run would do.

    Attributes:
        weighed: whether the weights had to be loaded to find out.
        lengths: how many prompts have how many tokens.
        padded: the tokens that the batches compute, padding included.
        batches: how many forwards there are.
        bytes: the exact size of all shard files.
    """

    bound: Bound
    weighed: bool
    plan: Plan
    lengths: Mapping[int, int]
    padded: int
    batches: int
    bytes: int


def forecast(spec: Spec, watcher: Watcher | None = None) -> Forecast:
    """Plan a run and write nothing."""
    watcher = watcher or Silent()
    watcher.step("reading the model's config")
    bound, weighed = survey(spec, watcher=watcher)
    cutter = cutter_for(spec, bound)
    budget = (
        budget_for(spec, bound) if spec.batch.tokens != "auto" or weighed else Budget(auto_tokens(spec), spec.batch.prompts)
    )
    watcher.step("tokenising")
    lengths: dict[int, list[int]] = {}
    with standard_input(spec) as stdin:
        inputs.of(spec, stdin).stamps()
        for _, ids in tokenised(spec, bound, stdin):
            lengths.setdefault(cutter.add(len(ids)), []).append(len(ids))
    cuts = [(part, batches(part, budget)) for part in lengths.values()]
    plan = make({}, bound.columns, cutter.parts, budget)
    size = sum(shard_layout(bound.columns, lengths[part.number], store.metadata(plan, part)).size for part in plan.parts)
    counts = Counter(length for part in lengths.values() for length in part)
    return Forecast(bound, weighed, plan, counts, sum(padded(*cut) for cut in cuts), sum(len(cut) for _, cut in cuts), size)
