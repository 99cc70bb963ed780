"""Hooks on sites, and how to read what a port held."""

from collections.abc import Callable, Mapping, Sequence
from copy import copy as shallow
from dataclasses import fields, is_dataclass
from threading import get_ident
from typing import Any, cast

from torch import Tensor, nn

from actdump.address import Child, Index, Item, Key, Nth, Slice, nth, written
from actdump.engine.site import Site
from actdump.tap import Tap


class Stop(BaseException):
    """Ends a forward when every site has fired. Never leaves this package."""


class Unfit(Exception):
    """Why a tap cannot be captured, in words."""


class Hooks:
    """Inside its `with` block, `seen(place, what the port holds)` is called whenever a site's module runs in this thread: what other
    threads run is not asked for. Every hook comes off on every way out.

    They stand in the dictionaries in which torch keeps hooks, without the handles that `register_forward_hook` makes, of three weak
    references each: with those, a capture of a small model added a quarter more to the forward (`scripts/bench overhead`).
    """

    def __init__(self, sites: Sequence[Site], seen: Callable[[int, Any], None]) -> None:
        self._hooks = [_hook(site, place, seen) for place, site in enumerate(sites)]

    def __enter__(self) -> None:
        try:
            for tables, hook in self._hooks:
                for table in tables:
                    table[hook] = hook
        except BaseException:  # Ctrl-C may come here too
            self.__exit__()
            raise

    def __exit__(self, *_: object) -> None:
        for tables, hook in self._hooks:
            for table in tables:
                table.pop(hook, None)


def _hook(site: Site, place: int, seen: Callable[[int, Any], None]) -> tuple[tuple[dict[Any, Any], ...], Callable[..., None]]:
    """A hook, and the dictionaries of the module in which torch looks for it."""
    thread, port, module = get_ident(), site.tap.address.port, site.module

    if port in ("output", "outputs"):

        def after(_module: nn.Module, _args: Any, result: Any) -> None:
            if get_ident() == thread:
                seen(place, result if port == "output" else _as_arguments(result))

        return (module._forward_hooks,), after

    def before(_module: nn.Module, args: Any, named: Any) -> None:
        if get_ident() == thread:
            seen(place, (args, named) if port == "inputs" else args[0] if args else next(iter(named.values()), None))

    return (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs), before


def _as_arguments(result: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A return value in the form of arguments: `((values…), {named values})`."""
    if isinstance(result, Mapping):
        return (), dict(result)
    return (tuple(result) if isinstance(result, tuple | list) else (result,)), {}


def read(tap: Tap, held: Any) -> tuple[Any, tuple[Item, ...]]:
    """Follow the address into what its port held, as far as a tensor; return it and the items left, which index the tensor.

    After `output`, a bare tensor counts as a tuple of one; a port without an item is the first value of a tuple.
    """
    value, items = held, tap.address.items
    if tap.address.port in ("input", "output"):
        first = items[0] if items else None
        if isinstance(value, Tensor):
            if tap.address.port == "output" and isinstance(first, Nth):
                if first.number not in (0, -1):
                    raise Unfit(
                        f"there is no [{first.number}]: the port held {described(held)}, which counts as a tuple of one; "
                        "use [0], or leave it out"
                    )
                items = items[1:]
        elif isinstance(value, tuple | list | Mapping) and (first is None or isinstance(first, Index)):
            value = next(iter(value.values() if isinstance(value, Mapping) else value), None)
    while items and not isinstance(value, Tensor):
        value, items = _entry(value, items[0], held), items[1:]
    return value, items


def _entry(value: Any, item: Item, held: Any) -> Any:
    """One step into a structure."""
    try:
        match item:
            case Nth(number) if isinstance(value, Mapping):
                return nth(value, number)
            case Nth(number) if isinstance(value, tuple | list):
                return value[number]
            case Key(key) if isinstance(value, Mapping):
                return value[key]
            case Child(name) if isinstance(value, Mapping) and name in value:
                return value[name]
            case Child(name) if not isinstance(value, Mapping | tuple | list) or hasattr(type(value), "_fields"):
                return getattr(value, name)
    except (IndexError, KeyError, AttributeError):
        pass
    raise Unfit(f"`{written(item)}` leads nowhere: the port held {described(held)}")


def tensor_index(item: Item) -> Any:
    """An item of an address as what a tensor is indexed with."""
    if isinstance(item, Nth):
        return item.number
    entries = cast(Index, item).entries
    return tuple(slice(entry.start, entry.stop, entry.step) if isinstance(entry, Slice) else entry for entry in entries)


def which_call(site: Site, calls: int, again: int) -> int:
    """The place of the wanted call among those of one forward."""
    place = f"`{site.tap.address.path}`" if site.tap.address.module else "the model"
    if calls == 0 and isinstance(site.module, nn.ModuleList | nn.ModuleDict):
        raise Unfit(
            f"{place} is a {type(site.module).__name__}, which holds modules and never runs itself; tap its entries, as in `[*]`"
        )
    if calls == 0:
        raise Unfit(
            f"{place} ({type(site.module).__name__}) never ran in a forward; its parent may use its parameters "
            "without calling it, so tap the parent"
        )
    if calls != again:
        raise Unfit(
            f"{place} ran {times(calls)} for one prompt and {times(again)} for several, so its calls cannot be told apart"
        )
    call = site.tap.call
    if call is None:
        if calls > 1:
            raise Unfit(
                f"{place} runs {calls} times in one forward; say which with `call`: 0 to {calls - 1}, or -1 for the last"
            )
        return 0
    if not -calls <= call < calls:
        raise Unfit(f"{place} runs {times(calls)} in one forward, so there is no call {call}")
    return call % calls


def times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


def described(value: Any) -> str:
    """A value in words: `a tensor (1, 7, 32)`, `a tuple of 2 (a tensor (1, 7, 32), None)`."""
    if isinstance(value, Tensor):
        return f"a tensor {tuple(value.shape)}"
    if isinstance(value, Mapping):
        return f"a {type(value).__name__} of " + ", ".join(f"{key}: {described(entry)}" for key, entry in value.items())
    if isinstance(value, tuple | list):
        inside = ", ".join(described(entry) for entry in value)
        return f"a {type(value).__name__} of {len(value)} ({inside})"
    return "None" if value is None else f"a {type(value).__name__}"


def form(held: Any) -> str:
    if isinstance(held, Tensor):
        return "tensor"
    return f"{type(held).__name__} of {len(held)}" if isinstance(held, tuple | list | Mapping) else type(held).__name__


def copied(value: Any, copy: Callable[[Tensor], Tensor] = Tensor.clone) -> Any:
    """A structure with every tensor in it copied, so that nothing later in the forward can change it."""
    if isinstance(value, Tensor):
        return copy(value)
    if isinstance(value, Mapping):
        copies = {key: copied(entry, copy) for key, entry in value.items()}
        try:
            return copies if type(value) is dict else type(value)(**copies)
        except TypeError:  # made in another way, as a tokenizer's result
            return copies
    if isinstance(value, tuple | list):
        entries = [copied(entry, copy) for entry in value]
        return type(value)(*entries) if hasattr(type(value), "_fields") else type(value)(entries)
    if is_dataclass(value) and not isinstance(value, type):
        twin = shallow(value)
        for each in fields(value):
            object.__setattr__(twin, each.name, copied(getattr(value, each.name), copy))
        return twin
    return value


def not_a_tensor(value: Any, held: Any) -> str:
    """Why what stands at an address cannot be kept."""
    if value is None:
        return (
            f"it is None; the port held {described(held)}. Attention weights exist only with `attn_implementation: eager` "
            "(a key of `model` in the spec, an option of `actdump.load`)"
        )
    return f"it is {described(value)}, not a tensor; add an item that picks one, such as [0] or ['name']"
