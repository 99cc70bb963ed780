"""How to measure: how often, how much, where to write."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console

from benchmarks.texts import Prompts

ROOT = Path(__file__).parents[2]
err = Console(stderr=True, highlight=False, soft_wrap=True, markup=False)


@dataclass(frozen=True)
class Setting:
    """How to measure.

    Attributes:
        rounds: how often each side runs.
        quick: with little of everything, to see that it works; the figures mean nothing.
        dtypes: the model's dtypes.
        scratch: an empty folder on a disk for what is written.
    """

    rounds: int
    quick: bool
    dtypes: tuple[str, ...]
    scratch: Path

    def some(self, usual: int, quick: int) -> int:
        """How much of something."""
        return quick if self.quick else usual

    def saved(self, prompts: Prompts) -> Path:
        """A file with the prompts, for a spec."""
        path = self.scratch / f"{prompts.name}.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in prompts.texts))
        return path


def say(text: str) -> None:
    """Tell whoever waits what is going on."""
    err.print(text, style="dim")


@contextmanager
def scratch() -> Iterator[Path]:
    """A folder on the disk where the repository is, gone afterwards."""
    place = ROOT / "out"
    place.mkdir(exist_ok=True)
    with TemporaryDirectory(prefix="bench-", dir=place) as folder:
        yield Path(folder)
