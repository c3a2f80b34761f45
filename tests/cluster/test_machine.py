"""Tests of a Ray that raywarp starts itself, on a machine that does not suit Ray."""

import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from raywarp.cluster import machine
from raywarp.config.schema import ConfigError

# Starts a Ray with 64 MB of shared memory; prints where it is, what is unusual, its folder, and the
# Python of a worker.
DRIVER = """
import json, sys
from raywarp.cluster import machine, runtime
machine.SHORT_FOLDER = sys.argv[1]
machine.free_shared_memory = lambda: 64 << 20
runtime.start_ray()
import ray
from ray._private import worker
python = ray.get(ray.remote(lambda: sys.executable).remote())
session = worker._global_node.get_session_dir_path()
print(json.dumps([runtime.where(), runtime.notes(), session, python]))
"""
# A process that calls itself `uv run`, as the parent of its second argument's program.
UV_RUN = "import subprocess, sys; sys.exit(subprocess.run(sys.argv[1:]).returncode)"


@pytest.mark.parametrize(("length", "is_long"), [(39, False), (40, True)])
def test_a_folder_is_too_long_for_rays_sockets(
    monkeypatch: pytest.MonkeyPatch, length: int, is_long: bool
) -> None:
    """A socket's path has at most 107 bytes, and 64 of them are Ray's: 107 − 64 − 4 = 39, where 4
    are those of "/ray".
    """
    monkeypatch.setenv("RAY_TMPDIR", "/tmp/" + "x" * (length - len("/tmp/")))
    assert (machine.short_folder() == "/tmp/ray") == is_long
    monkeypatch.setenv("RAY_TMPDIR", "/tmp/" + "é" * ((length - len("/tmp/")) // 2))
    assert machine.short_folder() is None
    monkeypatch.setenv("RAY_TMPDIR", "/tmp/" + "é" * (length - len("/tmp/")))
    assert machine.short_folder() == "/tmp/ray"


def test_without_a_short_folder_a_long_one_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TMPDIR", "/tmp/" + "x" * 80)
    monkeypatch.setattr(machine, "SHORT_FOLDER", "/proc/none/ray")
    with pytest.raises(ConfigError, match="set RAY_TMPDIR to a folder of at most 39 bytes"):
        machine.short_folder()


# Ray's control server does not know the node in time: at first once, then never.
SLOW = """
import sys
from raywarp.cluster import runtime
from raywarp.config.schema import ConfigError
import ray._private.services as services
import ray._private.node as node

known, left = services.get_node, [int(sys.argv[1])]

class Clock:
    def __init__(self, time):
        self.time = time
    def __getattr__(self, name):
        return getattr(self.time, name)
    def monotonic(self):
        return 40 * self.time.monotonic()

def get_node(*arguments):
    if left[0]:
        raise RuntimeError("No node info found")
    return known(*arguments)

def init(*arguments, _init=runtime._init, **options):
    try:
        return _init(*arguments, **options)
    finally:
        left[0] -= 1

services.get_node, node.time, runtime._init = get_node, Clock(node.time), init
try:
    runtime.start_ray()
    print(runtime.where())
except ConfigError as error:
    print("ConfigError:", error)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("failures", "told"),
    [(1, "on a Ray of its own"), (9, "ConfigError: Ray did not start on this machine, 3 times")],
)
def test_ray_is_started_again_where_the_machine_was_too_slow(
    tmp_path: Path, failures: int, told: str
) -> None:
    """Ray waits for 30 s, which its clock here takes for less than one."""
    with tempfile.TemporaryDirectory(prefix="rws", ignore_cleanup_errors=True) as folder:
        environment = {"RAY_ADDRESS": "local", "HOME": str(tmp_path), "RAY_TMPDIR": folder}
        found = subprocess.run(
            [sys.executable, "-c", SLOW, str(failures)],
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
        )
    assert found.stdout.startswith(told), found.stderr


@pytest.mark.parametrize("name", ["HOME", "RAY_TMPDIR"])
def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path, name: str) -> None:
    script = "from raywarp.cluster import runtime; runtime.start_ray()"
    environment = {"RAY_ADDRESS": "local", "HOME": str(tmp_path), name: "/dev/null"}
    found = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert "ConfigError: Ray cannot start on this machine: [Errno 20] Not a dir" in found.stderr
    assert f"({name})" in found.stderr


def test_too_little_shared_memory_is_told_with_its_remedy() -> None:
    store = 4 << 30
    assert machine.shared_memory_note(store, store) is None
    note = machine.shared_memory_note(store, 64 << 20)
    assert note is not None
    assert "/dev/shm has 64 MB free, too little for Ray's object store of 4.0 GB" in note
    assert note.endswith("--shm-size=5g")


def test_shared_memory_that_is_not_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "SHARED_MEMORY", "/none")
    assert machine.free_shared_memory() == 0


@pytest.mark.slow
def test_a_run_starts_where_ray_alone_would_not(tmp_path: Path) -> None:
    """The folder for Ray's files is too long and names a cluster that is gone, there is little
    shared memory, and `uv run` is an ancestor, for which Ray's workers would start with `uv run`.
    """
    long = tmp_path / ("long" * 20)
    (long / "ray").mkdir(parents=True)
    with socket.create_server(("127.0.0.1", 0)) as server:
        gone = f"127.0.0.1:{server.getsockname()[1]}"
    (long / "ray" / "ray_current_cluster").write_text(gone)
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    with tempfile.TemporaryDirectory(prefix="rwm", ignore_cleanup_errors=True) as short:
        (tmp_path / "run").write_text(UV_RUN)
        found = subprocess.run(
            ["uv", "run", sys.executable, "-c", DRIVER, short],
            executable=sys.executable,
            cwd=tmp_path,
            env={**environment, "RAY_TMPDIR": str(long), "HOME": str(tmp_path)},
            capture_output=True,
            text=True,
            timeout=100,
        )
        assert found.returncode == 0, found.stderr
        where, notes, session, python = json.loads(found.stdout.splitlines()[-1])
        assert session.startswith(short)
    assert where.startswith("on a Ray of its own on this machine (")
    assert notes[0] == f"the cluster of the last `ray start`, {gone}, is gone"
    assert f"{long}/ray is too long" in notes[1]
    assert "--shm-size" in notes[2]
    assert python == sys.executable
