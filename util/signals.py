"""Ctrl-C and SIGTERM: a run stops between two steps, and a loader's workers ignore them."""

import contextlib
import signal
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from util import distributed

T = TypeVar("T")


class StoppedError(Exception):
    """Somebody asked the run to stop, and it is between two steps."""


class Interrupts:
    """Turns Ctrl-C and SIGTERM into a `StoppedError` between two items of what is gone through."""

    def __enter__(self) -> "Interrupts":
        self.asked = False
        self.before = {
            number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)
        }
        return self

    def _ask(self, number: int, frame: Any) -> None:
        if self.asked:  # twice: now
            raise KeyboardInterrupt
        self.asked = True

    def __exit__(self, *error: Any) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def stop_between(self, items: Iterable[T]) -> Iterator[T]:
        """Yield the items; once asked to stop, raise StoppedError instead of the next.

        All processes of a job go through as many items, and stop at the same one.
        """
        for item in items:
            self.check()
            yield item
            self.check()  # before the next is waited for

    def check(self) -> None:
        """Raise StoppedError if this process, or another of the job, was asked to stop."""
        if distributed.all_reduce_sum([self.asked])[0]:
            raise StoppedError

    def stop_between_alone(self, items: Iterable[T]) -> Iterator[T]:
        """Do the same where processes have items of their own; only a job of one stops there."""
        return self.stop_between(items) if distributed.world_size() == 1 else iter(items)


SIGNALS = (signal.SIGINT, signal.SIGTERM)


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
