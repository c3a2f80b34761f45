"""Tests that each stage that samples refuses what the cluster's workers would silently ignore."""

from pathlib import Path
from typing import Any

import pytest
from tiny_run import Listener, tiny_config

from raywarp import reward_stage
from raywarp.ceiling_stage import ceiling
from raywarp.config.schema import Config, ConfigError
from raywarp.reward_stage import StageInputs, reward
from raywarp.training.session import Session

REFUSAL = "rollout.sleep=true frees a GPU"


@pytest.fixture
def sleeping(
    ray_cluster: Any, project: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> Config:
    """A configuration for GPUs; the cluster, which has none, is unknown before it is joined."""
    monkeypatch.setattr("raywarp.rollout.engine.expects_gpu", lambda config: None)
    monkeypatch.setattr(Session, "_start", lambda session: pytest.fail("actors would start"))
    front = {"ceiling_completions": 4}
    return tiny_config(
        project, tiny_llama, "sleeping", rollout={"engine": "vllm", "sleep": True}, front=front
    )


def test_a_ceiling(sleeping: Config) -> None:
    with pytest.raises(ConfigError, match=REFUSAL):
        ceiling(sleeping, Listener())


def test_a_reward_model_that_is_to_be_standardised(
    sleeping: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is refused before its training. Training alone samples nothing."""

    class Trained(Exception):
        pass

    def train(*_: Any) -> None:
        raise Trained

    monkeypatch.setattr(reward_stage, "train_reward", train)
    unread: Any = object()
    inputs = StageInputs("none", unread, training=unread)
    with pytest.raises(ConfigError, match=REFUSAL):
        reward(sleeping, Listener(), inputs=inputs)
    with pytest.raises(Trained):
        reward(sleeping, Listener(), standardise=False, inputs=inputs)
