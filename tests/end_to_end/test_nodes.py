"""Tests of what is checked on a cluster of several nodes before a run.

Each node has processes of its own and, if the system permits it, a file system of its own.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

# In a process of its own, since the Ray of the other tests lives in this one. The last node mounts
# an empty folder over the run's.
SCRIPT = """
import json, os, subprocess, sys, time
import ray
from ray.cluster_utils import Cluster
from raywarp.planning import preflight
from raywarp.config.schema import ConfigError
from raywarp.config.load import load_config

run, tmp = sys.argv[1:3]
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
cluster.add_node(num_cpus=1)
ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
found = {}
def ask(name, out):
    config, start = load_config({"out": out, "cluster": {"timeout_seconds": 60}}), time.monotonic()
    try:
        reports = preflight.node_reports(config, [run])
        problems = [*preflight.access_problems(reports, config), *preflight.version_problems(reports)]
        found[name] = [len(reports), len({report.address for report in reports}), problems, time.monotonic() - start]
    except ConfigError as error:
        found[name] = str(error)
ask("two", run + "/one")
ask("again", run + "/one")
found["left"] = os.listdir(run)
if os.environ["APART"] == "yes":
    start = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--num-cpus=1", "--address", cluster.address]
    inside = f'mount -t tmpfs none {run} && exec "$@"'
    third = subprocess.Popen(["unshare", "-m", "sh", "-c", inside, "sh", *start], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while sum(node["Alive"] for node in ray.nodes()) < 3 and time.monotonic() < deadline:
        time.sleep(0.2)
    ask("apart", run + "/one")
    third.terminate()
    third.wait()
print("FOUND", json.dumps(found))
ray.shutdown()
cluster.shutdown()
"""  # noqa: E501


def mounts_apart() -> bool:
    with tempfile.TemporaryDirectory() as folder:
        command = ["unshare", "-m", "mount", "-t", "tmpfs", "none", folder]
        try:
            return subprocess.run(command, capture_output=True).returncode == 0
        except OSError:
            return False


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    run = tmp_path_factory.mktemp("shared")
    with tempfile.TemporaryDirectory(prefix="rw", ignore_cleanup_errors=True) as temporary:
        own = {
            "RAY_TMPDIR": temporary,
            "HOME": str(run.parent),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": "0" * 64,
            "APART": "yes" if mounts_apart() else "no",
        }
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, str(run), temporary],
            capture_output=True,
            text=True,
            timeout=240,
            env={**os.environ, **own},
        )
    lines = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    assert lines, done.stdout[-2000:] + done.stderr[-2000:]
    return json.loads(lines[0].removeprefix("FOUND "))


def test_every_node_is_asked_and_nothing_is_left(found: dict[str, Any]) -> None:
    for name in ("two", "again"):
        nodes, addresses, problems, _ = found[name]
        assert (nodes, addresses, problems) == (2, 2, [])
    assert found["left"] == []


def test_a_node_that_does_not_see_the_runs_folder_is_named(found: dict[str, Any]) -> None:
    if "apart" not in found:
        pytest.skip("this system does not let a process have mounts of its own")
    nodes, _, problems, _ = found["apart"]
    assert nodes == 3
    (problem,) = problems
    assert "cannot use out=" in problem
    assert (
        "it does not see it; several nodes need a shared folder, or a URI such as"
        " s3://bucket/prefix" in problem
    )


def test_a_local_ray_asks_for_a_token_and_has_no_dashboard(tmp_path: Path) -> None:
    """Without anything set in the environment: what `raywarp train` starts on a laptop lets nobody
    else in.
    """
    script = """
import os, subprocess, sys, ray
from raywarp.cluster.runtime import start_ray
start_ray()
address = ray.get_runtime_context().gcs_address
join = "import ray; ray.init(address=sys.argv[1], log_to_driver=False); print('JOINED')"
for name, home in (("own", os.environ["HOME"]), ("other", os.environ["HOME"] + "/other")):
    os.makedirs(home, exist_ok=True)
    environment = {**os.environ, "HOME": home, "RAY_AUTH_TOKEN": "x" * 64} if name == "other" else dict(os.environ)
    command = [sys.executable, "-c", "import sys; " + join, address]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60 if name == "own" else 8)
        print("FOUND", name, "JOINED" in done.stdout)
    except subprocess.TimeoutExpired:  # Ray goes on asking
        print("FOUND", name, False)
print("FOUND dashboard", bool(ray._private.worker._global_node.webui_url))
"""  # noqa: E501
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    with tempfile.TemporaryDirectory(prefix="rw", ignore_cleanup_errors=True) as temporary:
        own = {"RAY_TMPDIR": temporary, "HOME": str(tmp_path), "RAY_USAGE_STATS_ENABLED": "0"}
        done = subprocess.run(
            [sys.executable, "-c", script],
            capture_output=True,
            text=True,
            timeout=240,
            env={**environment, **own},
            cwd=tmp_path,
        )
    found = [line for line in done.stdout.splitlines() if line.startswith("FOUND")]
    assert found == ["FOUND own True", "FOUND other False", "FOUND dashboard False"], (
        done.stdout[-1500:] + done.stderr[-1500:]
    )


# The only node with room for actors goes while the engine loads.
LOST = """
import sys, threading, time
import ray
from ray.cluster_utils import Cluster
from ray.util import placement_group_table
from raywarp.training.actors import Kinds
from raywarp.config.load import parse_config
from raywarp.cluster.faults import FaultError
from raywarp.rollout.worker import RolloutWorker
from raywarp.training.session import Session

class Slow(RolloutWorker):
    def start(self):
        time.sleep(600)

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
node = cluster.add_node(num_cpus=2)
ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
rollout = {"engine": "transformers"}
tree = {"model": sys.argv[1], "reward": {"function": "raywarp.embedded:vader"}, "rollout": rollout, "cluster": {"timeout_seconds": 10}}

def lose():
    while [group["state"] for group in placement_group_table().values()] != ["CREATED"]:
        time.sleep(0.2)
    time.sleep(float(sys.argv[2]))
    cluster.remove_node(node, allow_graceful=False)

threading.Thread(target=lose, daemon=True).start()
try:
    with Session(parse_config(tree), sys.argv[1], 3, kinds=Kinds(worker=Slow), policies=False):
        pass
except FaultError as error:
    print("FOUND", error, flush=True)
ray.shutdown()
cluster.shutdown()
"""  # noqa: E501


@pytest.mark.parametrize("seconds", ["0", "5"])
def test_another_node_is_waited_for_while_an_engine_loads_but_not_without_end(
    tiny_llama: Path, tmp_path: Path, seconds: str
) -> None:
    with tempfile.TemporaryDirectory(prefix="rw", ignore_cleanup_errors=True) as temporary:
        own = {
            "RAY_TMPDIR": temporary,
            "HOME": str(tmp_path),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": "0" * 64,
        }
        command = [sys.executable, "-c", LOST, str(tiny_llama), seconds]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=200, env={**os.environ, **own}
        )
    (message,) = [
        line.removeprefix("FOUND ")
        for line in done.stdout.splitlines()
        if line.startswith("FOUND ")
    ]
    assert message.startswith(
        "a rollout worker has waited 10 s for another node after it lost its own while it started: "
    )
    assert "raise cluster.timeout_seconds; the same command continues" in message
