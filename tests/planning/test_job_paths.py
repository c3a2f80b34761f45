"""Tests of relative paths where the working directory is a temporary one."""

import contextlib
from pathlib import Path
from typing import Any

import pytest

from raywarp.config.load import load_config
from raywarp.config.schema import ConfigError
from raywarp.planning.jobs import absolute_paths, check_paths


def test_a_relative_out_is_refused_in_a_folder_of_rays_session(
    ray_cluster: Any, tmp_path: Path
) -> None:
    """As in a trial of a user's own Tuner: the next one would not find the run again."""
    trial = Path(ray_cluster._private.worker._global_node.get_session_dir_path()) / "artifacts/x"
    trial.mkdir(parents=True)
    with contextlib.chdir(trial):
        with pytest.raises(
            ConfigError,
            match="^out=runs/x is relative: in a worker of Ray it .* RAY_CHDIR_TO_TRIAL_DIR=0",
        ):
            check_paths(load_config({"out": "runs/x"}))
        check_paths(load_config({"out": str(tmp_path / "x")}))
    with contextlib.chdir(tmp_path):
        check_paths(load_config({"out": "runs/x"}))


def test_datasets_of_single_policies_become_absolute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "de.jsonl").touch()
    sources = [{"dataset": "de.jsonl", "weight": 2}, {"dataset": "org/en"}]
    each = [{}, {"dataset": "de.jsonl", "lr": 1e-5}, {"datasets": sources}]
    config = load_config({"warp": {"policies": 3, "each": each}})
    found = load_config(config.model_dump(mode="json"), absolute_paths(config)).warp.each
    path = str(tmp_path / "de.jsonl")
    assert found is not None
    assert found[0] == {}
    assert found[1] == {"prompts.dataset": path, "optim.lr": 1e-5}
    assert found[2] == {"prompts.datasets": [{**sources[0], "dataset": path}, sources[1]]}
