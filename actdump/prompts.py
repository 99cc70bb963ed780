"""Where prompts come from: a list in the spec, a .txt or .jsonl file, or standard input; read one by one, never whole."""

import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from actdump.errors import MissingError, SpecError
from actdump.spec import PromptsSpec, Row, said


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
        stdin: a file with what standard input held, where the spec names `-` and it was kept.

    Raises:
        MissingError: the file is not there.
        SpecError: a line is no prompt, or an id is given twice; the message names file and line.
    """
    ids = _Ids()
    count = 0
    for number, (row, where) in enumerate(islice(_rows(spec, stdin), spec.limit)):
        count += 1
        if row.id == "":
            raise SpecError(f"{where}: the id is empty")
        content = row.text or row.messages or row.input_ids
        assert content is not None
        own_id = None if row.id is None else str(row.id)
        yield Prompt(number, ids.take(number, own_id, where), content, row.model_extra or {}, where)
    if count == 0:
        raise SpecError(f"{'standard input' if spec.file == '-' else spec.file}: there are no prompts in it")


def _rows(spec: PromptsSpec, stdin: Path | None) -> Iterator[tuple[Row, str]]:
    if spec.rows is not None:
        yield from ((row, f"prompts[{place}]") for place, row in enumerate(spec.rows))
        return
    for line, where in _lines(str(spec.file), stdin):
        yield (_json_row(line, where, spec) if spec.kind == "jsonl" else _checked({"text": line}, where)), where


def _lines(name: str, stdin: Path | None) -> Iterator[tuple[str, str]]:
    shown = "standard input" if name == "-" else name
    if name == "-" and stdin is None:
        yield from _decoded(sys.stdin.buffer, shown)
        return
    path = stdin if name == "-" and stdin is not None else Path(name).expanduser()
    try:
        file = path.open("rb")
    except FileNotFoundError:
        raise MissingError(f"prompts: there is no file `{name}`") from None
    except IsADirectoryError:
        raise MissingError(f"prompts: `{name}` is a folder, not a file") from None
    with file:
        yield from _decoded(file, shown)


def _decoded(file: Any, name: str) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(file, 1):
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n"), f"{name}:{number}"
        except UnicodeDecodeError as error:
            raise SpecError(f"{name}:{number}: not UTF-8 text: {error.reason} at byte {error.start} of the line") from None


def _json_row(line: str, where: str, spec: PromptsSpec) -> Row:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        blank = "the line is empty; remove it" if not line.strip() else f"not JSON: {error.msg} at column {error.colno}"
        raise SpecError(f"{where}: {blank}") from None
    if isinstance(value, str):
        value = {"text": value}
    if not isinstance(value, dict):
        raise SpecError(f"{where}: a line must be a JSON object or text, not {json.dumps(value)[:40]}")
    if spec.text != "text":
        value = _renamed_text(value, where, spec.text)
    if spec.id != "id":
        if spec.id not in value:
            raise SpecError(f"{where}: there is no field `{spec.id}`, which `prompts.id` names")
        value = {"id": value[spec.id], **{key: entry for key, entry in value.items() if key not in (spec.id, "id")}}
    return _checked(value, where)


def _renamed_text(value: dict[str, Any], where: str, name: str) -> dict[str, Any]:
    """A row whose prompt is in the field that the user named."""
    if name not in value:
        raise SpecError(
            f"{where}: there is no field `{name}`, which `prompts.text` names; there is {', '.join(value) or 'none'}"
        )
    content = value[name]
    kind = "text"
    if isinstance(content, list):
        kind = "input_ids" if all(type(entry) is int for entry in content) else "messages"
    rest = {key: entry for key, entry in value.items() if key not in (name, "text", "messages", "input_ids")}
    return {kind: content, **rest}


def _checked(value: dict[str, Any], where: str) -> Row:
    try:
        return Row.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        raise SpecError(f"{where}: {said(first, first['loc'])}") from None


@dataclass
class _Ids:
    """The ids so far, as 8-byte hashes, and only where a user gave one, so that millions of them fit in memory."""

    seen: set[int] | None = None

    def take(self, number: int, own_id: str | None, where: str) -> str:
        """The id of a prompt; its number where the user gave none."""
        if own_id is not None and self.seen is None:
            self.seen = {_hash(str(earlier)) for earlier in range(number)}
        id = str(number) if own_id is None else own_id
        if self.seen is not None:
            key = _hash(id)
            if key in self.seen:
                raise SpecError(
                    f"{where}: the id `{id}` is given twice; ids must differ (a prompt without an id has its number as id)"
                )
            self.seen.add(key)
        return id


def _hash(id: str) -> int:
    return int.from_bytes(blake2b(id.encode(), digest_size=8).digest(), "big")
