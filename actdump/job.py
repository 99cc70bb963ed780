"""The job: from a spec to a sealed dump. The loop that ties plan, engine and store together.

torch and transformers are imported inside functions, because an up-to-date answer needs neither.
"""

import json
import logging
import os
import platform
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any, Literal, Protocol

from actdump import inputs, prompts, store
from actdump.errors import DataError, OccupiedError, SpecError, Stopped, UsageError
from actdump.format import Folder, Manifest, manifest_from_json, plan_to_json, shard_layout
from actdump.plan import Batch, Budget, Column, Cutter, Part, Plan, batches, make, padded
from actdump.spec import ModelSpec, Spec

if TYPE_CHECKING:
    from torch import nn

    from actdump.engine import Feed, Site
    from actdump.model import Source

log = logging.getLogger(__name__)

# Padded tokens in a batch where the spec says `auto`. On a CPU small batches are fastest (measured on 2 cores, 512 was the best
# of five); an accelerator wants large ones (not measured).
AUTO_TOKENS = {"cpu": 512}
AUTO_TOKENS_ACCELERATOR = 16_384


class Watcher(Protocol):
    """What a run tells while it goes on."""

    def step(self, doing: str) -> None:
        """Something slow begins: `loading the model`."""

    def planned(self, plan: Plan, done: Sequence[Part]) -> None:
        """The plan is made, or found; some of its parts may be done."""

    def batch(self, prompts: int, tokens: int) -> None:
        """A batch went through the model."""


class _Silent:
    """Tells nobody."""

    def step(self, doing: str) -> None: ...

    def planned(self, plan: Plan, done: Sequence[Part]) -> None: ...

    def batch(self, prompts: int, tokens: int) -> None: ...


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    state: Literal["done", "up to date"]
    manifest: Manifest
    path: Path
    seconds: float


def run(
    spec: Spec,
    root: Path,
    *,
    overwrite: bool = False,
    watcher: Watcher | None = None,
    stopping: Callable[[], bool] = lambda: False,
) -> Outcome:
    """Make a dump, go on with an unfinished one, or find that it is up to date.

    Args:
        overwrite: replace another dump in the folder.
        stopping: asked after every batch; `True` ends the run.

    Raises:
        OccupiedError: the folder holds something else.
        Stopped: asked to stop; finished parts stay, and the same run goes on.
        ActdumpError: see the subclasses.
    """
    began = monotonic()
    watcher = watcher or _Silent()
    folder = Folder(root)
    with _standard_input(spec) as stdin:
        sources = inputs.of(spec, stdin)
        found = _standing(spec, sources, folder, overwrite)
        if found is not None and store.complete(folder, found):
            return Outcome("up to date", _manifest(folder), folder.manifest, monotonic() - began)
        return _go_on(_Job(spec, folder, watcher, stopping, began), sources, found, stdin)


def _standing(spec: Spec, sources: inputs.Inputs, folder: Folder, overwrite: bool) -> Plan | None:
    """The plan in the folder, if it is that of this very spec; `None` where a new one is to be made."""
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
    differs = _difference(spec.decisive(), plan.facts["spec"])
    if differs is None and not sources.same(stamps, plan.facts["inputs"]):
        differs = "the model's files or the prompt file have changed"
    if differs is None:
        return plan
    if not overwrite:
        raise OccupiedError(
            f"{folder.root} holds another dump: {differs}; choose another output, or replace it with --overwrite"
        )
    return None


def _difference(now: object, before: object, key: str = "") -> str | None:
    """The first place where two specs differ, in words."""
    if now == before:
        return None
    if isinstance(now, dict) and isinstance(before, dict):
        names = [name for name in {**before, **now} if now.get(name) != before.get(name)]
        return _difference(now.get(names[0]), before.get(names[0]), f"{key}.{names[0]}".lstrip("."))
    if isinstance(now, list) and isinstance(before, list):
        if len(now) != len(before):
            return f"`{key}` had {len(before)} entries and has {len(now)}"
        place = next(place for place in range(len(now)) if now[place] != before[place])
        return _difference(now[place], before[place], f"{key}[{place}]")
    return f"`{key}` was {_short(before)} and is {_short(now)}"


def _short(value: object) -> str:
    text = "not given" if value is None else str(value)
    return text if len(text) <= 120 else text[:117] + "…"


@contextmanager
def _standard_input(spec: Spec) -> Iterator[Path | None]:
    """Keep what comes on standard input, because it is read more than once."""
    if spec.prompts.file != "-":
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="actdump-") as place:
        path = Path(place) / "stdin"
        with path.open("wb") as file:
            while piece := sys.stdin.buffer.read(1 << 20):
                file.write(piece)
        yield path


def _manifest(folder: Folder) -> Manifest:
    return manifest_from_json(json.loads(folder.manifest.read_bytes()))


# ------------------------------------------------------------------------------------------------------- preparation


@dataclass(frozen=True)
class Bound:
    """A model with the spec's taps bound to it and their axes known."""

    source: "Source"
    module: "nn.Module"
    feed: "Feed"
    sites: "list[Site]"

    @property
    def columns(self) -> tuple[Column, ...]:
        return tuple(site.column for site in self.sites)

    @property
    def least(self) -> int:
        """The fewest tokens that a prompt must have for every tap's positions to be there."""
        return max((site.least for site in self.sites), default=1)


def bind(spec: Spec, source: "Source", module: "nn.Module") -> Bound:
    """Bind the spec's taps to a model and probe them.

    Raises:
        AddressError: taps that lead nowhere or cannot be captured, all of them at once.
    """
    from actdump import engine

    sites = engine.bind(module, [entry.tap for entry in spec.save], named=[entry.name is not None for entry in spec.save])
    probe = engine.probe(module, sites, engine.feed_for(module), tokens=spec.selection, dtype=spec.dtype)
    return Bound(source, module, probe.feed, probe.sites)


def _bind_early(spec: Spec, source: "Source") -> None:
    """Find wrong addresses before the weights are loaded, where the model class can be made without them."""
    from actdump import engine, model

    try:
        skeleton = model.skeleton(source)
    except UsageError:
        return  # loading will say what is wrong, if anything is
    engine.bind(skeleton, [entry.tap for entry in spec.save], named=[entry.name is not None for entry in spec.save])


def survey(spec: Spec, *, watcher: Watcher | None = None) -> tuple[Bound, bool]:
    """Bind the taps without weights where the model class allows it, and with them where it does not.

    Returns:
        What was bound, and whether weights were needed.
    """
    from actdump import engine, model

    watcher = watcher or _Silent()
    source = model.find(spec.model)
    skeleton = model.skeleton(source)
    engine.bind(skeleton, [entry.tap for entry in spec.save], named=[entry.name is not None for entry in spec.save])
    try:
        return bind(spec, source, skeleton), False
    except UsageError as error:
        if isinstance(error.__cause__, Exception):  # the model itself does not run on the meta device
            watcher.step("loading the model, which cannot be probed without weights")
            return bind(spec, source, model.load(source)), True
        raise


def modules(spec: ModelSpec, *, grep: str | None = None, depth: int | None = None) -> Iterator[tuple[int, str, str, str]]:
    """The modules of a model without its weights: depth, path, class, and the axes of the output or why it has none."""
    from actdump import engine, model

    source = model.find(spec)
    skeleton = model.skeleton(source)
    found = engine.outline(skeleton, engine.feed_for(skeleton))
    if not any(output for _, _, output in found):  # this class does not run on the meta device
        module = model.load(source)
        found = engine.outline(module, engine.feed_for(module))
    for path, kind, output in found:
        level = path.count(".") + path.count("[") + (1 if path else 0)
        if (depth is None or level <= depth) and (grep is None or grep.lower() in f"{path} {kind}".lower()):
            yield level if grep is None else 0, path or "(the model)", kind, output


@dataclass
class _Job:
    """A run that is under way."""

    spec: Spec
    folder: Folder
    watcher: Watcher
    stopping: Callable[[], bool]
    began: float
    started: str = field(default_factory=lambda: _now())


def _go_on(job: _Job, sources: inputs.Inputs, found: Plan | None, stdin: Path | None) -> Outcome:
    from actdump import engine, model

    spec, watcher = job.spec, job.watcher
    watcher.step("reading the model's config")
    with ThreadPoolExecutor(1) as aside:
        hashes = aside.submit(sources.hashes)
        source = model.find(spec.model)
        engine.bind(
            model.skeleton(source), [entry.tap for entry in spec.save], named=[entry.name is not None for entry in spec.save]
        )
        watcher.step("loading the model")
        bound = bind(spec, source, model.load(source))
        _check_stop(job)
        if found is None or not store.has_tokens(job.folder, found):
            watcher.step("tokenising")
            plan = _take_in(job, bound, sources, hashes.result(), stdin, found)
        else:
            plan = found
    if plan.columns != bound.columns:
        raise DataError(
            f"{job.folder.root}: the model's shapes are not those of the plan in the folder; use the versions that made it"
        )
    return _write_parts(job, plan, bound)


def _take_in(
    job: _Job, bound: Bound, sources: inputs.Inputs, hashes: Mapping[str, str], stdin: Path | None, found: Plan | None
) -> Plan:
    """Tokenise all prompts and write plan, tokens and prompts; with a plan found, only what is missing beside it."""
    folder = job.folder
    with store.storage(folder.root, "made"):
        folder.root.mkdir(parents=True, exist_ok=True)
    store.sweep(folder)
    with store.Intake(folder, _cutter(job.spec, bound)) as intake:
        for prompt, ids in _tokenised(job.spec, bound, stdin):
            _check_stop(job)
            intake.add(prompt.number, prompt.id, ids, *_content(prompt))
        facts = _facts(job.spec, bound, hashes, intake.facts)
        plan = make(facts, bound.columns, intake.cutter.parts, found.budget if found else _budget(job.spec, bound))
        if found is not None and plan.digest != found.digest:
            raise DataError(
                f"{folder.root}: the prompts' tokens are not those of the plan in the folder; use the versions that made it"
            )
        if found is None:
            store.check_space(folder, sum(part.bytes for part in plan.parts))
            store.clear(folder)
        intake.commit(plan if found is None else None, sources.stamps(), plan_to_json)
    return plan


def _cutter(spec: Spec, bound: Bound) -> Cutter:
    return Cutter(bound.columns, most_bytes=spec.shard.size, most_tokens=spec.shard.tokens)


def _tokenised(spec: Spec, bound: Bound, stdin: Path | None) -> Iterator[tuple[prompts.Prompt, list[int]]]:
    from actdump import model

    tokenizer = model.load_tokenizer(spec.tokenizer, bound.source) if _needs_tokenizer(spec) else None
    for prompt, ids in model.tokenise(prompts.read(spec.prompts, stdin), tokenizer, spec.tokenizer, bound.source):
        if len(ids) < bound.least:
            site = max(bound.sites, key=lambda site: site.least)
            raise SpecError(
                f"{prompt.where}: prompt `{prompt.id}` has {len(ids)} tokens, and `{site.tap.name}` asks for a position that needs "
                f"{site.least}; use a slice, which takes what is there"
            )
        yield prompt, ids


def _needs_tokenizer(spec: Spec) -> bool:
    return spec.prompts.rows is None or any(row.input_ids is None for row in spec.prompts.rows)


def _content(prompt: prompts.Prompt) -> tuple[dict[str, Any], Mapping[str, Any]]:
    """What the user gave, for prompts.jsonl; token ids stand in the shard."""
    content = prompt.content
    if isinstance(content, str):
        return {"text": content}, prompt.fields
    return ({} if isinstance(content[0], int) else {"messages": content}), prompt.fields


def _budget(spec: Spec, bound: Bound) -> Budget:
    tokens = spec.batch.tokens
    if tokens == "auto":
        tokens = AUTO_TOKENS.get(bound.feed.device.type, AUTO_TOKENS_ACCELERATOR)
    return Budget(tokens, spec.batch.prompts)


def _facts(spec: Spec, bound: Bound, hashes: Mapping[str, str], taken: Mapping[str, Any]) -> dict[str, Any]:
    config: Any = bound.module.config
    return {
        "spec": spec.decisive(),
        "inputs": dict(hashes),
        **taken,
        "model": {
            "name": spec.model.source or str(config.model_type),
            "commit": bound.source.commit,
            "class": type(bound.module).__name__,
            "dtype": str(bound.source.dtype).removeprefix("torch."),
            "attn_implementation": getattr(config, "_attn_implementation", None),
            "masked": bound.feed.masked,
        },
    }


@dataclass(frozen=True)
class Forecast:
    """What a run would do.

    Attributes:
        weighed: whether the weights had to be loaded to find out.
        lengths: how many prompts have how many tokens.
        padded: the tokens that the batches compute, padding included.
        batches: how many forwards there are.
        bytes: the exact size of all shard files.
    """

    bound: Bound
    weighed: bool
    plan: Plan
    lengths: Mapping[int, int]
    padded: int
    batches: int
    bytes: int


def forecast(spec: Spec, watcher: Watcher | None = None) -> Forecast:
    """Plan a run and write nothing."""
    watcher = watcher or _Silent()
    watcher.step("reading the model's config")
    bound, weighed = survey(spec, watcher=watcher)
    cutter = _cutter(spec, bound)
    budget = _budget(spec, bound) if spec.batch.tokens != "auto" or weighed else Budget(_auto_tokens(spec), spec.batch.prompts)
    watcher.step("tokenising")
    lengths: dict[int, list[int]] = {}
    with _standard_input(spec) as stdin:
        inputs.of(spec, stdin).stamps()
        for _, ids in _tokenised(spec, bound, stdin):
            lengths.setdefault(cutter.add(len(ids)), []).append(len(ids))
    cuts = [(part, batches(part, budget)) for part in lengths.values()]
    plan = make({}, bound.columns, cutter.parts, budget)
    size = sum(shard_layout(bound.columns, lengths[part.number], store.metadata(plan, part)).size for part in plan.parts)
    counts = Counter(length for part in lengths.values() for length in part)
    return Forecast(bound, weighed, plan, counts, sum(padded(*cut) for cut in cuts), sum(len(cut) for _, cut in cuts), size)


def _auto_tokens(spec: Spec) -> int:
    from actdump import model

    return AUTO_TOKENS.get(model.pick_device(spec.model.device).type, AUTO_TOKENS_ACCELERATOR)


# ------------------------------------------------------------------------------------------------------------ the loop


def _write_parts(job: _Job, plan: Plan, bound: Bound) -> Outcome:
    folder = job.folder
    store.sweep(folder)
    finished = [part for part in plan.parts if store.done(folder, part, plan.digest)]
    waiting = [part for part in plan.parts if part not in finished]
    store.check_space(folder, sum(part.bytes for part in waiting))
    job.watcher.planned(plan, finished)
    with store.Pendings() as pendings, store.Writer() as writer:  # the writer ends before what it writes to is closed
        for part in waiting:
            _write_part(job, plan, bound, part, writer, pendings)
        writer.finish()
    made = {**_circumstances(bound), "started": job.started, "finished": _now(), "seconds": round(monotonic() - job.began, 3)}
    manifest = store.seal(folder, plan, made)
    return Outcome("done", manifest, folder.manifest, monotonic() - job.began)


def _write_part(job: _Job, plan: Plan, bound: Bound, part: Part, writer: store.Writer, pendings: store.Pendings) -> None:
    """Capture a part batch by batch, and hand its rows to the writer, which seals the shard after the last."""
    import torch

    from actdump import engine

    ids = store.part_tokens(job.folder, plan, part)
    shard = pendings.begin(job.folder, plan, part, ids)
    cut = batches([len(prompt) for prompt in ids], plan.budget)
    with torch.inference_mode():
        for places in cut:
            _check_stop(job)
            batch = Batch(tuple(part.first + place for place in places), tuple(ids[place].tolist() for place in places))
            captured = engine.capture(bound.module, bound.sites, bound.feed, batch)
            writer.do(_put, shard, places, captured)
            job.watcher.batch(len(places), sum(batch.lengths))
    writer.do(shard.seal, {**_circumstances(bound), "batches": len(cut), "finished": _now()})


def _check_stop(job: _Job) -> None:
    if job.stopping():
        raise Stopped(f"{job.folder.root}: stopped before the end; the same command goes on with it")


def _put(shard: store.Pending, places: Sequence[int], captured: Any) -> None:
    captured.wait()
    shard.put(places, captured.buffers())


# -------------------------------------------------------------------------------------------------------- provenance


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _circumstances(bound: Bound) -> dict[str, Any]:
    """With what, where and by whom the values were computed; none of it decides them."""
    import torch

    slurm = {
        name: os.environ[name] for name in ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID") if name in os.environ
    }
    return {
        "versions": {name: version(name) for name in ("actdump", "torch", "transformers", "safetensors")},
        "python": platform.python_version(),
        "host": platform.node(),
        "device": str(bound.feed.device),
        "threads": torch.get_num_threads(),
        "git": _git(),
        **({"slurm": slurm} if slurm else {}),
    }


def _git() -> dict[str, Any] | None:
    """The commit of the working folder and whether it has changes; `None` outside a repository."""

    def ask(*words: str) -> str:
        return subprocess.run(["git", *words], capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        return {"commit": ask("rev-parse", "HEAD"), "changed": bool(ask("status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.SubprocessError):
        return None
