"""Out-of-memory kills: whether Ray's memory monitor or the kernel killed a process."""

import contextlib
import importlib
import time
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

COUNTERS = Path("/proc/vmstat")
TOLD_SECONDS = 2.0  # Ray's control service learns of a death within this time
ASKED_SECONDS = 10.0  # time limit for reading another node's counter


def kernel_kills() -> int:
    """Return how many processes this machine's kernel has killed for lack of memory since boot.

    The result is 0 where the machine does not say.
    """
    with contextlib.suppress(OSError):
        for line in COUNTERS.read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0


def explains(process: int, node: str, kills_before: int) -> bool:
    """Return whether lack of memory explains the death of a Ray worker.

    Args:
        process: its process id.
        node: Ray's id of its node.
        kills_before: kernel_kills of that node while the worker was alive.
    """
    return killed_by_ray(process, node) or kernel_kills_on(node) > kills_before


def killed_by_ray(process: int, node: str) -> bool:
    """Return whether Ray's memory monitor killed the worker.

    No error says so for an actor that Ray restarts, but Ray's table of workers does (Ray 2.60).
    """
    deadline = time.monotonic() + TOLD_SECONDS
    while (worker := _dead_worker(process, node)) is None and time.monotonic() < deadline:
        time.sleep(0.1)
    return worker is not None and worker.exit_type == _out_of_memory()


def kernel_kills_on(node: str) -> int:
    """Return kernel_kills of a node. It is 0 where the node does not answer."""
    if node == ray.get_runtime_context().get_node_id():
        return kernel_kills()
    there = NodeAffinitySchedulingStrategy(node, soft=False)
    ref = (
        ray.remote(num_cpus=0, max_retries=0)(kernel_kills)
        .options(scheduling_strategy=there)
        .remote()
    )
    try:
        kills: int = ray.get(ref, timeout=ASKED_SECONDS)
    except RayError:
        return 0
    return kills


def _dead_worker(process: int, node: str) -> Any:
    """Return the worker's row in Ray's table of workers, once that says it is dead."""
    from ray._private.state import state

    gcs: Any = importlib.import_module("ray.core.generated.gcs_pb2")
    # Ray 2.60 has no public way to read the table without a dashboard.
    with contextlib.suppress(AttributeError):
        accessor: Any = state._global_state_accessor
        rows = (gcs.WorkerTableData.FromString(row) for row in accessor.get_worker_table())
        return next(
            (
                row
                for row in rows
                if row.pid == process
                and row.worker_address.node_id.hex() == node
                and not row.is_alive
            ),
            None,
        )
    return None


def _out_of_memory() -> int:
    exits: Any = importlib.import_module("ray.core.generated.common_pb2")
    return int(exits.NODE_OUT_OF_MEMORY)
