"""Tests of when policies are measured while they train, which state is best, and stop rules."""

import math

import pytest

from raywarp.config.load import parse_config
from raywarp.config.policies import StopConfig
from raywarp.rewards.reward import RewardError
from raywarp.rollout.protocol import Scores
from raywarp.training.tracking import Row, best, is_due, measured, reason_to_stop


def rows(**columns: list[float]) -> list[Row]:
    """A trajectory, measured every 10 steps."""
    names, values = columns.keys(), zip(*columns.values(), strict=True)
    found = [dict(zip(names, own, strict=True)) for own in values]
    return [{"step": 10 * n, "kl": 0.0, "reward": 0.0, **row} for n, row in enumerate(found)]


def test_it_is_measured_at_the_start_every_few_steps_and_after_the_last() -> None:
    config = parse_config({"warp": {"steps": 25}, "front": {"every": 10}})
    assert [step for step in range(26) if is_due(config, step, [])] == [0, 10, 20, 25]
    assert not is_due(config, 10, [{"step": 10}])
    assert is_due(config, 20, [{"step": 10}])
    never = parse_config({"front": {"every": 0}})
    assert not any(is_due(never, step, []) for step in range(41))


def test_means_and_intervals_are_over_prompts() -> None:
    row = measured([Scores([1.0, 3.0]), Scores([0.0, 0.0])], [0.5, 1.5])
    assert row["reward"] == 2.0
    assert row["reward_ci"] == pytest.approx(1.96)  # deviation √2, of two prompts
    assert row["kl"] == 1.0
    assert row["kl_ci"] == pytest.approx(0.98)
    assert (row["control"], row["control_ci"]) == (0.0, 0.0)
    assert "control" not in measured([Scores([1.0, 3.0])], [0.5, 1.5])


def test_the_best_state_has_the_highest_score_within_the_kl() -> None:
    found = rows(kl=[0.0, 2.0, 4.0, 6.0], reward=[0.1, 0.5, 0.5, 0.9], control=[0.3, 0.2, 0.1, 0.0])
    assert best(found, StopConfig(plateau=1))["step"] == 30
    assert best(found, StopConfig(max_kl=5))["step"] == 10  # the earlier of two equals
    assert best(found, StopConfig(control_falls=0.5))["step"] == 0
    assert best(found, StopConfig(control_falls=0.5, max_kl=5))["step"] == 0
    beyond = rows(kl=[9.0, 7.0, 8.0], reward=[0.1, 0.2, 0.3])
    assert best(beyond, StopConfig(max_kl=5))["step"] == 10


def test_max_kl_ends_above_it_and_not_at_it() -> None:
    rule = StopConfig(max_kl=5)
    assert reason_to_stop(rows(kl=[0.0, 5.0]), rule) is None
    assert reason_to_stop(rows(kl=[0.0, 5.1]), rule) == "KL 5.10 is above stop.max_kl=5"


def test_control_counts_from_its_best() -> None:
    rule = StopConfig(control_falls=0.25)
    assert reason_to_stop(rows(control=[0.0, 0.5, 0.25]), rule) is None
    said = reason_to_stop(rows(control=[0.0, 0.5, 0.2]), rule)
    assert said == "control 0.20 is more than stop.control_falls=0.25 below its best, 0.50"


def test_a_plateau_is_so_many_measurements_without_a_new_best() -> None:
    rule = StopConfig(plateau=2)
    assert reason_to_stop(rows(reward=[0.0, 0.4, 0.3]), rule) is None
    assert reason_to_stop(rows(reward=[0.0, 0.4, 0.3, 0.5]), rule) is None
    said = reason_to_stop(rows(reward=[0.0, 0.4, 0.4, 0.4]), rule)
    assert said == "reward has not risen above 0.40 for stop.plateau=2 measurements"
    assert reason_to_stop(rows(reward=[0.0, 0.4, 0.3, 0.2]), StopConfig()) is None


def test_a_measurement_leaves_out_completions_without_a_reward() -> None:
    scores = Scores([1.0, math.nan, 3.0])
    scores.parts = {"a": Scores([1.0, math.nan, 3.0]), "b": Scores([math.nan] * 3)}
    row = measured([scores], [0.5, 0.5, 2.0])
    assert (row["reward"], row["kl"], row["reward/a"]) == (2.0, 1.0, 2.0)
    assert "reward/b" not in row
    assert math.isnan(measured([scores], [0.5, math.nan, 2.0])["kl"])
    with pytest.raises(RewardError, match="applies to no completion"):
        measured([Scores([math.nan] * 2)], [0.0, 0.0])
