"""Tests of the ceiling's estimator on bandits whose optimum is known by enumeration."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from raywarp.algorithm.tilting import TiltedLine, best_of, tilted_line

Array = NDArray[np.float64]
ARMS, PROMPTS, COMPLETIONS = 40, 60, 32


class Bandits:
    """A population of prompts; an arm is a completion. π_sft and rewards differ by prompt."""

    def __init__(self, seed: int, count: int = 1500, ties: bool = False):
        random = np.random.default_rng(seed)
        logits = random.normal(size=(count, ARMS))
        self.sft = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        spread = random.uniform(0.5, 1.5, size=(count, 1))
        self.rewards = random.normal(size=(count, 1)) * 0.3 + spread * random.normal(
            size=(count, ARMS)
        )
        if ties:
            self.rewards = (self.rewards > 0).astype(float)

    def optimum(self) -> tuple[Array, Array]:
        """KL and reward of π_sft·exp(r/β) for many β, by enumeration of the arms."""
        kls, rewards = [0.0], [float((self.sft * self.rewards).sum(1).mean())]
        for beta in np.geomspace(300, 3e-3, 400):
            tilted = self.sft * np.exp((self.rewards - self.rewards.max(1, keepdims=True)) / beta)
            tilted /= tilted.sum(1, keepdims=True)
            ratio = np.log(np.maximum(tilted, 1e-300) / self.sft)
            kls.append(float((tilted * ratio).sum(1).mean()))
            rewards.append(float((tilted * self.rewards).sum(1).mean()))
        return np.array(kls), np.array(rewards)

    def sample(self, seed: int, prompts: int = PROMPTS, n: int = COMPLETIONS) -> torch.Tensor:
        """Rewards of n completions of some prompts, as (P, n)."""
        random = np.random.default_rng(seed)
        chosen = random.choice(len(self.sft), prompts, replace=False)
        arms = np.stack([random.choice(ARMS, n, p=self.sft[one]) for one in chosen])
        return torch.tensor(np.take_along_axis(self.rewards[chosen], arms, axis=1))


@pytest.fixture(scope="module")
def bandits() -> Bandits:
    return Bandits(0)


@pytest.fixture(scope="module")
def lines(bandits: Bandits) -> list[TiltedLine]:
    return [tilted_line(bandits.sample(seed)) for seed in range(40)]


def plain_curve(rewards: Array) -> tuple[Array, Array]:
    """The estimate without any correction, in its textbook form."""
    kls, means, n = [0.0], [float(rewards.mean())], rewards.shape[1]
    for beta in np.geomspace(300, 3e-3, 200):
        weights = np.exp((rewards - rewards.max(1, keepdims=True)) / beta)
        weights /= weights.sum(1, keepdims=True)
        kls.append(float((weights * np.log(np.maximum(n * weights, 1e-300))).sum(1).mean()))
        means.append(float((weights * rewards).sum(1).mean()))
    return np.array(kls), np.array(means)


def test_the_line_is_the_enumerated_optimum_within_its_interval(
    bandits: Bandits, lines: list[TiltedLine]
) -> None:
    """Over the whole range, for prompts and completions drawn anew each time."""
    kl, reward = bandits.optimum()

    def covers(line: TiltedLine) -> bool:
        error = np.abs(np.interp(line.kl, kl, reward) - line.reward)
        return bool((error <= np.array(line.reward_ci) + 1e-9).all())

    assert sum(map(covers, lines)) >= 0.9 * len(lines)


def test_the_interval_is_narrow_enough_to_be_of_use(lines: list[TiltedLine]) -> None:
    """Half of it is at most .35 up to 1 nat and .65 at the end; rewards deviate by about 1."""
    for line in lines:
        half = np.interp([0, 1.0, line.kl[-1]], line.kl, line.reward_ci)
        assert half[0] < 0.2
        assert half[1] < 0.35
        assert half[2] < 0.65


def test_the_gain_is_known_better_than_the_level(bandits: Bandits, lines: list[TiltedLine]) -> None:
    kl, reward = bandits.optimum()
    inside = 0
    for line in lines:
        gains = np.array(line.reward) - line.reward[0]
        error = np.abs(np.interp(line.kl, kl, reward) - reward[0] - gains)
        inside += bool((error <= np.array(line.gain_ci) + 1e-9).all())
        assert np.interp(0.5, line.kl, line.gain_ci) < np.interp(0.5, line.kl, line.reward_ci)
    assert inside >= 0.9 * len(lines)


def test_the_correction_is_needed_and_removes_most_of_the_bias(
    bandits: Bandits, lines: list[TiltedLine]
) -> None:
    """Gains against the optimum's, as means over the seeds: the plain estimate is low."""
    kl, reward = bandits.optimum()
    plain = [plain_curve(bandits.sample(seed).numpy()) for seed in range(40)]
    for at, low, close in ((1.0, 0.97, 0.985), (2.0, 0.95, 0.96)):
        truth = np.interp(at, kl, reward) - reward[0]
        corrected = np.mean([np.interp(at, one.kl, one.reward) - one.reward[0] for one in lines])
        uncorrected = np.mean([np.interp(at, *one) - one[1][0] for one in plain])
        assert uncorrected < low * truth
        assert close * truth < corrected < 1.02 * truth
        assert abs(corrected - truth) < 0.5 * abs(uncorrected - truth)


def test_the_bias_on_gaussian_rewards_is_as_documented() -> None:
    """Where R = √(2·KL): the shares by which 32 completions fall short, in reading-a-front.md."""
    shortfalls = []
    for seed in range(8):
        rewards = torch.tensor(np.random.default_rng(seed).normal(size=(200, 32)))
        line, plain = tilted_line(rewards), plain_curve(rewards.numpy())
        at = np.array([0.5, 1, 2, line.kl[-1]])
        found = [np.interp(at, line.kl, line.reward), np.interp(at, *plain)]
        shortfalls.append([1 - one / np.sqrt(2 * at) for one in found])
    corrected, uncorrected = 100 * np.mean(shortfalls, axis=0)
    print("per cent low, corrected and plain:", corrected.round(1), uncorrected.round(1))
    assert uncorrected == pytest.approx([2.3, 4.1, 9.2, 12.3], abs=0.5)
    assert corrected == pytest.approx([0.1, 0.6, 3.1, 4.7], abs=0.5)


def test_the_plain_estimate_is_inside_the_interval(
    bandits: Bandits, lines: list[TiltedLine]
) -> None:
    for seed, line in enumerate(lines[:10]):
        plain = np.interp(line.kl, *plain_curve(bandits.sample(seed).numpy()))
        assert (np.abs(plain - line.reward) <= np.array(line.reward_ci) + 2e-3).all()


@pytest.mark.parametrize("n", [4, 8, 32])
def test_the_range_ends_one_nat_below_log_n(bandits: Bandits, n: int) -> None:
    line = tilted_line(bandits.sample(1, n=n))
    assert line.kl[0] == 0
    assert line.kl[-1] == pytest.approx(math.log(n) - 1, abs=1e-9)
    assert line.reward[0] == pytest.approx(bandits.sample(1, n=n).mean().item())


def test_the_range_ends_earlier_where_ties_end_it() -> None:
    """Rewards of 0 and 1: no policy is further from SFT than needed for all to be 1."""
    bandits = Bandits(3, ties=True)
    kl, reward = bandits.optimum()
    ends = []
    for seed in range(10):
        line = tilted_line(bandits.sample(seed))
        assert line.kl[-1] < math.log(COMPLETIONS) - 1
        assert line.reward[-1] == pytest.approx(1, abs=0.02)
        assert max(line.reward) <= 1
        ends.append(line.kl[-1])
        error = np.abs(np.interp(line.kl, kl, reward) - line.reward)
        assert (error <= np.array(line.reward_ci) + 0.02).all()
    assert np.mean(ends) == pytest.approx(kl[-1], rel=0.1)


def test_equal_rewards_have_nothing_to_gain() -> None:
    line = tilted_line(torch.tensor([[2.0] * 6, [-1.0] * 6]))
    assert (line.kl, line.reward) == ([0.0], [pytest.approx(0.5)])
    assert line.gain_ci == [pytest.approx(0, abs=1e-9)]
    assert [best.reward for best in best_of(torch.full((3, 8), 2.0))] == pytest.approx([2.0] * 3)


def test_the_line_rises_and_is_no_higher_than_the_best_sample(lines: list[TiltedLine]) -> None:
    for line in lines:
        assert all(a <= b for a, b in itertools.pairwise(line.reward))
    few = torch.tensor([[0.0, 0.0, 0.0, 1.0], [0.0, 0.1, 0.2, 1.0], [0.0, 0.5, 0.9, 1.0]])
    assert max(tilted_line(few).reward) <= 1


def test_shift_and_scale_of_rewards_carry_over(bandits: Bandits) -> None:
    rewards = bandits.sample(5)
    one, two = tilted_line(rewards), tilted_line(100 + 1e3 * rewards)
    assert two.kl == pytest.approx(one.kl)
    assert two.reward == pytest.approx([100 + 1e3 * value for value in one.reward])
    assert two.reward_ci == pytest.approx([1e3 * value for value in one.reward_ci], rel=1e-6)


def test_fewer_than_two_prompts_have_no_interval(bandits: Bandits) -> None:
    line = tilted_line(bandits.sample(0, prompts=1))
    assert all(math.isinf(half) for half in line.reward_ci)
    assert math.isinf(best_of(bandits.sample(0, prompts=1))[0].reward_ci)


def test_best_of_n_is_the_mean_over_all_choices() -> None:
    """Of 8 completions, each choice of 2, 4 and 8 is enumerated."""
    rewards = torch.tensor(np.random.default_rng(0).normal(size=(5, 8)))
    for best in best_of(rewards):
        means = [
            np.mean([max(some) for some in itertools.combinations(row, best.n)])
            for row in rewards.tolist()
        ]
        assert best.reward == pytest.approx(np.mean(means))
        assert best.reward_ci == pytest.approx(1.96 * np.std(means, ddof=1) / math.sqrt(5))
        assert best.kl == pytest.approx(math.log(best.n) - (best.n - 1) / best.n)
    assert [best.n for best in best_of(rewards)] == [2, 4, 8]
    assert [best.n for best in best_of(rewards[:, :7])] == [2, 4]


def test_best_of_n_has_no_bias(bandits: Bandits) -> None:
    """Against the expectation by enumeration: P(best ≤ r) = P(reward ≤ r)^n."""
    order = np.argsort(bandits.rewards, axis=1)
    ranked, weight = (np.take_along_axis(x, order, axis=1) for x in (bandits.rewards, bandits.sft))
    below = weight.cumsum(1)
    samples = [best_of(bandits.sample(seed)) for seed in range(40)]
    for place, n in enumerate((2, 4, 8, 16, 32)):
        chances = np.diff(below**n, axis=1, prepend=0)
        truth = float((chances * ranked).sum(1).mean())
        found: Any = [one[place].reward for one in samples]
        assert np.mean(found) == pytest.approx(truth, abs=3 * np.std(found) / math.sqrt(40))


def test_best_of_n_is_not_above_the_ceiling(bandits: Bandits) -> None:
    """Best of n at its KL bound is a policy, so no more than the optimum."""
    for seed in range(5):
        rewards = bandits.sample(seed)
        line = tilted_line(rewards)
        for best in best_of(rewards):
            limit = np.interp(best.kl, line.kl, np.add(line.reward, line.gain_ci))
            assert best.reward <= limit
