"""What a model keeps from one forward to the next, and how it is given back."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from operator import call, itemgetter
from typing import Any

import torch
from torch import Tensor, nn

TABLE = 1 << 20  # elements; a larger buffer is a weight or a mask, and is not computed anew in a forward
# Attributes in which torch keeps what a module consists of; and two in which transformers notes that it has put in hooks, which stay
# (without the note, each forward would put them in once more: `maybe_install_capturing_hooks`), and that it has set the first weights.
_OWN = frozenset(vars(nn.Module())) | {"_output_capturing_hooks_installed", "_is_hf_initialized"}


class State:
    """The buffers of a model and the plain attributes of its modules, as they are now.

    A forward in evaluation mode should leave them alone. Where it does not, its values depend on more than one prompt: rotary
    tables with `dynamic` or `longrope` scaling are computed for the widest row of a batch, and some are kept for the batches
    after it (https://github.com/huggingface/transformers/blob/main/src/transformers/modeling_rope_utils.py); Reformer settles
    its number of buckets by its first long prompt; older remote code keeps rotary tables in plain attributes.
    What is written into a buffer of more than `TABLE` elements, or into objects within attributes, is not seen. In training mode
    nothing is watched: there a forward is meant to change the statistics of norms.
    """

    def __init__(self, model: nn.Module) -> None:
        watched = [module for module in model.modules() if not module.training]
        modules = [module for module in watched if module._buffers or not _of_torch(module)]
        held = [each for module in modules for each in (vars(module), module._buffers)]
        self._dictionaries = list(map(_Dictionary.of, held))
        values = [value for each in self._dictionaries for value in each.values.values()]
        self._containers = [_Container(value, value.copy()) for value in values if type(value) in (list, dict, set)]
        inside = [value for each in self._containers for value in _values(each.held)]
        tensors = {id(value): value for value in (*values, *inside) if isinstance(value, Tensor)}
        small = (tensor for tensor in tensors.values() if tensor.numel() <= TABLE and tensor.device.type != "meta")
        self._tables = list(map(_Table.of, small))
        self._look = _Look(self._dictionaries, self._containers)

    def settle(self) -> None:
        """Give back what the forward of a short prompt alone changed. The attributes that it added are those that every forward adds:
        where one adds others, or others values, it changes something."""
        for each in self._dictionaries:
            each.usual = each.added()
        self.restored()

    def restored(self) -> bool:
        """Give back what forwards changed; whether they had changed anything."""
        if self._look.same and all(table.untouched for table in self._tables):
            return False  # of most models, after every forward
        restored = [each.restored() for kept in (self._dictionaries, self._containers, self._tables) for each in kept]
        if not any(restored):  # what made the look doubt will be there next time
            self._look = _Look(self._dictionaries, self._containers)
        return any(restored)


class _Look:
    """A quick look at many dictionaries and containers, without a line of Python for each."""

    def __init__(self, dictionaries: "Sequence[_Dictionary]", containers: "Sequence[_Container]") -> None:
        self._held = [each.held for each in dictionaries]
        self._sizes = list(map(len, self._held))
        named = [each for each in dictionaries if each.values]
        self._named, self._getters = [each.held for each in named], [itemgetter(*each.values) for each in named]
        self._values = list(map(call, self._getters, self._named))
        self._inside, self._copies = [each.held for each in containers], [each.copy for each in containers]

    @property
    def same(self) -> bool:
        """Whether it is certain that all is as it was."""
        try:
            return (
                list(map(len, self._held)) == self._sizes
                and list(map(call, self._getters, self._named)) == self._values
                and self._inside == self._copies
            )
        except Exception:  # one is gone; or another one stands there, and tensors, arrays, anything can refuse to be compared
            return False


def _of_torch(module: nn.Module) -> bool:
    """Whether a module is one of torch's own, which keep what lasts in buffers."""
    return type(module).__module__.startswith("torch.nn.")


@dataclass
class _Table:
    """A tensor that a module keeps, a copy of its values, and torch's count of the writes to it (not kept for inference tensors)."""

    tensor: Tensor
    copy: Tensor
    writes: int | None

    @staticmethod
    def of(tensor: Tensor) -> "_Table":
        return _Table(tensor, tensor.detach().clone(), writes_to(tensor))

    @property
    def untouched(self) -> bool:
        """Whether it is certain, without a look at the values, that nobody wrote into the tensor."""
        return self.writes is not None and self.writes == self.tensor._version

    def restored(self) -> bool:
        if self.untouched:
            return False
        changed = not torch.equal(self.tensor, self.copy)
        if changed:
            with torch.no_grad():
                self.tensor.copy_(self.copy)
        self.writes = writes_to(self.tensor)
        return changed


@dataclass
class _Dictionary:
    """The attributes of a module, beside those that torch keeps, or its buffers.

    Attributes:
        usual: what every forward adds, as `longrope` adds the table for prompts that are longer than the shortest.
    """

    held: dict[str, Any]
    values: dict[str, Any]
    usual: dict[str, Any] = field(default_factory=dict)

    @staticmethod
    def of(held: dict[str, Any]) -> "_Dictionary":
        return _Dictionary(held, {name: value for name, value in held.items() if name not in _OWN})

    def added(self) -> dict[str, Any]:
        """What was not there before."""
        return {name: self.held[name] for name in self.held.keys() - self.values.keys() - _OWN}

    def restored(self) -> bool:
        added = self.added()
        stayed = all(name in self.held and _same(self.held[name], value) for name, value in self.values.items())
        for name in added:
            del self.held[name]
        if not stayed:
            self.held.update(self.values)
        as_usual = added.keys() <= self.usual.keys() and all(_alike(value, self.usual[name]) for name, value in added.items())
        return not (stayed and as_usual)


@dataclass
class _Container:
    """A list, dictionary or set in an attribute, and what it held."""

    held: Any
    copy: Any

    @property
    def same(self) -> bool:
        if isinstance(self.held, set):
            return bool(self.held == self.copy)
        keys = not isinstance(self.held, dict) or self.held.keys() == self.copy.keys()
        return keys and len(self.held) == len(self.copy) and all(map(_same, _values(self.held), _values(self.copy)))

    def restored(self) -> bool:
        if self.same:
            return False
        if isinstance(self.held, list):
            self.held[:] = self.copy
        else:
            self.held.clear()
            self.held.update(self.copy)
        return True


def _values(held: Any) -> Iterable[Any]:
    return held.values() if isinstance(held, dict) else held


def _same(now: object, before: object) -> bool:
    """Whether an attribute is what it was; a number may have been computed anew."""
    return now is before or (isinstance(before, int | float | str) and type(now) is type(before) and now == before)


def _alike(now: object, before: object) -> bool:
    """Whether an attribute was computed to be what it was."""
    if isinstance(now, Tensor) and isinstance(before, Tensor):
        return now.dtype == before.dtype and now.device == before.device and torch.equal(now, before)
    return _same(now, before)


def writes_to(tensor: Tensor) -> int | None:
    """torch's count of the writes to a tensor; not kept for inference tensors."""
    return None if tensor.is_inference() else tensor._version
