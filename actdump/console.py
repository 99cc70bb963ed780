"""What a person sees: progress, tables, sizes. Results go to stdout, everything else to stderr."""

import json
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console
from rich.logging import RichHandler
from rich.table import Table
from rich.text import Text

from actdump.format import Manifest
from actdump.plan import Column, Part, Plan

if TYPE_CHECKING:
    from actdump.diff import Comparison, Difference
    from actdump.job import Explanation, Forecast
    from actdump.store import Status

out = Console(highlight=False, soft_wrap=True, markup=False)
err = Console(stderr=True, highlight=False, soft_wrap=True, markup=False)
EVERY = 10.0  # seconds between lines of progress where there is no terminal
_form: Literal["plain", "dated", "json"] = "plain"  # of the lines on stderr


def table(content: Table) -> None:
    """A table on stdout at its full width: a wrapped line can be read, a cut one cannot."""
    Console(highlight=False, markup=False, width=1000).print(content)


def choose_form(as_json: bool) -> None:
    """Write lines for a log from here on: JSON where asked for; with the time in a SLURM job, whose log nobody watches."""
    global _form
    _form = "json" if as_json else "dated" if "SLURM_JOB_ID" in os.environ and not err.is_terminal else "plain"


def say(message: str, level: str = "info", **numbers: float) -> None:
    """A line on stderr. The numbers that it tells have names of their own in JSON."""
    now = datetime.now().astimezone().isoformat(timespec="seconds")
    if _form == "json":
        err.print(Text(json.dumps({"time": now, "level": level, "message": message, **numbers}, ensure_ascii=False)))
    else:
        begins = (f"{now} " if _form == "dated" else "", (f"{level}: " if level != "info" else "", "bold red"))
        err.print(Text.assemble(*begins, message))


class _Warnings(logging.Handler):
    """Says what is logged."""

    def emit(self, record: logging.LogRecord) -> None:
        say(record.getMessage(), record.levelname.lower())


def start_logging(quiet: bool) -> None:
    """Show warnings of actdump (and nothing else's) on stderr."""
    logger = logging.getLogger("actdump")
    logger.handlers = [RichHandler(console=err, show_time=False, show_path=False) if _form == "plain" else _Warnings()]
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

        self.lines = _form != "plain" or not err.is_terminal
        self.progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("prompts  {task.fields[rate]}"),
            TimeRemainingColumn(),
            console=err,
            transient=True,
            disable=self.lines,
        )
        self.task = self.progress.add_task("starting", total=None, rate="")
        self.tokens = self.prompts = self.total = self.all_tokens = self.bytes = 0
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

    def planned(self, plan: Plan, done: Sequence[Part]) -> None:
        finished, tokens = sum(part.prompts for part in done), sum(part.tokens for part in done)
        self.total, self.all_tokens, self.bytes = plan.prompts - finished, plan.tokens - tokens, plan.bytes
        self.began = self.said = monotonic()
        self.progress.update(self.task, description="capturing", total=plan.prompts, completed=finished)
        going_on = f", {len(done)} of {len(plan.parts)} parts done before" if done else ""
        counts = ((plan.prompts, "prompt"), (plan.tokens, "token"), (len(plan.columns), "tap"))
        what = ", ".join(counted(*each) for each in counts)
        say(
            f"{what}, {size(plan.bytes)} in {counted(len(plan.parts), 'shard')}{going_on}",
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
                f"{self.prompts:,} of {self.total:,} prompts  {rate}  {left:,.0f} s left",
                prompts=self.prompts, tokens=self.tokens, bytes=round(written), seconds_left=round(left),
            )  # fmt: skip

    def elsewhere(self, part: Part) -> None:
        self.total -= part.prompts
        self.all_tokens -= part.tokens
        self.progress.update(self.task, advance=part.prompts)


def _plain_table(*headings: str, right: Sequence[str] = ()) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for heading in headings:
        table.add_column(heading, justify="right" if heading in right else "left", no_wrap=True)
    return table


def _address(column: Column) -> str:
    return "" if column.name == column.address else column.address


_RIGHT = (
    "rows", "bytes", "compared", "differ", "not finite", "largest", "mean", "rel. median", "rel. 99 %", "rel. worst", "least cosine",
    "mean cosine", "beyond",
)  # fmt: skip


def _taps_table(rows: Iterable[Mapping[str, str]]) -> Table:
    """A table of taps; a column in which nothing stands is left out."""
    listed = list(rows)
    headings = [heading for heading in listed[0] if any(row[heading] for row in listed)]
    table = _plain_table(*headings, right=_RIGHT)
    for row in listed:
        table.add_row(*(Text(row[heading]) for heading in headings))
    return table


def forecast_table(forecast: "Forecast") -> Table:
    """What `check` shows of every tap."""

    def row(column: Column) -> dict[str, str]:
        rows, count = _rows_and_bytes(forecast, column)
        return {
            "tap": column.name,
            "address": _address(column),
            "module": column.module,
            "axes": "(" + ", ".join(column.axes) + ")",
            "a prompt": column.layout.words,
            "dtype": column.layout.dtype,
            "rows": f"{rows:,}",
            "bytes": f"{count:,}",
        }

    return _taps_table(map(row, forecast.plan.columns))


def _rows_and_bytes(forecast: "Forecast", column: Column) -> tuple[int, int]:
    rows = sum(count * column.layout.rows(length) for length, count in forecast.lengths.items())
    return rows, rows * column.layout.row_bytes


def forecast_json(forecast: "Forecast", free: int) -> dict[str, Any]:
    """The same for programs."""
    plan = forecast.plan
    taps = []
    for column in plan.columns:
        rows, count = _rows_and_bytes(forecast, column)
        taps.append({
            "name": column.name, "address": column.address, "resolved": column.resolved, "module": column.module,
            "axes": list(column.axes), "value": column.layout.words, "dtype": column.layout.dtype, "rows": rows, "bytes": count,
        })  # fmt: skip
    return {
        "taps": taps, "prompts": plan.prompts, "tokens": plan.tokens, "padded_tokens": forecast.padded, "batches": forecast.batches,
        "parts": len(plan.parts), "bytes": forecast.bytes, "free_bytes": free, "weights_loaded": forecast.weighed,
    }  # fmt: skip


def manifest_table(manifest: Manifest) -> Table:
    """What `show` says of every tap."""

    def row(column: Column) -> dict[str, str]:
        rows = sum(shard.rows[column.name] for shard in manifest.shards)
        return {
            "tap": column.name,
            "address": _address(column),
            "module": column.module,
            "tokens": column.tokens,
            "a prompt": column.layout.words,
            "dtype": column.layout.dtype,
            "rows": f"{rows:,}",
            "bytes": size(rows * column.layout.row_bytes),
        }

    return _taps_table(map(row, manifest.columns))


def statistics_table(manifest: Manifest) -> Table:
    """What `show` says of the values of every floating point tap; norms by position are those of the prompts' first tokens."""
    listed = manifest.statistics.items()
    odd = any(each.nonfinite for _, each in listed)
    positions = any(each.rows_by_position for _, each in listed)
    headings = ["mean", "std", "mean norm", "largest", *["not finite"] * odd]
    table = _plain_table("tap", *headings, *["mean norm of tokens 0, 1, 2 …"] * positions, right=headings)
    for name, each in listed:
        norm = "" if each.norm is None else f"{each.norm:.4g}"
        early = "  ".join(
            f"{norm:.4g}" for rows, norm in zip(each.rows_by_position, each.norm_by_position, strict=True) if rows
        )
        figures = [f"{each.mean:.4g}", f"{each.std:.4g}", norm, f"{each.largest:.4g}", *[f"{each.nonfinite:,}"] * odd]
        table.add_row(*map(Text, (name, *figures, *[early] * positions)))
    return table


def audit_totals(audit: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """An audit over all its taps: prompts, classes of tokens, the worst error, seconds."""
    if audit is None:
        return None
    counts = {name: sum(tap[name] for tap in audit["taps"]) for name in ("exact", "drift", "unstable")}
    worst = max(tap["worst"] for tap in audit["taps"])
    return {"prompts": audit["prompts"], "padded": audit["padded"], **counts, "worst": worst, "seconds": audit["seconds"]}


def audit_words(audit: Mapping[str, Any] | None) -> str:
    """What an audit found, in a few words."""
    totals = audit_totals(audit)
    if totals is None:
        return "not audited"
    padded = f" ({len(totals['padded'])} padded)" if totals["padded"] else ""
    unstable = f", {totals['unstable']:,} of them where the model itself is unstable" if totals["unstable"] else ""
    return (
        f"audit of {counted(len(totals['prompts']), 'prompt')}{padded}, {totals['seconds']:.1f} s: {totals['exact']:,} vectors "
        f"exact, {totals['drift']:,} with drift{unstable}; worst relative error {totals['worst']:.2g}"
    )


def audit_table(audit: Mapping[str, Any]) -> Table:
    """What an audit found at every tap."""
    headings = ("exact", "drift", "unstable", "median", "worst", "limit")
    witnessed = any(tap["witnessed"] for tap in audit["taps"])
    table = _plain_table("tap", *headings, *["hidden_states"] * witnessed, right=headings)
    for tap in audit["taps"]:
        counts = [f"{tap[name]:,}" for name in headings[:3]]
        errors = [f"{tap[name]:.2g}" for name in headings[3:]]
        table.add_row(Text(tap["name"]), *counts, *errors, *["agrees" if tap["witnessed"] else ""] * witnessed)
    return table


def difference_table(comparison: "Comparison") -> Table:
    """How far apart two dumps are at every tap; a column in which nothing stands is left out."""

    def row(tap: "Difference") -> dict[str, str]:
        figures = {"largest": tap.largest, "mean": tap.mean}
        errors = {"rel. median": tap.median, "rel. 99 %": tap.high, "rel. worst": tap.worst}
        cosines = {"least cosine": tap.cosine, "mean cosine": tap.mean_cosine}
        return {
            "tap": tap.name,
            "address": " / ".join(tap.addresses) if len(set(tap.addresses)) == 2 else "",
            "dtype": " / ".join(dict.fromkeys(tap.dtypes)),
            "compared": f"{tap.tokens:,}",
            "differ": f"{tap.differing / max(tap.values, 1):.2%}",
            "not finite": f"{tap.nonfinite:,}" if tap.nonfinite else "",
            **{name: "" if figure is None else f"{figure:.2g}" for name, figure in (figures | errors).items()},
            **{name: "" if figure is None else f"{figure:.6f}" for name, figure in cosines.items()},
            "beyond": f"{tap.beyond:,}" if tap.beyond else "",
        }

    return _taps_table(map(row, comparison.taps))


def explanation(root: Path, found: "Explanation") -> list[str]:
    """What a run would find in its folder, and what follows."""
    if found.state == "stale":
        return [
            f"{root}: stale: a run would refuse it, and with --overwrite replace it:",
            *(f"  {why}" for why in found.reasons),
        ]
    follows = {
        "new": "a run would begin a dump",
        "unfinished": "a run would go on with it",
        "up to date": "a run would leave it alone",
    }
    return [f"{root}: {found.state}: {follows[found.state]}"]


def status_facts(status: "Status") -> list[tuple[str, str]]:
    """How far a dump is."""
    unsealed = not (status.complete or status.working or status.missing)
    hands = ", ".join(f"{hand.part} (process {hand.process} on {hand.host})" for hand in status.working)
    return [
        ("state", "complete" if status.complete else "unfinished" + ": all parts are done, the same run seals it" * unsealed),
        ("prompts", f"{status.prompts_done:,} of {status.prompts:,} done"),
        ("parts", f"{status.parts:,}"),
        ("done", _numbers(status.done)),
        *([("in hand", f"{len(status.working):,}: {hands}")] if status.working else []),
        *([("missing", _numbers(status.missing))] if status.missing else []),
    ]


def _numbers(numbers: Sequence[int]) -> str:
    """How many numbers there are, and which, runs of them together: `4: 0-2, 7`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    which = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
    return f"{len(numbers):,}" + f": {which}" * bool(runs)


def facts_table(rows: Iterable[tuple[str, str]]) -> Table:
    """Pairs of a word and what it is."""
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    for word, value in rows:
        table.add_row(Text(word, style="bold"), Text(value))
    return table


def tree_table(rows: Iterable[tuple[int, str, str, str]]) -> Table:
    """The modules of a model: depth, name, class, output."""
    table = _plain_table("module", "class", "output")
    for depth, name, kind, output in rows:
        table.add_row(Text("  " * depth + name), Text(kind), Text(output))
    return table
