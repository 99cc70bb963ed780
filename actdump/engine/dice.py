"""The random numbers of the process: forwards that draw them cannot run side by side."""

from typing import Any

import numpy as np
import torch

SEED = 3_141_592_653  # one that nobody takes: a forward may seed, and draw as often as the one before it


class Dice:
    """Torch's and numpy's generators on the CPU, which show from now on whether anybody drew from them, or seeded them.

    Reformer seeds torch's in each forward, of prompts that are long enough, and then draws the rotations of its hashes: of two forwards
    side by side, one could take the other's.
    """

    def __init__(self) -> None:
        self._kept: tuple[Any, Any] = np.random.get_state(), torch.get_rng_state()
        np.random.seed(SEED)
        torch.default_generator.manual_seed(SEED)
        self._before = _states()

    @property
    def thrown(self) -> bool:
        """Whether anybody drew or seeded."""
        return _states() != self._before

    def restore(self) -> None:
        """Make them what they were before."""
        numpys, torchs = self._kept
        np.random.set_state(numpys)
        torch.set_rng_state(torchs)


def _states() -> tuple[object, ...]:
    numpys: Any = np.random.get_state()
    _, words, *rest = numpys
    return words.tobytes(), rest, torch.get_rng_state().numpy().tobytes()
