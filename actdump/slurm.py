"""A job script for SLURM, as text. Pure."""

import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from actdump.errors import UsageError

LEAD = 120  # seconds before its time limit at which a job is asked to stop; SLURM may ask up to a minute earlier


@dataclass(frozen=True)
class Job:
    """What a job script is made from.

    Attributes:
        command: what to run, word by word; the program with its full path.
        folder: where to run it.
        name: what it is about; the job and its log are called after it.
        time: the time limit, as SLURM spells it.
        tasks: how many tasks the array has; `None`: the job is no array.
        gpus: how many each task gets.
        requeue: whether a job that was stopped goes back into the queue.
        extra: further words for `#SBATCH` lines; they win over ours.
    """

    command: Sequence[str]
    folder: str
    name: str
    time: str
    tasks: int | None = None
    gpus: int | None = None
    requeue: bool = False
    extra: Sequence[str] = ()


def script(job: Job) -> str:
    """The job script, ready for sbatch.

    Raises:
        UsageError: the time limit is none, or the extra words are no options.
    """
    header = [f"#SBATCH {shlex.join(words)}" for words in [*([word] for word in _settings(job)), *_options(job.extra)]]
    srun = f"{SRUN} {shlex.join(job.command)}"
    body = f"trap 'cancelled=yes' TERM\n{srun}\n{REQUEUE}" if job.requeue else f"exec {srun}\n"
    return "\n".join(["#!/bin/bash", *header, "", f"cd -- {shlex.quote(job.folder)} || exit", body])


# srun, because a signal before the limit is for job steps: the shell that runs this script would not hand it on. One worker's
# end is not to end the others. Since 22.05, srun does not take over --cpus-per-task by itself.
SRUN = 'srun --kill-on-bad-exit=0 --wait=0 ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"}'

REQUEUE = """\
code=$?
# 75: stopped before the end. Not again after a failure, after scancel, or without end.
if [ $code -eq 75 ] && [ -z "${cancelled-}" ] && [ "${SLURM_RESTART_COUNT:-0}" -lt 50 ]; then
    scontrol requeue "${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}"
fi
exit $code
"""


def _settings(job: Job) -> Iterator[str]:
    name = re.sub(r"[^\w.-]+", "_", job.name, flags=re.ASCII)
    yield f"--job-name={name}"
    if job.tasks is not None:
        yield f"--array=0-{job.tasks - 1}"
    yield f"--time={job.time}"
    yield f"--signal=USR1@{min(LEAD, seconds(job.time) // 4)}"
    yield f"--output={name}-{'%j' if job.tasks is None else '%A_%a'}.log"
    yield "--open-mode=append"
    yield "--requeue" if job.requeue else "--no-requeue"
    if job.gpus is not None:
        yield f"--gpus={job.gpus}"


def seconds(limit: str) -> int:
    """A time limit of SLURM, in seconds: `30` (minutes), `30:00`, `1:00:00`, `2-0` (days and hours), `2-00:30`, `2-00:30:00`.

    Raises:
        UsageError: it is none of these, or zero, which SLURM takes for no limit.
    """
    found = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", limit, re.ASCII)
    if found is None or not any(map(int, filter(None, found.groups()))):
        raise UsageError(f"--time `{limit}` is no time limit; write minutes, or H:MM:SS, or D-HH:MM:SS")
    days, *given = found.groups()
    numbers = [int(number) for number in given if number is not None]
    units = (3600, 60, 1) if days is not None or len(numbers) == 3 else (60, 1)
    return int(days or 0) * 86400 + sum(number * unit for number, unit in zip(numbers, units, strict=False))


def _options(words: Sequence[str]) -> list[list[str]]:
    """Cut the extra words into options, each with what follows it."""
    options: list[list[str]] = []
    for word in words:
        if "\n" in word or not (options or word.startswith("-")):
            raise UsageError(f"`{word}` is no option of sbatch; after `--` come words such as --partition=long")
        if word.startswith("-"):
            options.append([])
        options[-1].append(word)
    return options
