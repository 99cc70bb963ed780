"""What is measured: SmolLM2 with its real weights, and what is saved of it."""

from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import nn

from actdump import model
from actdump.spec import ModelSpec
from benchmarks.setting import ROOT

NAME = "SmolLM2-135M-Instruct"
FOLDER = ROOT / "models" / NAME


@dataclass(frozen=True)
class Task:
    """What is to be saved: the outputs of some blocks."""

    name: str
    layers: tuple[int, ...]
    tokens: str = "all"

    @property
    def depth(self) -> int:
        """How many blocks must run."""
        return max(self.layers) + 1


A = Task("A", (5, 10, 15))
B = Task("B", tuple(range(30)))
C = Task("C", (5, 10, 15), tokens="last")
TASKS = (A, B, C)


@cache
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(FOLDER)


def load(dtype: str, **options: Any) -> nn.Module:
    """The whole model, loaded as a run loads it."""
    return model.load(model.find(ModelSpec.model_validate({"name": str(FOLDER), "dtype": dtype, **options})))
