"""The hub and the library that loads from it: what is asked of them, and how their errors and bars are kept in hand."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, StrictDataclassError
from huggingface_hub.file_download import repo_folder_name
from safetensors import SafetensorError, safe_open

from actdump.errors import ActdumpError, DataError, MissingError, UsageError, did_you_mean
from actdump.memory import out_of_memory
from actdump.spec import ModelSpec, path_of

_POINTER = b"version https://git-lfs"  # what a file begins with that stands for one which was not fetched

# Errors whose messages are sentences; that of another one says little without its name.
_SENTENCES = (
    ValueError,
    OSError,
    ImportError,
    RuntimeError,
    MemoryError,
    AssertionError,
    StrictDataclassError,
    SafetensorError,
)


def ask_once(name: str, revision: str | None) -> None:
    """Ask the hub once whether it is there, where nothing of a name is cached: without a network, loading asks six times in 20 seconds.

    An answer of any kind lets the name pass.

    Raises:
        OSError: the hub does not answer.
    """
    if Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=name, repo_type="model")).is_dir():
        return
    try:
        get_hf_file_metadata(hf_hub_url(name, "config.json", revision=revision), timeout=10)
    except (HfHubHTTPError, HFValidationError):
        return  # an answer; or no name of the hub, which loading will say
    except Exception as error:  # whatever the hub's HTTP library raises
        raise OSError(f"the hub does not answer ({first_line(error)})") from error


def neighbours(name: str) -> list[str]:
    """The folders beside the one that a name would be as a path."""
    parent = path_of(name).parent
    if "/" not in name or not parent.is_dir():
        return []
    return [str(path) for path in sorted(parent.iterdir()) if path.is_dir() and not path.name.startswith(".")]


def hub_options(spec: ModelSpec) -> dict[str, Any]:
    options: dict[str, Any] = {"trust_remote_code": spec.trust_remote_code}
    if spec.revision is not None:
        options["revision"] = spec.revision
    if spec.gguf_file is not None:
        options["gguf_file"] = spec.gguf_file
    return options


@contextmanager
def quiet() -> Iterator[None]:
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
def wording(spec: ModelSpec) -> Iterator[None]:
    """Word the errors of loading: what is missing is an input, the rest is how it was asked for."""
    name = spec.source or "config"
    try:
        yield
    except ActdumpError:
        raise
    except SafetensorError as error:
        raise DataError(f"model: {_broken(spec, error)}") from error
    except OSError as error:
        if spec.folder is not None:
            raise MissingError(f"model: `{name}` cannot be loaded: {first_line(error)}") from error
        raise MissingError(
            f"model: `{name}` is neither a local folder nor found on the hub: {first_line(error)}"
            f"{did_you_mean(name, neighbours(name))}"
        ) from error
    except KeyError as error:
        raise UsageError(
            f"model: `{name}` cannot be loaded: transformers does not know {error}, which the config names"
        ) from error
    except Exception as error:  # whatever a model's code raises
        if out_of_memory(error):
            raise ActdumpError(
                f"model: `{name}` does not fit into memory: {first_line(error)}; use a narrower `model.dtype`, "
                "`device_map: auto`, or `device: cpu`"
            ) from error
        raise UsageError(f"model: `{name}` cannot be loaded: {first_line(error)}") from error


def _broken(spec: ModelSpec, error: SafetensorError) -> str:
    """Which weights file of a model is broken, and how."""
    for path in sorted(spec.folder.glob("*.safetensors")) if spec.folder is not None else ():
        try:
            with safe_open(path, framework="pt"):
                pass
        except SafetensorError as found:
            with path.open("rb") as file:
                if file.read(len(_POINTER)) == _POINTER:
                    return f"`{path}` holds no weights, only Git LFS's pointer to them: fetch them with `git lfs pull`"
            return f"`{path}` is broken: {first_line(found)}; fetch it again"
    return f"a weights file of `{spec.source}` is broken: {first_line(error)}; fetch it again"


def first_line(error: Exception) -> str:
    """An error in a line; that of a config's field is in two."""
    if isinstance(error, StrictDataclassError):
        return " ".join(str(error).split())
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return line if isinstance(error, _SENTENCES) else f"{type(error).__name__}: {line}"
