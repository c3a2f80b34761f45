"""Tests of a run's metrics on Ray's endpoints; tests/end_to_end/test_jobs.py reads them there."""

from typing import Any

from raywarp.run.prometheus import RunMetrics

ROW = {
    **{"iteration": 1, "policy": 2, "step": 0, "reward": 0.5, "tokens": 8},
    **{"wait_seconds": 0.1, "request_seconds": 0.1, "update_seconds": 0.1},
}


def test_names_that_are_not_ascii_become_tags(ray_cluster: Any) -> None:
    """Ray takes ASCII only. ä is %C3%A4 in a URI, and ß is %C3%9F."""
    metrics = RunMetrics("läuft gut")
    assert metrics.run == "l%C3%A4uft gut"
    metrics.step(ROW)
    metrics.fault("reward Größe", "crash")
    assert metrics._steps.info["name"] == "raywarp_steps_total"
