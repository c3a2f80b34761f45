"""Tests of keys: equal policies share one, and what makes another policy makes another key."""

from typing import Any

import pytest

from raywarp.config.load import parse_config
from raywarp.run.keys import front_key, key_chain

INPUTS = {"base": "b", "prompts": "p", "reward": "r"}


def chain(**tree: Any) -> list[list[str]]:
    return key_chain(parse_config(tree), INPUTS)


def test_an_anchor_that_stays_is_an_ema_of_rate_0() -> None:
    still = chain(warp={"ema_rate": 0})
    assert chain(warp={"anchor": "init"}) == still
    assert chain() != still


def test_an_sft_anchor_is_the_init_in_the_first_iteration_alone() -> None:
    first, second = chain(warp={"anchor": "sft"})
    still = chain(warp={"ema_rate": 0})
    assert first == still[0]
    assert second != still[1]


def test_elastic_reset_shares_its_first_policy_with_no_run_that_keeps_no_ema() -> None:
    elastic = chain(warp={"elastic_reset": True, "policies": 1, "ema_rate": 0.1})
    plain = chain(warp={"policies": 1, "ema_rate": 0.1})
    assert elastic[0] != plain[0]
    assert elastic[1] != plain[1]


@pytest.mark.parametrize(
    "tree",
    [
        {"optim": {"schedule": "cosine"}},
        {"warp": {"kl_target": 1.0}},
        {"warp": {"average_last": 2}},
        {"warp": {"average_last": 2}, "checkpoint_every": 5},
        {"stop": {"max_kl": 5}},
        {"stop": {"max_kl": 5}, "front": {"every": 5}},
        {"stop": {"max_kl": 5}, "front": {"tracked_prompts": 8}},
    ],
    ids=str,
)
def test_each_choice_makes_other_policies(tree: dict[str, Any]) -> None:
    parts = [chain(), *(chain(**{name: own}) for name, own in tree.items() if len(tree) > 1)]
    assert all(chain(**tree)[0][0] != part[0][0] for part in parts)


@pytest.mark.parametrize(
    "tree",
    [
        {"front": {"every": 5, "tracked_prompts": 8}},
        {"front": {"ceiling_completions": 0, "share_kl": 1}},
        {"checkpoint_every": 5},
        {"retention": {"texts": 8}},
    ],
    ids=str,
)
def test_measuring_does_not(tree: dict[str, Any]) -> None:
    assert chain(**tree) == chain()
    assert front_key(parse_config(tree), "e", ["k"]) == front_key(parse_config({}), "e", ["k"])


@pytest.mark.parametrize("weights", [[3], [1, 1], [0.2, 0.2, 0.2]])
def test_equal_weights_of_the_merge_are_those_of_none(weights: list[float]) -> None:
    plain, equal = ({"policies": len(weights), **own} for own in ({}, {"merge_weights": weights}))
    assert chain(warp=equal) == chain(warp=plain)
    keys = [front_key(parse_config({"warp": own}), "e", ["a"]) for own in (plain, equal)]
    assert keys[0] == keys[1]


def test_other_weights_of_the_merge_make_other_fronts() -> None:
    warp = {"merge_weights": [1, 2]}
    assert chain(warp=warp)[1] != chain()[1]
    assert front_key(parse_config({"warp": warp}), "e", []) != front_key(parse_config({}), "e", [])
