"""Test of a run on a cluster without nodes, which Ray's autoscaler starts.

Ray's fake provider starts them as processes of this machine. The head is ended by its pid.
"""

import json
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import ray
from killing import Command, Patience, make_project

NODES = {
    "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
    "small": {"resources": {"CPU": 1}, "node_config": {}, "min_workers": 0, "max_workers": 4},
}
COMMANDS = (
    "initialization_commands",
    "setup_commands",
    "head_setup_commands",
    "worker_setup_commands",
    "head_start_ray_commands",
    "worker_start_ray_commands",
)


@pytest.fixture
def address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A head without CPUs, and with an autoscaler that may start four nodes of one CPU each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"{ray.util.get_node_ip_address()}:{port}"
    flags = {"launch_multiple": True, "disable_node_updaters": True}
    provider = {"type": "fake_multinode", "head_node_id": "f" * 56, **flags}
    settings = {
        "cluster_name": "fake",
        "max_workers": 4,
        "idle_timeout_minutes": 5,
        "upscaling_speed": 10,
        "provider": {**provider, "gcs_address": address},
        "auth": {},
        "available_node_types": NODES,
        "head_node_type": "ray.head.default",
        "file_mounts": {},
        "cluster_synced_files": [],
        **{key: [] for key in COMMANDS},
    }
    (tmp_path / "cluster.yaml").write_text(json.dumps(settings))
    with tempfile.TemporaryDirectory(prefix="rw", ignore_cleanup_errors=True) as folder:
        for name, value in {
            "HOME": folder,
            "RAY_TMPDIR": folder,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": "0" * 64,
            "RAY_FAKE_CLUSTER": "1",
            "RAY_OVERRIDE_NODE_ID_FOR_TESTING": "f" * 56,
            "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        }.items():
            monkeypatch.setenv(name, value)
        words = [f"--autoscaling-config={tmp_path / 'cluster.yaml'}", f"--port={port}"]
        words += ["--num-cpus=0", "--include-dashboard=false"]
        head = subprocess.Popen(
            [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", *words],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        monkeypatch.delenv("RAY_OVERRIDE_NODE_ID_FOR_TESTING")
        try:
            yield address
        finally:
            ours = [p for p in psutil.process_iter() if _uses(p, folder)]
            head.terminate()
            head.wait(60)
            for process in ours:
                if process.is_running():
                    process.kill()
            psutil.wait_procs(ours, timeout=30)


def _uses(process: psutil.Process, folder: str) -> bool:
    try:
        return any(folder in word for word in process.cmdline())
    except psutil.Error:
        return False


def test_a_run_without_nodes_asks_for_them_and_runs(address: str, tmp_path: Path) -> None:
    """Its three actors need 1.5 CPUs on nodes of one: two nodes, and no more."""
    project = make_project(tmp_path / "project", warp={"steps": 2})
    patience = Patience(60)
    while not _listens(address):
        assert patience.lasts()
    command = Command(project, "run", address=address)
    try:
        assert command.end() == 0, command.tail()
    finally:
        command.stop()
    assert (project / "run" / "front.json").is_file()
    assert "waiting: the run" in command.log.read_text()


def _listens(address: str) -> bool:
    host, port = address.split(":")
    with socket.socket() as one:
        return one.connect_ex((host, int(port))) == 0
