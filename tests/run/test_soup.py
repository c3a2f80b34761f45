"""Tests of merges with other shares of the policies: which are measured, and their hypervolume."""

import math

import numpy as np
import pytest
import torch
from conftest import assert_same_change

from raywarp.algorithm.averaging import slerp
from raywarp.algorithm.deltas import AdapterDelta, add, scale, zeros_like
from raywarp.algorithm.factors import Factors
from raywarp.config.each import shares
from raywarp.config.front import ChooseConfig, FrontConfig
from raywarp.config.load import load_config
from raywarp.config.schema import Config, ConfigError
from raywarp.front_stage import _chosen, _soup
from raywarp.planning.front_sources import Sources
from raywarp.rollout.protocol import Scores
from raywarp.run.front import choose
from raywarp.run.points import Candidate, Point, Scored, summarise
from raywarp.soup_stage import Soup, measure_soup, next_eta, preference_front, preference_json


def some_delta(seed: int, rank: int = 2) -> AdapterDelta:
    generator = torch.Generator().manual_seed(seed)
    B, A = (torch.randn(*size, generator=generator) for size in ((4, rank), (rank, 3)))
    return AdapterDelta({"layers.0.q": Factors(B, A)})


INIT, POLICIES = some_delta(0), [some_delta(1), some_delta(2, rank=3)]
CORNERS = {"good": [1], "short": [2]}
UP = {"good": 1, "short": 1}
HALF = {"good": 0.5, "short": 0.5}
FIRST = {"good": 1.0, "short": 0.0}


def test_a_merge_is_slerp_with_its_shares() -> None:
    soup = Soup(INIT, POLICIES, CORNERS, [])
    assert_same_change(soup.merged(FIRST), add(INIT, POLICIES[0]), 1e-6)
    expected = add(INIT, slerp(POLICIES, [0.7, 0.3]))
    assert_same_change(soup.merged({"good": 0.7, "short": 0.3}), expected, 1e-6)
    assert_same_change(soup.on_line({"good": 0.7, "short": 0.3}, 0.4), scale(expected, 0.4), 1e-6)


def test_policies_of_one_reward_share_its_part() -> None:
    soup = Soup(INIT, [], {"good": [1, 3], "short": [2]}, [])
    assert soup.of_policies({"good": 0.6, "short": 0.4}) == [0.3, 0.4, 0.3]


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0, 4.0])
@pytest.mark.parametrize("largest", [4.0, 6.0, 40.0, 4000.0])
def test_the_largest_eta_within_a_kl_is_found(power: float, largest: float) -> None:
    rule, tried = ChooseConfig(max_kl=5.0), dict[float, float]()
    while (eta := next_eta(tried, rule)) is not None:
        assert 0 < eta <= 1
        assert eta not in tried
        tried[eta] = largest * eta**power
    within = [kl for kl in tried.values() if kl <= 5]
    assert max(within) == largest if largest < 5 else max(within) > 0.8 * 5
    assert len(tried) <= 8


def test_a_kl_that_is_not_finite_is_left() -> None:
    tried = {1.0: math.nan}
    while (eta := next_eta(tried, ChooseConfig(max_kl=5.0))) is not None:
        tried[eta] = math.inf if eta > 0.2 else 5 * eta
    assert max(eta for eta, kl in tried.items() if kl <= 5) <= 0.2


def test_an_eta_that_is_named_is_the_only_one() -> None:
    assert next_eta({}, ChooseConfig(eta=0.3)) == 0.3
    assert next_eta({0.3: 9.0}, ChooseConfig(eta=0.3)) is None


def scored(good: list[float], short: list[float], kl: float) -> Scored:
    rewards = Scores([a + b for a, b in zip(good, short, strict=True)])
    rewards.parts = {"good": Scores(good), "short": Scores(short)}
    count = len(good)
    return Scored(["a b"] * count, [2] * count, [True] * count, rewards, None, [kl] * count)


def test_what_is_said_of_the_preference_front() -> None:
    """Two prompts with two completions each. SFT is at (0, 0), the corners at (2, 1) and (1, 3),
    and half of both at (1.5, 2.5), within the KL only at η = .5: 2·1 + 1.5·1.5 + 1·.5 = 4.75.
    """
    soup = Soup(zeros_like(INIT), POLICIES, CORNERS, [FIRST, HALF, {"good": 0.0, "short": 1.0}])
    rule = ChooseConfig(max_kl=5.0)
    kinds = {(1.0, 1.0): (2, 1, 4), (0.5, 1.0): (9, 9, 18), (0.5, 0.5): (1.5, 2.5, 4.6)}
    kinds[0.0, 1.0] = (1, 3, 5)

    def measure(points: list[Candidate]) -> list[tuple[Point, Scored]]:
        found = []
        for point in points:
            good, short, kl = kinds[
                point.weights["good"], min(point.liti or 0, 1.0) if (point.liti == 1) else 0.5
            ]
            own = scored([good - 1, good + 1] * 2, [short] * 4, kl)
            found.append((summarise(point, own, 2), own))
        return found

    sft = scored([0.0] * 4, [0.0] * 4, 0.0)
    results = [(summarise(Candidate("sft", 0.0, None), sft, 2), sft)]
    results += measure_soup(soup, rule, measure)
    front = preference_front([point for point, _ in results], rule)
    assert [point.liti for point in front] == [1, pytest.approx(0.5, abs=0.05), 1]
    said = preference_json(soup, results, rule, 2, UP)
    assert said["preference_front"] == [point.name for point in front]
    assert said["preference_front"][0] == "good 1"
    assert said["hypervolume"] == pytest.approx(4.75)
    assert said["hypervolume_ci"] == pytest.approx([4.75, 4.75])  # the prompts do not differ
    assert said["hypervolume_of"] == ["good", "short"]


def one_merge(good: float, short: float, **more: float) -> list[tuple[Point, Scored]]:
    """The SFT model with rewards of 0, and a merge with these."""
    found = []
    for candidate, kl, share in (
        (Candidate("sft", 0.0, None), 0.0, 0.0),
        (Candidate("x", None, None, HALF, 1.0), 1.0, 1.0),
    ):
        own = scored([share * good] * 2, [share * short] * 2, kl)
        assert isinstance(own.rewards, Scores)
        own.rewards.parts |= {name: Scores([share * mean] * 2) for name, mean in more.items()}
        found.append((summarise(candidate, own, 1), own))
    return found


def test_the_hypervolume_of_a_penalty_is_of_its_fall() -> None:
    soup, rule = Soup(INIT, POLICIES, CORNERS, [HALF]), ChooseConfig(eta=1.0)
    ways = {"good": 1, "short": -1}
    said = preference_json(soup, one_merge(2, -3), rule, 1, ways)
    assert said["hypervolume"] == pytest.approx(6)
    assert (said["hypervolume_of"], said["directions"]) == (["good", "short"], ways)
    assert preference_json(soup, one_merge(2, 3), rule, 1, ways)["hypervolume"] == 0


def test_a_reward_that_is_only_logged_is_no_part_of_the_hypervolume() -> None:
    soup, rule = Soup(INIT, POLICIES, CORNERS, [HALF]), ChooseConfig(eta=1.0)
    said = preference_json(soup, one_merge(2, 3, kind=-1), rule, 1, UP)
    assert said["hypervolume"] == pytest.approx(6)
    assert said["hypervolume_of"] == ["good", "short"]
    assert "hypervolume" not in preference_json(soup, one_merge(2, 3), rule, 1, {"good": 1})


def test_the_interval_of_the_hypervolume_covers_it() -> None:
    """Rewards of one merge are Gaussian with mean (1, 1): its hypervolume is 1, with a standard
    error of √2 / √50 = 0.2.
    """
    soup, rule = Soup(INIT, POLICIES, CORNERS, [HALF]), ChooseConfig(eta=1.0)
    covered, widths = 0, []
    for seed in range(40):
        draw = np.random.default_rng(seed)
        own = scored(*(draw.normal(1, 1, 50).tolist() for _ in range(2)), kl=1.0)
        sft = scored([0.0] * 50, [0.0] * 50, 0.0)
        results = [
            (summarise(Candidate("sft", 0.0, None), sft, 1), sft),
            (summarise(Candidate("x", None, None, HALF, 1.0), own, 1), own),
        ]
        low, high = preference_json(soup, results, rule, 1, UP)["hypervolume_ci"]
        covered += low <= 1 <= high
        widths.append(high - low)
    assert covered >= 34
    assert np.mean(widths) == pytest.approx(2 * 1.96 * 0.2, rel=0.15)


@pytest.mark.parametrize("given", [[0.2, 0.7, 0.1], [1, 4, 1], [3, 3, 1]])
@pytest.mark.parametrize("rule", [ChooseConfig(max_kl=5.0), ChooseConfig(eta=1.0)])
def test_shares_that_a_command_names_are_chosen(given: list[float], rule: ChooseConfig) -> None:
    wanted = shares(dict(zip("xyz", given, strict=True)), "xyz")
    config = _chosen(Config(front=FrontConfig(choose=rule)), wanted)
    sft, merge = (
        Point(name, eta, 0.0, 0.1, kl, 0.1, None, None, 0.5, 10.0, 0.0, weights=own, liti=liti)
        for name, eta, kl, own, liti in (("sft", 0.0, 0.0, {}, None), ("x", None, 1.0, wanted, 1.0))
    )
    assert choose([sft, merge], config.front.choose, "xyz") is merge


RUN = load_config(
    {
        "rewards": [{"name": name, "function": f"a:{name}"} for name in CORNERS],
        "warp": {"policies": 2, "each": [{"rewards": {"short": 0}}, {"rewards": {"good": 0}}]},
        "front": {"choose": {"weights": {"good": 7, "short": 3}, "max_kl": 5}},
    }
)
OF_RUN = Sources(["policy 1", "policy 2"], ["x", "y"], "", INIT, POLICIES, of_run=True)
OF_ADAPTERS = Sources(["a", "b"], ["a", "b"], "", INIT, POLICIES)


def test_the_merge_of_a_runs_own_choice_is_measured_beside_others() -> None:
    own, corners = {"good": 0.7, "short": 0.3}, [FIRST, {"good": 0.0, "short": 1.0}]
    assert _soup(RUN, OF_RUN, [[1, 0], [0, 1]]).wanted == [*corners, own]
    assert _soup(RUN, OF_RUN, [[1, 0], {"good": 7, "short": 3}]).wanted == [FIRST, own]
    assert _soup(RUN, OF_RUN, [[1, 0]]).wanted == [FIRST]
    assert _soup(RUN, OF_RUN, []).wanted == RUN.mixes


def test_equal_shares_are_one_merge() -> None:
    half = {"a": 0.5, "b": 0.5}
    assert _soup(Config(), OF_ADAPTERS, [[1, 1], [2, 2], {"b": 3, "a": 3}]).wanted == [half]


def test_adapters_have_the_merges_that_the_configuration_wants() -> None:
    config = load_config({"front": {"weights": 2}})
    grid = [{"a": 1.0, "b": 0.0}, {"a": 0.5, "b": 0.5}, {"a": 0.0, "b": 1.0}]
    assert _soup(config, OF_ADAPTERS, []).wanted == grid
    assert _soup(config, OF_ADAPTERS, [[1, 0]]).wanted == grid[:1]
    assert _soup(Config(), OF_ADAPTERS, []).wanted == []
    one = Sources(["a"], ["a"], "", INIT, POLICIES[:1])
    with pytest.raises(ConfigError, match="front.weights are shares of adapters, and there is one"):
        _soup(config, one, [])


@pytest.mark.parametrize("key", ["front.weights", "front.choose.weights"])
def test_shares_of_policies_that_adapters_have_not_are_refused(key: str) -> None:
    of_policies = {"policy 1": 0.7, "policy 2": 0.3}
    given = {"weights": [of_policies], "choose": {"max_kl": 5.0}}
    if key != "front.weights":
        given = {"choose": {"weights": of_policies, "max_kl": 5.0}}
    config = load_config({"front": given})
    with pytest.raises(ConfigError, match=f"{key}.*nothing has the name policy 1; there are a, b"):
        _soup(config, OF_ADAPTERS, [])
