"""actdump: dump the internal activations of neural networks.

`open` reads a dump, `load` and `wrap` give a model for `with model.trace(prompt):`. What needs torch is imported when it is first
used, so that importing actdump is quick.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from actdump.errors import ActdumpError

if TYPE_CHECKING:
    from actdump.reader import Dump
    from actdump.reader import open_dump as open
    from actdump.tracing import Model, load, wrap

__version__ = "0.1.0"
__all__ = ["ActdumpError", "Dump", "Model", "load", "open", "wrap"]

_PLACES = {
    "Dump": ("reader", "Dump"),
    "Model": ("tracing", "Model"),
    "load": ("tracing", "load"),
    "open": ("reader", "open_dump"),
    "wrap": ("tracing", "wrap"),
}


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'actdump' has no attribute {name!r}")
    module, attribute = _PLACES[name]
    return getattr(import_module(f"actdump.{module}"), attribute)
