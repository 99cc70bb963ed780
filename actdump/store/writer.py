"""The threads that write beside the captures."""

from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from types import TracebackType
from typing import Any, Self

from actdump.store.pending import Pending
from actdump.store.threads import shut_down

AHEAD = 2  # tasks of one thread, as the seals of a part are: one under way, and one that waits
UNSEALED = 32  # shards that may wait for a thread that seals: two parts beside an accelerator
BESIDE = 4  # batches that may be on their way where a device computes and the threads have the cores for themselves


class Writer:
    """Threads that do tasks beside whoever captures, a few at most waiting; what goes wrong there is raised at the next call here.

    Usually one thread, which does all of them in order. Where a seal, which hashes a shard, should not keep the rows of the next one
    waiting, seals have threads of their own, and so have rows: then only what is in threads of one kind begins in order.
    """

    def __init__(self, seals: int = 0) -> None:
        """
        Args:
            seals: how many shards can be sealed at once, beside the tasks; 0: they are tasks like any other.
        """
        self._tasks = _Threads("actdump-writer", BESIDE, BESIDE) if seals else _Threads("actdump-writer", 1, AHEAD)
        self._seals = _Threads("actdump-sealer", seals, UNSEALED) if seals else self._tasks
        self._held: list[Callable[[], Any]] = []

    def do(self, task: Callable[..., Any], *args: Any) -> "Future[None]":
        """Let a thread do this; waits while too much is waiting there."""
        self.let_go()
        return self._submit(self._tasks, partial(task, *args))

    def hold(self, seals: Iterable[Callable[[], Any]]) -> None:
        """Let threads do these, which seal the shards of a part, when the next call of `let_go`, `do` or `finish` comes."""
        self.let_go()
        self._held = list(seals)

    def let_go(self) -> None:
        """Let threads do what was held: side by side if they are for that, and otherwise as one task."""
        seals, self._held = self._held, []
        if seals and self._seals is self._tasks:
            seals = [partial(_one_by_one, seals)]
        for seal in seals:
            self._submit(self._seals, seal)

    def _submit(self, threads: "_Threads", task: Callable[[], Any]) -> "Future[None]":
        threads.make_way()
        self._check()
        return threads.begin(task, self._failed)

    def flush(self, part: Pending) -> None:
        """Let a thread that seals flush a part that wants it, if none has anything else to do: its waiting for the disk costs nobody
        time, and the seal that waits for the disk later has less to wait for."""
        if part.wants_flush and self._seals.idle:
            self._submit(self._seals, part.flush)

    def settle(self) -> bool:
        """Return when no rows are on their way; whether some were since the last call. What went wrong with them is raised elsewhere.

        Rows that were on their way a moment ago may have taken the memory that somebody lacked then.
        """
        return self._tasks is not self._seals and self._tasks.settle()

    def _failed(self) -> BaseException | None:
        """What went wrong first."""
        return self._tasks.failure or self._seals.failure

    def _check(self) -> None:
        """Raise what went wrong, again and again: whoever got it first may have taken it for something of its own."""
        if (failure := self._failed()) is not None:
            raise failure

    def finish(self) -> None:
        """Return when all is done."""
        self.let_go()
        self._tasks.join()
        self._seals.join()
        self._check()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self._tasks.end(cancel=kind is not None)
        finally:
            self._seals.end(cancel=kind is not None)


def _one_by_one(tasks: Iterable[Callable[[], Any]]) -> None:
    for task in tasks:
        task()


class _Threads:
    """Threads of one kind, with the tasks that they have not done yet.

    Attributes:
        failure: what went wrong first.
    """

    def __init__(self, name: str, count: int, most: int) -> None:
        """
        Args:
            most: tasks, under way or waiting.
        """
        self.failure: BaseException | None = None
        self._most = most
        self._begun = False  # a task, since the last call of `settle`
        self._threads = ThreadPoolExecutor(count, name)
        self._left: deque[Future[None]] = deque()

    @property
    def idle(self) -> bool:
        return all(task.done() for task in self._left)

    def make_way(self) -> None:
        """Return when there is room for another task."""
        while self._left and (len(self._left) >= self._most or self._left[0].done()):
            self._left.popleft().result()

    def begin(self, task: Callable[[], Any], failed: Callable[[], BaseException | None]) -> "Future[None]":
        """Do a task, unless one before it failed: what follows may build on it, as a seal does on the rows."""
        self._begun = True
        self._left.append(self._threads.submit(self._run, task, failed))
        return self._left[-1]

    def _run(self, task: Callable[[], Any], failed: Callable[[], BaseException | None]) -> None:
        if (before := failed()) is not None:
            raise before
        try:
            task()
        except BaseException as failure:
            self.failure = self.failure or failure
            raise

    def settle(self) -> bool:
        """Return when all is done, well or not; whether something was begun since the last call."""
        begun, self._begun = self._begun, False
        wait(self._left)
        return begun

    def join(self) -> None:
        """Return when all is done."""
        while self._left:
            self._left.popleft().result()

    def end(self, cancel: bool) -> None:
        shut_down(self._threads, cancel)
