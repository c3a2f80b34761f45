"""Tests of advantages, with numbers worked by hand, and of the guard of a step."""

import math
import pickle

import pytest
import torch
from torch import Tensor

from raywarp.algorithm.advantages import advantages, flat_groups
from raywarp.algorithm.finite import NotFiniteError, check_completions, check_gradient

NONE = math.nan


def found(rewards: list[float], baseline: str, group: int) -> list[float]:
    values: list[float] = advantages(torch.tensor(rewards), baseline, group).tolist()
    return values


def test_grpo_divides_by_the_groups_deviation() -> None:
    """1, 0, 0, 1 has the mean 1/2 and the variance 1/3; 0, 3 has 3/2 and 9/2."""
    root = math.sqrt(3) / 2
    assert found([1, 0, 0, 1], "grpo", 4) == pytest.approx([root, -root, -root, root], abs=1e-5)
    one = 1 / math.sqrt(2)
    assert found([0, 3, 5, 5], "grpo", 2) == pytest.approx([-one, one, 0, 0], abs=1e-5)


def test_a_completion_without_a_reward_has_no_gradient_and_is_in_no_baseline() -> None:
    rewards = [1.0, NONE, 4.0, NONE, 7.0, NONE]
    assert found(rewards, "rloo", 3) == [-3.0, 0.0, 3.0, 0.0, 0.0, 0.0]
    assert found(rewards, "mean", 3) == [-4.5, 0.0, 0.0, 0.0, 4.5, 0.0]
    assert found(rewards, "none", 3) == [1.0, 0.0, 4.0, 0.0, 7.0, 0.0]
    one = 1 / math.sqrt(2)
    assert found(rewards, "grpo", 3) == pytest.approx([-one, 0, one, 0, 0, 0], abs=1e-5)


def test_the_same_rewards_without_the_absent_ones_have_the_same_advantages() -> None:
    whole = [2.0, 5.0, 1.0]
    for baseline in ("rloo", "grpo", "mean", "none"):
        with_none = found([2.0, NONE, 5.0, 1.0], baseline, 4)
        assert [with_none[n] for n in (0, 2, 3)] == pytest.approx(found(whole, baseline, 3))


def test_an_unknown_baseline_is_refused() -> None:
    with pytest.raises(ValueError, match="use rloo, grpo, mean or none"):
        found([1.0, 2.0], "ppo", 2)


def test_groups_of_equal_rewards_are_counted() -> None:
    rewards = torch.tensor([1.0, 1.0, 0.0, 2.0, NONE, 3.0, NONE, NONE, 0.0, 0.0])
    assert flat_groups(rewards, 2) == 4


def batch() -> dict[str, Tensor]:
    """Three completions of two tokens; the third's second token is padding."""
    shape = {name: torch.zeros(3, 2) for name in ("logprobs", "anchor", "sampler")}
    return {"rewards": torch.tensor([1.0, NONE, 2.0]), **shape, "mask": torch.ones(3, 2)}


@pytest.mark.parametrize(
    ("name", "said", "is_reward"),
    [
        ("rewards", "the reward is inf", True),
        ("logprobs", "the log-prob is nan", False),
        ("anchor", "the log-prob of the anchor is nan", False),
        ("sampler", "the log-prob of the sampler is nan", False),
    ],
)
def test_what_is_not_finite_is_named_with_its_completion(
    name: str, said: str, is_reward: bool
) -> None:
    values = batch()
    check_completions(**values)
    if name == "rewards":
        values[name][2] = math.inf
    else:
        values[name][2, 0] = math.nan
    with pytest.raises(NotFiniteError, match=said) as caught:
        check_completions(**values)
    assert (caught.value.completions, caught.value.is_reward) == ((2,), is_reward)
    assert str(pickle.loads(pickle.dumps(caught.value))) == said
    if name != "rewards":
        values["mask"][2, 0] = 0
        check_completions(**values)


def test_a_gradient_that_is_not_finite_is_refused() -> None:
    check_gradient(torch.tensor(1e30))
    for wrong in (math.nan, math.inf):
        with pytest.raises(NotFiniteError, match="the gradient's norm is"):
            check_gradient(torch.tensor(wrong))
