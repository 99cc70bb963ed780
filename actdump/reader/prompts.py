"""The prompts of a dump."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from operator import index
from typing import TYPE_CHECKING, Any, BinaryIO, SupportsIndex, overload

from actdump.errors import DataError, UsageError, did_you_mean
from actdump.format import TOKENS
from actdump.reader.keys import is_number, prompt_number

if TYPE_CHECKING:
    from actdump.reader.dump import Dump


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


class Prompts:
    """The prompts of a dump, by number or id; prompts.jsonl is read as needed."""

    def __init__(self, dump: "Dump") -> None:
        self.dump = dump

    def __len__(self) -> int:
        return self.dump.manifest.prompts

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
        number = prompt_number(key, self.dump)
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
        return key in self.numbers if isinstance(key, str) else is_number(key) and -len(self) <= index(key) < len(self)

    def __iter__(self) -> Iterator[PromptRecord]:
        with self._file() as file:
            for number, _ in enumerate(self._places):
                yield self._record(number, file.readline())
