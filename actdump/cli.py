"""The command line: a thin skin over the library, and the only place that knows exit codes.

Nothing here imports torch before a command needs it, so that `--help`, a spec with mistakes and an up-to-date dump answer at once.
"""

import gc
import io
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from actdump import __version__
from actdump.errors import ActdumpError, DataError, MissingError, Stopped, StorageError, UsageError
from actdump.signals import StopSignals, ignore, let_go, seconds

if TYPE_CHECKING:
    from actdump.job import Outcome
    from actdump.spec import Spec
    from actdump.worker import Worker

app = typer.Typer(
    name="actdump",
    help="Dump the internal activations of neural networks: correct, fast, resumable, described.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain text, as in a log; to import what draws boxes takes as long as all the rest
)

SpecFile = Annotated[Path, typer.Argument(metavar="SPEC", help="The YAML spec.", show_default=False, readable=False)]
Out = Annotated[Path, typer.Argument(metavar="OUT", help="The folder of a dump.", show_default=False, readable=False)]
Sets = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key: model.dtype=float32.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Take the first N prompts only.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]
LogJson = Annotated[bool, typer.Option("--log-json", help="Write progress, warnings and errors as JSON lines.")]
OutputFolder = Annotated[
    str | None, typer.Option("-o", "--output", help="The folder to write, instead of the spec's.", show_default=False)
]


def _tell_version(asked: bool) -> None:
    if asked:
        typer.echo(f"actdump {__version__}")
        raise typer.Exit


@app.callback()
def top(
    _version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_tell_version, help="Print the version.")
    ] = False,
) -> None: ...


@contextmanager
def _quitting(stopped: int = Stopped.code, log_json: bool = False, signals: StopSignals | None = None) -> Iterator[None]:
    """Turn errors into messages and exit codes.

    Args:
        stopped: the exit code of a run that was stopped.
        log_json: write messages as JSON.
        signals: what becomes of signals; without it, what they usually do.
    """
    from actdump import console

    console.choose_form(log_json)
    try:
        if signals is None:
            let_go()
        with signals or nullcontext():
            yield
    except ActdumpError as error:
        _quit(str(error), stopped if isinstance(error, Stopped) else error.code)
    except KeyboardInterrupt:
        _quit("interrupted" if signals is None else "interrupted; the same command goes on", 130)
    except OSError as error:
        _quit(_refused(error), StorageError.code)


def _refused(error: OSError) -> str:
    """What the file system refused, where no path was ours to word: a name that is too long, a full disk behind stdout."""
    return f"{error.filename or 'the output'}: {error.strerror or error}"


def _quit(message: str, code: int) -> NoReturn:
    from actdump import console

    for line in message.splitlines():
        console.error(line)
    raise typer.Exit(code)


@contextmanager
def _located(spec: "Spec") -> Iterator[None]:
    """Give errors about a spec's taps, prompts and keys the file and line where they stand."""
    try:
        yield
    except (UsageError, MissingError, DataError) as error:
        raise type(error)(spec.located(str(error))) from error


def _load(path: Path, sets: list[str] | None, limit: int | None) -> "Spec":
    from actdump import spec

    return spec.load(path, [*(sets or []), *([f"prompts.limit={limit}"] if limit is not None else [])])


def _root(spec: "Spec", output: str | None) -> Path:
    from actdump.spec import path_of

    given = spec.output if output is None else output
    if not given:  # empty: a variable of a shell that was never set, and no wish to write here
        raise UsageError(
            f"`output` is {'missing' if given is None else 'empty'}: name the folder to write in the spec, or with -o"
        )
    root = path_of(given) if output is None else Path(given)  # a shell has expanded that one
    try:
        str(root).encode()
    except UnicodeEncodeError:
        raise UsageError(f"output: {str(root)!r} is not UTF-8, and safetensors opens no other files") from None
    return root


@app.command()
def run(
    spec: SpecFile,
    output: OutputFolder = None,
    sets: Sets = None,
    limit: Limit = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Plan, show what would be done, write nothing.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace another dump in the folder.")] = False,
    repair: Annotated[bool, typer.Option("--repair", help="Check every byte that is there; make again what changed.")] = False,
    worker: Annotated[
        str | None,
        typer.Option(
            metavar="I/N|off", help="Which of several workers this is; by default as SLURM or torchrun say.", show_default=False
        ),
    ] = None,
    stop_after: Annotated[
        str | None, typer.Option(metavar="TIME", help="Stop by itself after 55m, 90s, 1h30m.", show_default=False)
    ] = None,
    stopped: Annotated[
        int, typer.Option("--exit-code-stopped", min=1, max=255, help="The exit code of a run that was stopped.")
    ] = Stopped.code,
    depfile: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write the files that the dump depends on, for make.", show_default=False),
    ] = None,
    as_json: Json = False,
    log_json: LogJson = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Say nothing but errors and the result.")] = False,
) -> None:
    """Run the model over the prompts and write the dump. Prints the path of its manifest."""
    signals = StopSignals()
    with _quitting(stopped, log_json, None if dry_run else signals):
        from actdump import console, dependencies, views
        from actdump.format import Folder
        from actdump.worker import which

        this = which(worker, os.environ)
        if stop_after is not None:
            signals.ask_after(seconds(stop_after))
        if depfile is not None and depfile.is_dir():
            raise UsageError(f"--depfile: `{depfile}` is a folder; name a file")
        time = dependencies.time_of(spec)
        loaded = _load(spec, sets, limit)
        root = _root(loaded, output)
        with _located(loaded):
            if dry_run:
                _show_forecast(loaded, root, as_json, quiet)
            else:
                files = dependencies.of(loaded, spec, time)
                if depfile is not None:
                    files.check_place_of(depfile, Folder(root))
                rules = files.rules(Folder(root).manifest) if depfile is not None else b""
                outcome = _run(loaded, root, overwrite, repair, this, signals, quiet)
                files.date(outcome.path)
                console.answer(json.dumps(views.outcome_json(outcome)) if as_json else outcome.path)
                if depfile is not None:
                    dependencies.write(depfile, rules)


def _run(
    spec: "Spec",
    root: Path,
    overwrite: bool,
    repair: bool,
    worker: "Worker",
    signals: StopSignals,
    quiet: bool,
) -> "Outcome":
    from actdump import console, job, views

    console.start_logging(quiet)
    with nullcontext() if quiet else console.Bar() as bar:
        outcome = job.run(
            spec, root, overwrite=overwrite, repair=repair, worker=worker, watcher=bar, stopping=lambda: signals.asked
        )
    manifest = outcome.manifest
    if not quiet:
        counts = f"{console.counted(manifest.prompts, 'prompt')}, {console.counted(manifest.tokens, 'token')}"
        state = "nothing to repair" if repair and outcome.state == "up to date" else outcome.state
        console.say(f"{root}: {state}: {counts}, {console.size(manifest.bytes)}, {outcome.seconds:.1f} s")
        if outcome.state == "done" and manifest.audit is not None:
            console.say(f"{root}: {views.audit_words(manifest.audit)}")
    return outcome


@app.command()
def check(spec: SpecFile, output: OutputFolder = None, sets: Sets = None, limit: Limit = None, as_json: Json = False) -> None:
    """Show what a run would keep. Every tap's module, axes and exact bytes; parts, batches, padding; disk space."""
    with _quitting():
        loaded = _load(spec, sets, limit)
        root = None if output is None and loaded.output is None else _root(loaded, output)
        with _located(loaded):
            _show_forecast(loaded, root, as_json, quiet=False)


def _show_forecast(spec: "Spec", root: Path | None, as_json: bool, quiet: bool) -> None:
    """Raises:
    ActdumpError: a run would end with it.
    """
    from actdump import console, job, views

    console.start_logging(quiet)
    with nullcontext() if quiet else console.Bar() as bar:
        forecast = job.forecast(spec, bar, root)
    if as_json:
        console.answer(json.dumps(views.forecast_json(forecast)))
    else:
        views.show(views.forecast_table(forecast))
        console.out.print()
        views.show(views.facts_table(views.forecast_facts(forecast)))
    if forecast.refusal is not None:
        raise forecast.refusal


@app.command()
def explain(spec: SpecFile, output: OutputFolder = None, sets: Sets = None, limit: Limit = None, as_json: Json = False) -> None:
    """Say what a run would find in its folder. Nothing yet, its own dump, or another one and what differs."""
    with _quitting():
        from actdump import console, job, views

        loaded = _load(spec, sets, limit)
        root = _root(loaded, output)
        with _located(loaded):
            found = job.explain(loaded, root)
        if as_json:
            console.answer(json.dumps({"state": found.state, "reasons": found.reasons}))
            return
        for line in views.explanation(root, found):
            console.out.print(line)


@app.command()
def status(out: Out, as_json: Json = False) -> None:
    """Say how far a dump is. Parts done, in hand and missing; exit code 0 when it is complete, 75 before, and 65 when it is damaged."""
    with _quitting():
        from actdump import console, store, views
        from actdump.format import Folder

        found = store.status(Folder(out))
        if as_json:
            console.answer(json.dumps(asdict(found)))
        else:
            views.show(views.facts_table(views.status_facts(found)))
        if not found.complete:
            raise typer.Exit(DataError.code if found.sealed else Stopped.code)


@app.command()
def tree(
    model: Annotated[str, typer.Argument(help="A spec, a hub id or a local folder.", show_default=False)],
    sets: Sets = None,
    grep: Annotated[str | None, typer.Option(help="Only modules whose path or class holds this.")] = None,
    depth: Annotated[int | None, typer.Option(min=0, help="Only so many levels.")] = None,
) -> None:
    """Show the modules of a model, with their classes and axes."""
    with _quitting():
        from actdump import console, job, views
        from actdump.spec import model_spec

        console.start_logging(quiet=False)
        path = Path(model)
        is_spec = path.is_file() or path.suffix in (".yaml", ".yml")
        if path.is_file() and (path.name == "config.json" or path.suffix in (".safetensors", ".bin")):
            raise UsageError(f"`{model}` is a file of a model; name the folder that holds it: `{path.parent}`")
        if sets and not is_spec:
            raise UsageError(f"--set changes a spec, and `{model}` is none; write a spec, or leave it out")
        wanted = _load(path, sets, None).model if is_spec else model_spec(model, {})
        found = list(job.modules(wanted, grep=grep, depth=depth))
        if not found:
            near = f" down to a depth of {depth} (--depth)" if depth is not None else ""
            raise UsageError(f"no module of `{model}` has `{grep}` in its path or class{near}")
        views.show(views.tree_table(found))


@app.command()
def show(out: Out, as_json: Json = False) -> None:
    """Show what a dump holds."""
    with _quitting():
        from actdump import console, reader, views

        dump = reader.open_dump(out)
        if as_json:
            console.answer(dump.folder.manifest.read_text(encoding="utf-8"), nl=False)
            return
        views.show(views.facts_table(views.manifest_facts(dump.manifest)))
        console.out.print()
        views.show(views.manifest_table(dump.manifest))
        if dump.manifest.statistics:
            console.out.print()
            views.show(views.statistics_table(dump.manifest))


@app.command()
def verify(out: Out) -> None:
    """Compare every byte of a dump with its manifest."""
    with _quitting():
        from actdump import console, reader, verify

        dump = reader.open_dump(out)
        if faults := verify.faults(dump):
            raise DataError("\n".join(faults))
        console.answer(f"{out}: whole: {console.counted(len(dump.manifest.shards), 'shard')}, {dump.manifest.bytes:,} bytes")


@app.command()
def audit(
    out: Out,
    count: Annotated[int, typer.Option("-n", "--prompts", min=1, help="How many prompts to run.")] = 20,
    model: Annotated[str | None, typer.Option(help="Where the model is now, if not where it was.", show_default=False)] = None,
    as_json: Json = False,
) -> None:
    """Compare a dump with prompts run alone, without actdump's engine."""
    with _quitting():
        from actdump import audit, console, views

        console.start_logging(quiet=False)
        with console.Bar() as bar:
            found = audit.to_json(audit.finished(out, count, place=model, step=bar.step))
        if as_json:
            console.answer(json.dumps(found))
            return
        views.show(views.audit_table(found))
        console.out.print(f"{out}: {views.audit_words(found)}")


@app.command()
def diff(
    first: Out,
    second: Out,
    atol: Annotated[float, typer.Option(help="How far apart two values may be.")] = 0.0,
    rtol: Annotated[float, typer.Option(help="How large the relative error of a token may be.")] = 0.0,
    as_json: Json = False,
) -> None:
    """Compare two dumps. Prompts by id, taps by name, tokens one by one; exit code 65 if they differ by more than the limits."""
    with _quitting():
        from actdump import console, diff, reader, views

        found = diff.compare(reader.open_dump(first), reader.open_dump(second), diff.Limits(atol, rtol))
        if as_json:
            console.answer(json.dumps(diff.to_json(found)))
        elif found.taps:
            views.show(views.difference_table(found))
        if found.faults:
            raise DataError("\n".join(found.faults))
        if not as_json:
            counts = f"{console.counted(found.prompts, 'prompt')}, {console.counted(len(found.taps), 'tap')}"
            console.answer(f"{first} and {second}: the same within atol {atol:g} or rtol {rtol:g}: {counts}")


@app.command()
def sbatch(
    spec: SpecFile,
    time: Annotated[str, typer.Option("--time", metavar="LIMIT", help="The time limit: 1:00:00.", show_default=False)],
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="[-- OPTION...]", help="Further options of sbatch: -- --partition=long.", show_default=False),
    ] = None,
    array: Annotated[int | None, typer.Option(min=1, help="Share the work among so many tasks.", show_default=False)] = None,
    gpus: Annotated[int | None, typer.Option(min=1, help="How many each task gets.", show_default=False)] = None,
    requeue: Annotated[bool, typer.Option("--requeue", help="Queue again what the time limit stopped.")] = False,
    output: OutputFolder = None,
    sets: Sets = None,
    limit: Limit = None,
    log_json: LogJson = False,
) -> None:
    """Print a SLURM job script that runs a spec. Use: actdump sbatch SPEC --time 1:00:00 | sbatch."""
    with _quitting():
        from actdump import console, slurm

        loaded = _load(spec, sets, limit)
        _root(loaded, output)
        if loaded.prompts.file == "-":
            raise UsageError(f"{spec}: prompts on standard input do not reach a job; put them into a file")
        options = {"--output": output, "--limit": limit}
        program = Path(sys.argv[0]).absolute()
        command = [
            *([sys.executable, "-m", "actdump"] if program.name == "__main__.py" else [str(program)]), "run", str(spec),
            *(word for name, value in options.items() if value is not None for word in (name, str(value))),
            *(word for each in sets or () for word in ("--set", each)),
            *["--log-json"] * log_json,
        ]  # fmt: skip
        job = slurm.Job(command, str(Path.cwd()), spec.stem, time, array, gpus, requeue, tuple(words or ()))
        console.answer(slurm.script(job), nl=False)


@app.command()
def schema() -> None:
    """Print the JSON schema of the spec, for editors."""
    with _quitting():
        from actdump import console
        from actdump.spec import Spec

        console.answer(json.dumps(Spec.model_json_schema(), indent=1))


def main() -> None:
    """The entry point."""
    _write_all()
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "critical")  # its advice is not for who runs actdump, and no JSON line
    try:
        app()
    except SystemExit as end:
        _end(end.code)
    except OSError as error:  # where typer prints by itself, as for `--help`
        from actdump import console

        console.error(_refused(error))
        _end(StorageError.code)


def _write_all() -> None:
    """Let stdout take any character, and lose nothing: where Python does not buffer it (`PYTHONUNBUFFERED`), what a full disk takes no
    more is dropped without a word."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
        if isinstance(raw := sys.stdout.buffer, io.RawIOBase):
            sys.stdout = io.TextIOWrapper(io.BufferedWriter(raw), sys.stdout.encoding, sys.stdout.errors, line_buffering=True)


def _end(code: str | int | None) -> NoReturn:
    """End without waiting for what a stop abandoned, such as a model that is being loaded, nor for a last collection of garbage,
    which takes one to two seconds with a model in the process."""
    ignore()
    gc.freeze()
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:  # which was told; Python would try once more, and end with a code of its own
        from actdump import console

        console.out.on_broken_pipe()
    if "actdump.job" in sys.modules:
        from actdump import job

        if job.abandoned():
            sys.stderr.flush()
            os._exit(code if isinstance(code, int) else 1)
    sys.exit(code)
