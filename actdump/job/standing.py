"""What a folder is to a spec: nothing yet, its own dump, finished or not, or another one."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

from actdump import inputs, store
from actdump.errors import DataError, OccupiedError
from actdump.format import Folder
from actdump.job.feeding import standard_input
from actdump.job.underway import Job
from actdump.plan import Plan
from actdump.spec import LOCAL, Spec
from actdump.statistics import Statistics

MOST = 20  # differences that are told


@dataclass(frozen=True)
class Explanation:
    """What a run of a spec would find in its folder.

    Attributes:
        state: `new`, nothing is in the way; `unfinished` or `up to date`, it is this very dump; `stale`, it is another one.
        reasons: what makes it another dump.
    """

    state: Literal["new", "unfinished", "up to date", "stale"]
    reasons: tuple[str, ...] = ()


def explain(spec: Spec, root: Path) -> Explanation:
    """Say what a run would find in the folder, and why.

    Raises:
        OccupiedError: it holds something that is no dump.
        DataError: its plan cannot be read.
        MissingError: an input is not there.
    """
    with standard_input(spec) as stdin:
        return found(spec, Folder(root), inputs.of(spec, stdin))


def found(spec: Spec, folder: Folder, sources: inputs.Inputs) -> Explanation:
    """What a run would find in the folder.

    Raises:
        OccupiedError: it holds something that is no dump.
        StorageError: where the folder would be made is a file.
        DataError: its plan cannot be read, or the spec wants finite values alone, and others are there.
    """
    _check_apart(folder, sources)
    store.check_free(folder, overwrite=False)
    if (loaded := store.load_plan(folder)) is None:
        return Explanation("new")
    plan, stamps = loaded
    if reasons := tuple(islice(_reasons(spec, sources, plan, stamps), MOST + 1)):
        return Explanation("stale", (*reasons[:MOST], "and more") if len(reasons) > MOST else reasons)
    check_finite(spec, folder, store.statistics(folder, plan))
    return Explanation("up to date" if store.complete(folder, plan) else "unfinished")


def check_finite(spec: Spec, folder: Folder, made: Iterable[Mapping[str, Statistics]]) -> None:
    """Where a spec wants finite values alone, look for others in what was made before it did.

    Args:
        made: the statistics of what was made.

    Raises:
        DataError: there are some.
    """
    if spec.nonfinite != "error":
        return
    counts: Counter[str] = Counter()
    for statistics in made:
        counts.update({name: each.nonfinite for name, each in statistics.items() if each.nonfinite})
    if counts:
        told = ", ".join(f"{name} ({count:,})" for name, count in counts.items())
        raise DataError(
            f"{folder.root}: holds values that are NaN or infinite, made with `nonfinite: report`: {told}; keep them with it, or "
            "remove the folder and try another `model.dtype`"
        )


def standing(job: Job) -> Plan | None:
    """The plan in the folder, if it is that of this very spec; `None` where a new one is to be made."""
    spec, folder, overwrite = job.spec, job.folder, job.overwrite
    _check_apart(folder, job.sources)
    store.check_free(folder, overwrite=overwrite, repair=job.repair)
    try:
        loaded = store.load_plan(folder)
    except DataError:
        if not overwrite and not job.repair:
            raise
        return None
    if loaded is None:
        return None
    plan, stamps = loaded
    differs = job.patiently(lambda: next(_reasons(spec, job.sources, plan, stamps), None))
    if differs is None:
        if job.stdin is None:  # what was kept of standard input has no time of its own
            store.restamp(folder, plan, stamps, job.sources.stamps)
        return plan
    if not overwrite:
        raise OccupiedError(
            f"{folder.root} holds another dump: {differs}; choose another output, or replace it with --overwrite"
        )
    return None


def _check_apart(folder: Folder, sources: inputs.Inputs) -> None:
    """Raises:
    OccupiedError: the folder is the model's or the tokenizer's, of which a dump's files would become a part.
    """
    for role, path in sources.files.items():
        whose, _, name = role.partition("/")
        if name and path.parent.resolve() == folder.root.resolve():
            raise OccupiedError(f"{folder.root} is the {whose}'s own folder; choose another output")


def _reasons(spec: Spec, sources: inputs.Inputs, plan: Plan, stamps: inputs.Stamps) -> Iterator[str]:
    """Why a plan is not that of a spec and its inputs, in words; large files are read only where the answer is asked for."""
    yield from differences(spec.decisive(), plan.facts["spec"])
    for role, how in sources.changes(stamps, plan.facts["inputs"]):
        part, _, name = role.partition("/")
        source = "standard input" if spec.prompts.file == "-" else "the prompt file"
        yield f"the {part}'s file `{name}` {how}" if name else f"{source} {how}"


def differences(now: object, before: object, key: str = "") -> Iterator[str]:
    """The places where two specs differ, in words."""
    if now == before:
        return
    if isinstance(now, dict) and isinstance(before, dict):
        for name in {**before, **now}:
            yield from differences(now.get(name), before.get(name), f"{key}.{name}".lstrip("."))
    elif isinstance(now, list) and isinstance(before, list) and len(now) == len(before):
        for place in range(len(now)):
            yield from differences(now[place], before[place], f"{key}[{place}]")
    elif isinstance(now, list) and isinstance(before, list):
        yield f"`{_written(key)}` had {len(before)} entries and has {len(now)}"
    else:
        gone = ", where there are none" if before == LOCAL and isinstance(now, str) else ""
        yield f"`{_written(key)}` was {_short(before)} and is {_short(now)}{gone}"


def _written(key: str) -> str:
    """A key as a user writes it."""
    return key.replace("prompts.rows", "prompts", 1)


def _short(value: object) -> str:
    text = "not given" if value is None else str(value)
    return text if len(text) <= 120 else text[:117] + "…"
