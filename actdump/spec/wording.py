"""What is wrong with a spec, in words: pydantic's complaints as a user of the spec would tell them."""

import re
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

from actdump.errors import did_you_mean
from actdump.spec.models import BatchSpec, ModelSpec, PromptsSpec, SaveSpec, ShardSpec, Spec, TokenizerSpec, Where, kind_of

_SECTIONS: dict[Where, type[BaseModel]] = {
    (): Spec, ("model",): ModelSpec, ("prompts",): PromptsSpec, ("tokenizer",): TokenizerSpec,
    ("batch",): BatchSpec, ("shard",): ShardSpec,
}  # fmt: skip
_SHORT_FORMS: dict[Where, str] = {
    ("model",): "a name", ("prompts",): "a list of prompts", ("tokenizer",): "a name", ("save",): "a mapping of names to addresses",
}  # fmt: skip
LISTED = "rows"  # where a list of prompts stands once it is lifted into a mapping; users write the list alone
_EXPECTED = {
    "string_type": "text", "int_type": "a whole number", "bool_type": "true or false", "list_type": "a list",
    "dict_type": "a mapping", "model_type": "a mapping", "model_attributes_type": "a mapping",
}  # fmt: skip


def complaints(error: ValidationError, data: Any, within: Where = ()) -> dict[Where, list[str]]:
    """Pydantic's complaints in our words, by the place that they are about.

    Args:
        data: what was looked at.
        within: the part of a spec that it is.
    """
    found: dict[Where, list[Any]] = {}
    for each in error.errors():
        found.setdefault((*within, *_place(each["loc"], data)), []).append(each)
    return {where: _told(errors, where) for where, errors in found.items()}


def _place(loc: Sequence[str | int], data: Any) -> Where:
    """Where pydantic's location stands in the data: without the names of union members and of short forms lifted."""
    where: Where = ()
    for key in loc:
        if key == LISTED and isinstance(data, list):
            continue
        if where == ("save",) and isinstance(data, dict) and isinstance(key, int):
            key = list(data)[key]
        if isinstance(data, dict) and (key in data or key == loc[-1]):
            where, data = (*where, key), data.get(str(key))
        elif isinstance(data, list) and isinstance(key, int) and key < len(data):
            where, data = (*where, key), data[key]
    return where


def _told(errors: Sequence[Any], where: Where) -> list[str]:
    """Complaints about one place; where it may be of several kinds, one sentence names them all."""
    if len(errors) > 1 and all(error["type"] in _EXPECTED for error in errors):
        kinds = " or ".join(dict.fromkeys(_EXPECTED[error["type"]] for error in errors))
        return [_of_another_kind(errors[0], where, kinds)]
    return [_said(error, where) for error in errors]


def _of_another_kind(error: Any, where: Where, kinds: str) -> str:
    keys = f" of {', '.join(_keys(where))}" if kinds == "a mapping" and where in _SECTIONS else ""
    given, short = error["input"], f"{_SHORT_FORMS[where]}, or " if where in _SHORT_FORMS else ""
    shown = "" if given is None else f" `{_short(given)}`"
    return f"{_key(where)}: must be {short}{kinds}{keys}, not {kind_of(given)}{shown}{_about_quotes(given, kinds)}"


def _about_quotes(given: Any, kinds: str) -> str:
    if kinds == "text" and isinstance(given, int | float):
        return "; write it in quotes"
    numeral = isinstance(given, str) and re.fullmatch("[0-9]+", given) is not None
    return "; write it without quotes" if numeral and kinds == "a whole number" else ""


def _keys(section: Where) -> list[str]:
    return [name for name in _SECTIONS.get(section, SaveSpec).model_fields if name != LISTED]


def _meant(name: str, section: Where) -> str:
    """What a key may have been meant for that a section does not have: the same key of another section, or one that is spelt nearly so."""
    homes = [_key((*home, name)) for home, kind in _SECTIONS.items() if name in kind.model_fields and name != LISTED]
    return f"; did you mean {' or '.join(f'`{home}`' for home in homes)}?" if homes else did_you_mean(name, _keys(section))


def _key(where: Where) -> str:
    """A place as a user writes it: `prompts[3].text`."""
    lifted = where[:1] + where[2:] if where[1:2] == (LISTED,) else where
    parts = (f"[{part}]" if isinstance(part, int) else f".{part}" for part in lifted)
    return "".join(parts).removeprefix(".") or "the spec"


def _said(error: Any, where: Where) -> str:
    """One of pydantic's complaints in our words."""
    key, kind = _key(where), error["type"]
    if kind == "extra_forbidden":
        return f"unknown key `{key}`{_meant(str(where[-1]), where[:-1])}"
    if kind == "missing":
        form = "; an entry is an address, or `{name: …, address: …}`" if (where[0], where[-1]) == ("save", "address") else ""
        return f"`{key}` is missing{form}"
    if kind == "value_error":
        message = str(error["ctx"]["error"])
        return message if not where or message.startswith(f"{key}:") else f"{key}: {message}"
    if kind == "literal_error":
        return f"{key}: `{_short(error['input'])}` is not one of {error['ctx']['expected']}"
    if kind in _EXPECTED:
        return _of_another_kind(error, where, _EXPECTED[kind])
    if kind == "greater_than_equal":
        return f"{key}: must be {error['ctx']['ge']} or more"
    if kind == "less_than_equal":
        return f"{key}: must be {error['ctx']['le']} or less"
    if kind == "string_too_short":
        return f"{key}: is empty"
    if kind == "string_unicode":
        return f"{key}: half a character (a lone surrogate), which is no text"
    return f"{key}: {error['msg']}"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "…"
