"""The audit of a finished dump, on any machine that has its model."""

import logging
from collections.abc import Callable
from pathlib import Path

from torch import nn

from actdump import inputs, model, reader, store, verify
from actdump.audit.choice import Choice, choose
from actdump.audit.comparison import Audit, compare
from actdump.errors import DataError, MissingError, UsageError
from actdump.format import Manifest
from actdump.memory import memory_for
from actdump.plan import Plan
from actdump.reader import Dump
from actdump.spec import ModelSpec

log = logging.getLogger(__name__)

# The files of a model's folder that decide what it computes from token ids; the tokenizer's do not.
_DECIDING = (".safetensors", ".bin", ".gguf", ".py", "/config.json")


def finished(path: Path, count: int, *, place: str | None = None, step: Callable[[str], None] = lambda _: None) -> Audit:
    """Audit a finished dump.

    Args:
        count: how many prompts to run alone.
        place: the folder or hub id of the model, where it is not the one that the dump was made with.
        step: told what begins.

    Raises:
        MissingError: there is no finished dump, or its model is not there.
        UsageError: the dump's model has no place.
        DataError: a shard's bytes changed, the model is another one, or values are wrong.
        ActdumpError: memory ran out.
    """
    dump = reader.open_dump(path)
    plan = _plan(dump)
    spec = _model_spec(dump.manifest, place)
    made = dump.manifest.facts["model"]["class"]
    try:
        source = model.find(spec, made)
        step("comparing the model's files")
        _check_files(dump.manifest, spec)
    except MissingError as error:
        raise MissingError(f"{error}\nmodel: if it is somewhere else now, say where with --model") from None
    step("reading the shards")
    choice = choose(dump, plan, count)
    _check_shards(dump, choice)
    step("loading the model")
    module = model.load(source)
    if (kind := type(module).__name__) != made:
        raise DataError(f"model: `{spec.source}` is a {kind}, and the dump was made from a {made}")
    step("auditing")
    with memory_for("the audit", "use a machine or a device with more"):
        found = compare(dump, module, choice)
    if found.faults:
        raise DataError(f"{found.told}\n{path}: {_verdict(dump.manifest, module)}")
    return found


def _verdict(manifest: Manifest, module: nn.Module) -> str:
    if model.other_weights(manifest.facts["model"], module):
        return (
            "the model's weights here are not those that the dump was made with (random ones depend on the versions of torch and "
            "transformers and on the kind of CPU), so this says nothing of its values"
        )
    return "the audit found values that are not those of the prompts run alone: do not use them"


def _plan(dump: Dump) -> Plan:
    loaded = store.load_plan(dump.folder)
    if loaded is None:
        raise MissingError(f"{dump.folder.plan}: missing; an audit needs it to know which prompts were padded")
    if loaded[0].digest != dump.manifest.digest:
        raise DataError(f"{dump.folder.plan}: it is not the plan of this dump: its digest is not that in manifest.json")
    return loaded[0]


def _model_spec(manifest: Manifest, place: str | None) -> ModelSpec:
    """How to load the dump's model: as it was, but on the device that is here, and from the very commit."""
    given = {key: value for key, value in manifest.made["model"].items() if key != "device"}
    key = "name" if "name" in given else "config"
    if place is not None:
        if not isinstance(given[key], str):
            raise UsageError(
                "--model: the dump's model is random weights from a config, which the manifest holds; leave it out"
            )
        moved = ModelSpec.model_validate({**given, key: place})
        return moved if moved.folder is None else moved.model_copy(update={"revision": None})
    commit = manifest.facts["model"]["commit"]
    return ModelSpec.model_validate({**given, "revision": commit} if commit else given)


def _check_files(manifest: Manifest, spec: ModelSpec) -> None:
    """Compare the files of a local model with those that the dump was made from."""
    recorded = {role: digest for role, digest in manifest.facts["inputs"].items() if role.startswith("model/")}
    with inputs.of_model(spec).hashing() as hashes:
        found = hashes()
    if not recorded or not found:
        if recorded or found:
            log.warning(
                "the dump's model was on the hub and this one is in a folder, or the other way: only values are compared"
            )
        return
    roles = [role for role in sorted({**recorded, **found}) if role.endswith(_DECIDING)]
    if changed := [role.removeprefix("model/") for role in roles if recorded.get(role) != found.get(role)]:
        raise DataError(
            f"model: `{spec.folder}` is not the model that the dump was made from: {', '.join(changed)} "
            f"{'differs' if len(changed) == 1 else 'differ'} (sha256)"
        )


def _check_shards(dump: Dump, choice: Choice) -> None:
    shards = {shard.number: shard for number in choice.numbers for shard in [dump.shard_of(number).shard]}
    if faults := [fault for shard in shards.values() for fault in verify.shard_faults(dump.folder, shard)]:
        raise DataError("\n".join(faults))
