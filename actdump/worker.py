"""Which worker this process is."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from actdump.errors import UsageError
from actdump.plan import Part


@dataclass(frozen=True)
class Worker:
    """One of several processes that write the same dump. Says where it starts; nothing on disk depends on it.

    Attributes:
        index, count: its number, from 0, of how many.
        local: its number among those of this machine, where that is known.
    """

    index: int = 0
    count: int = 1
    local: int | None = None

    def owns(self, part: Part) -> bool:
        """Whether a part is of its own share."""
        return part.number % self.count == self.index % self.count

    def order(self, parts: Sequence[Part]) -> list[Part]:
        """Its own parts, and then those of others, from the end, where their owners come last."""
        own = [part for part in parts if self.owns(part)]
        return own + [part for part in reversed(parts) if not self.owns(part)]


def which(option: str | None, environment: Mapping[str, str]) -> Worker:
    """Which worker this process is.

    An index that cannot be derived, as in an array of a list (`--array=3,7`) or in one of which some tasks were submitted again,
    only means that several workers start at the same part and sort it out.

    Args:
        option: `off` (the only one, whatever the environment says), `I/N`, or `None`: from the environment.

    Raises:
        UsageError: the option is neither.
    """
    if option == "off":
        return Worker()
    local = _number(environment, "LOCAL_RANK", "SLURM_LOCALID")
    if option is not None:
        return Worker(*_given(option), local)
    task, tasks = _of_array(environment)
    process, processes = _of_processes(environment)
    return Worker(task * processes + process, tasks * processes, local)


def _given(option: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)/(\d+)", option)
    if found is None or int(found[2]) == 0 or int(found[1]) > int(found[2]):
        raise UsageError(f"--worker: `{option}` is not a worker; write 0/4 to 3/4 (or 1/4 to 4/4), or off")
    return int(found[1]) % int(found[2]), int(found[2])


def _number(environment: Mapping[str, str], *names: str) -> int | None:
    """The first of these variables that is there and is a number."""
    return next((int(value) for name in names if (value := environment.get(name, "")).isdecimal()), None)


def _of_array(environment: Mapping[str, str]) -> tuple[int, int]:
    """The place of this task in a SLURM array of evenly spaced tasks, and how many there are (https://slurm.schedmd.com/job_array.html)."""
    names = ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_MIN", "SLURM_ARRAY_TASK_MAX", "SLURM_ARRAY_TASK_COUNT")
    task, first, last, count = (_number(environment, name) for name in names)
    if task is None or first is None or last is None or not count:
        return 0, 1
    step = _number(environment, "SLURM_ARRAY_TASK_STEP") or 1
    even = first + step * (count - 1) == last and first <= task <= last and (task - first) % step == 0
    return ((task - first) // step, count) if even else (0, 1)


def _of_processes(environment: Mapping[str, str]) -> tuple[int, int]:
    """The number of this process among those that torchrun or srun started.

    The shell of a batch job has `SLURM_PROCID=0` and `SLURM_NTASKS`, too, however many tasks the job has: only in a step do they
    count what runs.
    """
    rank, world = _number(environment, "RANK"), _number(environment, "WORLD_SIZE")
    if rank is None or not world:
        rank, world = _number(environment, "SLURM_PROCID"), _number(environment, "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS")
        if not rank and "SLURM_STEP_ID" not in environment:
            return 0, 1
    return (rank, world) if rank is not None and world and rank < world else (0, 1)
