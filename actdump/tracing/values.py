"""Inside a block: `Proxy` spells an address, `Saved` is a value that is kept."""

import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from actdump.address import PORTS, Address, Child, Index, Item, Key, Nth, Port, Slice, Step, Tree, expand, path_text, written
from actdump.errors import AddressError, TraceError

if TYPE_CHECKING:
    from actdump.tracing.tracer import Tracer


def _reflected(name: str) -> Callable[..., Any]:
    operation = getattr(operator, f"__{name}__")
    return lambda value, other: operation(other, value)


_ARITHMETIC = ["add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor", "lshift", "rshift"]
_OTHER = ["neg", "pos", "abs", "invert", "lt", "le", "eq", "ne", "ge", "gt", "contains", "getitem", "setitem", "delitem"]
_FUNCTIONS = (len, iter, reversed, bool, int, float, complex, operator.index, format, str)
_OPERATIONS: dict[str, Callable[..., Any]] = {
    **{f"__{name}__": getattr(operator, f"__{name}__") for name in _ARITHMETIC + _OTHER},
    **{f"__r{name}__": _reflected(name) for name in _ARITHMETIC},
    **{f"__{function.__name__}__": function for function in _FUNCTIONS},
}
_Class = TypeVar("_Class", bound=type)


def operators(method_for: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Callable[[_Class], _Class]:
    """Give a class the operators that it does not define itself."""

    def decorate(cls: _Class) -> _Class:
        for name, operation in _OPERATIONS.items():
            if name not in vars(cls):
                setattr(cls, name, method_for(operation))
        return cls

    return decorate


def _on_value(operation: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, *args: operation(self.value, *args)


def _refused(_: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, *_: self._refuse()


def out_of_scope(place: str) -> TraceError:
    return TraceError(
        f"`{place}`: changing values and computing inside a `trace` block are out of scope; `.save()` what you need and "
        "compute with it after the block"
    )


@operators(_refused)
class Proxy:
    """A value that the model will hold, spelled so far; `save` keeps it."""

    __slots__ = ("_steps", "_tail", "_tracer")
    _tracer: "Tracer"
    _steps: tuple[Step, ...]
    _tail: tuple[Item, ...]

    def __init__(self, tracer: "Tracer", steps: tuple[Step, ...], tail: tuple[Item, ...]) -> None:
        for name, value in (("_tracer", tracer), ("_steps", steps), ("_tail", tail)):
            object.__setattr__(self, name, value)

    def save(self, call: int | None = None) -> "Saved":
        """Keep the value beyond the block.

        Args:
            call: which call, for a module that runs several times in a forward; `-1` is the last.

        Raises:
            AddressError: the address leads to no module.
            TraceError: `call` is no number.
        """
        self._check_open()
        if call is not None and (isinstance(call, bool) or not isinstance(call, int)):
            raise TraceError(f"`{self._text()}`: `call` is a number, counted from 0, or from -1 for the last, not {call!r}")
        place = max(place for place, item in enumerate(self._tail) if isinstance(item, Child) and item.name in PORTS)
        for item in self._tail[:place]:
            if not isinstance(item, Child | Nth):
                raise AddressError(f"`{self._text()}`: `{written(item)}` cannot stand in a module path")
        module = self._steps + cast(tuple[Step, ...], self._tail[:place])
        address = Address(module, cast(Port, cast(Child, self._tail[place]).name), self._tail[place + 1 :])
        (resolved,) = expand(address, cast(Tree, self._tracer.traced.module))
        return self._tracer.keep(resolved, call)

    def __getattr__(self, name: str) -> "Proxy":
        if name.startswith("__") or name in Proxy.__slots__:
            raise AttributeError(name)
        self._check_open()
        return Proxy(self._tracer, self._steps, (*self._tail, Child(name)))

    def __getitem__(self, key: Any) -> "Proxy":
        self._check_open()
        return Proxy(self._tracer, self._steps, (*self._tail, self._item(key)))

    def _item(self, key: Any) -> Item:
        if isinstance(key, str):
            return Key(key)
        if isinstance(key, tuple) and key:
            return Index(tuple(map(self._entry, key)))
        entry = self._entry(key)
        return Nth(entry) if isinstance(entry, int) else Index((entry,))

    def _entry(self, key: Any) -> Any:
        if key is ...:
            return key
        try:
            if isinstance(key, slice):
                return Slice(*(None if bound is None else operator.index(bound) for bound in (key.start, key.stop, key.step)))
            if not isinstance(key, bool | Tensor):
                return operator.index(key)
        except TypeError:
            pass
        raise TraceError(
            f"`{self._text()}` cannot be indexed with {key!r} inside a block, only with numbers, slices, `...` and 'keys': "
            "`.save()` it and index it after the block"
        )

    def _text(self) -> str:
        return path_text((*self._steps, *cast(tuple[Step, ...], self._tail)))

    def _check_open(self) -> None:
        if self._tracer.over:
            raise TraceError(
                f"`{self._text()}` is a place, and not what was saved, so it is gone after the block; keep what `.save()` gives inside: "
                "`kept = ….save()`"
            )

    def _refuse(self, *_: object, **__: object) -> Any:
        self._check_open()
        raise out_of_scope(self._text())

    __call__ = __array__ = __setattr__ = __delattr__ = _refuse

    @classmethod
    def __torch_function__(cls, func: object, types: object, args: Any = (), kwargs: Any = None) -> Any:
        next(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, cls))._refuse()

    def __repr__(self) -> str:
        return f"<{self._text()}, not saved>"


@operators(_on_value)
class Saved:
    """A value kept from a trace. After the block it stands in for its tensor: `hs.shape`, `hs[0]`, `hs + 1`, `torch.norm(hs)`.

    Raises:
        TraceError: it is used before the block ends, or the block or the model raised, so there is no value.
    """

    __slots__ = ("_kept", "_name", "_tracer")

    def __init__(self, tracer: "Tracer", name: str) -> None:
        self._tracer: Tracer | None = tracer
        self._name = name
        self._kept: Any = None

    def fill(self, value: Any) -> None:
        self._kept, self._tracer = value, None

    @property
    def value(self) -> Any:
        """The tensor, `(1, tokens, …)` for one prompt; a list of them for several; or a structure."""
        if self._tracer is None:
            return self._kept
        if self._tracer.over:
            raise TraceError(f"`{self._name}` has no value, because its block, or the model, raised an exception")
        raise TraceError(f"`{self._name}` has no value yet: the model runs when the block ends; use it after the block")

    def __getattr__(self, name: str) -> Any:
        if name in Saved.__slots__ or (name.startswith("__") and self._tracer is not None):
            raise AttributeError(name)
        return getattr(self.value, name)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        array = np.asarray(self.value, dtype)
        return array.copy() if copy else array

    __array_priority__ = 1000  # as torch.Tensor has it, so that `array + saved` is the saved value's affair

    @classmethod
    def __torch_function__(cls, func: Callable[..., Any], types: object, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map(lambda leaf: leaf.value if isinstance(leaf, cls) else leaf, (args, kwargs or {}))
        return func(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.value.__reduce_ex__(protocol)

    def __repr__(self) -> str:
        return f"<{self._name}, no value yet>" if self._tracer is not None else repr(self._kept)
