"""What a run would do, without doing it."""

from array import array
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from actdump import inputs, store
from actdump.errors import DataError, OccupiedError, StorageError
from actdump.format import Folder, shard_layout
from actdump.job.bound import Bound, budget_for, survey
from actdump.job.feeding import cut, standard_input, tokenised, tokenizer_for
from actdump.job.standing import Explanation, found
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
        folder: what stands in its folder, or the error that a run would end with; `None` where no folder was named.
    """

    bound: Bound
    weighed: bool
    plan: Plan
    lengths: Mapping[int, int]
    padded: int
    batches: int
    bytes: int
    folder: Explanation | str | None


def forecast(spec: Spec, watcher: Watcher | None = None, root: Path | None = None) -> Forecast:
    """Plan a run and write nothing."""
    watcher = watcher or Silent()
    lengths = array("i")
    with standard_input(spec) as stdin:
        sources = inputs.of(spec, stdin)
        _ = sources.stamps  # they are there
        watcher.step("reading the model's config")
        bound, weighed = survey(spec, watcher=watcher)
        tokenizer = tokenizer_for(spec, bound.source, watcher)
        watcher.step("tokenising")
        for _, ids in tokenised(spec, bound.source, tokenizer, stdin):
            lengths.extend(map(len, ids))
        budget = budget_for(spec, bound)
        plan = make({}, bound.columns, cut(spec, bound, lengths, stdin), budget)
        folder = _found(spec, root, sources) if root is not None else None
    size = computed = count = 0
    for shard in plan.shards:
        size += shard_layout(
            bound.columns, lengths[shard.first : shard.first + shard.prompts], store.metadata(plan, shard)
        ).size
    for part in plan.parts:
        inside = lengths[part.first : part.first + part.prompts]
        cuts = batches(inside, budget)
        computed += padded(inside, cuts)
        count += len(cuts)
    return Forecast(bound, weighed, plan, Counter(lengths), computed, count, size, folder)


def _found(spec: Spec, root: Path, sources: inputs.Inputs) -> Explanation | str:
    try:
        explained = found(spec, Folder(root), sources)
        if explained.state != "up to date":
            store.check_writable(root, Folder(root).shards)
        return explained
    except (OccupiedError, StorageError, DataError) as error:
        return str(error)
