"""Tests of runs with other recipes than WARP's own: Elastic Reset, and averaged checkpoints."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import assert_same_change
from tiny_run import Listener, tiny_config

from raywarp.adapters.peft import load_peft
from raywarp.algorithm.deltas import AdapterDelta, add, scale, subtract
from raywarp.algorithm.factors import dense
from raywarp.config.schema import Config
from raywarp.run.folder import Run
from raywarp.run.policy_files import EMA, PolicyFiles
from raywarp.warp import train


def elastic_config(project: Path, model: Path, out: Path) -> Config:
    return tiny_config(
        project,
        model,
        out,
        warp={
            "policies": 1,
            "elastic_reset": True,
            "liti_rate": None,
            "average_last": 2,
        },
    )


@pytest.fixture(scope="module")
def elastic(ray_cluster: Any, project: Path, tiny_llama: Path) -> tuple[Config, Run]:
    config = elastic_config(project, tiny_llama, project / "elastic")
    return config, train(config, Listener())


def policy(run: Run, iteration: int) -> str:
    (name,) = json.loads((run.folder / f"iterations/{iteration}/policies.json").read_text())
    return Path(name).name


def test_each_iteration_starts_from_the_ema_of_the_one_before(
    elastic: tuple[Config, Run],
) -> None:
    """The EMA is on its way between the SFT model and the policy. At rate 0.2 over six steps it
    has come part of it.
    """
    _, run = elastic
    store = run.folder / "policies"
    ema = load_peft(store / f"{policy(run, 1)}{EMA}")
    assert_same_change(load_peft(run.folder / "iterations/2/init"), ema, 1e-5)
    end = load_peft(store / policy(run, 1))
    along = {
        module: float(
            (dense(f) * dense(end.factors[module])).sum() / dense(end.factors[module]).norm() ** 2
        )
        for module, f in ema.factors.items()
    }
    assert 0.2 < sorted(along.values())[len(along) // 2] < 0.95


def test_the_result_is_the_mean_of_the_last_two_checkpoints(
    elastic: tuple[Config, Run], project: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    """Checkpoints are of steps 2, 4 and 6. Policies of 4 and of 6 steps that average nothing, and
    are else the same, give them.
    """
    _, run = elastic
    ends = []
    for steps in (4, 6):
        warp = {"policies": 1, "iterations": 1, "steps": steps}
        short = tiny_config(project, tiny_llama, tmp_path / str(steps), warp=warp)
        ends.append(first_policy(train(short, Listener())))
    mean = scale(add(*ends), 0.5)
    assert_same_change(first_policy(run), mean, 1e-5)
    assert norm(subtract(ends[0], ends[1])) > 0.05 * norm(mean)


def first_policy(run: Run) -> AdapterDelta:
    return load_peft(run.folder / "policies" / policy(run, 1))


def norm(delta: AdapterDelta) -> float:
    return float(torch.stack([dense(f).norm() for f in delta.factors.values()]).norm())


def test_a_lost_ema_is_made_again_from_the_same_bits(
    elastic: tuple[Config, Run], tmp_path: Path
) -> None:
    config, run = elastic
    folder = Path(shutil.copytree(run.folder, tmp_path / "run"))
    key = policy(run, 1)
    shutil.rmtree(folder / "policies" / f"{key}{EMA}")
    again = train(config.model_copy(update={"out": str(folder)}), heard := Listener())
    assert "iteration 1: 1 of 1 policies to train" in heard.text()
    assert "iteration 2: 0 of 1 policies to train" in heard.text()
    name = f"policies/{key}{EMA}/adapter_model.safetensors"
    assert (again.folder / name).read_bytes() == (run.folder / name).read_bytes()
    assert PolicyFiles(again.store, key).checkpoints() == []


def test_a_finished_run_starts_nothing(
    elastic: tuple[Config, Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, _ = elastic

    def refuse() -> None:
        raise AssertionError("Ray is wanted")

    monkeypatch.setattr("raywarp.cluster.runtime.start_ray", refuse)
    train(config, heard := Listener())
    assert "iteration 2: 0 of 1 policies to train" in heard.text()
