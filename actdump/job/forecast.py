"""What a run would do, without doing it."""

from array import array
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from actdump import inputs, store
from actdump.errors import ActdumpError, DataError, OccupiedError, StorageError
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
        place: the folder, or the working folder where none was named; free: the bytes that are free there.
        found: what stands in the folder; refusal: the error that a run would end with, if it is not another dump that stands there. Both
            are `None` where no folder was named.
    """

    bound: Bound
    weighed: bool
    plan: Plan
    lengths: Mapping[int, int]
    padded: int
    batches: int
    bytes: int
    place: Path
    free: int
    found: Explanation | None
    refusal: ActdumpError | None


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
        size = _size(plan, lengths)
        found, refusal = _found(spec, Folder(root), sources, size) if root is not None else (None, None)
    computed = count = 0
    for part in plan.parts:
        inside = lengths[part.first : part.first + part.prompts]
        cuts = batches(inside, budget)
        computed += padded(inside, cuts)
        count += len(cuts)
    place = root or Path()
    free = store.free_space(Folder(place).shards)
    return Forecast(bound, weighed, plan, Counter(lengths), computed, count, size, place, free, found, refusal)


def _size(plan: Plan, lengths: "array[int]") -> int:
    """The bytes of all shard files."""
    spans = ((shard, lengths[shard.first : shard.first + shard.prompts]) for shard in plan.shards)
    return sum(shard_layout(plan.columns, inside, store.metadata(plan, shard)).size for shard, inside in spans)


def _found(spec: Spec, folder: Folder, sources: inputs.Inputs, size: int) -> tuple[Explanation | None, ActdumpError | None]:
    """What stands in a folder, and what would end a run there."""
    explained = None
    try:
        explained = found(spec, folder, sources)
        if explained.state != "up to date":
            store.check_writable(folder.root, folder.shards)
            store.check_space(folder, size - store.taken(folder))
    except (OccupiedError, StorageError, DataError) as error:
        return explained, error
    return explained, None
