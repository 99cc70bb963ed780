"""What the commands show: tables, facts and lines made of forecasts, manifests, audits and comparisons."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from actdump.console import Output, counted, size
from actdump.errors import few
from actdump.format import Manifest
from actdump.plan import Column
from actdump.statistics import Statistics

if TYPE_CHECKING:
    from actdump.diff import Comparison, Difference
    from actdump.job import Explanation, Forecast, Outcome
    from actdump.store import Status

MUCH = 0.1  # of what is computed is padding: worth a word


def show(content: Table) -> None:
    """A table on stdout at its full width, without the spaces that fill it up: a wrapped line can be read, a cut one cannot."""
    console = Output(width=1000)
    for line in console.render_lines(content, pad=False):
        text = Text.assemble(*((segment.text, segment.style or "") for segment in line))
        text.rstrip()
        console.print(text)


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


def forecast_facts(forecast: "Forecast") -> list[tuple[str, str]]:
    """What `check` says of the run as a whole."""
    plan = forecast.plan
    share = 1 - plan.tokens / max(forecast.padded, 1)
    padding = f"{share:.1%} of what is computed is padding"
    if share > MUCH and len(plan.parts) > 1:
        padding += ", less in larger shards (`shard`), which hold more prompts to sort"
    state, reasons = _folder_state(forecast)
    told = f" ({'; '.join(reasons)})" if reasons and forecast.refusal is None else ""
    return [
        ("prompts", f"{plan.prompts:,}, {plan.tokens:,} tokens"),
        ("shards", f"{len(plan.shards):,} in {counted(len(plan.parts), 'part')}"),
        ("batches", f"{forecast.batches:,} of at most {plan.budget.tokens:,} padded tokens; {padding}"),
        ("size", f"{forecast.bytes:,} bytes; {forecast.free:,} are free at {forecast.place}"),
        *([("folder", f"{state}: {_FOLLOWS[state]}{told}")] if state else []),
        ("probed", "with weights" if forecast.weighed else "without weights, by shapes; a run also checks values"),
    ]  # fmt: skip


def _folder_state(forecast: "Forecast") -> tuple[str | None, Sequence[str]]:
    """What a run would make of its folder, in a word, and why; `None` where no folder was named."""
    if forecast.refusal is not None:
        return "refused", [str(forecast.refusal)]
    return (forecast.found.state, forecast.found.reasons) if forecast.found is not None else (None, ())


def forecast_json(forecast: "Forecast") -> dict[str, Any]:
    """The same for programs."""
    plan = forecast.plan
    state, reasons = _folder_state(forecast)
    taps = []
    for column in plan.columns:
        rows, count = _rows_and_bytes(forecast, column)
        taps.append({
            "name": column.name, "address": column.address, "resolved": column.resolved, "module": column.module,
            "axes": list(column.axes), "value": column.layout.words, "dtype": column.layout.dtype, "rows": rows, "bytes": count,
        })  # fmt: skip
    return {
        "taps": taps, "prompts": plan.prompts, "tokens": plan.tokens, "padded_tokens": forecast.padded, "batches": forecast.batches,
        "parts": len(plan.parts), "shards": len(plan.shards), "bytes": forecast.bytes, "free_bytes": forecast.free,
        "weights_loaded": forecast.weighed, "folder": {"state": state, "reasons": list(reasons)} if state else None,
    }  # fmt: skip


def manifest_facts(manifest: Manifest) -> list[tuple[str, str]]:
    """What `show` says of a dump as a whole."""
    model, made = manifest.facts["model"], manifest.made
    git = made.get("git")
    versions = ", ".join(f"{name} {number}" for name, number in made["versions"].items())
    return [
        (
            "model",
            f"{model['name']}{'@' + model['commit'][:12] if model['commit'] else ''} ({model['class']}, {model['dtype']})",
        ),
        *([("random", f"the checkpoint lacks {few(drawn)}")] if (drawn := model.get("drawn")) else []),
        ("prompts", f"{manifest.prompts:,}, {manifest.tokens:,} tokens"),
        ("shards", f"{len(manifest.shards):,}, {size(manifest.bytes)}"),
        ("digest", manifest.digest),
        ("made", f"{made['finished']} on {made['host']} ({made['device']}) in {made['seconds']:.1f} s"),
        ("audit", audit_words(manifest.audit)),
        ("with", versions),
        *([("git", git["commit"] + (" with changes" if git["changed"] else ""))] if git else []),
    ]


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
        norm = "" if each.norm is None else f"{each.norm:.4g}" if each.rows > each.rows_nonfinite else "-"
        early = "  ".join(_early_norms(each))
        figures = [f"{each.mean:.4g}", f"{each.std:.4g}", norm, f"{each.largest:.4g}", *[f"{each.nonfinite:,}"] * odd]
        table.add_row(*map(Text, (name, *figures, *[early] * positions)))
    return table


def _early_norms(statistics: Statistics) -> list[str]:
    """The mean norm at each of the first positions, up to the last that has a row; `-` where none has."""
    found = zip(statistics.rows_by_position, statistics.norm_by_position, strict=True)
    norms = [f"{norm:.4g}" if rows else "-" for rows, norm in found]
    while norms and norms[-1] == "-":
        norms.pop()
    return norms


def outcome_json(outcome: "Outcome") -> dict[str, Any]:
    """How a run ended, for programs."""
    manifest = outcome.manifest
    return {
        "state": outcome.state,
        "manifest": str(outcome.path),
        "digest": manifest.digest,
        "prompts": manifest.prompts,
        "tokens": manifest.tokens,
        "bytes": manifest.bytes,
        "seconds": round(outcome.seconds, 3),
        "audit": audit_totals(manifest.audit),
    }


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


_FOLLOWS = {
    "new": "a run would begin a dump",
    "unfinished": "a run would go on with it",
    "up to date": "a run would leave it alone",
    "stale": "a run would refuse it, and with --overwrite replace it",
    "refused": "a run would end with the error that follows",
}


def explanation(root: Path, found: "Explanation") -> list[str]:
    """What a run would find in its folder, and what follows."""
    return [
        f"{root}: {found.state}: {_FOLLOWS[found.state]}" + ":" * bool(found.reasons),
        *(f"  {why}" for why in found.reasons),
    ]


def status_facts(status: "Status") -> list[tuple[str, str]]:
    """How far a dump is."""
    hands = ", ".join(f"{hand.part} (process {hand.process} on {hand.host})" for hand in status.working)
    return [
        ("state", _state(status)),
        ("prompts", f"{status.prompts_done:,} of {status.prompts:,} done"),
        ("parts", f"{status.parts:,}"),
        ("done", _numbers(status.done)),
        *([("in hand", f"{len(status.working):,}: {hands}")] if status.working else []),
        *([("missing", _numbers(status.missing))] if status.missing else []),
    ]


def _state(status: "Status") -> str:
    if status.complete:
        return "complete"
    if status.sealed:
        return "damaged: sealed, but records of its parts are not whole; `run --repair` makes those parts again"
    waits = not (status.working or status.missing)
    return "unfinished" + ": all parts are done, the same run seals it" * waits


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
