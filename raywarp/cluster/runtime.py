"""SIGTERM and Ctrl-C as an exception: Ray stops a job with SIGTERM, and with SIGKILL three seconds
later.
"""

import contextlib
import logging
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from raywarp.cluster import orphans

SAVE_SECONDS = 2.0  # of the three, for the policies' checkpoints


class Stopped(KeyboardInterrupt):
    """The run was told to stop by the signal of this number; the same command continues. Its text
    says what was saved.
    """

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number

    @property
    def exit_code(self) -> int:
        return 128 + self.number

    def __str__(self) -> str:
        name = {signal.SIGINT: "Ctrl-C"}.get(
            signal.Signals(self.number), signal.Signals(self.number).name
        )
        return "; ".join([f"stopped by {name}", *_saved, "the same command continues"])


_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_inside: list[bool] = []
_received: list[int] = []
_saved: list[str] = []


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """In the body SIGTERM and SIGINT raise Stopped, once; a second Ctrl-C interrupts at once.
    Nothing changes outside the main thread.

    After a ray.init in the body, `keep_listening` is to be called.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, _stop) for number in _SIGNALS}
    _received.clear()
    _saved.clear()
    _inside.append(True)
    try:
        yield
    # Ray raises one of its own in the place of whatever a handler raises while it waits (2.60)
    except KeyboardInterrupt as error:
        raise (
            Stopped(_received[0]) if _received and not isinstance(error, Stopped) else error
        ) from None
    finally:
        _inside.pop()
        _received.clear()
        for number, handler in before.items():
            signal.signal(number, handler)


def keep_listening() -> None:
    """Inside `stoppable`, after ray.init, which sets a handler of its own (Ray 2.60)."""
    if _inside and threading.current_thread() is threading.main_thread():
        for number in _SIGNALS:
            signal.signal(number, _stop)


def check() -> None:
    """Raise the Stopped of a signal that came while Python could not pass an exception on (in a
    destructor, say).
    """
    if _received:
        raise Stopped(_received[0])


def is_requested() -> bool:
    """Whether a signal has come."""
    return bool(_received)


def request(number: int) -> None:
    """As if the signal of this number had come: the next `check` raises."""
    if not _received:
        _received.append(number)


def note(lines: list[str]) -> None:
    """What was saved, for the message of whoever ends the run."""
    _saved[:] = lines


def _stop(number: int, frame: FrameType | None) -> None:
    if not _received:
        _received.append(number)
        raise Stopped(number)
    if number == signal.SIGINT:
        raise KeyboardInterrupt


def start_ray() -> None:
    """Join the cluster of RAY_ADDRESS (a job's) or the last `ray start`, or start one here for as
    long as this process lives.

    Not address="auto", which joins whatever Ray runs on this machine (2.60), another program's or
    another user's.
    """
    import ray

    if ray.is_initialized():
        return
    with orphans.watched():
        try:
            ray.init(log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False)
        except ConnectionError:  # the last `ray start` is gone
            ray.init(
                address="local",
                log_to_driver=False,
                logging_level=logging.ERROR,
                include_dashboard=False,
            )
    keep_listening()
