"""Named recipes: settings that belong together, with the figures that speak for them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Tree = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Recipe:
    """Settings that belong together.

    Attributes:
        about: what it does, in lines.
        figures: what was measured, in lines, with the command that measures it.
        fixed: the settings that make it this recipe.
        usual: further settings, which a configuration may change.
    """

    about: tuple[str, ...]
    figures: tuple[str, ...]
    fixed: Tree
    usual: Tree


_MEASURED = (
    "Measured on the quickstart's reward: 56 policy steps, 200 held-out prompts, two seeds",
    "(tests/bench/recipes.py, which says how). Reward of the front at 1, 2 and 4 nats:",
)
RECIPES = {
    "warp": Recipe(
        about=(
            "WARP (Ramé et al. 2024): M policies in parallel, each with its own EMA as the anchor",
            "of its KL, merged by SLERP, I times. For as many GPUs as policies.",
        ),
        figures=(*_MEASURED, "0.31, 0.50, 0.76; anchored, at the same compute: 0.38, 0.59, 0.87."),
        fixed={"warp": {"anchor": "ema", "elastic_reset": False}},
        usual={"warp": {"iterations": 2, "policies": 2, "steps": 40, "ema_rate": 0.01}},
    ),
    "anchored": Recipe(
        about=(
            "One long policy with the SFT model as its anchor, a learning rate that falls to 0,",
            "and the line back to the SFT model (LITI). Scaling the log-ratio of a converged",
            "policy gives the optimum of another KL coefficient. For one GPU, or where compute",
            "counts.",
        ),
        figures=(*_MEASURED, "0.38, 0.59, 0.87; warp, at the same compute: 0.31, 0.50, 0.76."),
        fixed={"warp": {"anchor": "sft", "iterations": 1, "policies": 1}},
        usual={"warp": {"steps": 160}, "optim": {"schedule": "linear"}},
    ),
    "soup": Recipe(
        about=(
            "Rewarded soup (Ramé et al. 2023): one policy for each of the rewards, and afterwards",
            "merges with any shares of them, each within the KL of front.choose. Give your own",
            "rewards; these two need no model.",
        ),
        figures=("docs/preferences.md has a measured front.",),
        fixed={"warp": {"anchor": "sft", "iterations": 1}},
        usual={
            "warp": {"steps": 64},
            "optim": {"schedule": "linear", "batch_size": 32},
            "rollout": {"max_new_tokens": 16},
        },
    ),
}
_EXAMPLE = [
    {"name": "positive", "function": "raywarp.embedded:vader", "standardise": True},
    {"name": "present", "function": "raywarp.rewards.tense:present", "standardise": True},
]


def with_recipe(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration's tree with the settings of its recipe filled in.

    Raises:
        ValueError: a given setting contradicts the recipe.
    """
    recipe = RECIPES[tree["recipe"]]
    filled = _soup(tree) if tree["recipe"] == "soup" else dict(tree)
    for section in recipe.fixed.keys() | recipe.usual.keys():
        given = filled.get(section) or {}
        if not isinstance(given, Mapping):
            return filled  # a mistake that has its own message
        fixed, usual = recipe.fixed.get(section, {}), recipe.usual.get(section, {})
        for key, value in fixed.items():
            if given.get(key, value) != value:
                raise ValueError(
                    f"{section}.{key}={given[key]} contradicts recipe={tree['recipe']}, which has"
                    f" {section}.{key}={value}; leave one of the two out"
                )
        filled[section] = {**usual, **given, **fixed}
    return filled


def _soup(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return the tree with rewards, and with a policy for each of them where none are given.

    A policy's reward has its own weight. Those of weight 0 are only logged, and have no policy.

    Raises:
        ValueError: there is a single reward, or fewer policies than rewards.
    """
    rewards, warp = tree.get("rewards") or [], tree.get("warp") or {}
    reward = tree.get("reward") or {}
    if not isinstance(rewards, list | tuple) or not isinstance(reward, Mapping):
        return dict(tree)  # a mistake that has its own message
    if not rewards and any(reward.get(key) for key in ("model", "function")):
        raise ValueError("recipe=soup mixes rewards: give two or more in rewards, not in reward")
    rewards = rewards or _EXAMPLE
    named = all(isinstance(one, Mapping) and isinstance(one.get("name"), str) for one in rewards)
    if not isinstance(warp, Mapping) or warp.get("each") or not named:
        return {**tree, "rewards": rewards}
    given = [(one["name"], one.get("weight", 1.0)) for one in rewards]
    weights, trained = dict(given), [name for name, weight in given if weight != 0]
    count = warp.get("policies", len(trained))
    if len(trained) < 2 or not isinstance(count, int) or count < len(trained):
        raise ValueError(
            "recipe=soup trains a policy for each of two or more rewards; there are"
            f" {len(trained)} rewards and warp.policies={count}"
        )
    own = [trained[m % len(trained)] for m in range(count)]
    each = [
        {"rewards": {name: weights[name] if name == mine else 0.0 for name in weights}}
        for mine in own
    ]
    return {**tree, "rewards": rewards, "warp": {**warp, "policies": count, "each": each}}
