"""The spec: the YAML file as strict models. Every mistake in it is reported at once, with file, line and what would be right."""

from actdump.spec.document import load, model_spec
from actdump.spec.models import (
    LOCAL,
    BatchSpec,
    ModelSpec,
    PromptsSpec,
    Row,
    SaveSpec,
    ShardSpec,
    Spec,
    Task,
    TokenizerSpec,
    path_of,
)
from actdump.spec.wording import complaints

__all__ = [
    "LOCAL",
    "BatchSpec",
    "ModelSpec",
    "PromptsSpec",
    "Row",
    "SaveSpec",
    "ShardSpec",
    "Spec",
    "Task",
    "TokenizerSpec",
    "complaints",
    "load",
    "model_spec",
    "path_of",
]
