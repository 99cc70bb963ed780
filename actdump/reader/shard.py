"""A finished shard, mapped into memory."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from actdump.errors import DataError, StorageError
from actdump.format import OFFSETS, Folder, Shard

if TYPE_CHECKING:
    import torch


@dataclass
class OpenShard:
    """A shard, mapped into memory when it is first asked for something."""

    folder: Folder
    shard: Shard
    _offsets: dict[str, Sequence[int]] = field(default_factory=dict)
    _tensors: "dict[str, torch.Tensor]" = field(default_factory=dict)

    @cached_property
    def file(self) -> Any:
        from safetensors import safe_open

        path = self.folder.shard(self.shard.number)
        try:
            path.open("rb").close()  # of every file that it cannot open, safetensors says that it is missing
            file: Any = safe_open(path, framework="pt")
        except FileNotFoundError:
            raise DataError(f"{path}: the shard is missing") from None
        except OSError as error:
            raise StorageError(f"{path}: cannot be read: {error.strerror}") from error
        except Exception as error:  # safetensors raises its own error types
            raise DataError(f"{path}: not a whole safetensors file: {error}") from error
        if (file.metadata() or {}).get("digest") != self.shard.digest:
            raise DataError(f"{path}: a shard of another dump; was the dump made anew since it was opened? Open it again")
        return file

    def offsets(self, name: str) -> Sequence[int]:
        """The first row of each prompt of the shard, and the number of rows."""
        if name not in self._offsets:
            self._offsets[name] = self.file.get_tensor(name + OFFSETS).tolist()
        return self._offsets[name]

    def rows(self, name: str, first: int, last: int) -> "torch.Tensor":
        """Rows as they are mapped; hand out copies, because what is written into these shows in every later read."""
        if name not in self._tensors:
            self._tensors[name] = self.file.get_tensor(name)
        return self._tensors[name][first:last]

    def prompt(self, name: str, number: int) -> "torch.Tensor":
        """The rows of a prompt."""
        offsets = self.offsets(name)
        place = number - self.shard.first
        return self.rows(name, offsets[place], offsets[place + 1])
