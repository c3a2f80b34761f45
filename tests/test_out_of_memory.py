"""Why a process was killed: Ray's memory monitor and the kernel's counter, asked of the real ones."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from killing import own_home

from raywarp import out_of_memory, watch
from raywarp.faults import KILLED, OUT_OF_MEMORY

# A Ray of two nodes whose monitor kills what takes three gigabytes more than is taken now; in a process of its own.
MONITORED = """
import json
import os
import time

import ray
from ray.cluster_utils import Cluster
from raywarp import out_of_memory, watch


class Eater:
    @ray.method(concurrency_group=watch.GROUP)
    def pulse(self):
        return watch.Process.here(done=1)

    def eat(self):
        self.eaten = [bytearray(os.urandom(1 << 20)) * 64 for _ in range(100)]
        time.sleep(60)

    def die(self):
        os._exit(1)


cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
other = cluster.add_node(num_cpus=0).node_id
ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
events = []
kind = ray.remote(concurrency_groups={watch.GROUP: 1})(Eater)
actor = kind.options(num_cpus=1, max_restarts=-1).remote()
helper = watch.Helper("eater", actor, 60, lambda event, **details: events.append({"event": event, **details}))


def until(count):
    deadline = time.monotonic() + 90
    while len(events) < count and time.monotonic() < deadline:
        helper.check()
        time.sleep(0.05)


while helper.process is None:
    helper.check()
actor.die.options(max_task_retries=0).remote()
until(2)
actor.eat.options(max_task_retries=0).remote()
until(4)
kills = [out_of_memory.kernel_kills(), out_of_memory.kernel_kills_on(other)]
print("FOUND", json.dumps([[row["event"], row.get("cause")] for row in events]), json.dumps(kills))
ray.shutdown()
cluster.shutdown()
"""


def test_what_the_memory_monitor_kills_is_told_so() -> None:
    """An actor that Ray starts again: no error says why it died."""
    memory = psutil.virtual_memory()
    threshold = (memory.total - memory.available + (3 << 30)) / memory.total
    before = {name: os.environ.get(name) for name in ("RAY_TMPDIR", "HOME")}
    with tempfile.TemporaryDirectory(prefix="rw", ignore_cleanup_errors=True) as folder:
        own_home(Path(folder))
        limits = {"RAY_memory_usage_threshold": f"{threshold:.4f}", "RAY_memory_monitor_refresh_ms": "100"}
        ended = subprocess.run([sys.executable, "-c", MONITORED], env={**os.environ, **limits}, capture_output=True, text=True, timeout=300)
    for name, value in before.items():
        os.environ.pop(name, None) if value is None else os.environ.update({name: value})
    line = next((line for line in ended.stdout.splitlines() if line.startswith("FOUND ")), None)
    assert line is not None, ended.stdout + ended.stderr
    events, end = json.JSONDecoder().raw_decode(line, len("FOUND "))
    assert events == [["fault", KILLED], ["recovered", None], ["fault", OUT_OF_MEMORY], ["recovered", None]]
    here, there = json.loads(line[end:])
    assert here == there == out_of_memory.kernel_kills()


def test_the_kernels_counter_explains_a_death(ray_cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counters = tmp_path / "vmstat"
    counters.write_text("pgfault 12\noom_kill 3\noom_kill_other 9\n")
    monkeypatch.setattr(out_of_memory, "COUNTERS", counters)
    monkeypatch.setattr(out_of_memory, "TOLD_SECONDS", 0.1)
    lived = watch.Process.here()
    assert lived.kernel_kills == 3
    assert watch.cause_of_death(KILLED, lived) == KILLED
    counters.write_text("pgfault 12\noom_kill 4\noom_kill_other 9\n")
    assert watch.cause_of_death(KILLED, lived) == OUT_OF_MEMORY
    counters.unlink()
    assert out_of_memory.kernel_kills() == 0
    assert out_of_memory.kernel_kills_on(ray.get_runtime_context().get_node_id()) == 0
