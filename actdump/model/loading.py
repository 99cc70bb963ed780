"""A model with its weights, or as a skeleton without them, on its device."""

import hashlib
import logging
from collections.abc import Iterable, Mapping
from typing import Any, cast, get_args

import torch
from torch import nn

from actdump.errors import UsageError, few
from actdump.model.hub import hub_options, quiet, wording
from actdump.model.processor import avoid_faulty_amx, warn_of_slow
from actdump.model.source import Source
from actdump.spec import Task

log = logging.getLogger(__name__)

FINGER = 64  # how many values of a weight its fingerprint looks at


def skeleton(source: Source) -> nn.Module:
    """The model on the meta device: all modules and shapes, no weights."""
    with torch.device("meta"):
        return _random(source)


def load(source: Source) -> nn.Module:
    """The model with its weights, in evaluation mode, on its device.

    Raises:
        MissingError: the weights are not there.
        UsageError: the model cannot be loaded in the way asked for; none of its weights is in the checkpoint, say.
    """
    spec = source.spec
    device = pick_device(spec.device)
    if device.type == "cpu":
        avoid_faulty_amx()
        warn_of_slow(source.dtype)
    seen = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()  # type: ignore[no-untyped-call] # torch gives it no types
    with torch.random.fork_rng(devices=seen):  # the caller's own random numbers go on
        torch.manual_seed(spec.seed)  # for a checkpoint too: weights that it lacks are drawn
        model = _random(source) if spec.config is not None else _loaded(source)
    if spec.device_map is None:
        with wording(spec):
            model = model.to(device)
    return model.eval()


def fingerprint(model: nn.Module) -> str | None:
    """sha256 of the first values of every weight, which tells random weights that were drawn otherwise.

    `None` where `device_map` left some on disk.
    """
    digest = hashlib.sha256()
    for name, weight in model.named_parameters():
        if weight.is_meta:
            return None
        digest.update(name.encode())
        digest.update(weight.detach().flatten()[:FINGER].cpu().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def drawn(model: nn.Module) -> tuple[str, ...]:
    """The names of the weights that were drawn at random because a loaded model's checkpoint lacks them."""
    return cast(tuple[str, ...], getattr(model, "drawn", ()))


def other_weights(facts: Mapping[str, Any], model: nn.Module) -> bool:
    """Whether a model is known to have other weights than the one that these facts of a plan tell of."""
    recorded, found = facts.get("weights"), fingerprint(model)
    return None not in (recorded, found) and recorded != found


def _random(source: Source) -> nn.Module:
    options = {} if source.spec.attn_implementation is None else {"attn_implementation": source.spec.attn_implementation}
    with quiet(), wording(source.spec):
        model: nn.Module = source.auto_class.from_config(
            source.config, trust_remote_code=source.spec.trust_remote_code, dtype=source.dtype, **options
        )
        return model.eval()


def _loaded(source: Source) -> nn.Module:
    spec = source.spec
    options: dict[str, Any] = {
        "dtype": "auto" if spec.dtype == "auto" else getattr(torch, spec.dtype),
        "output_loading_info": True,
        "ignore_mismatched_sizes": True,  # told below; transformers names them in a report on the screen alone
    }
    if spec.attn_implementation is not None:
        options["attn_implementation"] = spec.attn_implementation
    if spec.device_map is not None:
        options["device_map"] = spec.device_map
    with quiet(), wording(spec):
        model, info = source.auto_class.from_pretrained(str(spec.folder or spec.name), **hub_options(spec), **options)
    if wrong := sorted(info["mismatched_keys"]):
        told = [f"{name} is {tuple(found)} and should be {tuple(shape)}" for name, found, shape in wrong]
        raise UsageError(f"model: weights of `{spec.source}` have other shapes than its config says: {few(told)}")
    _warn_of_unused(model, info["unexpected_keys"])
    model.drawn = tuple(sorted(info["missing_keys"]))
    if model.drawn:
        _check_some_loaded(source, model)
        log.warning(
            "the checkpoint has no weights for %s: they are random (`model.seed`), and so is all that they compute",
            few(model.drawn),
        )
    result: nn.Module = model
    return result


def _warn_of_unused(model: nn.Module, names: Iterable[str]) -> None:
    """Warn of blocks in the checkpoint that the model does not have. A head that is not asked for is no surprise."""
    modules = dict(model.named_modules())
    paths = ((name.split("."), at) for name in names for at in range(1, name.count(".")))
    found = {
        ".".join(parts[: at + 1])
        for parts, at in paths
        if parts[at].isdigit() and isinstance(modules.get(".".join(parts[:at])), nn.ModuleList)
    }
    if unused := sorted(found - modules.keys()):
        log.warning("the checkpoint has blocks that its config has no place for, and that are not used: %s", few(unused))


def _check_some_loaded(source: Source, model: nn.Module) -> None:
    """Refuse a model of random weights alone: its checkpoint is that of another class, whose weights have other names.

    Raises:
        UsageError: it is one.
    """
    weights = dict(model.named_parameters(remove_duplicate=False))
    lacking = {id(weights[name]) for name in drawn(model) if name in weights}
    if all(id(weight) in lacking for weight in weights.values()):
        made = next(iter(source.config.architectures or ()), "another class")
        raise UsageError(
            f"model: `{source.spec.source}` would be loaded as {type(model).__name__}, and holds none of its weights; its config says "
            f"{made}. Try another `model.task` ({', '.join(get_args(Task))}), or load it yourself and take `actdump.wrap`"
        )


def pick_device(name: str) -> torch.device:
    """The device of that name; `auto` is an accelerator where there is one.

    Raises:
        UsageError: there is no such device.
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if name == "auto":
        return accelerator or torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"model.device: `{name}` is not a device; use auto, cpu, cuda, cuda:1 or mps") from None
    if device.type != "cpu" and (accelerator is None or accelerator.type != device.type):
        raise UsageError(f"model.device: there is no {device.type} device here; use `device: auto`")
    if device.type != "cpu" and (device.index or 0) >= (count := torch.accelerator.device_count()):
        raise UsageError(f"model.device: there is no `{name}`: {device.type} has {count} here, numbered from 0")
    return device
