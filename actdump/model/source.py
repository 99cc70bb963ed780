"""A model before its weights: where it comes from, its config and its class."""

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from inspect import getsource
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from safetensors import safe_open
from transformers import (
    MODEL_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForTextEncoding,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)

from actdump.errors import MissingError, SpecError, did_you_mean
from actdump.model.hub import ask_once, first_line, hub_options, quiet, wording
from actdump.spec import ModelSpec, Task

_FLOATS = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}  # as safetensors calls them
# The Auto class of each task, and the names of the classes that it makes, by model type.
CLASSES: Mapping[Task, tuple[Any, Mapping[str, Any]]] = {
    "causal-lm": (AutoModelForCausalLM, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
    "masked-lm": (AutoModelForMaskedLM, MODEL_FOR_MASKED_LM_MAPPING_NAMES),
    "base": (AutoModel, MODEL_MAPPING_NAMES),
    "text-encoding": (AutoModelForTextEncoding, MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES),
}


@dataclass(frozen=True)
class Source:
    """A model before its weights: where it comes from, its config and its class."""

    spec: ModelSpec
    config: Any
    task: Task

    @property
    def auto_class(self) -> Any:
        """The class of transformers that makes the model."""
        return CLASSES[self.task][0]

    @property
    def commit(self) -> str | None:
        """The commit on the hub that the config came from, which a GGUF file holds itself."""
        if self.spec.source is None or self.spec.folder is not None:
            return None
        cached = try_to_load_from_cache(self.spec.source, self.spec.gguf_file or "config.json", revision=self.spec.revision)
        found = re.search(r"snapshots[/\\]([0-9a-f]{40})[/\\]", str(cached))
        return found[1] if found else None

    @cached_property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights: the spec's, the config's, or that of the checkpoint's first floating point weight."""
        named = self.config.dtype if self.spec.dtype == "auto" else self.spec.dtype
        return named if isinstance(named, torch.dtype) else getattr(torch, named or self._stored_dtype() or "float32")

    def _stored_dtype(self) -> str | None:
        """What transformers takes where nothing names a dtype; `None` where the weights are not here yet, or are in no such file."""
        if self.spec.config is not None or self.spec.gguf_file is not None:
            return None
        if (folder := self.spec.folder) is not None:
            files = sorted(map(str, folder.glob("model.safetensors"))) or sorted(
                map(str, folder.glob("model-*-of-*.safetensors"))
            )
        else:
            cached = try_to_load_from_cache(str(self.spec.source), "model.safetensors", revision=self.spec.revision)
            files = [cached] if isinstance(cached, str) else []
        for file in files:
            with wording(self.spec), safe_open(file, framework="pt") as weights:
                kinds = (weights.get_slice(name).get_dtype() for name in weights.keys())  # noqa: SIM118 # it is no mapping
                if found := next((_FLOATS[kind] for kind in kinds if kind in _FLOATS), None):
                    return found
        return None

    @property
    def positions(self) -> int | None:
        """The most tokens of a prompt (see `positions`)."""
        return positions(self.config)


def positions(config: Any) -> int | None:
    """The most tokens that a model's position table or training allows, where its config tells."""
    text = config.get_text_config()
    for name in ("max_position_embeddings", "max_encoder_position_embeddings", "n_positions", "max_seq_len"):
        if isinstance(limit := getattr(text, name, None), int) and limit > 0:
            return limit - _first_position(config)
    return None


def _first_position(config: Any) -> int:
    """Where the model's code begins to count: after the place of padding in models made after RoBERTa, which say so by a name."""
    padding = getattr(config, "pad_token_id", None)
    return padding + 1 if "create_position_ids_from_input_ids" in _code(config) and isinstance(padding, int) else 0


def find(spec: ModelSpec, made: str | None = None) -> Source:
    """Read the config of a model, without its weights.

    Args:
        made: the class that it was once loaded as, which tells the task where the spec does not.

    Raises:
        MissingError: there is no such model, here or within reach.
        SpecError: the config has an unknown `model_type` or unknown keys; or a revision of a local folder is asked for.
    """
    if spec.revision is not None and spec.folder is not None:
        raise SpecError(f"model.revision: `{spec.source}` is a local folder, which has no revisions; leave it out")
    config = _own_config(spec.config) if isinstance(spec.config, dict) else _found_config(spec)
    return Source(spec, config, spec.task or _default_task(config, made))


def _found_config(spec: ModelSpec) -> Any:
    folder = spec.folder
    if folder is not None and spec.gguf_file is None and not (folder / "config.json").is_file():
        raise MissingError(f"model: `{folder}` is not a model folder: it has no config.json")
    if folder is not None and spec.gguf_file is not None and not (folder / spec.gguf_file).is_file():
        raise MissingError(f"model: there is no `{spec.gguf_file}` in `{folder}`")
    with quiet(), wording(spec):
        if folder is None:
            ask_once(str(spec.source), spec.revision)
        return AutoConfig.from_pretrained(str(folder or spec.source), **hub_options(spec))


def _own_config(given: dict[str, Any]) -> Any:
    kind = given["model_type"]
    if kind not in CONFIG_MAPPING_NAMES:
        raise SpecError(f"model.config: unknown model_type `{kind}`{did_you_mean(kind, CONFIG_MAPPING_NAMES)}")
    with quiet():
        known = AutoConfig.for_model(kind)
        names = {*known.to_dict(), *getattr(known, "attribute_map", {}), "attn_implementation", "rope_scaling", "rope_theta"}
        for key in given:
            if key not in names and key not in _read_by_the_model(known):
                raise SpecError(f"model.config: {kind} has no `{key}`{did_you_mean(key, sorted(names))}")
        rest = {key: value for key, value in given.items() if key != "model_type"}
        try:
            return AutoConfig.for_model(kind, **rest)
        except Exception as error:  # whatever a config's code raises
            raise SpecError(f"model.config: {first_line(error)}") from error


def _read_by_the_model(config: Any) -> set[str]:
    """What the model's code takes from its config; some of it no config class names, as `head_dim` of Qwen3-MoE."""
    # config.head_dim, getattr(config, "head_dim", …)
    return set(re.findall(r"""\bconfig(?:\.|, ")([a-z]\w*)""", _code(config)))


def _code(config: Any) -> str:
    """The source of the model that a config is for, where it is one of transformers' own."""
    known = MODEL_MAPPING.get(type(config), ())  # of a few (Funnel) several
    models = known if isinstance(known, tuple) else (known,)
    return "".join(map(getsource, {sys.modules[model.__module__] for model in models}))


def _default_task(config: Any, made: str | None) -> Task:
    """Which Auto class: one that gives that class, or the architecture in the config, or the one usual for the model type."""
    if architecture := made or next(iter(config.architectures or ()), None):
        for task, (_, names) in CLASSES.items():
            known = names.get(config.model_type, ())
            if architecture in ((known,) if isinstance(known, str) else known):
                return task
        if architecture.endswith(("ForCausalLM", "LMHeadModel")):  # of remote code
            return "causal-lm"
        return "masked-lm" if architecture.endswith("ForMaskedLM") else "base"
    if config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        return "masked-lm"
    return "causal-lm" if config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES else "base"
