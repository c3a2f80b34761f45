"""Tests of finding out why a process was killed when no error says it."""

from pathlib import Path
from typing import Any

import pytest
import ray

from raywarp.cluster import health, out_of_memory
from raywarp.cluster.faults import KILLED, OUT_OF_MEMORY


def test_the_kernels_counter_explains_a_death(
    ray_cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counters = tmp_path / "vmstat"
    counters.write_text("pgfault 12\noom_kill 3\noom_kill_other 9\n")
    monkeypatch.setattr(out_of_memory, "COUNTERS", counters)
    monkeypatch.setattr(out_of_memory, "TOLD_SECONDS", 0.1)
    lived = health.Process.here()
    assert lived.kernel_kills == 3
    assert health.cause_of_death(KILLED, lived) == KILLED
    counters.write_text("pgfault 12\noom_kill 4\noom_kill_other 9\n")
    assert health.cause_of_death(KILLED, lived) == OUT_OF_MEMORY
    counters.unlink()
    assert out_of_memory.kernel_kills() == 0
    assert out_of_memory.kernel_kills_on(ray.get_runtime_context().get_node_id()) == 0
