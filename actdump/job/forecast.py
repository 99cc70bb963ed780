"""What a run would do, without doing it."""

from array import array
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from actdump import inputs, store
from actdump.format import shard_layout
from actdump.job.bound import Bound, budget_for, survey
from actdump.job.feeding import cut, standard_input, tokenised, tokenizer_for
from actdump.job.watching import Silent, Watcher
from actdump.plan import Plan, batches, make, padded
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
    budget = budget_for(spec, bound.source)
    tokenizer = tokenizer_for(spec, bound.source, watcher)
    watcher.step("tokenising")
    lengths = array("i")
    with standard_input(spec) as stdin:
        _ = inputs.of(spec, stdin).stamps  # they are there
        for _, ids in tokenised(spec, bound.source, tokenizer, stdin):
            lengths.extend(map(len, ids))
        plan = make({}, bound.columns, cut(spec, bound, lengths, stdin), budget)
    size = computed = count = 0
    for part in plan.parts:
        inside = lengths[part.first : part.first + part.prompts]
        cuts = batches(inside, budget)
        size += shard_layout(bound.columns, inside, store.metadata(plan, part)).size
        computed += padded(inside, cuts)
        count += len(cuts)
    return Forecast(bound, weighed, plan, Counter(lengths), computed, count, size)
