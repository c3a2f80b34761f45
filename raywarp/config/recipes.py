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
}


def with_recipe(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration's tree with the settings of its recipe filled in.

    Raises:
        ValueError: a given setting contradicts the recipe.
    """
    recipe, filled = RECIPES[tree["recipe"]], dict(tree)
    for section in recipe.fixed.keys() | recipe.usual.keys():
        given = tree.get(section) or {}
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
