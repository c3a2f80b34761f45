"""Tests of busy shares and of the critical path, with hand-worked numbers."""

import pytest

from raywarp.rollout.pool import PoolReport
from raywarp.training.timing import Timing, measure


def timing(updates: float, pool: float, reward: float = 0.0, trainers: int = 2) -> Timing:
    """Ten steps in 10 s on two trainers, an update of the given seconds in each."""
    phases = {
        "rollout_seconds": 1.5,
        "swap_seconds": 0.5,
        "wait_seconds": 0.25,
        "request_seconds": 0.0,
    }
    return measure(
        [{**phases, "update_seconds": updates}] * 10, 10.0, trainers, PoolReport(3, pool, 1), reward
    )


def test_shares_by_hand() -> None:
    found = timing(updates=1.5, pool=0.4, reward=2.0)
    assert (found.trainer_busy, found.pool_busy, found.reward_busy) == (
        pytest.approx(0.75),
        0.4,
        pytest.approx(0.2),
    )
    assert (found.steps, found.steps_per_second, found.workers, found.restarts) == (10, 1.0, 3, 1)
    assert found.phases == {
        "rollout_seconds": 1.5,
        "swap_seconds": 0.5,
        "wait_seconds": 0.25,
        "request_seconds": 0.0,
        "update_seconds": 1.5,
    }


def test_the_critical_path_is_named_with_its_key() -> None:
    assert (
        timing(updates=1.0, pool=0.97).bound()
        == "rollouts bound: add rollout workers (rollout.workers)"
    )
    assert (
        timing(updates=1.9, pool=0.90).bound()
        == "updates bound: add policy actors (cluster.policy_actors, or GPUs)"
    )
    assert timing(updates=1.0, pool=0.6, reward=9.9).bound() == "rewards bound: a faster reward"
    assert (
        "let trainers share policies (cluster.policy_actors below 2)"
        in timing(updates=1.0, pool=0.5).bound()
    )
    assert "more policies would use the gaps" in timing(updates=0.5, pool=0.5, trainers=1).bound()
