"""The settings of single policies: `warp.each`, a list with one mapping of changes per policy.

Its keys are those of the configuration, in full (`optim.lr`), by their last part (`lr`) or in
sections (`optim: {lr: …}`). `rewards` maps names of rewards to weights.
"""

import difflib
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

# Sections and what of them may differ between policies. Their last parts are unique.
_OWN = {
    "lora": ("rank", "alpha"),
    "warp": (
        *("steps", "anchor", "ema_rate", "kl_coef", "kl_target", "advantage", "average_last"),
    ),
    "optim": (
        *("lr", "batch_size", "warmup_steps", "schedule", "grad_clip", "weight_decay", "betas"),
        "importance_cap",
    ),
    "prompts": (
        *("dataset", "datasets", "name", "split", "held_out_split", "column", "where"),
        *("max_words", "max_tokens", "min_tokens"),
    ),
}
KEYS = {"seed": "seed", "rewards": "rewards"} | {
    last: f"{section}.{last}" for section, names in _OWN.items() for last in names
}


def in_full(changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return one policy's changes by full keys.

    Raises:
        ValueError: a key is unknown, may not differ between policies, or is given twice.
    """
    found: dict[str, Any] = {}
    for name, value in changes.items():
        inner = isinstance(value, Mapping) and name in _OWN
        own = {f"{name}.{last}": v for last, v in value.items()} if inner else {name: value}
        for key, setting in own.items():
            full = KEYS.get(key, key)
            if full not in KEYS.values():
                raise ValueError(_refusal(key))
            if full in found:
                raise ValueError(f"{full} is given twice")
            found[full] = setting
    return found


def key_of(given: str) -> str | None:
    """Return the dotted key that a key of a sweep means: warp.each.POLICY.KEY, policies from 1.

    `each.1.lr` means `warp.each.1.optim.lr`. The result is None where it is no such key.

    Raises:
        ValueError: it is one, but what it names may not differ between policies.
    """
    found = re.fullmatch(r"(?:warp\.)?each\.([1-9][0-9]*)\.(.+)", given)
    if not found:
        return None
    index, key = found.groups()
    full = KEYS.get(key, key)
    if full not in KEYS.values() and not full.startswith("rewards."):
        raise ValueError(_refusal(key))
    return f"warp.each.{index}.{full}"


def put(warp: dict[str, Any], key: str, value: Any) -> None:
    """Set a setting of a policy, named as by key_of, in a tree of the section `warp`.

    Raises:
        ValueError: there is no such policy.
    """
    index, full = key.removeprefix("warp.each.").split(".", 1)
    warp["each"] = warp["each"] or [{} for _ in range(warp["policies"])]
    if int(index) > len(warp["each"]):
        raise ValueError(f"{key}: the run has {len(warp['each'])} policies")
    own = warp["each"][int(index) - 1]
    if full.startswith("rewards."):
        own.setdefault("rewards", {})[full.removeprefix("rewards.")] = value
    else:
        own[full] = value


def get(warp: Mapping[str, Any], key: str) -> Any:
    """Return what `put` has set."""
    index, full = key.removeprefix("warp.each.").split(".", 1)
    own = warp["each"][int(index) - 1]
    if full.startswith("rewards."):
        return own["rewards"][full.removeprefix("rewards.")]
    return own[full]


def _refusal(key: str) -> str:
    near = difflib.get_close_matches(key.rpartition(".")[2], [*KEYS], n=1, cutoff=0.7)
    hint = f"did you mean {KEYS[near[0]]}?" if near else f"what may is {', '.join(KEYS.values())}"
    return f"{key} cannot differ between the policies of a run; {hint}"


def changed(tree: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the run's configuration with one policy's changes.

    Args:
        tree: of the run, without `warp.each`; its sections are changed.
        changes: by full keys.

    Raises:
        ValueError: `rewards` names a reward that there is not, or is no mapping of weights.
    """
    for key, value in changes.items():
        section, _, last = key.rpartition(".")
        if key == "rewards":
            tree["rewards"] = _weighted(tree["rewards"], value)
        elif section:
            tree[section][last] = value
        else:
            tree[last] = value
    if "warp.anchor" in changes and "warp.ema_rate" not in changes:
        tree["warp"]["ema_rate"] = None  # the anchor decides whether there is one
    if "prompts.dataset" in changes:
        tree["prompts"]["datasets"] = None
    return tree


def _weighted(rewards: list[dict[str, Any]], weights: Any) -> list[dict[str, Any]]:
    names = [entry["name"] for entry in rewards]
    if not isinstance(weights, Mapping) or not weights:
        raise ValueError("rewards: give weights by name, for example {helpful: 1, brief: 0}")
    if unknown := next((name for name in weights if name not in names), None):
        there = f"there are {', '.join(names)}" if names else "the run has no list of rewards"
        raise ValueError(f"rewards: no reward has the name {unknown}; {there}")
    return [{**entry, "weight": weights.get(entry["name"], entry["weight"])} for entry in rewards]


def reward_weights(policies: Iterable[Any]) -> list[dict[str, float]]:
    """Return the weights of the rewards by name, for each policy's configuration."""
    return [{entry.name: entry.weight for entry in own.rewards} for own in policies]


def corners(weights: Sequence[Mapping[str, float]]) -> dict[str, list[int]]:
    """Return what the shares of a merge may name: name → its policies, counted from 1.

    These are the rewards that policies are trained on, where each policy is trained on one. Else
    they are the policies themselves.

    Args:
        weights: of the rewards by name, for each policy.
    """
    own = [[name for name, weight in theirs.items() if weight] for theirs in weights]
    if all(len(names) == 1 for names in own):
        of = {name: [m for m, (n,) in enumerate(own, 1) if n == name] for name in weights[0]}
        if len(found := {name: theirs for name, theirs in of.items() if theirs}) > 1:
            return found
    return {f"policy {m}": [m] for m in range(1, len(weights) + 1)}


def directions(weights: Sequence[Mapping[str, float]]) -> dict[str, int]:
    """Return the rewards that policies are trained on: name → 1 where more is better, or −1.

    A reward that policies are trained on in both directions is left out.

    Args:
        weights: of the rewards by name, for each policy.
    """
    signs = {name: {w[name] > 0 for w in weights if w[name]} for name in weights[0]}
    return {name: 1 if True in own else -1 for name, own in signs.items() if len(own) == 1}


def usual_steps(count: int) -> int:
    """Return n for the shares in steps of 1/n of so many corners: at most 4, and 15 of them."""
    return next(n for n in (4, 3, 2, 1) if n == 1 or math.comb(n + count - 1, n) <= 15)


def shares(weights: Mapping[str, float], of: Collection[str]) -> dict[str, float]:
    """Return a merge's weights with an entry for every corner, and the sum 1, to 12 decimals.

    Shares of shares are the same numbers: those of points are compared with those of a rule.

    Args:
        of: names of the corners.

    Raises:
        ValueError: a weight names no corner, one is negative or not finite, or all are 0.
    """
    if unknown := next((name for name in weights if name not in of), None):
        raise ValueError(f"nothing has the name {unknown}; there are {', '.join(of)}")
    if odd := [share for share in weights.values() if not 0 <= share < math.inf]:
        raise ValueError(f"{odd[0]:g} is no share; it must be at least 0")
    if not any(weights.values()):
        raise ValueError("all weights are 0; give one of them a share")
    total = sum(weights.values())
    if math.isclose(total, 1.0, rel_tol=1e-9):
        total = 1.0
    return {name: round(weights.get(name, 0.0) / total, 12) for name in of}
