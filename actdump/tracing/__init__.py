"""The Python front end: `with model.trace(prompt): hidden = model.transformer.h[-1].output[0].save()`.

Inside the block nothing runs: attributes and indices only spell addresses, and `save` turns one into a tap. When the block
ends, one forward runs (several prompts: one a batch) through the engine that the YAML front end uses, and the saved values are
there. So saves may stand in any order, and what is not saved is never kept.
"""

from actdump.tracing.reference import Model, Reference, load, wrap
from actdump.tracing.tracer import Tracer
from actdump.tracing.values import Proxy, Saved

__all__ = ["Model", "Proxy", "Reference", "Saved", "Tracer", "load", "wrap"]
