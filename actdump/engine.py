"""The hook engine: the only place with hooks. `bind` finds modules, `probe` labels axes, `capture` runs one forward.

What is captured for a prompt at a tap is what the tap would hold if that prompt were run alone, unpadded; the batch axis is
dropped. The probe makes this so: it sends tiny inputs of two shapes through the model and compares the shapes that each tap
gave, which labels every axis; then it shows, on values, that a prompt cut out of a padded batch is the prompt run alone.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from inspect import Parameter, signature
from typing import Any, cast

import torch
from torch import Tensor, nn

from actdump.address import Child, Index, Item, Key, Nth, Selection, Slice, Tap, Tree, expand_tap, module_at, written
from actdump.errors import ActdumpError, AddressError, DataError, UsageError
from actdump.plan import ITEM_BYTES, Batch, Column, Layout

# Two shapes whose ratios and differences name every axis: from (1, 7) to (3, 12), a batch axis grows by a factor 3, a token
# axis by 12/7, their product by 36/7, and a token axis with something added by 5, which is no multiple of 3 - 1.
ALONE = (1, 7)
TOGETHER = (3, 12)
ROW = 1  # the row of TOGETHER that begins with the prompt of ALONE: not the first, so that a stray [0] would show
ALIKE = 0.05  # median relative error per vector above which two values are not the same value computed in another shape


class _Stop(BaseException):
    """Ends a forward when every site has fired. Never leaves this module."""


class _Unfit(Exception):
    """Why a tap cannot be captured, in words."""


@dataclass(frozen=True)
class Axis:
    """One axis of what a module holds: a product of the batch, the tokens and a number, the batch outermost."""

    batch: bool
    token: bool
    times: int

    def __str__(self) -> str:
        names = ["batch"] * self.batch + ["token"] * self.token
        return "*".join(names + ([str(self.times)] if self.times != 1 or not names else []))

    def size(self, batch: int, tokens: int) -> int:
        """The size of the axis for a batch of that many rows and tokens."""
        return (batch if self.batch else 1) * (tokens if self.token else 1) * self.times


@dataclass(frozen=True)
class Site:
    """A tap bound to a real module.

    Attributes:
        tap: what to keep, with its resolved address.
        spelled: the address as the user wrote it.
        module: the module at the address.
        axes: the axes of the tensor at the address, before its tensor indices; `None` where nobody probed, and then the
            value is taken as it is.
        shape: the axes of one prompt's value after the tensor indices, batch axis dropped, tokens not yet selected.
        index: the tensor indices of the address.
        dropped: where the batch axis stood in the indexed value; `None` where an index took it.
        calls: how often the module runs in a forward.
        form: what the port held, in words.
        layout: what one prompt gives.
    """

    tap: Tap
    spelled: str
    module: nn.Module
    axes: tuple[Axis, ...] | None = None
    shape: tuple[int | Slice, ...] = ()
    index: tuple[Item, ...] = ()
    dropped: int | None = None
    calls: int | None = None
    form: str = ""
    layout: Layout | None = None

    @property
    def selection(self) -> Selection:
        """Which tokens are kept; all of them where the value has no token axis."""
        return self.tap.tokens if self.tap.tokens is not None and self.token_axis is not None else "all"

    @property
    def token_axis(self) -> int | None:
        """The axis of a prompt's value that the token selection works on: the first with tokens (the query's, in attention)."""
        return next((place for place, dim in enumerate(self.shape) if isinstance(dim, Slice)), None)

    @property
    def rowwise(self) -> bool:
        """Whether the tensor is rows of batch and token, in this order, so that one gather takes all that is kept."""
        if self.axes is None or self.index:
            return False
        leading = [str(axis) for axis in self.axes if axis.batch or axis.token]
        count = len(leading)
        return leading in (["batch", "token"], ["batch*token"]) and [str(axis) for axis in self.axes[:count]] == leading

    @property
    def column(self) -> Column:
        """The site as it stands in a dump. Needs a probed site."""
        assert self.axes is not None and self.layout is not None
        return Column(
            name=self.tap.name,
            address=self.spelled,
            resolved=str(self.tap.address),
            module=type(self.module).__name__,
            form=self.form,
            tokens=_selection_text(self.selection),
            call=self.tap.call,
            axes=tuple(map(str, self.axes)),
            layout=self.layout,
        )


def _selection_text(selection: Selection) -> str:
    return str(list(selection)) if isinstance(selection, tuple) else str(selection)


@dataclass(frozen=True)
class Feed:
    """How to run a model on token ids.

    Attributes:
        device: where the ids go.
        vocabulary: ids are below this.
        pad: the id that fills rows up; its value never shows.
        accepts: the names of the arguments that the model takes.
        masked: whether padded rows need an attention mask; the probe finds out.
    """

    device: torch.device
    vocabulary: int
    pad: int
    accepts: frozenset[str]
    masked: bool = True

    def arguments(self, ids: Tensor, mask: Tensor | None) -> dict[str, Any]:
        """The keyword arguments of one forward on ids of shape (batch, token)."""
        arguments: dict[str, Any] = {"input_ids": ids.to(self.device)}
        if mask is not None and "attention_mask" in self.accepts:
            arguments["attention_mask"] = mask.to(self.device)
        if "use_cache" in self.accepts:
            arguments["use_cache"] = False
        return arguments


def feed_for(model: nn.Module, pad: int | None = None) -> Feed:
    """How to run this model on token ids, as far as its signature, its config and its embedding tell.

    Raises:
        UsageError: the model does not take `input_ids`.
    """
    parameters = signature(model.forward).parameters
    if "input_ids" not in parameters:
        raise UsageError(
            f"{type(model).__name__} takes {', '.join(parameters) or 'no arguments'}, not `input_ids`, so it cannot be run on prompts"
        )
    embedding = next((module for module in model.modules() if isinstance(module, nn.Embedding)), None)
    config = getattr(model, "config", None)
    vocabulary = getattr(config, "vocab_size", None) or (embedding.num_embeddings if embedding is not None else 2)
    if pad is None:
        pad = getattr(config, "pad_token_id", None)
    accepts = frozenset(name for name, parameter in parameters.items() if parameter.kind != Parameter.VAR_KEYWORD)
    place = next(iter((embedding or model).parameters()), torch.empty(0))
    return Feed(place.device, vocabulary, pad if pad is not None and 0 <= pad < vocabulary else 0, accepts)


# ------------------------------------------------------------------------------------------------------------ binding


def bind(model: nn.Module, taps: Sequence[Tap], *, named: Sequence[bool] | None = None) -> list[Site]:
    """Resolve taps to modules. A pattern gives as many sites as it matches modules, in the model's order.

    Args:
        named: for each tap, whether the user gave its name; otherwise a pattern's sites are named by their addresses.

    Raises:
        AddressError: addresses that lead nowhere, all of them in one message.
    """
    sites: list[Site] = []
    wrong: list[str] = []
    for place, tap in enumerate(taps):
        try:
            found = expand_tap(tap, cast(Tree, model), named=named is not None and named[place])
        except AddressError as error:
            wrong.append(f"{tap.address}: {error}")
            continue
        spelled = (str(each.address) if tap.address.many else str(tap.address) for each in found)
        sites += [Site(each, text, module_at(each.address, cast(Tree, model))) for each, text in zip(found, spelled, strict=True)]
    seen: set[str] = set()
    for site in sites:
        if site.tap.name in seen:
            wrong.append(f"{site.tap.name}: two taps would have this name; give names with the mapping form of `save`")
        seen.add(site.tap.name)
    if wrong:
        raise AddressError("\n".join(wrong))
    return sites


# -------------------------------------------------------------------------------------------------------------- hooks


@contextmanager
def _hooked(sites: Sequence[Site], seen: Callable[[int, Any], None]) -> Iterator[None]:
    """Call `seen(place, what the port holds)` whenever a site's module runs. Every hook comes off on every way out."""
    with ExitStack() as stack:
        for place, site in enumerate(sites):
            stack.callback(_hook(site, partial(seen, place)).remove)
        yield


def _hook(site: Site, seen: Callable[[Any], None]) -> Any:
    port = site.tap.address.port

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if port == "inputs":
            seen((args, kwargs))
        else:
            seen(args[0] if args else next(iter(kwargs.values()), None))

    def after(module: nn.Module, args: tuple[Any, ...], result: Any) -> None:
        seen(_as_arguments(result) if port == "outputs" else result)

    if port in ("input", "inputs"):
        return site.module.register_forward_pre_hook(before, with_kwargs=True)
    return site.module.register_forward_hook(after)


def _as_arguments(result: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A return value in the form of arguments: `((values…), {named values})`."""
    if isinstance(result, Mapping):
        return (), dict(result)
    return (tuple(result) if isinstance(result, tuple | list) else (result,)), {}


def _read(tap: Tap, held: Any) -> tuple[Any, tuple[Item, ...]]:
    """Follow the address into what its port held, as far as a tensor; return it and the items left, which index the tensor.

    A bare tensor counts as a tuple of one, and a port without an item is the first value of a tuple.
    """
    value, items = held, tap.address.items
    if tap.address.port in ("input", "output"):
        first = items[0] if items else None
        if isinstance(value, Tensor):
            if isinstance(first, Nth):
                if first.number not in (0, -1):
                    raise _Unfit(f"there is no [{first.number}]: the port held {described(held)}, which counts as a tuple of one")
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
                return list(value.values())[number]
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
    raise _Unfit(f"`{written(item)}` leads nowhere: the port held {described(held)}")


def described(value: Any, axes: Callable[[Tensor], str] | None = None) -> str:
    """A value in words: `a tensor (1, 7, 32)`, `a tuple of 2 (a tensor (1, 7, 32), None)`."""
    if isinstance(value, Tensor):
        return "a tensor " + (axes(value) if axes else str(tuple(value.shape)))
    if isinstance(value, Mapping):
        return f"a {type(value).__name__} of " + ", ".join(f"{key}: {described(entry, axes)}" for key, entry in value.items())
    if isinstance(value, tuple | list):
        inside = ", ".join(described(entry, axes) for entry in value)
        return f"a {type(value).__name__} of {len(value)} ({inside})"
    return "None" if value is None else f"a {type(value).__name__}"


def _form(held: Any) -> str:
    if isinstance(held, Tensor):
        return "tensor"
    return f"{type(held).__name__} of {len(held)}" if isinstance(held, tuple | list | Mapping) else type(held).__name__


def copied(value: Any) -> Any:
    """A structure with every tensor in it copied, so that nothing later in the forward can change it."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, Mapping):
        copies = {key: copied(entry) for key, entry in value.items()}
        return copies if type(value) is dict else type(value)(**copies)
    if isinstance(value, tuple | list):
        entries = [copied(entry) for entry in value]
        return type(value)(*entries) if hasattr(type(value), "_fields") else type(value)(entries)
    return value


# ------------------------------------------------------------------------------------------------------------ probing


@dataclass(frozen=True)
class Fault:
    """A tap that cannot be captured, and why."""

    tap: Tap
    reason: str

    def __str__(self) -> str:
        return f"{self.tap.name}: {self.reason}"


@dataclass(frozen=True)
class Probe:
    """What the probe found: sites with their axes, taps that cannot be captured, and how to run the model.

    Attributes:
        runs: for each tap, in the order given, a site or a fault.
        verified: whether values were compared, not shapes alone (they cannot be on the meta device).
    """

    runs: tuple[Site | Fault, ...]
    feed: Feed
    verified: bool

    @property
    def sites(self) -> list[Site]:
        """The sites, where every tap can be captured.

        Raises:
            AddressError: some cannot; the message lists them all.
        """
        faults = [str(run) for run in self.runs if isinstance(run, Fault)]
        if faults:
            raise AddressError("\n".join(faults))
        return [run for run in self.runs if isinstance(run, Site)]


def probe(model: nn.Module, sites: Sequence[Site], feed: Feed, *, tokens: Selection | None = None, dtype: str | None = None) -> Probe:
    """Label the axes of every site and count its calls with tiny forwards, and find out whether padding needs a mask.

    Two forwards of different shape give the axes. Then, unless the model is on the meta device, the same prompt is compared
    alone and inside a batch whose other tokens are changed: where no bit moves without a mask, no mask is needed; where one
    does, the mask is used. Either way the prompt's value in the batch must be its value alone, or the tap is a fault.

    Args:
        tokens: the selection of taps that name none and have a token axis.
        dtype: the storage type of taps that name none and hold floating point numbers.

    Raises:
        UsageError: the model does not run on token ids alone.
    """
    ids = _probe_ids(feed)
    together = ids["together"]
    alone = _observe(model, sites, feed, ids["alone"])
    batch = _observe(model, sites, feed, together)
    runs = tuple(_labelled(site, tokens, dtype, *seen) for site, *seen in zip(sites, alone, batch, strict=True))
    if feed.device.type == "meta":
        return Probe(runs, feed, verified=False)
    found = [run if isinstance(run, Site) else None for run in runs]
    batch_values = _row_values(found, batch)
    changed = _row_values(found, _observe(model, sites, feed, ids["changed"]))
    masked = not all(map(_same_bits, batch_values, changed))
    if masked:
        mask = torch.ones(TOGETHER, dtype=torch.long)
        mask[ROW, ALONE[1] :] = 0
        batch_values = _row_values(found, _observe(model, sites, feed, ids["changed"], mask))
    alone_values = [None if site is None else _probed_value(site, seen, ALONE, 0) for site, seen in zip(found, alone, strict=True)]
    checked = tuple(map(_verified, runs, alone_values, batch_values))
    return Probe(checked, replace(feed, masked=masked), verified=True)


def _probe_ids(feed: Feed) -> dict[str, Tensor]:
    """Token ids for the probes; `changed` differs from `together` in everything but the row's own prompt."""
    generator = torch.Generator().manual_seed(0)
    low = feed.vocabulary // 4 if feed.vocabulary >= 8 else 0
    together, changed = (torch.randint(low, feed.vocabulary, TOGETHER, generator=generator) for _ in range(2))
    together[together == feed.pad] = low
    prompt = together[ROW, : ALONE[1]]
    changed[ROW, : ALONE[1]] = prompt
    changed[ROW, ALONE[1] :] = feed.pad
    return {"alone": prompt[None], "together": together, "changed": changed}


def _observe(model: nn.Module, sites: Sequence[Site], feed: Feed, ids: Tensor, mask: Tensor | None = None) -> list[list[Any]]:
    """Run one forward to its end; for each site, what its port held at each call."""
    seen: list[list[Any]] = [[] for _ in sites]
    with torch.no_grad(), _hooked(sites, lambda place, held: seen[place].append(copied(held))):
        try:
            model(**feed.arguments(ids, mask))
        except ActdumpError:
            raise
        except Exception as error:
            raise UsageError(f"{type(model).__name__} does not run on token ids alone: {type(error).__name__}: {error}") from error
    return seen


def _labelled(site: Site, tokens: Selection | None, dtype: str | None, alone: list[Any], batch: list[Any]) -> Site | Fault:
    try:
        call = _which_call(site, len(alone), len(batch))
        value, index = _read(site.tap, alone[call])
        other, _ = _read(site.tap, batch[call])
        if not isinstance(value, Tensor) or not isinstance(other, Tensor):
            raise _Unfit(_not_a_tensor(value, alone[call]))
        axes = _axes(tuple(value.shape), tuple(other.shape))
        shape, dropped = _one_prompt(axes, index)
        bound = replace(site, axes=axes, shape=shape, index=index, dropped=dropped, calls=len(alone), form=_form(alone[call]))
        tap = bound.tap if bound.tap.tokens is not None else replace(bound.tap, tokens=tokens)
        if site.tap.tokens not in (None, "all") and bound.token_axis is None:
            raise _Unfit(f"it has no token axis to select from: {_shape_text(axes)}")
        bound = replace(bound, tap=tap)
        return replace(bound, layout=Layout(_selected_dims(bound), _storage(value.dtype, tap.dtype, dtype)))
    except _Unfit as reason:
        return Fault(site.tap, str(reason))


def _which_call(site: Site, calls: int, again: int) -> int:
    """The place of the wanted call among those of one forward."""
    place = f"`{site.tap.address.path}`" if site.tap.address.module else "the model"
    if calls == 0:
        raise _Unfit(
            f"{place} ({type(site.module).__name__}) never ran in a forward; its parent may use its parameters "
            "without calling it, so tap the parent"
        )
    if calls != again:
        raise _Unfit(f"{place} ran {calls} times for one prompt and {again} times for three, so its calls cannot be told apart")
    call = site.tap.call
    if call is None:
        if calls > 1:
            raise _Unfit(f"{place} runs {calls} times in one forward; say which, with `call: 0` to `call: {calls - 1}` or `call: -1`")
        return 0
    if not -calls <= call < calls:
        raise _Unfit(f"{place} runs {calls} times in one forward, so there is no call {call}")
    return call % calls


def _not_a_tensor(value: Any, held: Any) -> str:
    if value is None:
        return (
            f"it is None; the port held {described(held)}. Attention weights exist only with `attn_implementation: eager` "
            "in the model's part of the spec"
        )
    return f"it is {described(value)}, not a tensor; add an item that picks one, such as [0] or ['name']"


def _axes(alone: tuple[int, ...], together: tuple[int, ...]) -> tuple[Axis, ...]:
    if len(alone) != len(together):
        raise _Unfit(f"its number of axes depends on the input: {alone} and {together}")
    axes = [_axis(*sizes) for sizes in zip(alone, together, strict=True)]
    if None in axes:
        raise _Unfit(
            f"axis {axes.index(None)} cannot be attributed: the shape is {alone} for {ALONE[0]} prompt of {ALONE[1]} tokens "
            f"and {together} for {TOGETHER[0]} prompts of {TOGETHER[1]}"
        )
    return tuple(cast(list[Axis], axes))


def _axis(alone: int, together: int) -> Axis | None:
    for batch, token in ((False, False), (True, False), (False, True), (True, True)):
        unit = Axis(batch, token, 1)
        times = alone // unit.size(*ALONE)
        axis = replace(unit, times=times)
        if axis.size(*ALONE) == alone and axis.size(*TOGETHER) == together and (times == 1 or not token):
            return axis
    return None


def _shape_text(axes: Sequence[Axis]) -> str:
    return "(" + ", ".join(map(str, axes)) + ")"


def _one_prompt(axes: Sequence[Axis], index: Sequence[Item]) -> tuple[tuple[int | Slice, ...], int | None]:
    """The axes of one prompt's value after its tensor indices, and where the batch axis was dropped."""
    dims: list[int | Slice | None] = [_one_prompt_dim(axis) for axis in axes]
    if not any(axis.batch for axis in axes) and len(axes) > 1 and dims[0] == 1 and isinstance(dims[1], Slice):
        dims[0] = None  # a table shared by the batch, (1, token, …): the leading 1 stands where the batch would
    if dims.count(None) > 1:
        raise _Unfit(f"it has more than one batch axis: {_shape_text(axes)}")
    for item in index:
        if not isinstance(item, Nth | Index):
            raise _Unfit(f"`{written(item)}` cannot follow a tensor; it has the shape {_shape_text(axes)}")
        dims = _indexed_dims(dims, (item.number,) if isinstance(item, Nth) else item.entries, axes)
    dropped = dims.index(None) if None in dims else None
    return tuple(dim for dim in dims if dim is not None), dropped


def _one_prompt_dim(axis: Axis) -> int | Slice | None:
    """A slice for tokens, `None` for the batch axis, a number otherwise."""
    if axis.token:
        return Slice()
    return None if axis.batch and axis.times == 1 else axis.times


def _indexed_dims(dims: Sequence[int | Slice | None], entries: Sequence[Any], axes: Sequence[Axis]) -> list[int | Slice | None]:
    if entries.count(...) > 1 or len(entries) - entries.count(...) > len(dims):
        raise _Unfit(f"the tensor index has too many entries for the shape {_shape_text(axes)}")
    place = entries.index(...) if ... in entries else len(entries)
    full = Slice()
    filled = [*entries[:place], *[full] * (len(dims) - len(entries) + (... in entries)), *entries[place + 1 :]]
    picked: list[int | Slice | None] = []
    for dim, entry in zip(dims, filled, strict=True):
        if isinstance(entry, int):
            _check_position(1 if dim is None else dim, entry, axes)
        else:
            picked.append(_sliced_dim(dim, entry))
    return picked


def _check_position(dim: int | Slice, entry: int, axes: Sequence[Axis]) -> None:
    if isinstance(dim, int) and not -dim <= entry < dim:
        raise _Unfit(f"[{entry}] is outside an axis of size {dim} (the batch axis of one prompt is 1); the shape is {_shape_text(axes)}")


def _sliced_dim(dim: int | Slice | None, entry: Slice) -> int | Slice | None:
    if entry == Slice():
        return dim
    if entry.step is not None and entry.step < 0:
        raise _Unfit(f"the slice {entry} steps backwards, which tensors cannot do")
    if dim is None:
        if len(entry.of(1)) != 1:
            raise _Unfit(f"the slice {entry} leaves nothing of the batch axis, whose size is 1 for one prompt")
        return None
    if isinstance(dim, int):
        return len(entry.of(dim))
    if dim != Slice():
        raise _Unfit("two slices of the token axis; write them as one")
    return entry


def _selected_dims(site: Site) -> tuple[int | Slice, ...]:
    """The axes of what is stored: those of the value with the token selection done."""
    axis, selection = site.token_axis, site.selection
    if axis is None or selection == "all":
        return site.shape
    if site.shape[axis] != Slice():
        raise _Unfit("the address slices the tokens already; leave out the slice or `tokens`")
    before, after = site.shape[:axis], site.shape[axis + 1 :]
    if isinstance(selection, Slice):
        return (*before, selection, *after)
    return (*before, len(selection), *after) if isinstance(selection, tuple) else (*before, *after)


def dtype_name(dtype: torch.dtype) -> str:
    """`float32`, without torch's name before it."""
    return str(dtype).removeprefix("torch.")


def _storage(computed: torch.dtype, asked: str | None, default: str | None) -> str:
    name = dtype_name(computed)
    if name not in ITEM_BYTES:
        raise _Unfit(f"it is {name}, which safetensors files cannot hold")
    if computed.is_floating_point:
        return asked or default or name
    if asked not in (None, name):
        raise _Unfit(f"it is {name}; `dtype` is for floating point numbers")
    return name


# ----------------------------------------------------------------------------------------- does the probe's cut hold?


def _row_values(sites: Sequence[Site | None], seen: Sequence[list[Any]]) -> list[Tensor | None]:
    return [None if site is None else _probed_value(site, held, TOGETHER, ROW) for site, held in zip(sites, seen, strict=True)]


def _probed_value(site: Site, seen: list[Any], shape: tuple[int, int], row: int) -> Tensor | None:
    """The value of the prompt of ALONE, cut out of what a probe of that shape gave; `None` where the cut does not fit."""
    try:
        value, _ = _read(site.tap, seen[_which_call(site, len(seen), len(seen))])
    except (_Unfit, IndexError):
        return None
    if not isinstance(value, Tensor) or not _fits(site, value, shape):
        return None
    return _alone(value, cast(tuple[Axis, ...], site.axes), shape, row, ALONE[1])


def _same_bits(one: Tensor | None, other: Tensor | None) -> bool:
    return one is None or other is None or torch.equal(one.nan_to_num(), other.nan_to_num())


def _verified(run: Site | Fault, alone: Tensor | None, batch: Tensor | None) -> Site | Fault:
    if isinstance(run, Fault):
        return run
    if alone is None or batch is None or alone.shape != batch.shape:
        return Fault(run.tap, "its shape depends on the values in the batch, so a prompt's own value cannot be cut out")
    if unlike := _unlikeness(alone, batch):
        return Fault(
            run.tap,
            f"{_shape_text(run.axes or ())} cut out of a padded batch is not the value of the prompt run alone ({unlike}); its order, or "
            "its dependence on the other prompts, cannot be undone. `batch: {prompts: 1}` runs every prompt alone",
        )
    return run


def _unlikeness(alone: Tensor, batch: Tensor) -> str | None:
    """How two values of one prompt differ more than another batch shape explains; `None` where they do not."""
    equal = alone == batch
    if not alone.is_floating_point():
        share = equal.double().mean().item() if alone.numel() else 1.0
        return None if share >= 0.75 else f"{1 - share:.0%} of the integers differ"
    one, other = alone.double().nan_to_num(), batch.double().nan_to_num()
    difference = torch.where(equal, 0.0, one - other)
    if alone.ndim > 1:
        difference, one = difference.flatten(0, -2), one.flatten(0, -2)
    scale = one.reshape(len(difference) if alone.ndim > 1 else 1, -1).norm(dim=1)
    error = difference.reshape(len(scale), -1).norm(dim=1) / scale.clamp_min(1e-300)
    median = error.median().item() if len(error) else 0.0
    return None if median <= ALIKE else f"median relative error {median:.2g}"


# ---------------------------------------------------------------------------------------------------------- capturing


@dataclass
class Padded:
    """A batch as the model sees it: right-padded rows of token ids."""

    batch: Batch
    lengths: tuple[int, ...] = field(init=False)
    width: int = field(init=False)
    _indices: dict[tuple[Selection, torch.device], Tensor | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.lengths = self.batch.lengths
        self.width = max(self.lengths)

    @property
    def even(self) -> bool:
        """Whether no row is padded."""
        return min(self.lengths) == self.width

    def tensors(self, feed: Feed) -> tuple[Tensor, Tensor | None]:
        """The ids (batch, token), and the mask where padding needs one."""
        if self.even:
            return torch.tensor([list(ids) for ids in self.batch.ids]), None
        ids = torch.full((len(self.lengths), self.width), feed.pad)
        for row, prompt in zip(ids, self.batch.ids, strict=True):
            row[: len(prompt)] = torch.tensor(list(prompt))
        mask = torch.arange(self.width) < torch.tensor(self.lengths)[:, None] if feed.masked else None
        return ids, mask.long() if mask is not None else None

    def index(self, selection: Selection, device: torch.device) -> Tensor | None:
        """The places in `(batch*token)` rows that a selection keeps; `None` where it keeps every row."""
        key = selection, device
        if key not in self._indices:
            everything = self.even and selection in ("all", "mean")
            self._indices[key] = None if everything else torch.tensor(self._places(selection)).to(device)
        return self._indices[key]

    def _places(self, selection: Selection) -> list[int]:
        starts = range(0, self.width * len(self.lengths), self.width)
        return [start + place for start, length in zip(starts, self.lengths, strict=True) for place in positions(selection, length)]


def positions(selection: Selection, length: int) -> Sequence[int]:
    """Which tokens of a prompt of that length a selection keeps, or takes the mean of.

    Raises:
        IndexError: it asks for a position that the prompt does not have.
    """
    match selection:
        case "all" | "mean":
            return range(length)
        case "first":
            return (0,)
        case "last":
            return (length - 1,)
        case Slice():
            return selection.of(length)
        case _:
            return [range(length)[position] for position in selection]


@dataclass
class Captured:
    """What one forward gave: for each site, the rows of all prompts of the batch, in the batch's order.

    Call `wait` before reading; on CUDA the copies may still be on their way.
    """

    rows: list[Tensor]
    overflows: list[tuple[Site, Tensor]]
    ready: "torch.cuda.Event | None" = None

    def wait(self) -> None:
        """Return when the rows are there.

        Raises:
            DataError: a finite value became infinite in the cast to the storage type.
        """
        if self.ready is not None:
            self.ready.synchronize()
        for site, count in self.overflows:
            if lost := int(count.item()):
                layout = cast(Layout, site.layout)
                raise DataError(
                    f"{site.tap.name}: {lost} finite value{'s' * (lost > 1)} too large for {layout.dtype}, whose largest is "
                    f"{torch.finfo(getattr(torch, layout.dtype)).max:g}; use `dtype: bfloat16` or `dtype: float32`"
                )


def capture(model: nn.Module, sites: Sequence[Site], feed: Feed, batch: Batch, *, land: bool = True) -> Captured:
    """Run one forward for one batch and keep what the sites ask for; the forward ends when every site has fired.

    Args:
        sites: probed sites.
        land: bring the rows to the CPU; on CUDA through pinned memory on a side stream, while the forward goes on.

    Raises:
        DataError: a value does not have the shape that the probe promised, or a site did not fire.
    """
    padded = Padded(batch)
    catch = _Catch(sites, padded, land)
    arguments = feed.arguments(*padded.tensors(feed))
    with suppress(_Stop), _hooked(sites, catch.seen):
        model(**arguments)
    return catch.captured()


def capture_whole(model: nn.Module, sites: Sequence[Site], args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[list[Any], list[int]]:
    """Run one forward on the model's own arguments, and keep the values whole, as they are, with every axis.

    The forward ends early where the number of calls of every site is known; otherwise it runs to its end, to count them.

    Returns:
        For each site its value (a structure, where the address stops at one), and how often its module ran.

    Raises:
        AddressError: a module never ran, or ran more than once, or an item leads nowhere.
    """
    kept: list[dict[int, Any]] = [{} for _ in sites]
    calls = [0] * len(sites)
    known = all(site.calls is not None for site in sites)
    wanted = [_wanted_call(site) if known else None for site in sites]

    def seen(place: int, held: Any) -> None:
        if wanted[place] in (None, calls[place]):
            kept[place][calls[place]] = copied(_whole(sites[place].tap, held))
        calls[place] += 1
        if known and all(kept):
            raise _Stop

    with suppress(_Stop), _hooked(sites, seen):
        model(*args, **kwargs)
    if not known:
        sites = [replace(site, calls=count) for site, count in zip(sites, calls, strict=True)]
    return [values[_wanted_call(site)] for site, values in zip(sites, kept, strict=True)], [cast(int, site.calls) for site in sites]


def _wanted_call(site: Site) -> int:
    """The place of the wanted call in a forward whose calls were counted."""
    try:
        return _which_call(site, cast(int, site.calls), cast(int, site.calls))
    except _Unfit as reason:
        raise AddressError(f"{site.tap.name}: {reason}") from None


def _whole(tap: Tap, held: Any) -> Any:
    try:
        if tap.address.port in ("inputs", "outputs") and not tap.address.items:
            return held
        value, index = _read(tap, held)
        for item in index:
            if not isinstance(item, Nth | Index):
                raise _Unfit(f"`{written(item)}` cannot follow a tensor")
            value = value[_tensor_index(item)]
    except (_Unfit, IndexError) as reason:
        raise AddressError(f"{tap.name}: {reason}") from None
    return value


class _Catch:
    """One forward being watched."""

    def __init__(self, sites: Sequence[Site], padded: Padded, land: bool) -> None:
        self.sites = sites
        self.padded = padded
        self.land = land
        self.calls = [0] * len(sites)
        self.rows: list[Tensor | None] = [None] * len(sites)
        self.overflows: list[tuple[Site, Tensor]] = []
        self.waiting = len(sites)
        self.side: torch.cuda.Stream | None = None

    def seen(self, place: int, held: Any) -> None:
        site = self.sites[place]
        call = self.calls[place]
        self.calls[place] += 1
        if call != (site.tap.call or 0) % cast(int, site.calls):
            return
        value, _ = _read(site.tap, held)
        self.rows[place] = self._landed(self._cast(site, _rows(site, value, self.padded)))
        self.waiting -= 1
        if self.waiting == 0:
            raise _Stop

    def _cast(self, site: Site, rows: Tensor) -> Tensor:
        dtype = getattr(torch, cast(Layout, site.layout).dtype)
        if rows.dtype == dtype:
            return rows
        narrow = rows.to(dtype)
        if torch.finfo(dtype).max < torch.finfo(rows.dtype).max:
            self.overflows.append((site, (rows.isfinite() & ~narrow.isfinite()).sum()))
        return narrow

    def _landed(self, rows: Tensor) -> Tensor:
        if not self.land or rows.device.type == "cpu":
            return rows
        if rows.device.type != "cuda":
            return rows.cpu()
        if self.side is None:
            self.side = _side_stream(rows.device)
        self.side.wait_stream(torch.cuda.current_stream(rows.device))
        with torch.cuda.stream(self.side):
            host = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True)
            host.copy_(rows, non_blocking=True)
        rows.record_stream(self.side)
        return host

    def captured(self) -> Captured:
        for site, rows in zip(self.sites, self.rows, strict=True):
            if rows is None:
                raise DataError(f"{site.tap.name}: its module did not run in this forward, though it did in the probe")
        return Captured(cast(list[Tensor], self.rows), self.overflows, self.side.record_event() if self.side else None)


_SIDES: dict[torch.device, "torch.cuda.Stream"] = {}


def _side_stream(device: torch.device) -> "torch.cuda.Stream":
    if device not in _SIDES:
        _SIDES[device] = torch.cuda.Stream(device)
    return _SIDES[device]


def _rows(site: Site, value: Any, padded: Padded) -> Tensor:
    """The rows that all prompts of the batch give at a site: a copy, never a view of the model's tensor."""
    shape = len(padded.lengths), padded.width
    if not isinstance(value, Tensor) or not _fits(site, value, shape):
        raise DataError(
            f"{site.tap.name}: the probe found {_shape_text(site.axes or ())}, but for {shape[0]} prompts of {shape[1]} tokens it is "
            f"{described(value)}"
        )
    if site.rowwise:
        return _gathered(site, value, padded)
    if [axis.batch for axis in site.axes or ()][:1] == [True] and site.token_axis is None and not site.index:
        return value.clone(memory_format=torch.contiguous_format)
    return torch.cat([_one_value(site, value, shape, row, length).reshape(-1) for row, length in enumerate(padded.lengths)])


def _fits(site: Site, value: Tensor, shape: tuple[int, int]) -> bool:
    return tuple(value.shape) == tuple(axis.size(*shape) for axis in site.axes or ())


def _gathered(site: Site, value: Tensor, padded: Padded) -> Tensor:
    """The fast way, for `(batch, token, …)` and `(batch*token, …)`: one gather."""
    leading = 1 if cast(tuple[Axis, ...], site.axes)[0].token else 2
    flat = value.reshape(-1, *value.shape[leading:])
    index = padded.index(site.selection, value.device)
    if site.selection != "mean":
        return flat.clone(memory_format=torch.contiguous_format) if index is None else flat.index_select(0, index)
    rows = flat if index is None else flat.index_select(0, index)
    return torch.stack([prompt.mean(0) for prompt in rows.split(list(padded.lengths))])


def _one_value(site: Site, value: Tensor, shape: tuple[int, int], row: int, length: int) -> Tensor:
    """The general way: one prompt's value cut out, indexed, its tokens selected."""
    one = _alone(value, cast(tuple[Axis, ...], site.axes), shape, row, length)
    for item in site.index:
        one = one[_tensor_index(item)]
    if site.dropped is not None:
        one = one.squeeze(site.dropped)
    axis, selection = site.token_axis, site.selection
    if axis is None or selection == "all":
        return one
    if selection == "mean":
        return one.mean(axis)
    return one.index_select(axis, torch.tensor(positions(selection, length), device=one.device))


def _tensor_index(item: Item) -> Any:
    if isinstance(item, Nth):
        return item.number
    entries = cast(Index, item).entries
    return tuple(slice(entry.start, entry.stop, entry.step) if isinstance(entry, Slice) else entry for entry in entries)


def _alone(value: Tensor, axes: Sequence[Axis], shape: tuple[int, int], row: int, length: int) -> Tensor:
    """What one prompt, cut out of a padded batch of that shape (batch, token), would hold alone."""
    split: list[int] = []
    single: list[int] = []
    cuts: list[tuple[int, int, int]] = []
    for axis in axes:
        if axis.batch:
            cuts.append((len(split), row, 1))
            split.append(shape[0])
        if axis.token:
            cuts.append((len(split), 0, length))
            split.append(shape[1])
        split.append(axis.times)
        single.append(axis.size(1, length))
    view = value.reshape(split)
    for dim, start, size in cuts:
        view = view.narrow(dim, start, size)
    return view.reshape(single)


def values(site: Site, rows: Tensor, lengths: Sequence[int]) -> list[Tensor]:
    """Split captured rows into the value of each prompt, batch axis dropped."""
    layout = cast(Layout, site.layout)
    shapes = [layout.shape(length) for length in lengths]
    sizes = [layout.rows(length) * (layout.row_bytes // ITEM_BYTES[layout.dtype]) for length in lengths]
    return [flat.reshape(shape) for flat, shape in zip(rows.reshape(-1).split(sizes), shapes, strict=True)]
