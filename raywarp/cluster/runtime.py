"""The Ray runtime's start, and SIGTERM and Ctrl-C as an exception.

Ray stops a job with SIGTERM, and with SIGKILL three seconds later.
"""

import contextlib
import json
import logging
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from raywarp.cluster import orphans

SAVE_SECONDS = 2.0  # of these three seconds, the time for the policies' checkpoints


class Stopped(KeyboardInterrupt):
    """The run was told to stop by a signal. The same command continues it.

    The message says what was saved.

    Args:
        number: of the signal.
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
_own: list[str] = []


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """Let SIGTERM and SIGINT raise Stopped once in the block. A second Ctrl-C interrupts at once.

    Outside the main thread nothing changes. Call `keep_listening` after a ray.init in the block.
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
    # While Ray waits, it replaces what a handler raises by its own KeyboardInterrupt (Ray 2.60).
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
    """Set the signal handlers again after ray.init, which sets its own (Ray 2.60)."""
    if _inside and threading.current_thread() is threading.main_thread():
        for number in _SIGNALS:
            signal.signal(number, _stop)


def check() -> None:
    """Raise Stopped if a signal came while Python could not raise it, as in a destructor."""
    if _received:
        raise Stopped(_received[0])


def is_requested() -> bool:
    """Return whether a signal has come."""
    return bool(_received)


def request(number: int) -> None:
    """Act as if this signal had come: the next `check` raises."""
    if not _received:
        _received.append(number)


def note(lines: list[str]) -> None:
    """Keep the lines that say what was saved, for the message of Stopped."""
    _saved[:] = lines


def _stop(number: int, frame: FrameType | None) -> None:
    if not _received:
        _received.append(number)
        raise Stopped(number)
    if number == signal.SIGINT:
        raise KeyboardInterrupt


def start_ray() -> None:
    """Join a cluster, or start one here that lives as long as this process.

    The cluster is that of RAY_ADDRESS (as in a job) or of the last `ray start`. The address is not
    "auto", because that joins any Ray on this machine (Ray 2.60), also another program's or another
    user's.
    """
    import ray

    if ray.is_initialized():
        return
    with orphans.watched():
        try:
            ray.init(log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False)
            from ray._private import worker

            if worker._global_node and worker._global_node.head:
                _own[:] = [ray.get_runtime_context().gcs_address]
        except ConnectionError:  # the cluster of the last `ray start` is gone
            ray.init(
                address="local",
                log_to_driver=False,
                logging_level=logging.ERROR,
                include_dashboard=False,
            )
    keep_listening()


def owns_ray() -> bool:
    """Return whether start_ray has started the Ray that this process is on. No node will come."""
    import ray

    return _own == [ray.get_runtime_context().gcs_address]


def submission_id() -> str | None:
    """Return the id of the Ray job that this process is the driver of, or that started it.

    Ray 2.60 tells its drivers so in an environment variable.
    """
    try:
        found = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))
        return str(found["metadata"]["job_submission_id"])
    except (ValueError, KeyError, TypeError):
        return None
