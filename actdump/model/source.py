"""A model before its weights: where it comes from, its config and its class."""

import re
import sys
from dataclasses import dataclass
from inspect import getsource
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from transformers import MODEL_MAPPING, AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES

from actdump.errors import MissingError, SpecError, did_you_mean
from actdump.model.hub import ask_once, first_line, hub_options, quiet, wording
from actdump.spec import ModelSpec


@dataclass(frozen=True)
class Source:
    """A model before its weights: where it comes from, its config and its class."""

    spec: ModelSpec
    config: Any
    task: str

    @property
    def commit(self) -> str | None:
        """The commit on the hub that the config came from."""
        if self.spec.source is None or self.spec.folder is not None:
            return None
        cached = try_to_load_from_cache(self.spec.source, "config.json", revision=self.spec.revision)
        found = re.search(r"snapshots[/\\]([0-9a-f]{40})[/\\]", str(cached))
        return found[1] if found else None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights: the spec's, or the checkpoint's."""
        named = self.config.dtype if self.spec.dtype == "auto" else self.spec.dtype
        return named if isinstance(named, torch.dtype) else getattr(torch, named or "float32")

    @property
    def positions(self) -> int | None:
        """The most tokens that the model's position table or training allows, where its config tells."""
        for name in ("max_position_embeddings", "n_positions", "max_seq_len"):
            if isinstance(limit := getattr(self.config, name, None), int) and limit > 0:
                return limit
        return None


def find(spec: ModelSpec) -> Source:
    """Read the config of a model, without its weights.

    Raises:
        MissingError: there is no such model, here or within reach.
        SpecError: the config has an unknown `model_type` or unknown keys.
    """
    config = _own_config(spec.config) if isinstance(spec.config, dict) else _found_config(spec)
    return Source(spec, config, spec.task or _default_task(config))


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
        except (ValueError, TypeError) as error:
            raise SpecError(f"model.config: {first_line(error)}") from None


def _read_by_the_model(config: Any) -> set[str]:
    """What the model's code takes from its config; some of it no config class names, as `head_dim` of Qwen3-MoE."""
    model = MODEL_MAPPING.get(type(config), None)
    code = "" if model is None else getsource(sys.modules[model.__module__])
    return set(re.findall(r"""\bconfig(?:\.|, ")([a-z]\w*)""", code))  # config.head_dim, getattr(config, "head_dim", …)


def _default_task(config: Any) -> str:
    """Which Auto class: that of the architecture in the config, or the one usual for the model type."""
    for architecture in config.architectures or ():
        if architecture.endswith(("ForCausalLM", "LMHeadModel")):
            return "causal-lm"
        return "masked-lm" if architecture.endswith("ForMaskedLM") else "base"
    if config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        return "masked-lm"
    return "causal-lm" if config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES else "base"
