"""Tests of how anchors, rates, recipes and stop rules go together in a configuration."""

from pathlib import Path

import pytest

from raywarp.cli.config import recipe_text
from raywarp.config.load import load_config, parse_config
from raywarp.config.recipes import RECIPES
from raywarp.config.schema import ConfigError


def test_rates_have_their_defaults_where_they_are_used() -> None:
    assert parse_config({}).warp.ema_rate == 0.01
    assert parse_config({}).warp.liti_rate == 0.3
    assert parse_config({"warp": {"anchor": "sft"}}).warp.ema_rate is None
    elastic = parse_config({"warp": {"anchor": "sft", "elastic_reset": True, "policies": 1}}).warp
    assert (elastic.ema_rate, elastic.liti_rate) == (0.01, None)


def test_a_configuration_without_a_rate_comes_back_the_same() -> None:
    config = parse_config({"warp": {"anchor": "init"}})
    assert parse_config(config.model_dump(mode="json")) == config


def test_overrides_may_change_the_anchor() -> None:
    assert load_config(None, ["warp.anchor=sft"]).warp.anchor == "sft"


def test_a_recipe_fills_in_its_settings_and_keeps_those_that_it_leaves_open() -> None:
    config = load_config(None, ["recipe=anchored", "warp.steps=99"])
    assert (config.warp.anchor, config.warp.policies, config.warp.iterations) == ("sft", 1, 1)
    assert (config.warp.steps, config.warp.ema_rate) == (99, None)
    assert parse_config(config.model_dump(mode="json")) == config
    warp, default = parse_config({"recipe": "warp"}), parse_config({})
    assert warp.model_copy(update={"recipe": None}) == default


def test_a_soup_has_a_policy_for_each_reward() -> None:
    rewards = [{"name": name, "function": f"mine:{name}"} for name in ("a", "b", "c")]
    config = parse_config({"recipe": "soup", "rewards": rewards})
    assert config.corners == {"a": [1], "b": [2], "c": [3]}
    assert (config.warp.anchor, config.warp.iterations, len(config.mixes)) == ("sft", 1, 15)
    six = parse_config({"recipe": "soup", "rewards": rewards, "warp": {"policies": 6}})
    assert six.corners == {"a": [1, 4], "b": [2, 5], "c": [3, 6]}
    example = parse_config({"recipe": "soup"})
    assert example.corners == {"positive": [1], "present": [2]}
    assert parse_config(example.model_dump(mode="json")) == example


def test_a_soups_policies_have_their_rewards_own_weights() -> None:
    """A penalty stays one, and what is only logged has no policy."""
    weights = {"helpful": 1, "toxic": -2, "length": 0}
    rewards = [{"name": n, "function": f"mine:{n}", "weight": w} for n, w in weights.items()]
    config = parse_config({"recipe": "soup", "rewards": rewards})
    of = [{own.name: own.weight for own in one.rewards} for one in config.of_policies]
    assert of == [
        {"helpful": 1, "toxic": 0, "length": 0},
        {"helpful": 0, "toxic": -2, "length": 0},
    ]
    with pytest.raises(ConfigError, match="there are 1 rewards and warp.policies=1"):
        parse_config({"recipe": "soup", "rewards": rewards[::2]})


@pytest.mark.parametrize("name", RECIPES)
def test_a_printed_recipe_is_a_configuration_of_that_recipe(name: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe_text(name))
    assert load_config(path) == parse_config({"recipe": name})


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"warp": {"anchor": "sft", "ema_rate": 0.1}}, "ema_rate=0.1 has no EMA to move"),
        ({"warp": {"anchor": "init", "ema_rate": 0}}, "with anchor=init"),
        ({"warp": {"anchor": "reference"}}, "anchor"),
        (
            {"warp": {"elastic_reset": True, "policies": 1, "liti_rate": 0.3}},
            "liti_rate=0.3 contradicts elastic_reset=true",
        ),
        ({"warp": {"elastic_reset": True}}, "policies=2; set policies=1"),
        ({"warp": {"elastic_reset": True, "policies": 1, "iterations": 1}}, "iterations=1"),
        ({"warp": {"kl_target": 1, "kl_coef": 0}}, "kl_target=1 adapts kl_coef"),
        ({"warp": {"average_last": 5}}, "warp.average_last=5 checkpoints"),
        ({"warp": {"average_last": 2}, "stop": {"max_kl": 1}}, "contradict each other"),
        ({"stop": {"control_falls": 0.1}}, "stop.control_falls needs a control score"),
        ({"stop": {"max_kl": 1}, "front": {"every": 0}}, "front.every=0"),
        ({"stop": {"max_kl": 0}}, "stop.max_kl"),
        ({"front": {"ceiling_completions": 3}}, "at least 4, or 0"),
        ({"front": {"etas": [-0.5]}}, "front.etas"),
        ({"optim": {"schedule": "exponential"}}, "schedule"),
        ({"recipe": "soup-of-the-day"}, "recipe"),
        ({"recipe": "soup", "reward": {"function": "a:b"}}, "give two or more in rewards"),
        (
            {"recipe": "soup", "rewards": [{"name": "a", "function": "a:b"}]},
            "there are 1 rewards and warp.policies=1",
        ),
        ({"recipe": "soup", "warp": {"policies": 1}}, "there are 2 rewards and warp.policies=1"),
        ({"recipe": "soup", "rewards": 3}, "rewards"),
        ({"recipe": "soup", "reward": "x"}, "reward"),
        ({"recipe": "soup", "rewards": [{"name": ["a"], "function": "a:b"}]}, "rewards.0.name"),
        ({"warp": {"merge_weights": [1e308, 1e308]}}, "merge_weights: their sum is too large"),
        *(
            ({"front": front}, ": their sum is too large")
            for weights in [{"policy 1": 1e308, "policy 2": 1e308}]
            for front in ({"weights": [weights]}, {"choose": {"eta": 1, "weights": weights}})
        ),
        ({"recipe": "soup", "warp": {"anchor": "ema"}}, "contradicts recipe=soup"),
        (
            {"recipe": "anchored", "warp": {"policies": 2}},
            "warp.policies=2 contradicts recipe=anchored, which has warp.policies=1",
        ),
        ({"recipe": "anchored", "warp": {"anchor": "ema"}}, "contradicts recipe=anchored"),
        ({"recipe": "anchored", "warp": {"ema_rate": 0.1}}, "ema_rate=0.1 has no EMA to move"),
        ({"recipe": "warp", "warp": {"anchor": "sft"}}, "which has warp.anchor=ema"),
    ],
    ids=str,
)
def test_contradictions_are_refused_by_name(tree: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        parse_config(tree)
    assert message in str(refusal.value)
