"""A run on a float16 base."""

import contextlib
from pathlib import Path
from typing import Any

import pytest
from tiny_run import Listener, make_project, tiny_config

from raywarp.warp import train


@pytest.mark.slow
def test_a_run_in_float16(ray_cluster: Any, tiny_llama: Path, tmp_path: Path) -> None:
    """Trainer and sampler are a few thousandths of a nat apart at most."""
    config = tiny_config(
        make_project(tmp_path),
        tiny_llama,
        tmp_path / "run",
        dtype="float16",
        warp={"iterations": 1, "policies": 1, "steps": 2},
    )
    with contextlib.chdir(tmp_path):
        run = train(config, Listener())
    rows = run.metrics()
    assert [row["step"] for row in rows] == [0, 1]
    assert all(row["loss_scale"] >= 1 for row in rows)
    assert max(row["sampler_gap"] for row in rows) < 0.01
    assert rows[0]["adapter_effect"] == pytest.approx(1, abs=0.01)
    assert {point["eta"] for point in run.front()["points"]} >= {0, 0.5, 1}
