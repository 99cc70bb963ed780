"""Where prompts come from: a list in the spec, a .txt or .jsonl file, or standard input; read one by one, never whole."""

import json
import math
from array import array
from codecs import BOM_UTF8
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from actdump.errors import MissingError, SpecError, few
from actdump.spec import PromptsSpec, Row, complaints, path_of


@dataclass(frozen=True)
class Prompt:
    """One row of the input.

    Attributes:
        number: its place, for ever.
        id: the user's id, or the number as text.
        content: text, chat messages, or token ids.
        fields: whatever else the user gave: labels, sources.
        where: where it stands, for messages: `prompts.jsonl:7`.
    """

    number: int
    id: str
    content: str | list[dict[str, Any]] | list[int]
    fields: Mapping[str, Any]
    where: str


def read(spec: PromptsSpec, stdin: Path | None = None) -> Iterator[Prompt]:
    """The prompts in order.

    Args:
        stdin: a file with what standard input held, where the spec names `-`.

    Raises:
        MissingError: the file is not there.
        SpecError: lines are no prompts, or an id is given twice; the message names file and line of the first few.
    """
    ids = _Ids()
    number = -1
    for number, (row, where) in enumerate(_rows(spec, stdin)):
        yield Prompt(number, ids.take(number, row.id, where), row.content, row.fields, where)
    if number < 0:
        raise SpecError(f"{'standard input' if spec.file == '-' else spec.file}: there are no prompts in it")


_json = json.JSONEncoder(ensure_ascii=False, allow_nan=False).encode


def _writable(row: "_Found", where: str) -> "_Found":
    """The row, if what is read back from prompts.jsonl will be what was given.

    Raises:
        SpecError: it would not.
    """
    try:
        _json(row).encode()
        return row
    except UnicodeEncodeError:
        raise SpecError(f"{where}: half a character (a lone surrogate), which is no text") from None
    except ValueError:
        raise SpecError(f"{where}: NaN or an infinite number, which JSON has not; use null") from None
    except TypeError as error:
        raise SpecError(f"{where}: what JSON has not: {error}") from None


MOST, FURTHER = 20, 10_000  # wrong lines, and lines after the first of them, beyond which no more are looked for
_CONTENT = {"text", "messages", "input_ids"}  # what a row calls its prompt


class _Found(NamedTuple):
    """A row that was checked."""

    id: str | None
    content: str | list[dict[str, Any]] | list[int]
    fields: Mapping[str, Any]


def _rows(spec: PromptsSpec, stdin: Path | None) -> Iterator[tuple[_Found, str]]:
    if spec.rows is not None:
        for number, row in enumerate(spec.rows[: spec.limit]):
            where = f"prompts[{number}]"
            yield _writable(_found(row, where), where), where
        return
    json_lines = spec.kind == "jsonl"  # asked once, not for each of a million lines
    wrong: dict[str, list[str]] = {}  # where each fault is
    count, end, rest = 0, math.inf, ""
    for number, (raw, where) in enumerate(islice(_lines(str(spec.file), stdin), spec.limit)):
        if number == end or count == MOST:
            rest = f"\n{where}: here the search for mistakes ended; there may be more"
            break
        try:
            line = _decoded(raw, where)
            found = _writable(_json_row(line, where, spec), where) if json_lines else _checked({"text": line}, where)
        except SpecError as error:
            wrong.setdefault(str(error).removeprefix(f"{where}: "), []).append(where)
            count, end = count + 1, min(end, number + FURTHER)
            continue
        if not wrong:
            yield found, where
    if wrong:
        told = "\n".join(f"{places[0]}: {fault}{_also(places[1:])}" for fault, places in wrong.items())
        raise SpecError(f"{told}{rest}")


def _also(places: Sequence[str]) -> str:
    lines = [place.rpartition(":")[2] for place in places]
    return f" (so in line{'s' * (len(lines) > 1)} {few(lines)})" if lines else ""


def _lines(name: str, stdin: Path | None) -> Iterator[tuple[bytes, str]]:
    path = path_of(name) if stdin is None else stdin
    try:
        file = path.open("rb")
    except FileNotFoundError:
        raise MissingError(f"prompts: there is no file `{name}`") from None
    except IsADirectoryError:
        raise MissingError(f"prompts: `{name}` is a folder, not a file") from None
    shown = name if stdin is None else "standard input"
    with file:
        for number, line in enumerate(file, 1):
            yield line.removeprefix(BOM_UTF8) if number == 1 else line, f"{shown}:{number}"


def _decoded(line: bytes, where: str) -> str:
    try:
        return line.decode().rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise SpecError(f"{where}: not UTF-8 text: {error.reason} at byte {error.start} of the line") from None


def _json_row(line: str, where: str, spec: PromptsSpec) -> _Found:
    try:
        value = _read_json(line)
    except json.JSONDecodeError as error:
        what = f"not JSON: {error.msg} at column {error.colno}" if line.strip() else "the line is empty; remove it"
        one = "; each line is one prompt, and not a part of a list" if line.lstrip().startswith("[") else ""
        raise SpecError(f"{where}: {what}{one}") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; brackets in brackets
        raise SpecError(f"{where}: cannot be read: {error}") from None
    if isinstance(value, str):
        value = {"text": value}
    if not isinstance(value, dict):
        raise SpecError(f"{where}: a line must be a JSON object or text, not {json.dumps(value)[:40]}; one prompt a line")
    names = _CONTENT if spec.text == "text" else {spec.text}
    fields = {name: entry for name, entry in value.items() if name not in names and name != spec.id}
    return _checked(_content(value, where, spec) | _id(value, where, spec), where)._replace(fields=fields)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key `{next(key for key in keys if keys.count(key) > 1)}` is given twice")
    return found


_read_json = json.JSONDecoder(object_pairs_hook=_once).decode


def _content(value: dict[str, Any], where: str, spec: PromptsSpec) -> dict[str, Any]:
    """The prompt in a line, by what it is. Where the user named its field, the usual names are fields like any other."""
    if spec.text == "text":
        found = {name: entry for name, entry in value.items() if name in _CONTENT}
        if not found:
            raise SpecError(
                f"{where}: there is no field `text`, `messages` or `input_ids`; there is {', '.join(value) or 'none'}; "
                "`prompts.text` names another one"
            )
        return found
    if spec.text not in value:
        raise SpecError(
            f"{where}: there is no field `{spec.text}`, which `prompts.text` names; there is {', '.join(value) or 'none'}"
        )
    content = value[spec.text]
    if not isinstance(content, list):
        return {"text": content}
    return {"input_ids" if all(type(entry) is int for entry in content) else "messages": content}


def _id(value: dict[str, Any], where: str, spec: PromptsSpec) -> dict[str, Any]:
    if spec.id not in value and spec.id != "id":
        raise SpecError(
            f"{where}: there is no field `{spec.id}`, which `prompts.id` names; there is {', '.join(value) or 'none'}"
        )
    return {"id": value.get(spec.id)}


def _checked(value: dict[str, Any], where: str) -> _Found:
    try:
        return _found(Row.model_validate(value), where)
    except ValidationError as error:
        first, *_ = next(iter(complaints(error, value).values()))
        raise SpecError(f"{where}: {first}") from None


def _found(row: Row, where: str) -> _Found:
    if row.id == "":
        raise SpecError(f"{where}: the id is empty")
    content = row.text or row.messages or row.input_ids
    assert content is not None
    return _Found(None if row.id is None else str(row.id), content, row.model_extra or {})


class _Ids:
    """The ids so far, kept only where a user gave one, as 64-bit hashes in an open table, so that many millions fit in memory."""

    def __init__(self) -> None:
        self._table: array[int] | None = None
        self._count = 0

    def take(self, number: int, own_id: str | None, where: str) -> str:
        """The id of a prompt; its number where the user gave none."""
        if own_id is None and self._table is None:
            return str(number)
        if self._table is None:
            self._table = _empty(1024)
            for earlier in range(number):
                self._is_new(str(earlier))
        id = str(number) if own_id is None else own_id
        if not self._is_new(id):
            raise SpecError(
                f"{where}: the id `{id}` is given twice; ids must differ (a prompt without an id has its number as id)"
            )
        return id

    def _is_new(self, id: str) -> bool:
        """Whether an id was not there; it is from now on."""
        table = self._table
        assert table is not None
        key = hash(id) or 1  # 0 stands for an empty slot
        if (slot := _slot(table, key)) is None:
            return False
        table[slot] = key
        self._count += 1
        if 2 * self._count > len(table):
            self._grow(table)
        return True

    def _grow(self, table: "array[int]") -> None:
        self._table = larger = _empty(2 * len(table))
        for key in table:
            if key and (slot := _slot(larger, key)) is not None:
                larger[slot] = key


def _empty(size: int) -> "array[int]":
    return array("q", bytes(8 * size))


def _slot(table: "array[int]", key: int) -> int | None:
    """The empty slot for a hash; `None` where the hash is there already."""
    mask = len(table) - 1  # the length is a power of two
    slot = key & mask
    while held := table[slot]:
        if held == key:
            return None
        slot = (slot + 1) & mask
    return slot
