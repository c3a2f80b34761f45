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
from typing import Any

from raywarp.cluster import address, machine, orphans
from raywarp.config.schema import ConfigError

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


STARTS, TOO_SLOW = 3, "timed out during startup"  # attempts, and Ray's (2.60) words
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

    The cluster is that of RAY_ADDRESS (as in a job) or of the last `ray start`. Without RAY_ADDRESS
    the address is not "auto", because that joins any Ray on this machine (Ray 2.60), also another
    program's or another user's.

    Raises:
        ConfigError: the cluster is not there or does not let this process in.
    """
    import ray

    if ray.is_initialized():
        return _refuse_client()
    _notes.clear()
    _leave_uv_alone()
    if not _joins():
        _start_own()
    keep_listening()


def where() -> str:
    """Return where the run is: its cluster, with its GPUs and CPUs."""
    import ray
    from ray._private import worker  # Ray 2.60: no public way

    found = ray.cluster_resources()
    kinds = [kind for kind in ("GPU", "CPU") if found.get(kind)]
    size = ", ".join(f"{found[kind]:g} {kind}{'s' * (found[kind] != 1)}" for kind in kinds)
    if worker._global_node is not None and worker._global_node.head:
        return f"on a Ray of its own on this machine ({size})"
    job = f" (job {name})" if (name := submission_id()) else ""
    return f"on the cluster at {ray.get_runtime_context().gcs_address}{job}: {size}"


def owns_ray() -> bool:
    """Return whether start_ray has started the Ray that this process is on. No node will come."""
    import ray

    return _own == [ray.get_runtime_context().gcs_address]


def notes() -> list[str]:
    """Return what a person should know of the Ray that this process has started."""
    return list(_notes)


def submission_id() -> str | None:
    """Return the id of the Ray job that this process is the driver of, or that started it.

    Ray 2.60 tells its drivers so in an environment variable.
    """
    try:
        found = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))
        return str(found["metadata"]["job_submission_id"])
    except (ValueError, KeyError, TypeError):
        return None


_notes: list[str] = []


def _refuse_client() -> None:
    """Raise ConfigError if Ray is Ray Client, whose actors and placement groups are proxies."""
    from ray.util.client import ray as client

    if client.is_connected():
        raise ConfigError(
            "this process has called ray.init('ray://…'): Ray Client runs no raywarp;"
            f" {address.SUBMIT}"
        )


def _leave_uv_alone() -> None:
    """Start workers with the Python that runs here, also under `uv run`.

    Ray 2.60 would start each with `uv run` in a copy of this directory. In a job, whose other nodes
    may lack the environment, it still does, and where RAY_ENABLE_UV_RUN_RUNTIME_ENV is set.
    """
    from ray._private import ray_constants

    name = "RAY_ENABLE_UV_RUN_RUNTIME_ENV"
    if submission_id() is None and name not in os.environ:
        setattr(ray_constants, name, False)


def _joins() -> bool:
    """Join the cluster that is named. Return whether there is one."""
    if found := address.named_address():
        address.check_cluster(found, f"RAY_ADDRESS={os.environ['RAY_ADDRESS']}")
    elif os.environ.get("RAY_ADDRESS") == "local" or not (found := address.last_started()):
        return False
    elif address.is_gone(found):
        _notes.append(f"the cluster of the last `ray start`, {found}, is gone")
        return False
    else:
        address.check_cluster(found, f"the last `ray start` was at {found}")
    _init(found)
    return True


def _start_own() -> None:
    """Start a Ray on this machine that ends with this process.

    Raises:
        ConfigError: a folder for Ray's files cannot be written, or the machine is too loaded.
    """
    import ray

    free, folder = machine.free_shared_memory(), machine.short_folder()
    with orphans.watched():
        try:
            _start_patiently(folder)
        except OSError as error:
            raise ConfigError(
                f"Ray cannot start on this machine: {error}. Its files are below"
                f" {folder or machine.default_folder()} (RAY_TMPDIR) and its token below"
                f" {os.path.expanduser('~')}/.ray (HOME); both must be writable"
            ) from error
    _own[:] = [ray.get_runtime_context().gcs_address]
    if folder:
        _notes.append(machine.folder_note())
    store = ray.cluster_resources().get("object_store_memory", 0.0)
    if note := machine.shared_memory_note(store, free):
        _notes.append(note)


def _start_patiently(folder: str | None) -> None:
    """Start a Ray, again where its processes took longer than the 30 s that Ray (2.60) waits.

    What was started in vain ends with this process.

    Raises:
        ConfigError: it took too long each time.
    """
    import ray

    for _ in range(STARTS):
        try:
            return _init("local", _temp_dir=folder)
        except Exception as error:
            if TOO_SLOW not in str(error):
                raise
            ray.shutdown()
    raise ConfigError(
        f"Ray did not start on this machine, {STARTS} times for 30 s: it is too loaded, or lacks"
        " memory"
    )


def _init(found: str, **options: Any) -> None:
    """Run ray.init.

    Raises:
        ConfigError: the cluster refuses this process for a reason that only ray.init finds.
    """
    import ray
    from ray.exceptions import AuthenticationError

    try:
        ray.init(
            address=found,
            log_to_driver=False,
            logging_level=logging.ERROR,
            include_dashboard=False,
            **options,
        )
    except (ConnectionError, RuntimeError, AuthenticationError) as error:
        ray.shutdown()
        raise address.refusal(found, error) from error
