"""Tests of a run whose engine and trainer share one GPU, here a logical one, in turns."""

import hashlib
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_run import make_project, tiny_config

pytestmark = pytest.mark.slow

# In a process of its own, since the Ray of the other tests has no GPU.
RUNS = """
import json
import os
import sys

import ray

from raywarp.cli.commands import main
from raywarp.cluster.card import see_own_gpus


@ray.remote(num_gpus=1, runtime_env={"env_vars": {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}})
def seen():
    before = os.environ["CUDA_VISIBLE_DEVICES"]
    see_own_gpus()
    return before, os.environ["CUDA_VISIBLE_DEVICES"]


ray.init(address="local", num_cpus=4, num_gpus=1, include_dashboard=False, log_to_driver=False)
with open("seen.json", "w") as file:
    json.dump(ray.get(seen.remote()), file)
codes = [main(["train", "config.yaml", "out=apart"]), main(["train", "config.yaml", "out=turns", "rollout.sleep=true"])]
ray.shutdown()
sys.exit(max(codes))
"""  # noqa: E501


@pytest.fixture(scope="module")
def project(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs of the same settings: one whose processes work at any time, and one in turns."""
    folder = make_project(tmp_path_factory.mktemp("gpu"))
    shares = {"gpus_per_policy": 0.5, "gpus_per_rollout_worker": 0.5}
    config = tiny_config(folder, tiny_llama, "apart", cluster=shares, warp={"steps": 12})
    (folder / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    command = [sys.executable, "-c", RUNS]
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "5,7"}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def overlaps(run: Path) -> int:
    """How many pairs of an update and a generation were under way at the same moment."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    updates, rollouts = set(), set()
    for row in rows:
        spans = row.get("spans", {})
        updates |= {tuple(spans[who][-1]) for who in spans if who.startswith("policy actor")}
        rollouts |= {tuple(own) for who in spans if "rollout" in who for own in spans[who]}
    assert len(updates) >= 24
    assert len(rollouts) >= 24
    pairs = itertools.product(updates, rollouts)
    return sum(max(one[0], two[0]) + 0.002 < min(one[1], two[1]) for one, two in pairs)


def digests(run: Path) -> dict[str, Any]:
    files = sorted(run.glob("iterations/*/merged/adapter_model.safetensors"))
    assert len(files) == 2
    return {str(f.relative_to(run)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def test_engine_and_trainer_work_in_turns(project: Path) -> None:
    assert overlaps(project / "turns") == 0
    assert overlaps(project / "apart") > 0


def test_turns_change_no_bit(project: Path) -> None:
    assert digests(project / "turns") == digests(project / "apart")


def test_a_process_sees_its_own_gpu_where_ray_leaves_that_to_it(project: Path) -> None:
    assert json.loads((project / "seen.json").read_text()) == ["5,7", "5"]
