"""What a model keeps from one forward to the next, and how it is given back."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

TABLE = 1 << 20  # elements; a larger buffer is a weight or a mask, and is not computed anew in a forward
_OWN = frozenset(vars(nn.Module()))  # attributes in which torch keeps what a module consists of


class State:
    """The buffers of a model as they are now, with the other attributes of the modules that hold them.

    A forward in evaluation mode should leave them alone. Where it does not, its values hang on more than one prompt: rotary
    tables with `dynamic` or `longrope` scaling are computed for the widest row of a batch, and some are kept for the batches
    after it (https://github.com/huggingface/transformers/blob/main/src/transformers/modeling_rope_utils.py); Reformer settles
    its number of buckets by its first long prompt.
    In training mode nothing is watched: there a forward is meant to change the statistics of norms.
    """

    def __init__(self, model: nn.Module) -> None:
        self._kept = [_Kept.of(module) for module in model.modules() if module._buffers and not module.training]
        # Every table and where it should stand, in one list, because it is gone through after every forward.
        self._places = [(kept.module._buffers, name, table) for kept in self._kept for name, table in kept.tables.items()]

    def restored(self) -> bool:
        """Give back what forwards changed; whether they had changed anything."""
        unmoved = all(buffers.get(name) is table.buffer and table.untouched for buffers, name, table in self._places)
        if unmoved and not any(kept.moved for kept in self._kept):
            return False
        changed = [kept.restored() for kept in self._kept]
        return any(changed)


@dataclass
class _Table:
    """A buffer, a copy of its values, and torch's count of the writes to it (not kept for inference tensors)."""

    buffer: Tensor
    copy: Tensor
    writes: int | None

    @staticmethod
    def of(buffer: Tensor) -> "_Table":
        return _Table(buffer, buffer.clone(), writes_to(buffer))

    @property
    def untouched(self) -> bool:
        """Whether it is certain, without a look at the values, that nobody wrote into the buffer."""
        return self.writes is not None and self.writes == self.buffer._version

    def restored(self) -> bool:
        if self.untouched:
            return False
        changed = not torch.equal(self.buffer, self.copy)
        if changed:
            self.buffer.copy_(self.copy)
        self.writes = writes_to(self.buffer)
        return changed


@dataclass
class _Kept:
    """A module, its tables, and its attributes beside those that torch keeps."""

    module: nn.Module
    attributes: dict[str, Any]
    tables: dict[str, _Table]

    @staticmethod
    def of(module: nn.Module) -> "_Kept":
        small = {
            name: buffer
            for name, buffer in module._buffers.items()
            if buffer is not None and buffer.numel() <= TABLE and buffer.device.type != "meta"
        }
        attributes = {name: value for name, value in vars(module).items() if name not in _OWN}
        return _Kept(module, attributes, {name: _Table.of(buffer) for name, buffer in small.items()})

    @property
    def moved(self) -> bool:
        """Whether an attribute is not what it was."""
        now = vars(self.module)
        return any(not _same(now.get(name), value) for name, value in self.attributes.items())

    def restored(self) -> bool:
        buffers = self.module._buffers
        replaced = [name for name, table in self.tables.items() if buffers.get(name) is not table.buffer]
        written = [table.restored() for table in self.tables.values()]
        if not replaced and not any(written) and not self.moved:
            return False
        vars(self.module).update(self.attributes)
        buffers.update({name: self.tables[name].buffer for name in replaced})
        return True


def _same(now: object, before: object) -> bool:
    """Whether an attribute is what it was; a number may have been computed anew."""
    return now is before or (isinstance(before, int | float | str) and type(now) is type(before) and now == before)


def writes_to(tensor: Tensor) -> int | None:
    """torch's count of the writes to a tensor; not kept for inference tensors."""
    return None if tensor.is_inference() else tensor._version
