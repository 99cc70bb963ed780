"""The files that a dump is made from, and whether they are still the same. Needs neither torch nor transformers."""

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from errno import EACCES
from functools import cached_property
from pathlib import Path
from threading import Event

from actdump.errors import DataError, MissingError, UsageError
from actdump.spec import ModelSpec, Spec, path_of

# What a model folder consists of; the rest (README, optimizer states, logs) decides no activation.
_MODEL_SUFFIXES = (
    ".json", ".safetensors", ".bin", ".model", ".txt", ".jinja", ".py", ".tiktoken", ".spm", ".codes", ".tokenizer",
)  # fmt: skip
_NOT_MODEL = ("optimizer", "scheduler", "training_args", "trainer_state", "rng_state", "README")

Stamps = Mapping[str, list[int]]  # size and modification time (ns) of each file, by the part that it plays


@dataclass(frozen=True)
class Inputs:
    """The files that a spec names, by the part that they play: `prompts`, `model/config.json`."""

    files: Mapping[str, Path]

    @cached_property
    def stamps(self) -> dict[str, list[int]]:
        """Size and modification time of each, cheap to compare, as they were before any was read.

        Raises:
            MissingError: a file is not there.
        """
        return {role: self._stamp(role, path) for role, path in self.files.items()}

    def _stamp(self, role: str, path: Path) -> list[int]:
        try:
            status = path.stat()
        except OSError as error:
            raise MissingError(f"{role.partition('/')[0]}: `{path}`: {error.strerror}") from None
        if not os.access(path, os.R_OK):  # libraries that read it say that it is not there
            raise MissingError(f"{role.partition('/')[0]}: `{path}`: {os.strerror(EACCES)}")
        return [status.st_size, status.st_mtime_ns]

    @contextmanager
    def hashing(self) -> Iterator[Callable[[], dict[str, str]]]:
        """sha256 of each, computed in threads while the block runs, and given up when it ends; a call gives the result.

        Raises:
            DataError: at the call: a file has changed since its stamp was taken, so who else read it may have read something else.
        """
        ended = Event()
        _ = self.stamps  # what is written into a file from here on must not hide behind the hash of what it held

        def hashes() -> dict[str, str]:
            digests = {role: future.result() for role, future in found.items()}
            self.check_same()
            return digests

        with ThreadPoolExecutor(min(4, os.cpu_count() or 1), thread_name_prefix="actdump-hash") as threads:
            found = {role: threads.submit(sha256, path, ended.is_set) for role, path in self.files.items()}
            try:
                yield hashes
            finally:
                ended.set()

    def check_same(self) -> None:
        """Raises:
        DataError: a file has changed since its stamp was taken.
        """
        for role, path in self.files.items():
            if self._stamp(role, path) != self.stamps[role]:
                raise DataError(f"{role.partition('/')[0]}: `{path}` changed while it was read; run again when it is complete")

    def changes(self, stamps: Stamps, hashes: Mapping[str, str]) -> Iterator[tuple[str, str]]:
        """The roles whose file is new, gone or changed since these stamps and hashes, and which of it, in words.

        Only files whose stamp changed are read, each when its answer is asked for.
        """
        now = self.stamps
        for role in {**hashes, **now}:
            if role not in now or role not in hashes:
                yield role, "is gone" if role not in now else "is new"
            elif now[role] != stamps.get(role) and sha256(self.files[role]) != hashes[role]:
                yield role, "has changed"


def of(spec: Spec, stdin: Path | None = None) -> Inputs:
    """The files that a spec is made from.

    Args:
        stdin: where standard input was kept, for a spec that reads its prompts there.

    Raises:
        MissingError: the model's folder or the prompt file is not there.
    """
    files: dict[str, Path] = {}
    if spec.prompts.file is not None:
        files["prompts"] = stdin if spec.prompts.file == "-" and stdin is not None else _prompt_file(spec.prompts.file)
    files |= of_model(spec.model).files
    if spec.tokenizer.name is not None and (folder := path_of(spec.tokenizer.name)).is_dir():
        files |= {
            f"tokenizer/{path.name}": path for path in _model_files(folder, None) if path.suffix not in (".safetensors", ".bin")
        }
    return Inputs(files)


def of_model(spec: ModelSpec) -> Inputs:
    """The files of a model in a local folder; none for any other.

    Raises:
        MissingError: the folder is not there.
    """
    local = spec.folder
    files = [] if local is None else _model_files(local, spec.gguf_file)
    return Inputs({f"model/{path.name}": path for path in files})


def _prompt_file(name: str) -> Path:
    path = path_of(name)
    if path.is_dir():
        raise MissingError(f"prompts: `{name}` is a folder, not a file")
    if not path.exists():
        raise MissingError(f"prompts: there is no file `{name}`")
    if not path.is_file():
        raise UsageError(
            f'prompts: `{name}` is a pipe or a device, which can be read only once; write `file: "-"` and pipe it in'
        )
    return path


def _model_files(folder: Path, gguf: str | None) -> list[Path]:
    files = [path for path in sorted(folder.iterdir()) if path.is_file() and path.suffix in _MODEL_SUFFIXES]
    files = [path for path in files if not path.name.startswith(_NOT_MODEL)]
    return [*files, folder / gguf] if gguf is not None else files


def sha256(path: Path, stopping: Callable[[], bool] = lambda: False) -> str:
    """sha256 of a file, read in pieces.

    Args:
        stopping: asked before every piece; `True` ends it, and the result is that of the pieces so far.
    """
    digest = hashlib.sha256()
    piece = memoryview(bytearray(1 << 20))
    with path.open("rb", buffering=0) as file:
        while not stopping() and (size := file.readinto(piece)):
            digest.update(piece[:size])
    return digest.hexdigest()
