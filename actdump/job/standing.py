"""The plan in a folder, and whether it is that of a spec."""

from actdump import store
from actdump.errors import DataError, OccupiedError
from actdump.job.underway import Job
from actdump.plan import Plan


def standing(job: Job) -> Plan | None:
    """The plan in the folder, if it is that of this very spec; `None` where a new one is to be made."""
    spec, folder, overwrite = job.spec, job.folder, job.overwrite
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
    differs = difference(spec.decisive(), plan.facts["spec"])
    if differs is None and not job.sources.same(stamps, plan.facts["inputs"]):
        source = "standard input" if spec.prompts.file == "-" else "the prompt file"
        differs = f"the model's files or {source} have changed"
    if differs is None:
        return plan
    if not overwrite:
        raise OccupiedError(
            f"{folder.root} holds another dump: {differs}; choose another output, or replace it with --overwrite"
        )
    return None


def difference(now: object, before: object, key: str = "") -> str | None:
    """The first place where two specs differ, in words."""
    if now == before:
        return None
    if isinstance(now, dict) and isinstance(before, dict):
        names = [name for name in {**before, **now} if now.get(name) != before.get(name)]
        return difference(now.get(names[0]), before.get(names[0]), f"{key}.{names[0]}".lstrip("."))
    if isinstance(now, list) and isinstance(before, list):
        if len(now) != len(before):
            return f"`{key}` had {len(before)} entries and has {len(now)}"
        place = next(place for place in range(len(now)) if now[place] != before[place])
        return difference(now[place], before[place], f"{key}[{place}]")
    return f"`{key}` was {_short(before)} and is {_short(now)}"


def _short(value: object) -> str:
    text = "not given" if value is None else str(value)
    return text if len(text) <= 120 else text[:117] + "…"
