"""Tests of warp.each: what differs between the policies of a run."""

import math
from typing import Any

import pytest

from raywarp.algorithm.hypervolume import simplex
from raywarp.config.each import directions, shares
from raywarp.config.load import load_config
from raywarp.config.schema import Config, ConfigError
from raywarp.config.search import search_space
from raywarp.run.keys import key_chain

REWARDS = [{"name": "helpful", "function": "a:b"}, {"name": "brief", "function": "a:c"}]


def of_two(*each: dict[str, Any], **changes: Any) -> Config:
    warp = {"policies": 2, "each": list(each), **changes.pop("warp", {})}
    return load_config({"rewards": REWARDS, "warp": warp, **changes})


@pytest.mark.parametrize(
    "changes",
    [
        {"lr": 1e-4, "rank": 4},
        {"optim.lr": 1e-4, "lora.rank": 4},
        {"optim": {"lr": 1e-4}, "lora": {"rank": 4}},
    ],
)
def test_keys_are_given_in_full_by_their_last_part_or_in_sections(changes: dict[str, Any]) -> None:
    first, second = of_two({}, changes).of_policies
    assert (first.optim.lr, first.lora.rank) == (5e-4, 16)
    assert (second.optim.lr, second.lora.rank) == (1e-4, 4)


def test_a_policys_configuration_is_that_of_a_run_without_each() -> None:
    config = of_two({"rewards": {"brief": 0}, "seed": 7}, {"where": {"language": "de"}})
    weighted = [REWARDS[0], REWARDS[1] | {"weight": 0}]
    plain = {"rewards": REWARDS, "warp": {"policies": 2}}
    assert config.of_policy(1) == load_config(plain | {"rewards": weighted, "seed": 7})
    assert config.of_policy(2) == load_config(plain | {"prompts": {"where": {"language": "de"}}})


def test_another_anchor_has_its_own_rates() -> None:
    ema, sft = of_two({"anchor": "ema"}, {"anchor": "sft"}, warp={"ema_rate": 0.2}).of_policies
    assert (ema.warp.ema_rate, sft.warp.ema_rate) == (0.01, None)
    assert of_two({"ema_rate": 0.5}, {}, warp={"ema_rate": 0.2}).of_policy(1).warp.ema_rate == 0.5


def test_ranks_add_up() -> None:
    assert of_two({"rank": 4}, {"rank": 2}).merged_rank == 6
    assert load_config({"warp": {"policies": 3}}).merged_rank == 48


def test_alike_policies_share_their_keys_with_runs_that_have_no_each() -> None:
    inputs: dict[str, Any] = {"base": "b", "prompts": "p", "reward": "r"}
    plain = load_config({"rewards": REWARDS, "warp": {"policies": 2}})
    faster = load_config({"rewards": REWARDS, "warp": {"policies": 2}, "optim": {"lr": 1e-3}})
    mixed = of_two({}, {"lr": 1e-3})
    own = inputs | {"each": [inputs, inputs]}
    (alike, fast), _ = key_chain(mixed, own)
    assert alike == key_chain(plain, inputs)[0][0]
    assert fast == key_chain(faster, inputs)[0][1]
    other_prompts = inputs | {"each": [inputs, inputs | {"prompts": "q"}]}
    assert key_chain(mixed, other_prompts)[0] == [
        alike,
        key_chain(faster, inputs | {"prompts": "q"})[0][1],
    ]


def test_weights_of_the_merge_change_what_follows_it() -> None:
    inputs: dict[str, Any] = {"base": "b"}
    equal = key_chain(load_config({}), inputs)
    weighted = key_chain(load_config({"warp": {"merge_weights": [0.7, 0.3]}}), inputs)
    assert equal[0] == weighted[0]
    assert not {*equal[1]} & {*weighted[1]}


@pytest.mark.parametrize(
    ("each", "message"),
    [
        ([{}], r"each has 1 entries, and policies=2; give one for each policy"),
        ([{}, {"model": "y"}], "model cannot differ between the policies of a run; what may is"),
        ([{}, {"rollout": {"engine": "vllm"}}], "rollout cannot differ between the policies"),
        ([{}, {"prompts.template": "chat"}], "prompts.template cannot differ"),
        ([{}, {"ranks": 4}], "ranks cannot differ .*; did you mean lora.rank?"),
        ([{}, {"lr": 1, "optim.lr": 2}], "optim.lr is given twice"),
        ([{}, {"rewards": {"x": 1}}], "policy 2: rewards: no reward has the name x; there are he"),
        ([{}, {"rewards": {"helpful": 0, "brief": 0}}], "policy 2: rewards: every weight is 0"),
        ([{}, {"rewards": 3}], "policy 2: rewards: give weights by name"),
        ([{}, {"lr": -1}], r"policy 2: optim.lr: Input should be greater than 0"),
        ([{}, {"batch_size": 7}], "policy 2: optim.batch_size=7 is not a multiple"),
        ([{}, {"anchor": "sft", "ema_rate": 0.1}], "policy 2: warp: ema_rate=0.1 has no EMA"),
    ],
)
def test_what_cannot_differ_is_refused(each: list[Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        of_two(*each)


@pytest.mark.parametrize("weights", [[1], [1, 0], [1, -1], [1, 2, 3]])
def test_bad_weights_of_the_merge_are_refused(weights: list[float]) -> None:
    with pytest.raises(ConfigError, match="warp.*merge_weights"):
        load_config({"warp": {"policies": 2, "merge_weights": weights}})


SOUP = ({"rewards": {"brief": 0}}, {"rewards": {"helpful": 0}})


def test_shares_name_the_reward_that_a_policy_is_trained_on() -> None:
    assert of_two(*SOUP).corners == {"helpful": [1], "brief": [2]}
    mixed = of_two({}, {"rewards": {"brief": 0}})
    assert mixed.corners == {"policy 1": [1], "policy 2": [2]}
    four = of_two(*SOUP, *SOUP, warp={"policies": 4})
    assert four.corners == {"helpful": [1, 3], "brief": [2, 4]}
    assert of_two({"rewards": {"brief": 0}}, {"rewards": {"brief": 0}}).corners.keys() == {
        *("policy 1", "policy 2")
    }


def test_a_reward_that_is_only_logged_is_no_corner() -> None:
    logged = {"name": "kind", "function": "a:d", "weight": 0}
    warp = {"policies": 2, "each": list(SOUP)}
    choose = {"weights": {"helpful": 0.7, "brief": 0.3}, "max_kl": 5}
    config = load_config({"rewards": [*REWARDS, logged], "warp": warp, "front": {"choose": choose}})
    assert config.corners == {"helpful": [1], "brief": [2]}
    assert config.mixes[-1] == choose["weights"]


def test_directions_are_those_that_policies_are_trained_in() -> None:
    weights = [{"a": 1.0, "b": 0.0, "c": 0.0}, {"a": 0.5, "b": -2.0, "c": 0.0}]
    assert directions(weights) == {"a": 1, "b": -1}
    assert directions([{"a": 1.0, "b": 1.0}, {"a": -1.0, "b": 0.0}]) == {"b": 1}


def test_merges_of_other_shares_are_measured_where_the_rewards_differ() -> None:
    of = [1, 0.75, 0.5, 0.25, 0]
    grid = [{"helpful": own, "brief": 1 - own} for own in of]
    assert of_two(*SOUP).mixes == grid
    assert of_two(*SOUP, front={"weights": 0}).mixes == []
    assert of_two({}, {"lr": 1e-3}).mixes == []
    choose = {"weights": {"helpful": 7, "brief": 3}, "max_kl": 5}
    chosen = {"helpful": 0.7, "brief": 0.3}
    assert of_two(*SOUP, front={"choose": choose}).mixes == [*grid, chosen]
    assert of_two(*SOUP, front={"weights": [{"brief": 2}], "choose": choose}).mixes == [
        {"helpful": 0, "brief": 1},
        chosen,
    ]
    assert len(of_two({}, {"rewards": {"brief": 0}}).mixes) == 5
    three = [{"name": name, "function": f"a:{name}"} for name in "xyz"]
    each = [{"rewards": {**dict.fromkeys("xyz", 0), name: 1}} for name in "xyz"]
    assert len(load_config({"rewards": three, "warp": {"policies": 3, "each": each}}).mixes) == 15


def test_shares_of_shares_are_the_same() -> None:
    for counts in simplex(3, 12):
        for given in (counts, [10 * count for count in counts], [0.3 * count for count in counts]):
            once = shares(dict(zip("xyz", given, strict=True)), "xyz")
            assert shares(once, "xyz") == once
            assert once == shares(dict(zip("xyz", counts, strict=True)), "xyz")


def test_a_choice_on_the_grid_is_no_further_merge() -> None:
    rewards = [{"name": name, "function": f"a:{name}"} for name in "xyz"]
    each = [{"rewards": {**dict.fromkeys("xyz", 0), name: 1}} for name in "xyz"]
    for weights in ({"x": 2, "y": 7, "z": 1}, {"x": 0.6, "y": 2.1, "z": 0.3}):
        config = load_config(
            {
                "rewards": rewards,
                "warp": {"policies": 3, "each": each},
                "front": {"weights": 10, "choose": {"weights": weights, "max_kl": 5}},
            }
        )
        assert len(config.mixes) == math.comb(12, 2)


@pytest.mark.parametrize(
    ("front", "message"),
    [
        (
            {"choose": {"weights": {"kind": 1}, "eta": 1}},
            "weights: nothing has the name kind",
        ),
        ({"weights": [{"helpful": 0}]}, "front.weights: all weights are 0"),
        ({"weights": [{"helpful": -1}]}, "front.weights"),
        ({"choose": {"weights": {"helpful": 1}}}, "needs exactly one of eta and max_kl"),
    ],
)
def test_bad_shares_are_refused(front: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        of_two(*SOUP, front=front)


def test_a_single_policy_has_no_shares() -> None:
    with pytest.raises(ConfigError, match="are shares of policies, and warp.policies=1"):
        load_config({"warp": {"policies": 1}, "front": {"weights": 4}})


def test_trials_are_compared_by_their_line() -> None:
    choose = {"weights": {"helpful": 1}, "eta": 1}
    with pytest.raises(ConfigError, match="trials of tune are compared by their line"):
        of_two(*SOUP, front={"choose": choose}, tune={"lr": {"grid": [1e-3]}})


@pytest.mark.parametrize("key", ["front.choose", "front.choose.weights"])
def test_no_trial_chooses_a_merge_by_its_shares(key: str) -> None:
    shares = {"helpful": 0.7, "brief": 0.3}
    value = {"weights": shares, "eta": 1} if key == "front.choose" else shares
    tune = {key: {"grid": [*([{"eta": 1}] if key == "front.choose" else [{}]), value]}}
    with pytest.raises(ConfigError, match="trials of tune are compared by their line"):
        search_space(of_two(*SOUP, tune=tune))
