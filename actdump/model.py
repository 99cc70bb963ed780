"""Models and tokenizers: the only importer of transformers."""

import logging
import os
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES

from actdump.errors import DataError, MissingError, SpecError, UsageError, did_you_mean
from actdump.prompts import Prompt
from actdump.spec import ModelSpec, TokenizerSpec

log = logging.getLogger(__name__)

T = TypeVar("T")

CLASSES = {"causal-lm": AutoModelForCausalLM, "masked-lm": AutoModelForMaskedLM, "base": AutoModel}
CHUNK = 1024  # prompts handed to the tokenizer at a time


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
    with _quiet(), _loading(spec):
        if folder is None:
            _ask_once(str(spec.source), spec.revision)
        return AutoConfig.from_pretrained(str(folder or spec.source), **_hub(spec))


def _ask_once(name: str, revision: str | None) -> None:
    """Ask the hub once for what may be a mistyped path: `models/x`, beside other folders in `models`.

    Both readings are possible, so an answer of any kind lets it pass. Without a network, loading asks six times in 20 seconds.

    Raises:
        OSError: the hub does not answer.
    """
    if not _neighbours(name) or isinstance(try_to_load_from_cache(name, "config.json", revision=revision), str):
        return
    try:
        get_hf_file_metadata(hf_hub_url(name, "config.json", revision=revision), timeout=10)
    except HfHubHTTPError:
        return  # an answer
    except Exception as error:  # whatever the hub's HTTP library raises
        raise OSError(f"the hub does not answer ({_first_line(error)})") from error


def _neighbours(name: str) -> list[str]:
    """The folders beside the one that a name would be as a path."""
    parent = Path(name).expanduser().parent
    if "/" not in name or not parent.is_dir():
        return []
    return [str(path) for path in sorted(parent.iterdir()) if path.is_dir() and not path.name.startswith(".")]


def _own_config(given: dict[str, Any]) -> Any:
    kind = given["model_type"]
    if kind not in CONFIG_MAPPING_NAMES:
        raise SpecError(f"model.config: unknown model_type `{kind}`{did_you_mean(kind, CONFIG_MAPPING_NAMES)}")
    with _quiet():
        known = AutoConfig.for_model(kind)
        names = {*known.to_dict(), *getattr(known, "attribute_map", {}), "attn_implementation", "rope_scaling", "rope_theta"}
        for key in given:
            if key not in names:
                raise SpecError(f"model.config: {kind} has no `{key}`{did_you_mean(key, sorted(names))}")
        rest = {key: value for key, value in given.items() if key != "model_type"}
        try:
            return AutoConfig.for_model(kind, **rest)
        except (ValueError, TypeError) as error:
            raise SpecError(f"model.config: {_first_line(error)}") from None


def _default_task(config: Any) -> str:
    """Which Auto class: that of the architecture in the config, or the one usual for the model type."""
    for architecture in config.architectures or ():
        if architecture.endswith(("ForCausalLM", "LMHeadModel")):
            return "causal-lm"
        return "masked-lm" if architecture.endswith("ForMaskedLM") else "base"
    if config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        return "masked-lm"
    return "causal-lm" if config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES else "base"


def skeleton(source: Source) -> nn.Module:
    """The model on the meta device: all modules and shapes, no weights."""
    with torch.device("meta"):
        return _random(source)


def load(source: Source) -> nn.Module:
    """The model with its weights, in evaluation mode, on its device.

    Raises:
        MissingError: the weights are not there.
        UsageError: the model cannot be loaded in the way asked for.
    """
    spec = source.spec
    device = pick_device(spec.device)
    if device.type == "cpu":
        avoid_faulty_amx()
    if spec.config is not None:
        torch.manual_seed(spec.seed)
        model = _random(source)
    else:
        model = _loaded(source)
    return (model if spec.device_map is not None else model.to(device)).eval()


def _random(source: Source) -> nn.Module:
    options = {} if source.spec.attn_implementation is None else {"attn_implementation": source.spec.attn_implementation}
    with _quiet(), _loading(source.spec):
        model: nn.Module = CLASSES[source.task].from_config(
            source.config, trust_remote_code=source.spec.trust_remote_code, dtype=source.dtype, **options
        )
        return model.eval()


def _loaded(source: Source) -> nn.Module:
    spec = source.spec
    options: dict[str, Any] = {
        "dtype": "auto" if spec.dtype == "auto" else getattr(torch, spec.dtype),
        "output_loading_info": True,
    }
    if spec.attn_implementation is not None:
        options["attn_implementation"] = spec.attn_implementation
    if spec.device_map is not None:
        options["device_map"] = spec.device_map
    with _quiet(), _loading(spec):
        model, info = CLASSES[source.task].from_pretrained(str(spec.folder or spec.name), **_hub(spec), **options)
    if missing := sorted(info["missing_keys"]):
        log.warning("the checkpoint has no weights for %s: they are random, and so is all that they compute", _some(missing))
    result: nn.Module = model
    return result


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _hub(spec: ModelSpec) -> dict[str, Any]:
    options: dict[str, Any] = {"trust_remote_code": spec.trust_remote_code}
    if spec.revision is not None:
        options["revision"] = spec.revision
    if spec.gguf_file is not None:
        options["gguf_file"] = spec.gguf_file
    return options


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
    return device


def avoid_faulty_amx() -> None:
    """Keep oneDNN from AMX where the CPU says that it has it and faults on it, as some virtual machines do.

    Shown by one small product in a child process. oneDNN reads the variable at its first use:
    https://uxlfoundation.github.io/oneDNN/dev_guide_cpu_dispatcher_control.html
    """
    info = Path("/proc/cpuinfo")
    if "ONEDNN_MAX_CPU_ISA" in os.environ or not info.exists() or "amx_bf16" not in info.read_text():
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # forking beside threads: the child computes and ends
        child = os.fork()
    if child == 0:
        ones = torch.ones(32, 64, dtype=torch.bfloat16)
        nn.functional.linear(ones, ones)
        os._exit(0)
    if os.WIFSIGNALED(os.waitpid(child, 0)[1]):
        os.environ["ONEDNN_MAX_CPU_ISA"] = "AVX512_CORE_BF16"
        log.warning("this CPU faults on its own AMX instructions; going on without them (ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16)")


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' progress bars and advice off the screen; its errors are ours to word."""
    logger = logging.getLogger("transformers")
    level = logger.level
    bars = transformers.utils.logging.is_progress_bar_enabled()
    logger.setLevel(logging.CRITICAL)
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        logger.setLevel(level)
        if bars:
            transformers.utils.logging.enable_progress_bar()


@contextmanager
def _loading(spec: ModelSpec) -> Iterator[None]:
    """Word the errors of loading: what is missing is an input, the rest is how it was asked for."""
    name = spec.source or "config"
    try:
        yield
    except SafetensorError as error:
        raise DataError(f"model: a weights file of `{name}` is broken: {_first_line(error)}; fetch it again") from error
    except OSError as error:
        if spec.folder is not None:
            raise MissingError(f"model: `{name}` cannot be loaded: {_first_line(error)}") from error
        raise MissingError(
            f"model: `{name}` is neither a local folder nor found on the hub: {_first_line(error)}"
            f"{did_you_mean(name, _neighbours(name))}"
        ) from error
    except (ValueError, TypeError, ImportError, KeyError, RuntimeError) as error:
        raise UsageError(f"model: `{name}` cannot be loaded: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


# --------------------------------------------------------------------------------------------------------- tokenizers


def load_tokenizer(spec: TokenizerSpec, source: Source) -> Any | None:
    """The tokenizer, or `None` where the model has none.

    Raises:
        MissingError: the tokenizer that the spec names is not there.
    """
    name = spec.name or source.spec.source
    if name is None:
        return None
    folder = Path(name).expanduser()
    if folder.is_dir() and source.spec.gguf_file is None and not any(folder.glob("*token*")) and not any(folder.glob("vocab*")):
        if spec.name is not None:
            raise MissingError(f"tokenizer.name: there is no tokenizer in `{folder}`")
        return None
    options = _hub(source.spec) if spec.name is None else {"trust_remote_code": source.spec.trust_remote_code}
    try:
        with _quiet():
            if not folder.is_dir():
                _ask_once(name, source.spec.revision if spec.name is None else None)
            return AutoTokenizer.from_pretrained(str(folder if folder.is_dir() else name), **options)
    except (OSError, ValueError, ImportError, KeyError) as error:
        near = "" if folder.is_dir() else did_you_mean(name, _neighbours(name))
        raise MissingError(f"tokenizer: none can be loaded from `{name}`: {_first_line(error)}{near}") from error


def tokenise(
    prompts: Iterable[Prompt], tokenizer: Any | None, spec: TokenizerSpec, source: Source
) -> Iterator[tuple[list[Prompt], list[list[int]]]]:
    """Prompts in order, some at a time, with the token ids of each; the next ones are read and tokenised in a thread meanwhile.

    Raises:
        SpecError: a prompt is empty or too long, there is no tokenizer for its text, or an id is not in the vocabulary.
    """
    return _ahead(_chunks(prompts, tokenizer, spec, source))


def _ahead(items: Iterator[T]) -> Iterator[T]:
    """The same items, the next one made in a thread while this one is used."""
    with ThreadPoolExecutor(1, thread_name_prefix="actdump-tokeniser") as thread:
        waiting = thread.submit(next, items, None)
        while (item := waiting.result()) is not None:
            waiting = thread.submit(next, items, None)
            yield item


def _chunks(
    prompts: Iterable[Prompt], tokenizer: Any | None, spec: TokenizerSpec, source: Source
) -> Iterator[tuple[list[Prompt], list[list[int]]]]:
    limit = spec.max_length or _limit(tokenizer, source)
    vocabulary = getattr(source.config.get_text_config(), "vocab_size", None)
    waiting = iter(prompts)
    while chunk := list(islice(waiting, CHUNK)):
        texts = [prompt for prompt in chunk if isinstance(prompt.content, str)]
        encoded = iter(_encoded(texts, tokenizer, spec, limit))
        found = [next(encoded) if isinstance(prompt.content, str) else _ids(prompt, tokenizer, spec, limit) for prompt in chunk]
        if not _fit(found, limit, vocabulary):
            for prompt, ids in zip(chunk, found, strict=True):
                _check(prompt, ids, limit, vocabulary, spec)
        yield chunk, found


def _fit(chunk: Sequence[Sequence[int]], limit: int | None, vocabulary: int | None) -> bool:
    """Whether all prompts of a chunk have tokens, not too many, and of the vocabulary."""
    lengths = list(map(len, chunk))
    if min(lengths) == 0 or (limit is not None and max(lengths) > limit):
        return False
    return vocabulary is None or (min(map(min, chunk)) >= 0 and max(map(max, chunk)) < vocabulary)


def _limit(tokenizer: Any | None, source: Source) -> int | None:
    own = getattr(tokenizer, "model_max_length", None)
    limits = [limit for limit in (own, source.positions) if limit is not None and limit < 10**9]
    return min(limits, default=None)


def _encoded(prompts: Sequence[Prompt], tokenizer: Any | None, spec: TokenizerSpec, limit: int | None) -> list[list[int]]:
    if not prompts:
        return []
    if tokenizer is None:
        raise SpecError(
            f"{prompts[0].where}: the model has no tokenizer, so text cannot become tokens; give `input_ids`, or `tokenizer: {{name: …}}`"
        )
    options: dict[str, Any] = {"add_special_tokens": spec.add_special_tokens}
    if spec.truncation and limit:
        options |= {"truncation": True, "max_length": limit}
    texts = [prompt.content for prompt in prompts]
    with _quiet():
        ids: list[list[int]] = tokenizer(texts[:1], **options)["input_ids"]  # this also sets up the backend
        if _is_plain(tokenizer):
            encodings = tokenizer.backend_tokenizer.encode_batch_fast(texts[1:], add_special_tokens=spec.add_special_tokens)
            return ids + [encoding.ids for encoding in encodings]
        return ids + tokenizer(texts[1:], **options)["input_ids"] if texts[1:] else ids


def _is_plain(tokenizer: Any) -> bool:
    """Whether the ids that a tokenizer gives are those of its backend, whose own batch call takes two thirds of the time.

    They are where the class has the library's way from text to ids, which sets truncation and the like in the backend, and then
    takes the ids as they come (`TokenizersBackend._encode_plus`).
    """
    ways = ("__call__", "_encode_plus", "_convert_encoding", "set_truncation_and_padding")
    own, plain = type(tokenizer), PreTrainedTokenizerFast
    return isinstance(tokenizer, plain) and all(getattr(own, way) is getattr(plain, way, None) for way in ways)


def _ids(prompt: Prompt, tokenizer: Any | None, spec: TokenizerSpec, limit: int | None) -> list[int]:
    """The ids of a prompt that is no text: its own, or those of the chat template."""
    content: Any = prompt.content
    if isinstance(content[0], int):
        return list(content[:limit] if spec.truncation else content)
    if tokenizer is None:
        raise SpecError(f"{prompt.where}: the model has no tokenizer, so `messages` cannot become tokens; give `input_ids`")
    if spec.chat_template is None and not getattr(tokenizer, "chat_template", None):
        raise SpecError(
            f"{prompt.where}: the tokenizer has no chat template for `messages`; give `tokenizer: {{chat_template: …}}`"
        )
    try:
        with _quiet():
            ids: list[int] = tokenizer.apply_chat_template(
                content, chat_template=spec.chat_template, add_generation_prompt=spec.add_generation_prompt, return_dict=False
            )
    except Exception as error:  # a template can raise anything
        raise SpecError(f"{prompt.where}: the chat template fails: {_first_line(error)}") from error
    return ids[:limit] if spec.truncation else ids


def _check(prompt: Prompt, ids: Sequence[int], limit: int | None, vocabulary: int | None, spec: TokenizerSpec) -> None:
    if not ids:
        raise SpecError(f"{prompt.where}: an empty prompt: it has no tokens")
    if limit is not None and len(ids) > limit:
        whose = "tokenizer.max_length" if spec.max_length else "the model"
        raise SpecError(
            f"{prompt.where}: prompt `{prompt.id}` has {len(ids)} tokens, and {whose} allows {limit}; shorten it, or cut what is too long "
            "with `tokenizer: {truncation: true}`"
        )
    if vocabulary is not None and not 0 <= min(ids) <= max(ids) < vocabulary:
        wrong = min(ids) if min(ids) < 0 else max(ids)
        raise SpecError(
            f"{prompt.where}: prompt `{prompt.id}` has the token id {wrong}; the vocabulary is 0 to {vocabulary - 1}"
        )
