"""Sites and feeds: a tap bound to a module, its axes, and how to run the model on token ids."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from inspect import Parameter, signature
from typing import Any, cast

import torch
from torch import Tensor, nn

from actdump.address import Index, Item, Nth, Slice, Tree, module_at
from actdump.errors import AddressError, UsageError
from actdump.plan import Column, Layout
from actdump.state import State
from actdump.tap import Selection, Tap, expand_tap


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
        spelled: the address as the user wrote it; of a pattern's, the resolved one.
        module: the module at the address.
        axes: the axes of the tensor at the address, before its tensor indices; `None` where nobody probed, and then the
            value is taken as it is.
        shape: the axes of one prompt's value after the tensor indices, batch axis dropped, tokens not yet selected.
        index: the tensor indices of the address.
        dropped: where the batch axis stood in the indexed value; `None` where an index took it.
        indexed: how many tokens a prompt needs for the tensor indices to be there.
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
    indexed: int = 1
    calls: int | None = None
    form: str = ""
    layout: Layout | None = None

    @cached_property
    def selection(self) -> Selection:
        """Which tokens are kept; all of them where the value has no token axis."""
        return self.tap.tokens if self.tap.tokens is not None and self.token_axis is not None else "all"

    @cached_property
    def bare(self) -> bool:
        """Whether a bare tensor at the port is the value."""
        first = self.tap.address.items[0] if self.tap.address.items else None
        whole = first is None or isinstance(first, Index) or (isinstance(first, Nth) and first.number in (0, -1))
        return (self.tap.address.port == "output" and whole) or (
            self.tap.address.port == "input" and not isinstance(first, Nth)
        )

    @cached_property
    def wanted(self) -> int:
        """The place of the wanted call among those of one forward. Needs a probed site."""
        return (self.tap.call or 0) % cast(int, self.calls)

    @cached_property
    def late(self) -> bool:
        """Whether a forward has to go on to its end, because the call is counted from the last, and a longer prompt may have more."""
        return self.tap.call is not None and self.tap.call < 0

    @property
    def least(self) -> int:
        """How many tokens a prompt needs for every position that the tap names."""
        places = self.selection if isinstance(self.selection, tuple) else ()
        return max([self.indexed, *(place + 1 if place >= 0 else -place for place in places)])

    @cached_property
    def token_axis(self) -> int | None:
        """The axis of a prompt's value that the token selection works on: the first with tokens (the query's, in attention)."""
        return next((place for place, dim in enumerate(self.shape) if isinstance(dim, Slice)), None)

    @cached_property
    def rowwise(self) -> bool:
        """Whether the tensor is rows of batch and token, in this order, so that one gather takes all that is kept."""
        if self.axes is None or self.index:
            return False
        leading = [str(axis) for axis in self.axes if axis.batch or axis.token]
        count = len(leading)
        return leading in (["batch", "token"], ["batch*token"]) and [str(axis) for axis in self.axes[:count]] == leading

    @cached_property
    def everything(self) -> bool:
        """Whether a batch without padding is kept as it is: all rows of batch and token."""
        return self.rowwise and self.selection == "all"

    @cached_property
    def whole(self) -> bool:
        """Whether the tensor is one entry for each prompt, which is kept as it is."""
        return bool(self.axes and self.axes[0].batch) and self.token_axis is None and not self.index

    @cached_property
    def plain(self) -> bool:
        """Whether a bare tensor of a batch without padding is kept as it is."""
        return self.bare and (self.whole or self.everything)

    @cached_property
    def dtype(self) -> torch.dtype:
        """The storage type. Needs a probed site."""
        assert self.layout is not None
        return cast(torch.dtype, getattr(torch, self.layout.dtype))

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
            token_axis=None if self.selection in ("first", "last", "mean") else self.token_axis,
        )


def _selection_text(selection: Selection) -> str:
    return str(list(selection)) if isinstance(selection, tuple) else str(selection)


@dataclass(frozen=True)
class Feed:
    """How to run a model on token ids.

    Attributes:
        device: where the ids go.
        vocabulary: ids are below this.
        pad: the id that fills rows up.
        takes_mask: whether the model has an argument for an attention mask.
        options: what every forward is given beside its tokens.
        state: what the model keeps between forwards, as it was before the first one.
        masked: whether padded rows need an attention mask; the probe finds out.
        reads_pad: whether the model takes the pad id for padding where it is a token of a prompt too, as XLM does, which makes a
            mask of its own where it is given none; the probe finds out.
    """

    device: torch.device
    vocabulary: int
    pad: int
    takes_mask: bool
    options: Mapping[str, Any]
    state: State
    masked: bool = True
    reads_pad: bool = False

    def arguments(self, ids: Tensor, mask: Tensor | None) -> dict[str, Any]:
        """The keyword arguments of one forward on ids of shape (batch, token)."""
        arguments = {"input_ids": sent(ids, self.device), **self.options}
        if mask is not None and self.takes_mask:
            arguments["attention_mask"] = sent(mask, self.device)
        return arguments


def sent(values: Tensor, device: torch.device) -> Tensor:
    """Values on a device. CUDA takes them from pinned memory when it comes to that; from any other, where the host has no more of it,
    the device is waited for, with all that it has still to do."""
    if values.device == device:
        return values
    if device.type != "cuda":
        return values.to(device)
    with suppress(RuntimeError):  # the host has no more of it
        values = values.pin_memory()
    return values.to(device, non_blocking=values.is_pinned())


def feed_for(model: nn.Module) -> Feed:
    """How to run this model on token ids, as far as its signature, its config and its embedding tell.

    Raises:
        UsageError: the model does not take `input_ids`.
    """
    parameters = signature(model.forward).parameters
    if "input_ids" not in parameters:
        raise UsageError(
            f"{type(model).__name__} takes {', '.join(parameters) or 'no arguments'}, not `input_ids`, "
            "so it cannot be run on prompts"
        )
    embedding, config = _token_embedding(model), cast(Any, getattr(model, "config", None))
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    vocabulary = cast(int, getattr(text, "vocab_size", None) or getattr(embedding, "num_embeddings", 2))
    pad = getattr(config, "pad_token_id", None)
    accepts = {name for name, parameter in parameters.items() if parameter.kind != Parameter.VAR_KEYWORD}
    device = _device(model, embedding)
    keeps = "use_cache" not in accepts or device.type == "meta"  # without a cache, transformers looks at values
    return Feed(
        device=device,
        vocabulary=vocabulary,
        pad=pad if pad is not None and 0 <= pad < vocabulary else 0,
        takes_mask="attention_mask" in accepts,
        options={} if keeps else {"use_cache": False},
        state=State(model),
    )


def _device(model: nn.Module, embedding: nn.Module | None) -> torch.device:
    """That of what looks tokens up; where `device_map` left that on the host or on disk, that of other weights."""
    weights = [*(model if embedding is None else embedding).parameters(), *model.parameters()]
    here = [weight for weight in weights if not weight.is_meta] or weights
    return here[0].device if here else torch.device("cpu")


def _token_embedding(model: nn.Module) -> nn.Module | None:
    """What looks tokens up, as transformers tells it; of other modules the first embedding. Models of images have others before."""
    with suppress(AttributeError, NotImplementedError):  # no model of transformers, or one that does not tell (CANINE)
        embedding = cast(Any, model).get_input_embeddings()
        return embedding if isinstance(embedding, nn.Module) else None  # Perceiver's is a parameter
    return next((module for module in model.modules() if isinstance(module, nn.Embedding)), None)


# --------------------------------------------------------------------------------------------------------------------- binding


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
        sites += [
            Site(each, text, module_at(each.address, cast(Tree, model))) for each, text in zip(found, spelled, strict=True)
        ]
    seen: set[str] = set()
    for site in sites:
        if site.tap.name in seen:
            wrong.append(f"{site.tap.name}: two taps would have this name; give names with the mapping form of `save`")
        seen.add(site.tap.name)
    if wrong:
        raise AddressError("\n".join(wrong))
    return sites


# --------------------------------------------------------------------------------------------------------------------- cutting


def shape_text(axes: Sequence[Axis]) -> str:
    return "(" + ", ".join(map(str, axes)) + ")"


def cut_out(value: Tensor, axes: Sequence[Axis], shape: tuple[int, int], row: int, length: int) -> Tensor:
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
