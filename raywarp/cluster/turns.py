"""The work of several calls in one thread, in turns.

An engine then works on the calls of several policies at once (continuous batching).
"""

import threading
import time
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
# Work on one call. It yields where other calls may have their turn, and returns its result.
InTurns = Generator[None, None, T]


class Turns:
    """One thread that works on several calls in turns, first come, first served.

    The thread is the same for an engine's whole life, since OpenMP's threads belong to the thread
    that uses them.

    Attributes:
        thread: the thread's number.
    """

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="engine")
        self.thread = self._executor.submit(threading.get_ident).result()
        self._seconds = 0.0

    def run(self, work: Callable[[], T]) -> T:
        """Return the result of work that is one turn."""
        return self._executor.submit(work).result()

    def finish(self, work: InTurns[T]) -> T:
        """Return the result of the work. Several threads may call this at the same time.

        Raises what the work raises.
        """
        while not (found := self._executor.submit(self._turn, work).result()):
            pass
        return found[0]

    def seconds(self) -> float:
        """Return how long the thread has worked since the last call of this method."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def _turn(self, work: InTurns[T]) -> list[T]:
        """Work until others may have their turn. Return the result once it is there."""
        start = time.perf_counter()
        try:
            next(work)
        except StopIteration as end:
            return [end.value]
        finally:
            self._seconds += time.perf_counter() - start
        return []


def finish(work: InTurns[T]) -> T:
    """Return the result of work that has no others beside it."""
    while True:
        try:
            next(work)
        except StopIteration as end:
            result: T = end.value
            return result
