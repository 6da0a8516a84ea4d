"""Ctrl-C and SIGTERM: a run stops between two steps, and a loader's workers ignore them."""

import atexit
import contextlib
import multiprocessing.util  # it registers its own function to run at exit, after the one below
import signal
import threading
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from util import distributed

T = TypeVar("T")
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StoppedError(Exception):
    """The run was asked to stop, and is between two steps."""


class Interrupts:
    """Turns Ctrl-C and SIGTERM into a `StoppedError` between two items of an iteration.

    In another thread than the main one, which alone receives signals, nothing stops an iteration.
    """

    def __enter__(self) -> "Interrupts":
        self.requested = False
        # Only the main thread may set handlers; the program that started another decides itself.
        in_main = threading.current_thread() is threading.main_thread()
        numbers = SIGNALS if in_main else ()
        self.handlers = {number: signal.signal(number, self._ask) for number in numbers}
        return self

    def _ask(self, number: int, frame: Any) -> None:
        if self.requested:  # a second time: stop at once
            raise KeyboardInterrupt
        self.requested = True

    def __exit__(self, *error: Any) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def stop_between(self, items: Iterable[T]) -> Iterator[T]:
        """Yield the items; once a stop is requested, raise StoppedError in place of the next.

        All processes of a job must iterate over as many items; they stop at the same one.
        """
        for item in items:
            self.check()
            yield item
            self.check()  # before waiting for the next

    def check(self) -> None:
        """Raise StoppedError if a process of the job was asked to stop."""
        if distributed.all_reduce_sum([self.requested])[0]:
            raise StoppedError

    def stop_between_alone(self, items: Iterable[T]) -> Iterator[T]:
        """Do the same where ranks have different numbers of items: then they do not stop."""
        return self.stop_between(items) if distributed.world_size() == 1 else iter(items)


@contextlib.contextmanager
def block_signals() -> Iterator[None]:
    """Block SIGINT and SIGTERM inside the block; processes started in it keep them blocked.

    A loader's worker that only ignored them could still be killed while it starts.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def ignore_signals(worker: int) -> None:
    """Ignore SIGINT and SIGTERM: a `worker_init_fn` for workers that did not inherit the block."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@atexit.register
def kill_workers() -> None:
    """Kill the loaders' workers that are still alive when the program ends.

    An error whose traceback is kept also keeps its loader. At exit multiprocessing ends workers
    with SIGTERM, which ours ignore, and would wait for them for ever.
    """
    for worker in multiprocessing.active_children():
        if worker.daemon:
            worker.kill()
