"""Threads that write to files, and how they end."""

from concurrent.futures import ThreadPoolExecutor
from threading import Event, Thread


def shut_down(threads: ThreadPoolExecutor, cancel: bool) -> None:
    """Return when nothing runs there any more. An interrupt waits as well, because what runs writes to files that are closed next.

    The threads are joined in another one: before Python 3.13, a join that an interrupt breaks off takes its thread for ended
    (https://github.com/python/cpython/issues/90882). Each interrupt begins a new one, because it may have broken off the start of
    the last, and no thread can be started twice; joining twice does no harm.

    Args:
        cancel: whether to forget what has not been begun.

    Raises:
        KeyboardInterrupt: there was one.
    """
    ended = Event()

    def end() -> None:
        try:
            threads.shutdown(cancel_futures=cancel)
        finally:
            ended.set()

    interrupted: KeyboardInterrupt | None = None
    while not ended.is_set():
        try:
            Thread(target=end).start()
            ended.wait()
        except KeyboardInterrupt as interrupt:
            interrupted = interrupt
    if interrupted is not None:
        raise interrupted
