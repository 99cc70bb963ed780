"""The spec as strict models: its keys, their defaults and their short forms."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    PrivateAttr,
    Tag,
    model_validator,
)

from actdump.address import parse
from actdump.errors import AddressError, MissingError
from actdump.tap import Selection, Tap, parse_selection

StorageType = Literal["float64", "float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2"]
Task = Literal["causal-lm", "masked-lm", "base", "text-encoding"]
Kind = Literal["txt", "jsonl"]
KINDS = get_args(Kind)


LOCAL = "local files"  # stands in a decisive spec for a path, because contents count and not names


def path_of(name: str) -> Path:
    """The path that a name means, `~` as in a shell: only what begins with it, and only where there is such a user."""
    return Path(os.path.expanduser(name))  # noqa: PTH111 # Path's own takes `./~a` for a user's, and raises where there is none


def kind_of(value: Any) -> str:
    """The type of a YAML value in words."""
    names = {
        bool: "true/false",
        int: "a number",
        float: "a number",
        str: "text",
        list: "a list",
        dict: "a mapping",
        type(None): "nothing",
    }
    return names.get(type(value), type(value).__name__)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


def _text_of(key: str) -> Any:
    """Read `key: text` where the short form is the text alone."""
    return lambda value: {key: value} if isinstance(value, str) else value


def _auto_or_count(value: Any) -> str | None:
    """Which of the two a value is meant to be."""
    return "auto" if value == "auto" else "count" if isinstance(value, int) else None


Name = Annotated[str, Field(min_length=1)]
Count = Annotated[int, Field(ge=1, le=2**63 - 1)]
NotNegative = Annotated[int, Field(ge=0, le=2**63 - 1)]
AutoOrCount = Annotated[
    Annotated[Literal["auto"], Tag("auto")] | Annotated[Count, Tag("count")],
    Discriminator(
        _auto_or_count,
        custom_error_type="auto_or_count",
        custom_error_message="must be a whole number, or auto",
        custom_error_context={},
    ),
]

_UNITS = {
    "": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40,
}  # fmt: skip


def _bytes(value: Any) -> Any:
    """Read `1 GB`, `500MB`, `2GiB`, or a number of bytes."""
    if not isinstance(value, str):
        return value
    found = re.fullmatch(r"\s*(\d{1,18}(?:\.\d{1,18})?)\s*([kmgt]?i?b?)\s*", value.lower())
    if found is None or found[2] not in _UNITS:
        raise ValueError('must be a size such as "1 GB", "500 MB" or a number of bytes')
    return int(float(found[1]) * _UNITS[found[2]])


def _address(value: str) -> str:
    try:
        parse(value)
    except AddressError as error:
        raise ValueError(str(error)) from None
    return value


def _selection(value: Any) -> Any:
    try:
        parse_selection(value)
    except AddressError as error:
        raise ValueError(str(error)) from None
    return value


Selected = Annotated[str | list[int] | None, BeforeValidator(_selection, json_schema_input_type=str | list[int])]


class ModelSpec(_Strict):
    """Which model, and how it is loaded."""

    name: Name | None = Field(None, description="hub id or local folder")
    revision: str | None = Field(None, description="branch, tag or commit on the hub")
    task: Task | None = Field(
        None, description="which Auto class, text-encoding the encoder of T5, say; default from the config"
    )
    dtype: Literal["auto", "float64", "float32", "bfloat16", "float16"] = Field("auto", description="auto: the checkpoint's")
    device: str = Field("auto", description="cpu, cuda, cuda:1, mps; auto: an accelerator where there is one")
    attn_implementation: str | None = Field(None, description="eager, sdpa, flash_attention_2 …")
    gguf_file: str | None = Field(None, description="a GGUF file in the folder or repository")
    device_map: str | dict[str, int | str] | None = Field(
        None, description="spread over devices by accelerate, as in from_pretrained"
    )
    trust_remote_code: bool = Field(False, description="run code that comes with the model")
    config: str | dict[str, Any] | None = Field(
        None, description="random weights from this config (a mapping with model_type, or a folder)"
    )
    seed: int = Field(
        0, ge=-(2**63), lt=2**64, description="the seed of random weights, those that a checkpoint lacks among them"
    )

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.name is None) == (self.config is None):
            raise ValueError("needs `name` (a hub id or a local folder) or `config` (random weights), and not both")
        if isinstance(self.config, dict) and not isinstance(self.config.get("model_type"), str):
            raise ValueError("config: needs `model_type`, such as gpt2 or llama")
        if self.config is not None and self.device_map is not None:
            raise ValueError("`device_map` spreads the weights of a checkpoint; for random weights (`config`) use `device`")
        if self.config is not None and self.gguf_file is not None:
            raise ValueError("`gguf_file` is a file of weights; leave it out for random weights (`config`)")
        if isinstance(self.config, dict) and self.revision is not None:
            raise ValueError("`revision` is of a model on the hub; a config that is written here has none")
        return self

    @property
    def source(self) -> str | None:
        """The hub id or folder that the config comes from; `None` for a config written in the spec."""
        return self.name if self.name is not None else self.config if isinstance(self.config, str) else None

    @property
    def folder(self) -> Path | None:
        """The local folder that the model comes from, if it comes from one.

        Raises:
            MissingError: the name can only be a path, and nothing is there.
        """
        if self.source is None:
            return None
        path = path_of(self.source)
        if path.is_dir():
            return path
        if self.source.startswith((".", "/", "~")) or self.source.count("/") > 1 or path.exists():
            raise MissingError(f"model: `{self.source}` is not a folder with a model")
        return None


class Row(BaseModel):
    """A prompt: one of `text`, `messages` and `input_ids`, perhaps an `id`, and any further fields, which are carried along."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True)

    id: str | int | None = None
    text: str | None = None
    messages: list[dict[str, Any]] | None = None
    input_ids: list[int] | None = None

    @model_validator(mode="after")
    def _one_content(self) -> Self:
        given = [name for name in ("text", "messages", "input_ids") if getattr(self, name) is not None]
        if len(given) != 1:
            fields = (
                f" (only `{'`, `'.join(self.model_extra)}`; text that holds `: ` needs quotes)"
                if self.model_extra and not given
                else ""
            )
            raise ValueError(
                f"a prompt needs exactly one of `text`, `messages` and `input_ids`; this has {' and '.join(given) or 'none'}{fields}"
            )
        if not getattr(self, given[0]) or (self.text is not None and not self.text.strip()):
            raise ValueError("an empty prompt; remove it, or say what it should be")
        return self


def _row(value: Any) -> Any:
    if isinstance(value, str) and _is_prompt_file(value):
        raise ValueError(
            f"`{value}` is a file; write `prompts: {{file: {value}}}`, or `text: {value}` if the prompt is this very text"
        )
    if isinstance(value, str | Mapping | Row):
        return _text_of("text")(value)
    shown = str(value) if len(str(value)) <= 60 else f"{str(value)[:57]}…"
    raise ValueError(f"a prompt is text or a mapping, not {kind_of(value)} `{shown}`; put quotes around it if it is text")


def _is_prompt_file(text: str) -> bool:
    named = text.endswith(tuple(f".{kind}" for kind in KINDS))
    return named and os.path.isfile(path_of(text))  # noqa: PTH113 # Path's own raises where a text is too long for a name


PromptRow = Annotated[Row, BeforeValidator(_row, json_schema_input_type=str | Row)]


class PromptsSpec(_Strict):
    """Where the prompts come from: a list, or a file."""

    rows: list[PromptRow] | None = None
    file: Name | None = Field(None, description="a .txt (one prompt a line) or .jsonl file, or - for standard input")
    format: Kind | None = Field(None, description="what the file holds; default from its name")
    text: str = Field("text", description="the field of a .jsonl line that holds the prompt: text, messages or token ids")
    id: str = Field("id", description="the field of a .jsonl line that holds the prompt's id")
    limit: Count | None = Field(None, description="take the first so many")

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.rows is None and self.file is None:
            raise ValueError("needs a list of prompts, or `file`")
        if self.rows is not None and self.file is not None:
            raise ValueError("needs a list of prompts or `file`, not both")
        if self.rows == []:
            raise ValueError("the list is empty")
        if self.rows is not None and (about := {"format", "text", "id"} & self.model_fields_set):
            raise ValueError(f"only a file has `{'` and `'.join(sorted(about))}`, and here is a list of prompts")
        if self.file is not None and self.kind is None:
            raise ValueError(
                f"the name `{self.file}` does not end in .txt (a prompt a line) or .jsonl (a JSON object or text a line), and nothing "
                "else is read; if it holds one of these under another name, say so with `format: txt` or `format: jsonl`"
            )
        return self

    @property
    def kind(self) -> str | None:
        """What the file holds: `txt` or `jsonl`."""
        suffix = Path(self.file or "").suffix.removeprefix(".")
        return self.format or (suffix if suffix in KINDS else None)


def _prompts(value: Any) -> Any:
    if isinstance(value, str):
        raise ValueError(f"must be a list of prompts, or `file: {value}` for a file of them")
    return {"rows": value} if isinstance(value, list) else value


def _template(value: str) -> str:
    if "{{" not in value and "{%" not in value:
        raise ValueError(
            "holds no `{{` or `{%`, so it is no template; what stands here is the template itself, not the name of a file"
        )
    return value


class TokenizerSpec(_Strict):
    """How text becomes token ids."""

    name: Name | None = Field(None, description="another model's tokenizer: hub id or local folder")
    add_special_tokens: bool = True
    max_length: Count | None = Field(None, description="the most tokens a prompt may have; default: the model's limit")
    truncation: bool = Field(False, description="cut what is too long, instead of stopping with an error")
    chat_template: Annotated[str, AfterValidator(_template)] | None = Field(
        None, description="a Jinja template for `messages`, instead of the tokenizer's own"
    )
    add_generation_prompt: bool = Field(False, description="end `messages` with the start of the assistant's turn")


class SaveSpec(_Strict):
    """What to keep at one address."""

    name: Name | None = None
    address: Annotated[str, AfterValidator(_address)]
    tokens: Selected = None
    dtype: StorageType | None = None
    call: int | None = Field(None, description="which call of a module that runs several times in a forward; -1 is the last")

    @property
    def tap(self) -> Tap:
        """The tap, its address as written."""
        selection = None if self.tokens is None else parse_selection(self.tokens)
        return Tap(self.name or self.address, parse(self.address), selection, self.dtype, self.call)


SaveEntry = Annotated[SaveSpec, BeforeValidator(_text_of("address"), json_schema_input_type=str | SaveSpec)]


def _save(value: Any) -> Any:
    if isinstance(value, str):
        raise ValueError(
            f"must be a list of addresses, or a mapping of names to addresses; write `- {value}` on a line of its own"
        )
    if isinstance(value, Mapping):
        if several := next((name for name, entry in value.items() if isinstance(entry, list)), None):
            raise ValueError(f"`{several}` is the name of one address, not of a list; give each a name of its own")
        for name, entry in value.items():
            if isinstance(entry, Mapping) and entry.get("name", name) != name:
                raise ValueError(
                    f"`{name}` is the name of one address, which its own `name: {entry['name']}` contradicts; give it one"
                )
        return [
            {"name": name, **(entry if isinstance(entry, Mapping) else {"address": entry})} for name, entry in value.items()
        ]
    return value


class BatchSpec(_Strict):
    """How large a batch may be."""

    tokens: AutoOrCount = Field("auto", description="padded tokens in a batch")
    prompts: Count | None = Field(None, description="prompts in a batch")


class ShardSpec(_Strict):
    """How large a shard may be, and a part, which is a few shards: the unit of work, and what an interruption can lose."""

    size: Annotated[Count, BeforeValidator(_bytes, json_schema_input_type=int | str)] = Field(
        10**9, description="bytes in a shard, or 1 GB"
    )
    tokens: Count = Field(262_144, description="tokens in a part, which is a few shards")


def _names(save: list[SaveSpec]) -> list[SaveSpec]:
    if not save:
        raise ValueError("the list is empty; name at least one address")
    names = [entry.tap.name for entry in save]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two taps are called `{name}`; use the mapping form to give each a name")
        if name in ("tokens", "__metadata__") or name.endswith(".offsets"):
            raise ValueError(f"the name `{name}` is taken by the format itself; choose another")
    return save


Where = tuple[str | int, ...]


class Spec(_Strict):
    """What to run and what to keep."""

    model: Annotated[ModelSpec, BeforeValidator(_text_of("name"), json_schema_input_type=str | ModelSpec)]
    prompts: Annotated[PromptsSpec, BeforeValidator(_prompts, json_schema_input_type=list[PromptRow] | PromptsSpec)]
    tokenizer: Annotated[TokenizerSpec, BeforeValidator(_text_of("name"), json_schema_input_type=str | TokenizerSpec)] = (
        TokenizerSpec()
    )
    save: Annotated[
        list[SaveEntry],
        AfterValidator(_names),
        BeforeValidator(_save, json_schema_input_type=list[SaveEntry] | dict[str, str | SaveSpec]),
    ]
    tokens: Selected = Field(
        None, description="which tokens to keep where a tap does not say: all, first, last, mean, positions, a slice"
    )
    dtype: StorageType | None = Field(
        None, description="storage type of floating point taps that name none; default: as computed"
    )
    batch: BatchSpec = BatchSpec()
    shard: ShardSpec = ShardSpec()
    nonfinite: Literal["report", "error"] = Field(
        "report", description="what to do about values that the model itself makes NaN or infinite"
    )
    audit: NotNegative = Field(2, description="how many prompts to run again alone, and compare with the files; 0: none")
    output: str | None = Field(None, description="the folder to write")

    _lines: dict[Where, str] = PrivateAttr(default_factory=dict)

    @property
    def selection(self) -> Selection | None:
        """The token selection of taps that name none."""
        return None if self.tokens is None else parse_selection(self.tokens)

    def decisive(self) -> dict[str, Any]:
        """The part of the spec that decides the bytes, its local files apart (their contents count, not their names)."""
        plain = self.model_dump(
            mode="json",
            exclude={"output": True, "nonfinite": True, "audit": True, "model": {"device", "device_map"}},
            exclude_defaults=True,
        )
        if self.model.folder is not None:
            plain["model"]["name" if self.model.name is not None else "config"] = LOCAL
        if self.prompts.file is not None:
            plain["prompts"].update(file=LOCAL, format=self.prompts.kind)
        if self.tokenizer.name is not None and path_of(self.tokenizer.name).is_dir():
            plain["tokenizer"]["name"] = LOCAL
        return plain

    def located(self, message: str) -> str:
        """A message about taps, prompts or keys of this spec, each line with the file and line that it is about, if known."""
        return "\n".join(f"{place}: {line}" if (place := self._place(line)) else line for line in message.splitlines())

    def _place(self, message: str) -> str | None:
        """The place of the tap or the key that a message begins with: `model.config: …`, `prompts[3]: …`."""
        for about in (_names_entry, _names_pattern):
            for number, entry in enumerate(self.save):
                if about(entry, message):
                    return self._line(("save", number), ("save", entry.name or ""), ("save",))
        found = re.match(r"([a-z_]+)((?:\.\w+|\[\d+\])*): ", message)
        if found is None or found[1] not in Spec.model_fields:
            return None
        parts = (int(part) if part.isdecimal() else part for part in re.findall(r"\w+", found[2]))
        where = (found[1], *parts)
        return self._line(*(where[:size] for size in range(len(where), 0, -1)))

    def _line(self, *places: Where) -> str | None:
        return next((self._lines[where] for where in places if where in self._lines), None)


def _names_entry(entry: SaveSpec, message: str) -> bool:
    return any(message.startswith(f"{name}: ") for name in (entry.name, entry.address) if name)


def _names_pattern(entry: SaveSpec, message: str) -> bool:
    """Whether a message begins with an address that the entry's pattern stands for: `transformer.h[3].output: …`."""
    if not entry.tap.address.many:
        return False
    pattern = re.sub(r"\\\[.*?\\\]", r"\\[[^]]*\\]", re.escape(entry.address)).replace(r"\.\*", r"\.\w+")
    return re.match(pattern + ": ", message) is not None
