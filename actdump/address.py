"""Addresses: places in a model, as text. `transformer.h[-1].output[0]` is a module path, a port, and items into the value.

    address = [ module "." ] port { item }
    module  = step { step }, the first without its dot
    step    = "." name | "['" name "']" | "[" int "]" | "[" slice "]" | "[*]" | ".*"
    port    = "output" | "outputs" | "input" | "inputs"
    item    = "[" int "]" | "[" "'key'" "]" | "." key | "[" tensor index "]"

The port is the last port word outside brackets, because a module may have a child with such a name (BERT has `output`).
Nothing here evaluates text, and nothing here needs torch: a module is whatever has `_modules`, as torch's have.
"""

import ast
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from types import EllipsisType
from typing import Any, Literal, Protocol, cast

from actdump.errors import AddressError, did_you_mean

Port = Literal["output", "outputs", "input", "inputs"]
PORTS: tuple[Port, ...] = ("output", "outputs", "input", "inputs")


class Tree(Protocol):
    """The part of `torch.nn.Module` that an address needs: the modules in it by name."""

    @property
    def _modules(self) -> Mapping[str, Any]: ...


def children(tree: Tree) -> dict[str, Any]:
    """The modules in a module by name. Unlike `named_children()`, it has one that stands there twice twice, as numbers count it."""
    return {name: child for name, child in tree._modules.items() if child is not None}


@dataclass(frozen=True)
class Slice:
    """A slice that can be hashed, compared and written: `4:8`, `::4`, `-3:`."""

    start: int | None = None
    stop: int | None = None
    step: int | None = None

    def __str__(self) -> str:
        text = f"{_blank(self.start)}:{_blank(self.stop)}"
        return text if self.step is None else f"{text}:{self.step}"

    def of(self, size: int) -> range:
        """The positions that the slice picks from an axis of that size."""
        return range(size)[slice(self.start, self.stop, self.step)]


def _blank(number: int | None) -> str:
    return "" if number is None else str(number)


@dataclass(frozen=True)
class Child:
    """`.name` in a module path, or `.key` after a port."""

    name: str


@dataclass(frozen=True)
class Nth:
    """`[5]`: an entry of a list of modules, or of a tuple, or a position in a tensor."""

    number: int


@dataclass(frozen=True)
class Some:
    """`[4:8]` in a module path: a range of entries."""

    entries: Slice


@dataclass(frozen=True)
class Every:
    """`[*]` or `.*` in a module path: every child."""

    bracket: bool


@dataclass(frozen=True)
class Key:
    """`['logits']`: an entry of a mapping."""

    key: str


@dataclass(frozen=True)
class Index:
    """`[:, -1]`: an index into a tensor, done on each prompt's own value of shape `(1, tokens, …)`."""

    entries: tuple[int | Slice | EllipsisType, ...]


Step = Child | Nth | Some | Every
Item = Nth | Key | Child | Index


@dataclass(frozen=True)
class Address:
    """A place in a model; `str(address)` is its text and `parse` its inverse."""

    module: tuple[Step, ...]
    port: Port
    items: tuple[Item, ...] = ()

    def __str__(self) -> str:
        dot = "." if self.module else ""
        return path_text(self.module) + dot + self.port + "".join(written(item) for item in self.items)

    @property
    def path(self) -> str:
        """The module path alone, as written; empty for the model itself."""
        return path_text(self.module)

    @property
    def many(self) -> bool:
        """Whether the address is a pattern that can stand for several modules."""
        return any(isinstance(step, Some | Every) for step in self.module)


def nth(held: Mapping[Any, Any], number: int) -> Any:
    """What `[number]` is of a mapping: the entry of that key where keys are numbers; else the one in that place, as of a `ModelOutput`.

    Raises:
        LookupError: there is none.
    """
    return held[number] if any(isinstance(key, int) for key in held) else list(held.values())[number]


def path_text(steps: Iterable[Step]) -> str:
    """A module path as text: `transformer.h[-1]`."""
    return "".join(written(step) for step in steps).removeprefix(".")


def written(step: Step | Item) -> str:
    """A step or an item as it stands in an address, its dot or brackets included."""
    match step:
        case Child(name):
            return f".{name}" if _NAME.fullmatch(name) else f"[{name!r}]"
        case Nth(number):
            return f"[{number}]"
        case Some(entries):
            return f"[{entries}]"
        case Every(bracket):
            return "[*]" if bracket else ".*"
        case Key(key):
            return f"[{key!r}]"
        case Index(entries):
            comma = "," if len(entries) == 1 and isinstance(entries[0], int) else ""
            return "[" + ", ".join("..." if entry is ... else str(entry) for entry in entries) + comma + "]"


# ---------------------------------------------------------------------------------------------------------- parsing

_NAME = re.compile(r"""[^.\[\]\s*'"]+""")
_TOKEN = re.compile(
    rf"""(?P<name>(?:^|(?<=.)\.)\s*{_NAME.pattern})
      | (?P<star>(?:^|(?<=.)\.)\s*\*)
      | \[(?P<bracket>(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|[^\[\]'"])*)\]""",
    re.VERBOSE,
)
_SLICE = re.compile(r"(-?\d+)?\s*:\s*(-?\d+)?\s*(?::\s*(-?\d+)?)?")
_INTEGER = re.compile(r"-?\d+")


def parse(text: str) -> Address:
    """Read an address.

    Raises:
        AddressError: the text is not an address; the message shows where it stops making sense.
    """
    tokens = list(_tokens(text.strip()))
    ports = [place for place, (kind, token, _) in enumerate(tokens) if kind == "name" and token in PORTS]
    if not ports:
        if near := next(
            (token for kind, token, _ in tokens if kind == "name" and get_close_matches(token, PORTS, 1, 0.75)), None
        ):
            meant = did_you_mean(near, PORTS)
            raise AddressError(f"`{text}` names no port (.output, .input, .outputs or .inputs): `{near}` is none{meant}")
        remedy = f"`{text.strip().rstrip('.')}.output`" if tokens else "`transformer.h[-1].output[0]`"
        raise AddressError(
            f"`{text}` names no port: an address goes on with .output, .input, .outputs or .inputs, as in {remedy}"
        )
    place = ports[-1]
    module = tuple(_step(text, *token) for token in tokens[:place])
    items = tuple(_item(text, *token) for token in tokens[place + 1 :])
    return Address(module, cast(Port, tokens[place][1]), items)


def _tokens(text: str) -> Iterator[tuple[str, str, int]]:
    position = 0
    while position < len(text):
        found = _TOKEN.match(text, position)
        if found is None:
            raise _error(text, position, _complaint(text, position))
        kind = cast(str, found.lastgroup)
        token = found[kind] if kind == "bracket" else found[kind].removeprefix(".")
        yield kind, token.strip(), position
        position = found.end()


def _complaint(text: str, position: int) -> str:
    rest = text[position:]
    if rest[:1].isspace():
        return "a space, and addresses have none"
    if rest.startswith("["):
        return "this bracket is not closed, or holds another one"
    if rest.startswith(".") and len(rest.strip(". ")) == 0:
        return "nothing follows the dot"
    if position == 0 and rest.startswith("."):
        return "it begins with a dot, and no module stands before that"
    if rest.startswith(".."):
        return "two dots in a row"
    return "a name here needs a dot before it; names, [brackets] and .* are all that can stand here"


def _error(text: str, position: int, complaint: str) -> AddressError:
    return AddressError(f"`{text}` is not an address: {complaint}, at character {position + 1} (`{text[position:][:20]}`)")


def _step(text: str, kind: str, token: str, position: int) -> Step:
    if kind == "name":
        return Child(token)
    if kind == "star" or token == "*":
        return Every(bracket=kind == "bracket")
    if _INTEGER.fullmatch(token):
        return Nth(int(token))
    if found := _SLICE.fullmatch(token):
        return Some(_slice(text, found, position))
    if token[:1] in ("'", '"'):
        return Child(_quoted(text, token, position))
    raise _error(text, position, "in a module path, brackets hold a number, a slice such as 4:8, *, or a quoted name")


def _item(text: str, kind: str, token: str, position: int) -> Item:
    if kind == "name":
        return Child(token)
    if kind == "star" or token == "*":
        raise _error(text, position, "a star stands for modules, so it cannot follow the port")
    if _INTEGER.fullmatch(token):
        return Nth(int(token))
    if token[:1] in ("'", '"'):
        return Key(_quoted(text, token, position))
    return Index(tuple(_entry(text, entry.strip(), position) for entry in token.removesuffix(",").split(",")))


def _quoted(text: str, token: str, position: int) -> str:
    try:
        key = ast.literal_eval(token)
    except (ValueError, SyntaxError):
        key = None
    if not isinstance(key, str):
        raise _error(text, position, "a key is one quoted word, as in ['logits']")
    return key


def _entry(text: str, entry: str, position: int) -> int | Slice | EllipsisType:
    if entry == "...":
        return ...
    if _INTEGER.fullmatch(entry):
        return int(entry)
    if found := _SLICE.fullmatch(entry):
        return _slice(text, found, position)
    raise _error(
        text,
        position,
        "brackets after the port hold a number, a quoted key ['logits'], or a tensor index such as [:, -1] or [..., 2:5]",
    )


def parse_slice(text: str) -> Slice | None:
    """Read a slice such as `2:5`; `None` where the text is none.

    Raises:
        AddressError: its step is 0.
    """
    found = _SLICE.fullmatch(text.strip())
    return None if found is None else _slice(text, found, 0)


def _slice(text: str, found: re.Match[str], position: int) -> Slice:
    start, stop, step = (None if group is None else int(group) for group in found.groups())
    if step == 0:
        raise _error(text, position, "the step of a slice cannot be 0")
    return Slice(start, stop, step)


# -------------------------------------------------------------------------------------------- finding a place in a model


def expand(address: Address, root: Tree) -> list[Address]:
    """The resolved addresses that an address stands for in a model; those of a slice in its order.

    Entries of lists come out as non-negative numbers in brackets, however they were written.

    Raises:
        AddressError: a step leads nowhere; the message names what is there and the nearest real names.
    """
    places: list[tuple[tuple[Step, ...], Tree]] = [((), root)]
    for step in address.module:
        places = [((*path, taken), child) for path, tree in places for taken, child in _follow(step, path, tree)]
    if not places:
        raise AddressError(
            f"`{address}` matches no module: a slice in it picks nothing; `actdump tree` shows how many entries there are"
        )
    return [replace(address, module=path) for path, _ in places]


def module_at(address: Address, root: Tree) -> Any:
    """The module that a resolved address names."""
    module: Any = root
    for step in address.module:
        (_, module) = _follow(step, (), module)[0]
    return module


def _follow(step: Step, path: tuple[Step, ...], tree: Tree) -> list[tuple[Step, Tree]]:
    found = children(tree)
    listed = bool(found) and list(found) == [str(number) for number in range(len(found))]
    if isinstance(step, Child):
        if step.name not in found:
            raise AddressError(_no_child(step, path, tree, found))
        return [(_taken(step.name, listed), found[step.name])]
    if isinstance(step, Every):
        if not found:
            raise AddressError(f"{_place(path, tree)} has no children, so `{written(step)}` picks nothing")
        return [(_taken(name, listed), child) for name, child in found.items()]
    if not listed:
        raise AddressError(
            f"{_place(path, tree)} is not a list, so `{written(step)}` cannot follow; it has {', '.join(found) or 'no children'}"
        )
    entries = list(found.items())
    if isinstance(step, Some):
        picked = [entries[number] for number in step.entries.of(len(entries))]
    elif -len(entries) <= step.number < len(entries):
        picked = [entries[step.number]]
    else:
        raise AddressError(_out_of_range(step, path, len(entries)))
    return [(Nth(int(name)), child) for name, child in picked]


def _taken(name: str, listed: bool) -> Step:
    return Nth(int(name)) if listed else Child(name)


def _place(path: tuple[Step, ...], tree: Tree) -> str:
    return f"`{path_text(path)}` ({type(tree).__name__})" if path else f"the model ({type(tree).__name__})"


def _no_child(step: Child, path: tuple[Step, ...], tree: Tree, found: Mapping[str, Tree]) -> str:
    if not found:
        return f"{_place(path, tree)} has no children, so there is no `{step.name}` in it"
    if deeper := _deeper(step.name, path, tree):
        return f"{_place(path, tree)} has no child `{step.name}`; did you mean `{deeper}`?"
    return f"{_place(path, tree)} has no child `{step.name}`{did_you_mean(step.name, found)}"


def _deeper(name: str, path: tuple[Step, ...], tree: Tree) -> str | None:
    """The place one level further down that has the name, for a forgotten `model.` or `transformer.`."""
    for between, child in children(tree).items():
        if name in children(child):
            return path_text((*path, Child(between), Child(name)))
    return None


def _out_of_range(step: Nth, path: tuple[Step, ...], size: int) -> str:
    nearest = size - 1 if step.number >= 0 else -size
    place = path_text(path)
    has = "1 entry" if size == 1 else f"{size} entries, 0 to {size - 1}"
    return (
        f"did you mean `{place}[{nearest}]`? {f'`{place}`' if place else 'The model'} has {has}, so there is no [{step.number}]"
    )
