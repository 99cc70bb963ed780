"""What a model consists of, as far as it decides what its modules do."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as of_all_modules

from actdump.state import writes_to

CONTAINER = (dict, list, tuple, set, frozenset)
PLAIN = (bool, int, float, complex, str, bytes, type(None))
LARGE = 1000  # entries
DEPTH = 3  # of containers and objects that are looked into: a module's attributes, a config, the parts of a config


@dataclass(frozen=True)
class Standing:
    """Modules with their hooks and all other attributes, weights and buffers, as they are now.

    What is written through `.data`, stands deeper than `DEPTH`, or in a container of more than `LARGE` entries, is not seen.

    Attributes:
        facts: two models of the same facts do the same.
        parts: all that the facts tell by its identity, held so that nothing else comes to the same one.
    """

    facts: list[object]
    parts: list[object]

    @staticmethod
    def of(model: nn.Module) -> "Standing":
        standing = Standing([], [])
        known: set[int] = set()
        for module in model.modules():
            standing._add(vars(module), known, DEPTH)
        for name, value in vars(of_all_modules).items():
            if name.startswith("_global_"):
                standing._add(value, known, DEPTH)
        return standing

    def _add(self, value: Any, known: set[int], depth: int) -> None:
        if isinstance(value, PLAIN):
            self.facts.append(value)
            return
        self.facts.append(id(value))
        self.parts.append(value)
        if isinstance(value, Tensor):
            self.facts.extend((writes_to(value), value.dtype, value.device))
        elif depth and id(value) not in known and not isinstance(value, nn.Module | type):
            known.add(id(value))
            self._look_into(value, known, depth)

    def _look_into(self, value: Any, known: set[int], depth: int) -> None:
        held = value if isinstance(value, CONTAINER) else getattr(value, "__dict__", ())
        if len(held) > LARGE:
            self.facts.append(len(held))
            return
        if isinstance(held, dict):
            self.facts.extend(key if isinstance(key, PLAIN) else id(key) for key in held)
            held = held.values()
        for each in held:
            if not isinstance(each, CONTAINER) or each:  # torch has ten empty dictionaries for each module
                self._add(each, known, depth - 1)
