"""What a run tells while it goes on."""

from collections.abc import Sequence
from typing import Protocol

from actdump.plan import Part, Plan


class Watcher(Protocol):
    """What a run tells while it goes on."""

    def step(self, doing: str) -> None:
        """Something slow begins: `loading the model`."""

    def planned(self, plan: Plan, done: Sequence[Part]) -> None:
        """The plan is made, or found; some of its parts may be done."""

    def batch(self, prompts: int, tokens: int) -> None:
        """A batch went through the model."""

    def elsewhere(self, part: Part) -> None:
        """Another worker has done a part."""


class Silent:
    """Tells nobody."""

    def step(self, doing: str) -> None: ...

    def planned(self, plan: Plan, done: Sequence[Part]) -> None: ...

    def batch(self, prompts: int, tokens: int) -> None: ...

    def elsewhere(self, part: Part) -> None: ...
