"""A YAML file on its way to a spec: its data, the line of every value, and its mistakes, told all at once."""

import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from actdump.errors import MissingError, SpecError, UsageError
from actdump.spec.models import ModelSpec, Spec, Where, kind_of
from actdump.spec.wording import LISTED, complaints


def load(path: Path, sets: Sequence[str] = ()) -> Spec:
    """Read a spec file.

    Args:
        sets: `key.path=value` overrides; the value is read as YAML.

    Raises:
        MissingError: the file is not there.
        SpecError: it has mistakes; the message lists all of them.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise MissingError(f"{path}: there is no such file") from None
    except IsADirectoryError:
        raise MissingError(f"{path} is a folder; a spec is a YAML file") from None
    except UnicodeDecodeError as error:
        raise SpecError(f"{path}: not UTF-8 text, which a spec is: {error.reason} at byte {error.start}") from None
    document = _Document(str(path), {**os.environ, "SPEC_DIR": str(path.resolve().parent)})
    document.read(text)
    for override in sets:
        document.set(override)
    return document.checked()


@dataclass
class _Document:
    """A YAML file on its way to a spec: its data, the line of every value, and the mistakes so far.

    Attributes:
        label: what stands for the line of values from the command line, while they are read.
        unclear: the lines of values whose variables are missing or misspelled.
    """

    name: str
    environment: Mapping[str, str]
    label: str = ""
    data: Any = None
    lines: dict[Where, str] = field(default_factory=dict)
    mistakes: list[tuple[str, str]] = field(default_factory=list)
    unclear: set[str] = field(default_factory=set)
    overridden: list[Where] = field(default_factory=list)

    def read(self, text: str) -> None:
        try:
            node = yaml.compose(text, Loader=yaml.SafeLoader)
            self.data = {} if node is None else self._whole(node, ())
        except yaml.MarkedYAMLError as error:
            raise SpecError(self._syntax(error, text)) from None
        except yaml.YAMLError as error:
            raise SpecError(f"{self.name}: not YAML: {error}") from None
        except RecursionError:
            raise SpecError(f"{self.name}: {_ENDLESS}") from None
        if not isinstance(self.data, dict):
            raise SpecError(
                f"{self.name}:1: a spec is a mapping with model, prompts, save and output, not {kind_of(self.data)}"
            )

    def _syntax(self, error: yaml.MarkedYAMLError, text: str) -> str:
        mark, begin = error.problem_mark or error.context_mark, error.context_mark
        line = mark.line if mark else 0
        opened = next((sign for kind, sign in _OPENED.items() if kind in (error.context or "")), None)
        if begin is not None and begin.line < line and opened is not None:
            quoted = ', or an address in it is not quoted, as in "h[0].output"' if "'['" in (error.problem or "") else ""
            return f"{self.name}:{begin.line + 1}: not YAML: the {opened} here is not closed before line {line + 1}{quoted}"
        message = f"{self.name}:{line + 1}: not YAML: {error.problem or error.context}"
        lines = text.splitlines()
        near = lines[line] if line < len(lines) else ""
        if "\\t" in message or near.startswith("\t"):
            message += "; YAML does not allow tabs for indentation"
        elif "${" in near and "got '{'" in message:
            message += "; `${…}` cannot stand inside {…} without quotes: write its key on a line of its own"
        elif re.search(r"[{\[].*\w\[", near):
            message += f'; an address inside {{…}} or […] must be quoted, as in "model.layers[-1].output[0]": {near.strip()}'
        elif re.search(r":\s+-\s*$", near):
            message += '; standard input is written `file: "-"`, with quotes'
        elif "'?'" in message:
            message += "; text that holds ? must be quoted inside {…} or […]"
        elif "<block end>" in message:
            message += "; do the entries of this list, or the keys of this mapping, begin in the same column?"
        return message

    def _whole(self, root: Any, where: Where) -> Any:
        """What a document holds; its keys are looked at before any mapping is merged into another."""
        nodes, known = [root], set[int]()
        while nodes:
            node = nodes.pop()
            if id(node) in known:
                continue
            known.add(id(node))
            if isinstance(node, yaml.MappingNode):
                self._check_keys(node)
                nodes += [entry for _, entry in node.value]
            elif isinstance(node, yaml.SequenceNode):
                nodes += node.value
        return self._value(root, where)

    def _check_keys(self, node: yaml.MappingNode) -> None:
        seen: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(
                    None, None, "a key that is a list or a mapping; text that begins with { or [ must be quoted", key.start_mark
                )
            if key.value in seen and key.tag != "tag:yaml.org,2002:merge":
                self._mistake(self._line_of(key), f"`{key.value}` is given twice, first on line {seen[key.value]}")
            seen[key.value] = key.start_mark.line + 1

    def _value(self, node: Any, where: Where) -> Any:
        self.lines[where] = self._line_of(node)
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, where)
        if isinstance(node, yaml.SequenceNode):
            return [self._value(entry, (*where, place)) for place, entry in enumerate(node.value)]
        return self._scalar(node, where)

    def _mapping(self, node: yaml.MappingNode, where: Where) -> dict[str, Any]:
        yaml.constructor.SafeConstructor().flatten_mapping(node)
        mapping: dict[str, Any] = {}
        for key, entry in node.value:
            mapping[key.value] = self._value(entry, (*where, key.value))
            self.lines[(*where, key.value)] = self._line_of(key)
        return mapping

    def _line_of(self, node: Any) -> str:
        return self.label or f"{self.name}:{node.start_mark.line + 1}"

    def _scalar(self, node: Any, where: Where) -> Any:
        text = node.value
        if node.style is None and re.search(
            r"\n\s*- ", node.start_mark.buffer[node.start_mark.pointer : node.end_mark.pointer]
        ):
            self._mistake(
                self._line_of(node), "this text goes on with `- ` on another line: indent that as this, or quote all of it"
            )
        if where[:1] != ("prompts",) or not any(isinstance(step, int) for step in where):  # a listed prompt is left as it is
            text = self._substituted(text, where)
        if node.style is not None:
            return text
        return _plain_scalar(text)

    def _substituted(self, text: str, where: Where) -> str:
        def value(found: re.Match[str]) -> str:
            if found[0].startswith("$$"):
                return found[0][1:]
            if found[1] is None:
                self.unclear.add(self.lines[where])
                self._mistake(
                    self.lines[where], "what begins with `${` is `${NAME}` or `${NAME:-default}`; `$${` stands for `${` itself"
                )
                return found[0]
            given = self.environment.get(found[1])
            if given is None and found[2] is None:
                self.unclear.add(self.lines[where])
                self._mistake(
                    self.lines[where], f"${{{found[1]}}} is not set in the environment; give a default with ${{{found[1]}:-…}}"
                )
            return given if given else found[2] or ""

        return re.sub(r"\$?\$\{(?:(\w+)(?::-([^}]*))?\})?", value, text)

    def set(self, override: str) -> None:
        """Apply `key.path=value`."""
        path, equals, text = override.partition("=")
        if not equals or not path:
            raise UsageError(f"--set {override}: write it as key=value, as in --set model.dtype=float32")
        self.label = f"--set {path}"
        where: Where = tuple(int(key) if re.fullmatch("[0-9]{1,9}", key) else key for key in path.split("."))
        value = self._given(text, where)
        where = self._long_form(where)
        place: Any = self.data
        for key in where[:-1]:
            try:
                if isinstance(place, dict) and place.get(str(key)) is None:
                    place[str(key)] = {}
                place = place[str(key) if isinstance(place, dict) else key]
            except (KeyError, IndexError, TypeError):
                raise UsageError(f"--set {override}: there is no `{key}` in the spec") from None
        last = str(where[-1]) if isinstance(place, dict) else where[-1]
        try:
            place[last] = value
        except IndexError:
            raise UsageError(f"--set {override}: `{path.rpartition('.')[0]}` has {len(place)} entries, from 0") from None
        except TypeError:
            raise UsageError(f"--set {override}: `{path.rpartition('.')[0]}` has no parts to set") from None
        where = (*where[:-1], last)
        for depth in range(1, len(where)):
            self.lines.setdefault(where[:depth], self.label)
        self.lines[where] = self.label
        self.overridden.append(where)

    def _long_form(self, where: Where) -> Where:
        """Write out a short form that has to hold a part of its own; where the part stands then."""
        key, *inner = where
        short = self.data.get(key)
        if key in ("model", "tokenizer") and inner and isinstance(short, str):
            self.data[key] = {"name": short}
        if key == "save" and len(inner) > 1 and isinstance(address := self._at(where[:2]), str):
            self.data[key][inner[0]] = {"address": address}
        if key == "prompts" and inner and isinstance(inner[0], str) and isinstance(short, list):
            self.data[key] = {LISTED: short}
            self.lines |= {(key, LISTED, *place[1:]): line for place, line in self.lines.items() if place[:1] == (key,)}
        if key == "prompts" and inner and isinstance(inner[0], int) and isinstance(short, dict) and LISTED in short:
            return key, LISTED, *inner
        return where

    def _given(self, text: str, where: Where) -> Any:
        """What the text of an override holds: YAML, or, where it is none, text."""
        self.lines[where] = self.label
        # Standard input, and a slice: YAML takes them for a list and a mapping.
        if text == "-" or re.fullmatch(r"-?\d+:", text):
            return text
        try:
            node = yaml.compose(text, Loader=yaml.SafeLoader)
            return None if node is None else self._whole(node, where)
        except yaml.constructor.ConstructorError as error:
            raise UsageError(f"{self.label}: {error.problem}") from None
        except yaml.YAMLError:
            return self._substituted(text, where)
        except RecursionError:
            raise UsageError(f"{self.label}: {_ENDLESS}") from None

    def _at(self, where: Where) -> Any:
        data = self.data
        for key in where:
            if isinstance(data, list) and isinstance(key, int) and key < len(data):
                data = data[key]
            else:
                data = data.get(key) if isinstance(data, dict) else None
        return data

    def checked(self) -> Spec:
        """The spec, or all mistakes at once."""
        spec = None
        try:
            spec = Spec.model_validate(self.data)
        except ValidationError as error:
            for where, texts in complaints(error, self.data).items():
                if self._line(where) not in self.unclear:  # what follows from a variable is no mistake of its own
                    for text in texts:
                        self._mistake(self._lines(where), text)
        if self.mistakes or spec is None:
            ordered = sorted(self.mistakes, key=lambda mistake: self._order(mistake[0]))
            raise SpecError("\n".join(dict.fromkeys(f"{line}: {text}" for line, text in ordered)))
        spec._lines.update(self.lines)
        return spec

    def _order(self, line: str) -> int:
        """Lines of the file from the top, then overrides."""
        number = line.removeprefix(f"{self.name}:").partition(",")[0]
        return int(number) if number.isdecimal() else sys.maxsize

    def _mistake(self, line: str, text: str) -> None:
        self.mistakes.append((line, text))

    def _lines(self, where: Where) -> str:
        """The line of a value, and the overrides of its parts, any of which may be at fault."""
        parts = [
            self.lines[part] for part in self.overridden if where and len(part) > len(where) and part[: len(where)] == where
        ]
        return ", ".join(dict.fromkeys((self._line(where), *parts)))

    def _line(self, where: Where) -> str:
        while where and where not in self.lines:
            where = where[:-1]
        return self.lines.get(where, f"{self.name}:1")


# What YAML calls a thing that was opened, and how a user sees it.
_OPENED = {"flow sequence": "`[`", "flow mapping": "`{`", "quoted scalar": "quotation mark"}
_ENDLESS = "an alias stands within what it names (as in `&a [*a]`), or lists and mappings are nested too deep"


def _plain_scalar(text: str) -> Any:
    """An unquoted scalar by YAML's rules, without its base-60 numbers (`2:5` is a slice), dates, and octal numbers (`2024-01-01` and
    `007` are ids)."""
    tag: str = yaml.SafeLoader("").resolve(yaml.ScalarNode, text, (True, False))  # type: ignore[no-untyped-call] # its stubs say nothing
    number = tag.endswith((":int", ":float"))
    if tag.endswith((":timestamp", ":merge", ":value")) or (number and (":" in text or re.fullmatch(r"[-+]?0[0-7_]+", text))):
        return text
    try:
        return yaml.constructor.SafeConstructor().construct_object(yaml.ScalarNode(tag, text))
    except ValueError:  # as `0b_`, which is a number by the rule for how one looks alone
        return text


def model_spec(name: str | None, options: Mapping[str, Any]) -> ModelSpec:
    """The `model` part of a spec, from Python.

    Raises:
        UsageError: an option is unknown or wrong.
    """
    given = {"name": name, **options}
    try:
        return ModelSpec.model_validate(given)
    except ValidationError as error:
        texts = complaints(error, given, ("model",)).values()
        raise UsageError("\n".join(text for each in texts for text in each)) from None
