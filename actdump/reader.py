"""A dump being read. Needs no model: `actdump.open("out/eiffel")["model.layers[-1].output[0]"][0]` is a tensor."""

import json
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from operator import index, itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, SupportsIndex, TypeGuard, overload

from actdump.errors import DataError, MissingError, UsageError, did_you_mean
from actdump.format import OFFSETS, TOKENS, Folder, Manifest, Shard, manifest_from_json
from actdump.plan import Column

if TYPE_CHECKING:
    import numpy as np
    import torch

KEPT = 256  # shards that stay mapped: it takes no open file, and what was read of each counts as the process's memory, though it can go


def open_dump(path: str | Path) -> "Dump":
    """Open a finished dump.

    Raises:
        MissingError: the folder holds no finished dump.
        DataError: its manifest cannot be read.
    """
    folder = Folder(Path(path).absolute())  # it is read as needed, and by then the working folder may be another
    if folder.root.is_file():
        raise MissingError(f"{path} is a file; name the folder of a dump")
    if not folder.root.is_dir():
        raise MissingError(f"{path}: there is no such folder")
    if not folder.manifest.is_file():
        unfinished = (
            "the dump in it is not finished; the run that made it goes on with it"
            if folder.plan.is_file()
            else "it holds no dump"
        )
        raise MissingError(f"{path}: {unfinished} (there is no manifest.json)")
    try:
        return Dump(folder, manifest_from_json(json.loads(folder.manifest.read_bytes())))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{folder.manifest}: not a manifest: {error}") from None
    except DataError as error:
        raise DataError(f"{folder.manifest}: {error}") from None


@dataclass(frozen=True)
class PromptRecord:
    """A prompt of a dump.

    Attributes:
        number, id: its place, and the user's id (the number as text where none was given).
        tokens: its token ids.
        content: what the user gave: `text`, `messages` or nothing (token ids).
        fields: the user's own fields.
    """

    number: int
    id: str
    tokens: list[int]
    content: Mapping[str, Any]
    fields: Mapping[str, Any]


class Dump:
    """A finished dump, read lazily: shards are mapped into memory, and only rows that are asked for are read.

    Attributes:
        manifest: the description of the dump.
        names: the taps.
        prompts: the prompts, by number or id.
        shard_at: the shard of a place in the manifest, opened.
    """

    def __init__(self, folder: Folder, manifest: Manifest) -> None:
        self.folder = folder
        self.manifest = manifest
        self.names = [column.name for column in manifest.columns]
        self.prompts = Prompts(self)
        self._firsts = [shard.first for shard in manifest.shards]
        self.shard_at = lru_cache(KEPT)(lambda place: OpenShard(folder, manifest.shards[place]))

    def __getitem__(self, name: str) -> "Values":
        """The values of a tap, by the user's name, the address as written, or the resolved address.

        Raises:
            UsageError: there is no such tap.
        """
        for spelling in ("name", "resolved", "address"):
            found = [column for column in self.manifest.columns if getattr(column, spelling) == name]
            if len(found) == 1:
                return Values(self, found[0])
        raise UsageError(f"{self.folder.root}: there is no tap `{name}`{did_you_mean(str(name), self.names)}")

    def __contains__(self, name: object) -> bool:
        """Whether `dump[name]` is there."""
        try:
            return isinstance(name, str) and bool(self[name].column)
        except UsageError:
            return False

    def __len__(self) -> int:
        return self.manifest.prompts

    def __reduce__(self) -> tuple[Any, ...]:
        """For another process, as of a data loader, which maps the shards for itself."""
        return Dump, (self.folder, self.manifest)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __repr__(self) -> str:
        return (
            f"Dump({str(self.folder.root)!r}: {len(self)} prompts, {self.manifest.tokens} tokens, taps {', '.join(self.names)})"
        )

    def shard_of(self, number: int) -> "OpenShard":
        """The shard that holds a prompt, opened."""
        return self.shard_at(bisect_right(self._firsts, number) - 1)


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
            file: Any = safe_open(path, framework="pt")
        except FileNotFoundError:
            raise DataError(f"{path}: the shard is missing") from None
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


def _is_number(key: object) -> TypeGuard[SupportsIndex]:
    """Whether a key is one number: torch takes a tensor of one axis with one element for one, and Python a truth value."""
    return isinstance(key, SupportsIndex) and not isinstance(key, bool) and not getattr(key, "ndim", 0)


def _number(key: SupportsIndex | str, dump: Dump) -> int:
    """The place of a prompt that is named by its place or, as text, by its id."""
    if isinstance(key, str):
        return dump.prompts.number(key)
    if not _is_number(key):
        raise TypeError(f"prompts are taken by a number, an id or a slice, not by {type(key).__name__}")
    key = index(key)
    if not -len(dump) <= key < len(dump):
        own = f'; an id is text: ["{key}"]' if str(key) in dump.prompts.numbers else ""
        raise IndexError(f"there is no prompt {key}; the dump has {len(dump)}{own}")
    return key % len(dump)


class Values:
    """The values of one tap. `values[i]` and `values["id"]` are a prompt's value, as if it had run alone, batch axis dropped."""

    def __init__(self, dump: Dump, column: Column) -> None:
        self.dump = dump
        self.column = column

    def __len__(self) -> int:
        return len(self.dump)

    @overload
    def __getitem__(self, key: SupportsIndex | str) -> "torch.Tensor": ...

    @overload
    def __getitem__(self, key: slice) -> "list[torch.Tensor]": ...

    def __getitem__(self, key: SupportsIndex | str | slice) -> "torch.Tensor | list[torch.Tensor]":
        """The value of a prompt by number or id, or a list of them for a slice.

        Raises:
            IndexError: there is no prompt of that number.
            UsageError: there is no prompt of that id.
        """
        if isinstance(key, slice):
            return [self[number] for number in range(*key.indices(len(self)))]
        number = _number(key, self.dump)
        shard = self.dump.shard_of(number)
        rows = shard.prompt(self.column.name, number)
        tokens = shard.offsets(TOKENS)
        place = number - shard.shard.first
        return rows.reshape(self.column.layout.shape(tokens[place + 1] - tokens[place])).clone()

    def __iter__(self) -> "Iterator[torch.Tensor]":
        return (self[number] for number in range(len(self)))

    @property
    def rows(self) -> "Rows":
        """The rows of all prompts one after another."""
        return Rows(self.dump, self.column)

    def __repr__(self) -> str:
        layout = self.column.layout
        return f"Values({self.column.name!r}: {len(self)} prompts of {layout.words}, {layout.dtype})"


class Rows:
    """All rows of a tap across prompts and shards; `rows[a:b]` and `rows[numbers]` read what they need and nothing more."""

    def __init__(self, dump: Dump, column: Column) -> None:
        self.dump = dump
        self.column = column
        self._firsts = [0]
        for shard in dump.manifest.shards:
            self._firsts.append(self._firsts[-1] + shard.rows[column.name])

    def __len__(self) -> int:
        return self._firsts[-1]

    @property
    def shape(self) -> tuple[int, ...]:
        """(rows, …)."""
        return (len(self), *self.column.layout.row)

    def __getitem__(self, key: "SupportsIndex | slice | Sequence[int] | torch.Tensor | np.ndarray") -> "torch.Tensor":
        """One row; or a range of rows, or those of several numbers in any order, as one tensor.

        Raises:
            IndexError: there is no such row.
        """
        import torch

        if _is_number(key):
            first = self._place(index(key))
            return next(self._pieces(first, first + 1))[0].clone()
        if not isinstance(key, slice):
            return self._gathered(self._places(key))
        first, last, step = key.indices(len(self))
        if step < 0:
            raise ValueError("rows cannot be read backwards")
        pieces = list(self._pieces(first, last))
        empty = torch.empty((0, *self.column.layout.row), dtype=getattr(torch, self.column.layout.dtype))
        if len(pieces) == 1:
            return pieces[0][::step].clone()
        return torch.cat(pieces)[::step] if pieces else empty

    def where(self, row: int) -> tuple[int, int]:
        """The number of the prompt that a row belongs to, and which of the prompt's rows it is: with all tokens, its token.

        Raises:
            IndexError: there is no such row.
        """
        row = self._place(row)
        place = bisect_right(self._firsts, row) - 1
        shard = self.dump.shard_at(place)
        offsets = shard.offsets(self.column.name)
        prompt = bisect_right(offsets, row - self._firsts[place]) - 1
        return shard.shard.first + prompt, row - self._firsts[place] - offsets[prompt]

    def _place(self, number: int) -> int:
        if not -len(self) <= number < len(self):
            raise IndexError(f"there is no row {number}; the tap has {len(self)}")
        return number % len(self)

    def _places(self, key: Any) -> list[int]:
        """The numbers of rows that were given in a list, a tensor or an array of one axis."""
        import torch

        numbers = key.tolist() if isinstance(key, torch.Tensor) or hasattr(key, "__array__") else key
        if not isinstance(numbers, list | tuple | range) or not all(map(_is_number, numbers)):
            raise TypeError(f"rows are taken by a number, a slice, or a list, tensor or array of numbers, not by {key!r}")
        return [self._place(index(number)) for number in numbers]

    def _gathered(self, places: Sequence[int]) -> "torch.Tensor":
        import torch

        rows = torch.empty((len(places), *self.column.layout.row), dtype=getattr(torch, self.column.layout.dtype))
        for target, place in sorted(enumerate(places), key=itemgetter(1)):  # shard by shard
            rows[target] = next(self._pieces(place, place + 1))[0]
        return rows

    def _pieces(self, first: int, last: int) -> "Iterator[torch.Tensor]":
        """The rows from one number to another, as each shard has them."""
        for place in range(bisect_right(self._firsts, first) - 1, len(self.dump.manifest.shards)):
            begin, end = max(first, self._firsts[place]), min(last, self._firsts[place + 1])
            if begin >= last:
                return
            if begin < end:
                shard = self.dump.shard_at(place)
                yield shard.rows(self.column.name, begin - self._firsts[place], end - self._firsts[place])


class Prompts:
    """The prompts of a dump, by number or id; prompts.jsonl is read as needed."""

    def __init__(self, dump: Dump) -> None:
        self.dump = dump

    def __len__(self) -> int:
        return len(self.dump)

    def _file(self) -> BinaryIO:
        path = self.dump.folder.prompts
        try:
            if path.stat().st_size != self.dump.manifest.facts["prompts"]["bytes"]:
                raise self._damaged
            return path.open("rb")
        except OSError as error:
            raise DataError(f"{path}: {error.strerror}; `actdump run --repair` makes it again") from None

    @cached_property
    def _places(self) -> list[int]:
        """Where each line begins."""
        places = [0]
        with self._file() as file:
            for line in file:
                places.append(places[-1] + len(line))
        if len(places) != len(self) + 1:
            raise self._damaged
        return places[:-1]

    @cached_property
    def numbers(self) -> dict[str, int]:
        """The number of each prompt by its id, in order."""
        with self._file() as file:
            found = {(line := self._line(text))["id"]: line["number"] for text in file}
        if len(found) != len(self):
            raise self._damaged
        return found

    @property
    def _damaged(self) -> DataError:
        return DataError(f"{self.dump.folder.prompts}: damaged; `actdump run --repair` makes it again")

    def _line(self, text: bytes) -> dict[str, Any]:
        """What a line holds.

        Raises:
            DataError: it was damaged.
        """
        try:
            line: dict[str, Any] = json.loads(text)
            return {"number": line["number"], "id": line["id"], **line}
        except (ValueError, KeyError, TypeError):
            raise self._damaged from None

    def number(self, id: str) -> int:
        """The number of the prompt with that id.

        Raises:
            UsageError: there is none.
        """
        if id not in self.numbers:
            raise UsageError(f"there is no prompt with the id `{id}`{did_you_mean(id, self.numbers)}")
        return self.numbers[id]

    @overload
    def __getitem__(self, key: SupportsIndex | str) -> PromptRecord: ...

    @overload
    def __getitem__(self, key: slice) -> list[PromptRecord]: ...

    def __getitem__(self, key: SupportsIndex | str | slice) -> PromptRecord | list[PromptRecord]:
        """A prompt by number or id, or a list of them for a slice."""
        if isinstance(key, slice):
            return [self[number] for number in range(*key.indices(len(self)))]
        number = _number(key, self.dump)
        with self._file() as file:
            file.seek(self._places[number])
            return self._record(number, file.readline())

    def _record(self, number: int, text: bytes) -> PromptRecord:
        line = self._line(text)
        tokens = self.dump.shard_of(number).prompt(TOKENS, number).tolist()
        content: dict[str, Any] = {name: line[name] for name in ("text", "messages") if name in line}
        return PromptRecord(number, line["id"], tokens, content, line.get("fields", {}))

    def __contains__(self, key: object) -> bool:
        """Whether there is a prompt of that id, or number."""
        return key in self.numbers if isinstance(key, str) else _is_number(key) and -len(self) <= index(key) < len(self)

    def __iter__(self) -> Iterator[PromptRecord]:
        with self._file() as file:
            for number, _ in enumerate(self._places):
                yield self._record(number, file.readline())
