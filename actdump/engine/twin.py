"""Twins: the weights of a model under modules of their own, so that forwards can run side by side."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from actdump.engine.site import Feed, Site
from actdump.state import TABLE, State


class BrokenOff(BaseException):
    """Ended a forward that nobody waits for."""


def twin(model: nn.Module, sites: Sequence[Site], feed: Feed) -> tuple[nn.Module, list[Site], Feed]:
    """A model that shares its weights with another, and nothing that a forward may write; the sites and the feed that go with it.

    Modules, their hooks and attributes, and buffers that a forward may compute anew (see `State`) are copies.

    Raises:
        TypeError, RuntimeError: something that hangs on a module cannot be copied.
    """
    shared = [*model.parameters(), *(buffer for buffer in model.buffers() if buffer.numel() > TABLE)]
    with torch.inference_mode(False):  # whose tensors do not count the writes to them, which `State` looks at
        other = deepcopy(model, {id(tensor): tensor for tensor in shared})
    modules = dict(zip(model.modules(), other.modules(), strict=True))
    return other, [replace(site, module=modules[site.module]) for site in sites], replace(feed, state=State(other))


@contextmanager
def breaking_off(models: Iterable[nn.Module]) -> Iterator[None]:
    """While the block runs, a forward of these models, in whatever thread, ends with `BrokenOff` when it comes to its next module."""
    theirs = {module for model in models for module in model.modules()}

    def end(module: nn.Module, _args: Any) -> None:
        if module in theirs:
            raise BrokenOff

    handle = register_module_forward_pre_hook(end)
    try:
        yield
    finally:
        handle.remove()
