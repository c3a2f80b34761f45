"""Tests of several rewards: their total, their workers, and what a configuration may say."""

import math
from typing import Any

import pytest

from raywarp.config.load import load_config
from raywarp.config.schema import ConfigError
from raywarp.rewards.score import rewards_fingerprint
from raywarp.rewards.totals import means, total

NONE = math.nan


def test_the_total_is_the_weighted_sum_and_an_absent_score_scales_up_the_others() -> None:
    """Weights 2, 1, −1: without the second, 2 and −1 count 4/3 of themselves."""
    scores = [[1.0, 1.0, NONE, NONE], [3.0, NONE, 3.0, NONE], [5.0, 2.0, NONE, NONE]]
    assert total([2.0, 1.0, -1.0], scores)[:3] == pytest.approx([0.0, 0.0, 12.0])
    assert math.isnan(total([2.0, 1.0, -1.0], scores)[3])


def test_a_reward_of_weight_0_is_logged_only() -> None:
    assert total([1.0, 0.0], [[2.0], [NONE]]) == [2.0]
    assert math.isnan(total([1.0, 0.0], [[NONE], [3.0]])[0])
    assert means({"a": [1.0, NONE, 3.0], "b": [NONE]}) == {"reward/a": 2.0}


FIRST = {"name": "a", "function": "raywarp.embedded:vader"}


@pytest.mark.parametrize(
    ("tree", "said"),
    [
        ({"reward": {"function": "m:f"}, "rewards": [FIRST]}, "reward and rewards are both given"),
        ({"rewards": [FIRST, FIRST]}, "rewards: two of them have the name a"),
        ({"rewards": [FIRST | {"weight": "much"}]}, r"rewards\.0\.weight: .*valid number"),
        ({"rewards": [FIRST | {"weight": True}]}, r"rewards\.0\.weight: must be a number"),
        ({"rewards": [FIRST | {"weight": math.nan}]}, r"rewards\.0\.weight: .*finite"),
        ({"rewards": [FIRST | {"weight": 0}]}, "every weight is 0"),
        ({"rewards": [{"function": "m:f"}]}, r"rewards\.0\.name: field required"),
        ({"rewards": [{"name": "a b", "function": "m:f"}]}, r"rewards\.0\.name"),
        ({"rewards": [{"name": "a"}]}, r"rewards\.0 \(a\) has neither a model nor a function"),
        ({"rewards": [FIRST | {"model": "m"}]}, r"rewards\.0: has both a model and a function"),
        ({"rewards": FIRST}, "rewards: .*list"),
        ({"reward": {"model": "m", "concurrency": 2}}, "concurrency=2 is of functions"),
        ({"optim": {"betas": [0.9]}}, r"optim\.betas"),
        ({"optim": {"betas": [0.9, 1]}}, r"optim\.betas\.1"),
        ({"optim": {"weight_decay": -1}}, r"optim\.weight_decay"),
        ({"optim": {"importance_cap": 0}}, r"optim\.importance_cap"),
        (
            {"warp": {"advantage": "grpo"}, "rollout": {"completions_per_prompt": 1}},
            "at least 2 with warp.advantage=grpo",
        ),
    ],
)
def test_wrong_settings_name_their_key(tree: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_config(tree)


def test_each_entry_and_its_weight_decide_the_key() -> None:
    def key(*entries: dict[str, Any]) -> str:
        return rewards_fingerprint(load_config({"rewards": list(entries)}))

    second = FIRST | {"name": "b", "version": "2"}
    keys = [key(FIRST), key(FIRST | {"weight": 2}), key(FIRST, second), key(second)]
    assert len({*keys}) == 4
    assert key(FIRST | {"concurrency": 4, "timeout_seconds": 5}) == keys[0]


@pytest.mark.parametrize("function", ["__main__:score", lambda prompts, completions: [1.0]])
def test_a_sweep_refuses_a_function_that_its_trials_could_not_import(
    function: Any, no_ray: None
) -> None:
    from raywarp.sweep.sweep import tune

    tree = {"reward": {"function": function}, "tune": {"space": {"optim.lr": {"grid": [1e-4]}}}}
    with pytest.raises(ConfigError, match=r"reward\.function=.* put it into a module"):
        tune(load_config(tree))
