"""The Python front end: `with model.trace(prompt): hidden = model.transformer.h[-1].output[0].save()`.

Inside the block nothing runs: attributes and indices only spell addresses, and `save` turns one into a tap. When the block
ends, one forward runs (several prompts: one a batch) through the engine that the YAML front end uses, and the saved values are
there. So saves may stand in any order, and what is not saved is never kept.
"""

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from inspect import signature
from types import TracebackType
from typing import Any, Self, TypeVar, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from actdump.address import (
    PORTS,
    Address,
    Child,
    Index,
    Item,
    Key,
    Nth,
    Port,
    Slice,
    Step,
    Tap,
    Tree,
    expand,
    module_at,
    path_text,
    written,
)
from actdump.engine import Feed, Site, bind, capture, capture_whole, feed_for, probe, values
from actdump.errors import AddressError, TraceError, UsageError
from actdump.plan import Batch, Budget, batches

BUDGET = Budget(tokens=4096)  # padded tokens that several prompts of one trace share in a forward

# --------------------------------------------------------------------------------------------- operators, all at once


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


def _operators(method_for: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Callable[[_Class], _Class]:
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


# ------------------------------------------------------------------------------------------------- modules, by reference


@dataclass
class _Traced:
    """What the references to one model share.

    Attributes:
        open: the block that is open, if one is.
        calls: how often a module ran in a forward on that kind of input, once counted.
        probed: sites with their axes, and whether padding needs a mask for them, by address, call and kind of arithmetic.
    """

    module: nn.Module
    tokenizer: Any = None
    open: "Tracer | None" = None
    calls: dict[tuple[object, ...], int] = field(default_factory=dict)
    probed: dict[tuple[object, ...], tuple[Site, bool]] = field(default_factory=dict)


class _NoChildError(AddressError, AttributeError):
    """A wrong name; an AttributeError too, so that `hasattr` answers."""


class Reference:
    """A module of a model, by its place: `model.transformer.h[-1]`.

    Names and indices are checked at once. Inside a `trace` block, `.output`, `.outputs`, `.input` and `.inputs` name what the
    module returns and is given. Lists of modules have a length, can be iterated over, and give a list when sliced. What is
    not a child is the module's own attribute, as it is. Printed, a reference is its module.

    Raises:
        AddressError: there is no such module; the message suggests the nearest ones.
        TraceError: a port was used outside a block, or something was assigned.
    """

    __slots__ = ("_actdump",)
    _actdump: tuple[_Traced, tuple[Step, ...], nn.Module]

    def __init__(self, traced: _Traced, steps: tuple[Step, ...], module: nn.Module) -> None:
        object.__setattr__(self, "_actdump", (traced, steps, module))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_actdump":
            raise AttributeError(name)
        traced, steps, module = self._actdump
        child = name in dict(module.named_children())
        if name in PORTS and traced.open is not None:
            return Proxy(traced.open, steps, (Child(name),))
        if name in PORTS and not child:
            raise TraceError(f"`{path_text((*steps, Child(name)))}` has a value only inside a block: `with model.trace(...):`")
        if not child and hasattr(module, name):
            return getattr(module, name)
        return self._child(Child(name))

    def __getitem__(self, key: int | str | slice) -> Any:
        if isinstance(key, slice):
            return list(self)[key]
        return self._child(Child(key) if isinstance(key, str) else Nth(operator.index(key)))

    def _child(self, step: Step) -> "Reference":
        traced, steps, _ = self._actdump
        try:
            (found,) = expand(Address((*steps, step), "output"), cast(Tree, traced.module))
        except AddressError as error:
            raise _NoChildError(str(error)) from None
        return Reference(traced, found.module, module_at(found, cast(Tree, traced.module)))

    def __len__(self) -> int:
        return len(cast(nn.ModuleList, self._actdump[2]))

    def __bool__(self) -> bool:
        return True

    def __iter__(self) -> Iterator["Reference"]:
        return (self[place] for place in range(len(self)))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        traced, steps, module = self._actdump
        if traced.open is not None:
            raise _out_of_scope(path_text(steps) or "model")
        return module(*args, **kwargs)

    def __setattr__(self, name: str, value: object) -> None:
        raise _out_of_scope(path_text((*self._actdump[1], Child(name))))

    def __setitem__(self, key: object, value: object) -> None:
        raise _out_of_scope(f"{path_text(self._actdump[1])}[{key!r}]")

    def __dir__(self) -> list[str]:
        return sorted({*object.__dir__(self), *dir(self._actdump[2]), *PORTS})

    def __repr__(self) -> str:
        return repr(self._actdump[2])


class Model(Reference):
    """A torch module whose activations can be read with `with model.trace(...)`. Made by `wrap`, or by `actdump.load`."""

    __slots__ = ()

    def __init__(self, module: nn.Module, tokenizer: Any = None) -> None:
        super().__init__(_Traced(module, tokenizer), (), module)

    @property
    def tokenizer(self) -> Any:
        """What turns strings into token ids; `None` where there is nothing."""
        return self._actdump[0].tokenizer

    def trace(self, *args: Any, **kwargs: Any) -> "Tracer":
        """A block at whose end the model runs once on this input, and what was saved inside is there.

        One prompt is a string, a list of token ids, or a tensor of them with one axis: a saved value is exactly what the
        module held, `(1, tokens, …)`. Several prompts are a list of such: a saved value is a list that holds, for each prompt
        in the order given, what tracing it alone would have given; they are padded and run in batches. Anything else is the
        model's own arguments and runs as it is: keyword arguments, a mapping of them such as a tokenizer's result, a tensor
        with more axes, or positional arguments of a module that takes no token ids.

        The gradient mode in force at the end of the block decides whether saved values have a `grad_fn`. The first trace of
        an address runs the model to its end, to count the calls of its module; later ones (for the model's own arguments:
        with the same shapes and numbers) stop after the last saved module. The first trace of an address with several prompts
        probes it with tiny forwards.

        Raises:
            UsageError: an empty prompt, no input, or a string without a tokenizer.
        """
        return Tracer(self._actdump[0], _work(self._actdump[0], args, kwargs))


def wrap(module: nn.Module, tokenizer: Any = None) -> Model:
    """Make any torch module traceable. The module is not changed: not its device, and not its mode.

    Args:
        module: in eval mode, unless its dropout is meant to show.
        tokenizer: for prompts that are strings; called as `tokenizer(text)["input_ids"]`.
    """
    return Model(module, tokenizer)


# ------------------------------------------------------------------------------------------------------- inside a block


def _out_of_scope(place: str) -> TraceError:
    return TraceError(
        f"`{place}`: changing values and computing inside a `trace` block are out of scope; `.save()` what you need and "
        "compute with it after the block"
    )


@_operators(_refused)
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
        """
        self._check_open()
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
            raise TraceError(f"`{self._text()}` was not saved, so it is gone after the block; `.save()` it inside")

    def _refuse(self, *_: object, **__: object) -> Any:
        self._check_open()
        raise _out_of_scope(self._text())

    __call__ = __array__ = __setattr__ = __delattr__ = _refuse

    @classmethod
    def __torch_function__(cls, func: object, types: object, args: Any = (), kwargs: Any = None) -> Any:
        next(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, cls))._refuse()

    def __repr__(self) -> str:
        return f"<{self._text()}, not saved>"


@_operators(_on_value)
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

    def _fill(self, value: Any) -> None:
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


# ------------------------------------------------------------------------------------------------------------- the input


@dataclass(frozen=True)
class _Forward:
    """The arguments of one forward. Forwards of one kind are taken to run the same modules equally often."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    kind: object


_Prompts = list[Sequence[int]]


def _work(traced: _Traced, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Forward | _Prompts:
    if not args and not kwargs:
        raise UsageError("trace needs an input: a prompt, a list of prompts, token ids, or the model's own arguments")
    given = args[0] if args else None
    takes_ids = "input_ids" in signature(traced.module.forward).parameters
    if takes_ids and len(args) == 1 and isinstance(given, Tensor) and given.ndim != 1:
        given = {"input_ids": given}
    if isinstance(given, Mapping) and len(args) == 1:
        return _own((), {**given, **kwargs})
    texts = isinstance(given, str) or (isinstance(given, list) and any(isinstance(entry, str) for entry in given))
    if not texts and not (takes_ids and isinstance(given, list | Tensor)):
        return _own(args, kwargs)
    if len(args) > 1 or kwargs:
        raise UsageError("prompts stand alone in trace; to pass further arguments, pass all of them: `input_ids=…`, …")
    if isinstance(given, list) and not all(isinstance(entry, int) for entry in given):
        return [_ids(traced, prompt, f"prompt {number}") for number, prompt in enumerate(given)]
    ids = torch.tensor([_ids(traced, given, "the prompt")])
    return _Forward((), _feed(traced).arguments(ids, None), "prompt")


def _own(args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Forward:
    return _Forward(args, kwargs, tuple((name, _likeness(value)) for name, value in [*enumerate(args), *kwargs.items()]))


def _likeness(value: object) -> object:
    """What of an argument is taken to decide which modules run, and how often."""
    if isinstance(value, Tensor):
        return tuple(value.shape)
    return value if isinstance(value, int | float | str | None) else type(value)


def _ids(traced: _Traced, prompt: Any, which: str) -> Sequence[int]:
    if isinstance(prompt, str) and prompt:
        if traced.tokenizer is None:
            raise UsageError(f"{which} is a string, but the model has no tokenizer: pass token ids, or wrap(module, tokenizer)")
        prompt = traced.tokenizer(prompt)["input_ids"]
    ids = prompt.tolist() if isinstance(prompt, Tensor) and prompt.ndim == 1 else prompt
    if isinstance(ids, str | list | tuple) and not ids:
        raise UsageError(f"{which} is empty; a model needs at least one token")
    if not isinstance(ids, list | tuple) or not all(isinstance(entry, int) for entry in ids):
        raise UsageError(f"{which} is neither a string nor token ids: {prompt!r}")
    return ids


def _feed(traced: _Traced) -> Feed:
    return feed_for(traced.module, getattr(traced.tokenizer, "pad_token_id", None))


# --------------------------------------------------------------------------------------------------------------- the run


class Tracer:
    """A `trace` block: collects taps while it is open, and runs the model when it ends.

    Raises:
        TraceError: the model is being traced already.
    """

    def __init__(self, traced: _Traced, work: _Forward | _Prompts) -> None:
        self.traced = traced
        self.over = False
        self._work = work
        self._saved: dict[Tap, Saved] = {}

    def keep(self, address: Address, call: int | None) -> Saved:
        """Register a tap; the same place saved twice is one `Saved`."""
        name = str(address) if call is None else f"{address} (call {call})"
        return self._saved.setdefault(Tap(name, address, call=call), Saved(self, name))

    def __enter__(self) -> Self:
        if self.traced.open is not None or self.over:
            raise TraceError("this model is being traced already: end one `trace` block before the next")
        self.traced.open = self
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None) -> None:
        self.traced.open = None
        self.over = True
        saved, self._saved = self._saved, {}
        if kind is not None or not saved:
            return
        run = _run_whole if isinstance(self._work, _Forward) else _run_each
        for each, value in zip(saved.values(), run(self.traced, cast(Any, self._work), list(saved)), strict=True):
            each._fill(value)


def _run_whole(traced: _Traced, forward: _Forward, taps: Sequence[Tap]) -> list[Any]:
    """The values as the modules hold them, of one forward."""
    sites = bind(traced.module, taps)
    keys = [(tap.address.module, forward.kind) for tap in taps]
    counted = [replace(site, calls=traced.calls.get(key)) for site, key in zip(sites, keys, strict=True)]
    try:
        kept, calls = capture_whole(traced.module, counted, forward.args, forward.kwargs)
    except KeyError:  # a module that ran in an earlier trace did not run in this one: count again
        kept, calls = capture_whole(traced.module, sites, forward.args, forward.kwargs)
    traced.calls.update(zip(keys, calls, strict=True))
    return kept


def _run_each(traced: _Traced, prompts: _Prompts, taps: Sequence[Tap]) -> list[list[Tensor]]:
    """For each tap, the value of each prompt as it would be alone."""
    sites, feed = _probed(traced, taps)
    found: list[list[Any]] = [[None] * len(prompts) for _ in sites]
    for places in batches(list(map(len, prompts)), BUDGET):
        batch = Batch(tuple(places), tuple(prompts[place] for place in places))
        captured = capture(traced.module, sites, feed, batch, land=False)
        captured.wait()
        for site, rows, kept in zip(sites, captured.rows, found, strict=True):
            for place, value in zip(places, values(site, rows, batch.lengths), strict=True):
                kept[place] = (value if site.dropped is None else value.unsqueeze(site.dropped)).clone()
    return found


def _probed(traced: _Traced, taps: Sequence[Tap]) -> tuple[list[Site], Feed]:
    for tap in taps:
        if tap.address.port in ("inputs", "outputs") and not tap.address.items:
            raise TraceError(
                f"`{tap.address}` is a structure, which cannot be cut into several prompts: name one tensor in it, such as "
                f"`{tap.address}[0][0]`, or trace the prompts one by one"
            )
    feed = _feed(traced)
    kind = _arithmetic(traced.module, feed)
    new = [tap for tap in taps if (tap, kind) not in traced.probed]
    if new:
        found = probe(traced.module, bind(traced.module, new), feed)
        try:
            bound = found.sites
        except AddressError as error:
            hint = "\nThe model is in training mode, in which dropout changes values: call `model.eval()` first"
            raise AddressError(f"{error}{hint * traced.module.training}") from None
        traced.probed.update({(tap, kind): (site, found.feed.masked) for tap, site in zip(new, bound, strict=True)})
    sites, masked = zip(*(traced.probed[tap, kind] for tap in taps), strict=True)
    return list(sites), replace(feed, masked=any(masked))


def _arithmetic(module: nn.Module, feed: Feed) -> tuple[object, ...]:
    """What decides the types of values: a probe holds as long as it stays the same."""
    device = feed.device.type
    auto = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    return next((weight.dtype for weight in module.parameters() if weight.is_floating_point()), None), auto, module.training


def load(name: str, **options: Any) -> Model:
    """A model of the hub or a local folder, with its tokenizer, ready for `trace`.

    Args:
        options: the keys of the spec's `model`: `revision`, `task`, `dtype`, `device`, `attn_implementation`, `gguf_file`, …

    Raises:
        MissingError: there is no such model.
        UsageError: an option is wrong, or the model cannot be loaded that way.
    """
    from actdump import model
    from actdump.spec import TokenizerSpec, model_spec

    source = model.find(model_spec(name, options))
    return Model(model.load(source), model.load_tokenizer(TokenizerSpec(), source))
