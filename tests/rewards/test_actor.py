"""Tests of a reward worker whose GPU fails."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from raywarp.cluster.health import WATCH
from raywarp.config.rewards import RewardConfig
from raywarp.rewards.actor import RewardActor
from raywarp.rewards.reward import Reward

pytestmark = pytest.mark.slow


class Ailing(RewardActor):
    """The model of its first process meets a GPU error, at loading or later."""

    def __init__(self, folder: Path, when: str):
        super().__init__(RewardConfig(model="a model"))
        fails = not (folder / "started").exists()
        self.when = when if fails else "never"
        (folder / "started").touch()

    @property
    def reward(self) -> Reward:
        self._check("loading")
        return Reward("a model", self._lengths)

    def _lengths(self, prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
        self._check("scoring")
        return [float(len(text)) for text in completions]

    def _check(self, now: str) -> None:
        if self.when == now:
            raise RuntimeError("CUDA error: uncorrectable ECC error encountered")


@pytest.mark.parametrize("when", ["loading", "scoring"])
def test_a_reward_model_whose_gpu_fails_scores_in_a_new_process(
    ray_cluster: Any, tmp_path: Path, when: str
) -> None:
    """It is no fault of the reward, which a RewardError would tell, and the run would end."""
    remote: Any = ray_cluster.remote(concurrency_groups={WATCH: 1})(Ailing)
    actor = remote.options(num_cpus=0, max_restarts=-1, max_task_retries=-1).remote(tmp_path, when)
    assert ray_cluster.get(actor.score.remote(["a", "b"], ["one", "three"])) == [3.0, 5.0]
    ray_cluster.kill(actor)
