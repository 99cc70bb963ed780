"""What a run would do, without doing it."""

from array import array
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from actdump import inputs, store
from actdump.format import shard_layout
from actdump.job.bound import Bound, auto_tokens, budget_for, survey
from actdump.job.feeding import cut, standard_input, tokenised, tokenizer_for
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
    budget = (
        budget_for(spec, bound) if spec.batch.tokens != "auto" or weighed else Budget(auto_tokens(spec), spec.batch.prompts)
    )
    watcher.step("tokenising")
    lengths = array("i")
    with standard_input(spec) as stdin:
        inputs.of(spec, stdin).stamps()
        for _, ids in tokenised(spec, bound.source, tokenizer_for(spec, bound.source), stdin):
            lengths.extend(map(len, ids))
        plan = make({}, bound.columns, cut(spec, bound, lengths, stdin), budget)
    inside = [lengths[part.first : part.first + part.prompts] for part in plan.parts]
    cuts = [(part, batches(part, budget)) for part in inside]
    size = sum(
        shard_layout(bound.columns, each, store.metadata(plan, part)).size
        for part, each in zip(plan.parts, inside, strict=True)
    )
    return Forecast(
        bound, weighed, plan, Counter(lengths), sum(padded(*cut) for cut in cuts), sum(len(cut) for _, cut in cuts), size
    )
