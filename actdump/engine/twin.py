"""Twins: the weights of a model under modules of their own, so that forwards can run side by side."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from actdump.engine.site import Feed, Site
from actdump.engine.tiny import observe, probe_ids
from actdump.state import TABLE, State, writes_to


class BrokenOff(BaseException):
    """Ended a forward that nobody waits for."""


class InseparableError(Exception):
    """Why a model can have no twin."""


def twin(model: nn.Module, sites: Sequence[Site], feed: Feed) -> tuple[nn.Module, list[Site], Feed]:
    """A model that shares its weights with another and has all the rest for itself; the sites and the feed that go with it.

    Modules, their hooks and attributes, and buffers that a forward may compute anew (see `State`) are copies. That a forward of
    the twin stays with them is tried out with a few tokens.

    Raises:
        InseparableError: a forward of the twin runs modules of the model, or writes into what they share.
        Exception: something that hangs on a module cannot be copied.
    """
    shared = [*model.parameters(), *(buffer for buffer in model.buffers() if buffer.numel() > TABLE)]
    with torch.inference_mode(False):  # whose tensors do not count the writes to them, which `State` looks at
        other = deepcopy(model, {id(tensor): tensor for tensor in shared})
    modules = dict(zip(model.modules(), other.modules(), strict=True))
    twins = [replace(site, module=modules[site.module]) for site in sites]
    its_feed = replace(feed, state=State(other))
    _try_out(model, other, twins, its_feed, shared)
    return other, twins, its_feed


def _try_out(model: nn.Module, other: nn.Module, sites: Sequence[Site], feed: Feed, shared: Sequence[Tensor]) -> None:
    ran: list[nn.Module] = []
    writes = [writes_to(tensor) for tensor in shared]
    with before_each(model, ran.append):
        observe(other, sites, feed, probe_ids(feed)["alone"])
    if ran:
        raise InseparableError(f"a forward of its copy runs its own {type(ran[0]).__name__}")
    if writes != [writes_to(tensor) for tensor in shared]:
        raise InseparableError("a forward writes into its weights or large buffers")


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
