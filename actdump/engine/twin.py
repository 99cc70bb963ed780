"""Twins: the weights of a model under modules of their own, so that forwards can run side by side."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from actdump.engine.hooks import read
from actdump.engine.site import Feed, Site
from actdump.engine.tiny import observe, probe_ids
from actdump.state import TABLE, State, writes_to


class BrokenOff(BaseException):
    """Ended a forward that nobody waits for."""


class InseparableError(Exception):
    """Why a model can have no twin."""


def twin(model: nn.Module, sites: Sequence[Site], feed: Feed) -> tuple[nn.Module, list[Site], Feed]:
    """A model that shares its weights with another and has all the rest for itself; the sites and the feed that go with it.

    Modules, their hooks and attributes, and buffers that a forward may compute anew (see `State`) are copies. That forwards of
    both have nothing to do with each other is tried out with a few tokens.

    Raises:
        InseparableError: they have.
        Exception: something that hangs on a module cannot be copied.
    """
    shared = [*model.parameters(), *(buffer for buffer in model.buffers() if buffer.numel() > TABLE)]
    with torch.inference_mode(False):  # whose tensors do not count the writes to them, which `State` looks at
        other = deepcopy(model, {id(tensor): tensor for tensor in shared})
    modules = dict(zip(model.modules(), other.modules(), strict=True))
    twins = [replace(site, module=modules[site.module]) for site in sites]
    its_feed = replace(feed, state=State(other))
    _try_out(model, _Twin(other, twins, its_feed), sites, feed, shared)
    return other, twins, its_feed


def _try_out(model: nn.Module, other: "_Twin", sites: Sequence[Site], feed: Feed, shared: Sequence[Tensor]) -> None:
    """See that forwards of both give what each gives by itself, one after another and one amid the other.

    What a forward notes for its modules where both find it, as in a global or behind a weak reference, is seen by this.
    """
    one = probe_ids(feed)["alone"]
    two = one.flip(1)
    writes = [writes_to(tensor) for tensor in shared]
    ran: list[nn.Module] = []
    with before_each(model, ran.append):
        apart = other.observed(one, first=True)
    if ran:
        raise InseparableError(f"a forward of its copy runs its own {type(ran[0]).__name__}")
    with before_each(model, ran.append):
        by_itself = observe(model, sites, feed, two, like=apart)
    amid: list[list[list[Any]]] = []
    reached = count()

    def pause(_: nn.Module) -> None:
        if next(reached) == len(ran) // 2:
            amid.append(other.observed(one, like=apart))

    with before_each(model, pause):
        around = observe(model, sites, feed, two, like=apart)
    if writes != [writes_to(tensor) for tensor in shared]:
        raise InseparableError("a forward writes into its weights or large buffers")
    if not _same(sites, by_itself, around) or not all(_same(sites, apart, seen) for seen in amid):
        raise InseparableError("forwards of both change each other's values")


@dataclass(frozen=True)
class _Twin:
    model: nn.Module
    sites: Sequence[Site]
    feed: Feed

    def observed(self, ids: Tensor, like: Sequence[list[Any]] | None = None, *, first: bool = False) -> list[list[Any]]:
        return observe(self.model, self.sites, self.feed, ids, like=like, first=first)


def _same(sites: Sequence[Site], seen: Sequence[list[Any]], others: Sequence[list[Any]]) -> bool:
    """Whether two forwards gave the same values, bit for bit."""
    return all(
        len(calls) == len(again)
        and all(torch.equal(read(site.tap, one)[0], read(site.tap, two)[0]) for one, two in zip(calls, again, strict=True))
        for site, calls, again in zip(sites, seen, others, strict=True)
    )


@contextmanager
def breaking_off(models: Iterable[nn.Module]) -> Iterator[None]:
    """While the block runs, a forward of these models, in whatever thread, ends with `BrokenOff` when it comes to its next module."""

    def end(_: nn.Module) -> None:
        raise BrokenOff

    with ExitStack() as stack:
        for model in models:
            stack.enter_context(before_each(model, end))
        yield


@contextmanager
def before_each(model: nn.Module, do: Callable[[nn.Module], None]) -> Iterator[None]:
    """While the block runs, do something before each module of a model runs, in whatever thread."""
    modules = set(model.modules())

    def hook(module: nn.Module, _args: Any) -> None:
        if module in modules:
            do(module)

    handle = register_module_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()
