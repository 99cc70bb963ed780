"""The console: lines, warnings and progress. Results go to stdout, everything else to stderr."""

import json
import logging
import os
from collections.abc import Sequence
from datetime import datetime
from time import monotonic
from typing import TYPE_CHECKING, Any, Literal

import typer
from rich.console import Console
from rich.text import Text

if TYPE_CHECKING:
    from actdump.plan import Part, Plan


class Output(Console):
    """A console for plain text. If its reader goes away, nothing more is shown, and the command goes on to an end of its own."""

    def __init__(self, **options: Any) -> None:
        super().__init__(highlight=False, markup=False, emoji=False, **options)

    def on_broken_pipe(self) -> None:
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())


class Log(Output):
    """The console for what a command tells while it goes on. Where that cannot be written, its disk is full, say, the rest matters more."""

    def print(self, *objects: Any, **options: Any) -> None:
        try:
            super().print(*objects, **options)
        except OSError:
            self.on_broken_pipe()


out = Output(soft_wrap=True)
err = Log(soft_wrap=True, stderr=True)
EVERY = 10.0  # seconds between lines of progress where there is no terminal
ROOMY = 76  # columns; a narrower terminal has no place for the rate beside the counts
_form: Literal["plain", "dated", "json"] = "plain"  # of the lines on stderr


def choose_form(as_json: bool) -> None:
    """Write lines for a log from here on: JSON where asked for; with the time in a SLURM job, whose log nobody watches."""
    global _form
    _form = "json" if as_json else "dated" if "SLURM_JOB_ID" in os.environ and not err.is_terminal else "plain"


def answer(text: object, *, nl: bool = True) -> None:
    """What a command was asked for, on stdout, just as it is."""
    try:
        typer.echo(text, nl=nl)
    except BrokenPipeError:
        out.on_broken_pipe()


def say(message: str, level: str = "info", **numbers: float) -> None:
    """A line on stderr. The numbers that it tells have names of their own in JSON."""
    now = datetime.now().astimezone().isoformat(timespec="seconds")
    if _form == "json":
        err.print(Text(json.dumps({"time": now, "level": level, "message": message, **numbers}, ensure_ascii=False)))
    else:
        colour = "bold red" if level == "error" else "bold yellow"
        begins = (f"{now} " if _form == "dated" else "", (f"{level}: " if level != "info" else "", colour))
        err.print(Text.assemble(*begins, message))


class _Warnings(logging.Handler):
    """Says what is logged."""

    def emit(self, record: logging.LogRecord) -> None:
        say(record.getMessage(), record.levelname.lower())


def start_logging(quiet: bool) -> None:
    """Show warnings of actdump (and nothing else's) on stderr."""
    logger = logging.getLogger("actdump")
    logger.handlers = [_Warnings()]
    logger.setLevel(logging.ERROR if quiet else logging.WARNING)
    logger.propagate = False


def size(count: float) -> str:
    """Bytes for people: `1.2 MB`."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:,.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def counted(number: int, noun: str) -> str:
    """`1 shard`, `2 shards`."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def error(message: str) -> None:
    """An error, in red on a terminal."""
    say(message, "error")


class Bar:
    """Progress: a bar on a terminal, a line now and then elsewhere and in JSON."""

    def __init__(self) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
        from rich.table import Column

        self.lines = _form != "plain" or not err.is_terminal
        self.progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=None, table_column=Column(ratio=1)),  # it gives way on a narrow terminal
            MofNCompleteColumn(),
            TextColumn("prompts  {task.fields[rate]}" if err.width >= ROOMY else "prompts"),
            TimeRemainingColumn(),
            console=err,
            expand=True,
            transient=True,
            disable=self.lines,
        )
        self.task = self.progress.add_task("starting", total=None, rate="")
        self.tokens = self.prompts = self.others = self.total = self.all_tokens = self.bytes = 0
        self.began = self.said = monotonic()

    def __enter__(self) -> "Bar":
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def step(self, doing: str) -> None:
        self.progress.update(self.task, description=doing)
        if self.lines:
            say(doing)

    def planned(self, plan: "Plan", done: "Sequence[Part]") -> None:
        finished, tokens, written = (sum(getattr(part, name) for part in done) for name in ("prompts", "tokens", "bytes"))
        self.prompts = self.tokens = 0
        self.total, self.others = plan.prompts, finished
        self.all_tokens, self.bytes = plan.tokens - tokens, plan.bytes - written
        self.began = self.said = monotonic()
        self.progress.update(self.task, description="capturing", total=plan.prompts, completed=finished)
        going_on = f", {len(done)} of {len(plan.parts)} parts done before" if done else ""
        counts = ((plan.prompts, "prompt"), (plan.tokens, "token"), (len(plan.columns), "tap"))
        what = ", ".join(counted(*each) for each in counts)
        say(
            f"{what}, {size(plan.bytes)} in {counted(len(plan.shards), 'shard')}{going_on}",
            prompts=plan.prompts, tokens=plan.tokens, bytes=plan.bytes, parts=len(plan.parts), parts_done=len(done),
        )  # fmt: skip

    def batch(self, prompts: int, tokens: int) -> None:
        self.prompts += prompts
        self.tokens += tokens
        now = monotonic()
        speed = self.tokens / max(now - self.began, 1e-9)
        written = self.bytes * self.tokens / max(self.all_tokens, 1)
        rate = f"{speed:,.0f} tokens/s  {size(written)}"
        self.progress.update(self.task, description="capturing", advance=prompts, rate=rate)
        if self.lines and now - self.said >= EVERY:
            self.said = now
            left = (self.all_tokens - self.tokens) / max(speed, 1e-9)
            say(
                f"{self.others + self.prompts:,} of {self.total:,} prompts  {rate}  {left:,.0f} s left",
                prompts=self.prompts, tokens=self.tokens, bytes=round(written), seconds_left=round(left),
            )  # fmt: skip

    def elsewhere(self, part: "Part") -> None:
        self.others += part.prompts
        self.all_tokens -= part.tokens
        self.bytes -= part.bytes
        self.progress.update(self.task, advance=part.prompts)
