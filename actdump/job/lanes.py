"""Lanes: forwards that run side by side on a CPU."""

import logging
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from queue import SimpleQueue
from types import TracebackType
from typing import TYPE_CHECKING, Self, TypeVar

from actdump import store
from actdump.job.bound import Bound
from actdump.job.underway import LOOK
from actdump.memory import out_of_memory

if TYPE_CHECKING:
    from torch import nn

    from actdump.engine import Dice

log = logging.getLogger(__name__)

Item = TypeVar("Item")
Made = TypeVar("Made")
MOST = 4  # each lane holds the activations of a batch; more than two have not been measured


class Lanes:
    """Forwards that run side by side on a CPU, each in a thread that has its share of the threads that torch computes with.

    Where several threads share every operation, they wait for each other at the end of each, for Python before the next, and
    longest where another program takes one of the cores. Measured on two cores (SmolLM2 in float32, 16 blocks, batches of 1,024
    tokens): two forwards side by side take 0.87 to 0.95 of the time that they take one after another, and 0.7 beside another program.

    The values are those of one forward after another, up to the last bits, which can depend on the number of threads: every further
    lane has a twin of the model. An accelerator, and a model on several devices, have one lane.
    """

    def __init__(self, bound: Bound, check_stop: Callable[[], None]) -> None:
        """
        Args:
            check_stop: called again and again while forwards run; what it raises ends them.
        """
        import torch

        self._lanes = [bound]
        self._check_stop = check_stop
        self._all = torch.get_num_threads()
        self._count = _count(bound.module, self._all)
        self._free: SimpleQueue[Bound] = SimpleQueue()
        self._threads: ThreadPoolExecutor | None = None
        self._dice: Dice | None = None
        self._tight = False

    def run(self, do: Callable[[Bound, Item], Made], items: Sequence[Item]) -> Iterator[tuple[Item, Made | None]]:
        """Do something with each item in a lane; the items in their order, each with what came of it.

        Where that is `None`, it is to be done (anew) by the caller, who has all threads and all memory for it, because nothing runs
        beside. So it is with the items that are left over when each lane has had as many as the others; with one that found memory
        short, and those that were not begun by then; and with all from the first on during which somebody drew random numbers.
        """
        if self._count > 1 and len(items) >= self._count and self._threads is None:
            self._open()
        together = len(items) - len(items) % self._count if self._count > 1 and self._threads else 0
        self._tight = False
        running = deque(self._submit(do, item) for item in items[:together])
        for item in items[:together]:
            made = self._awaited(running.popleft())
            if made is None:  # the others are under way or will find that memory is short
                while wait(running, LOOK).not_done:
                    self._check_stop()
            yield item, made
        if together and self._drawn:
            log.warning("the model's forwards draw random numbers, so they run one after another")
            self._count = 1
        for item in items[together:]:
            yield item, None

    def _open(self) -> None:
        import torch

        from actdump import engine

        try:
            self._lanes += [_twin(self._lanes[0]) for _ in range(self._count - 1)]
        except Exception as error:  # whatever hangs on the modules can refuse to be copied; the model itself can still run
            log.warning("the model cannot be copied, so its forwards run one after another: %s", error)
            self._count = 1
            return
        for lane in self._lanes:
            self._free.put(lane)
        self._dice = engine.Dice()
        self._threads = ThreadPoolExecutor(self._count, "actdump-lane", torch.set_num_threads, (self._all // self._count,))

    def _submit(self, do: Callable[[Bound, Item], Made], item: Item) -> "Future[Made | None]":
        assert self._threads is not None
        return self._threads.submit(self._in_lane, do, item)

    def _in_lane(self, do: Callable[[Bound, Item], Made], item: Item) -> Made | None:
        lane = self._free.get()
        try:
            made = None if self._tight else do(lane, item)
            if not self._drawn:
                return made
            self._tight = True  # and what was made may be of another forward's numbers
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            self._tight = True
        finally:
            self._free.put(lane)
        return None

    @property
    def _drawn(self) -> bool:
        return self._dice is not None and self._dice.thrown

    def _awaited(self, future: "Future[Made | None]") -> Made | None:
        while not wait([future], LOOK).done:
            self._check_stop()
        return future.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._threads is None:
            return
        import torch

        from actdump import engine

        try:
            with engine.breaking_off(lane.module for lane in self._lanes):
                store.shut_down(self._threads, cancel=True)
        finally:
            torch.set_num_threads(self._all)  # for the threads that come
            if self._dice is not None:
                self._dice.restore()


def _count(module: "nn.Module", threads: int) -> int:
    """How many lanes share so many threads evenly."""
    import torch

    divisible = torch.backends.openmp.is_available()  # type: ignore[no-untyped-call] # torch gives it no types
    if not divisible or any(weight.device.type != "cpu" for weight in module.parameters()):
        return 1  # without OpenMP all lanes would share one pool of threads
    if hasattr(os, "sched_getaffinity") and len(os.sched_getaffinity(0)) < threads:
        return 1  # OMP_PROC_BIND holds this thread, and those that it begins, on one core
    return max(count for count in range(1, MOST + 1) if threads % count == 0)


def _twin(bound: Bound) -> Bound:
    from actdump import engine

    module, sites, feed = engine.twin(bound.module, bound.sites, bound.feed)
    return replace(bound, module=module, sites=sites, feed=feed)
