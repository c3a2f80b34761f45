"""Merges with other shares of the policies: the preference front of one run.

Policies that are trained on different rewards and merged with weights λ trade these rewards off
without further training ("rewarded soups", Ramé et al. 2023). Here a merge is SLERP of the task
vectors, and is moved towards the SFT model (LITI) until its KL is within a bound. Merges of
different λ are thus compared at one KL.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from raywarp.algorithm.averaging import slerp
from raywarp.algorithm.deltas import AdapterDelta, add, scale
from raywarp.algorithm.hypervolume import dominated_volume
from raywarp.algorithm.truncation import compress
from raywarp.config.front import ChooseConfig
from raywarp.rollout.protocol import Scores
from raywarp.run.points import Candidate, Point, Scored

Weights = Mapping[str, float]
Measure = Callable[[Sequence[Candidate]], Sequence[tuple[Point, Scored]]]

ROUNDS = 4  # of measuring; afterwards only until some η is within max_kl
AIM, NEAR = 0.95, 0.85  # of max_kl: what a guess aims at, and what is close enough
# What front.json has besides its points.
PREFERENCE_KEYS = (
    *("corners", "directions", "preference_front"),
    *("hypervolume", "hypervolume_ci", "hypervolume_of"),
)
RESAMPLES = 1000  # of the prompts, for the interval of the hypervolume


@dataclass(frozen=True)
class Soup:
    """The merges that are measured besides the line to SLERP.

    Attributes:
        init: θ_init − θ_sft.
        policies: the task vectors θ_m − θ_init.
        corners: what shares name, with its policies, counted from 1; see Config.corners.
        wanted: shares of each merge, by corner; each sums to 1.
    """

    init: AdapterDelta
    policies: Sequence[AdapterDelta]
    corners: Mapping[str, Sequence[int]]
    wanted: Sequence[Weights]

    def merged(self, weights: Weights) -> AdapterDelta:
        """Return the merge's change from the SFT model; with one policy, that policy's own."""
        own = self.of_policies(weights)
        if own.count(0) == len(own) - 1:
            return add(self.init, self.policies[next(m for m, w in enumerate(own) if w)])
        return compress(add(self.init, slerp(self.policies, own)))

    def of_policies(self, weights: Weights) -> list[float]:
        """Return each policy's weight: policies of one corner have equal parts of its share."""
        of = {m: weights[name] / len(own) for name, own in self.corners.items() for m in own}
        return [of[m] for m in sorted(of)]

    def candidate(self, weights: Weights, merged: AdapterDelta, eta: float) -> Candidate:
        """Return the point at η on the line from the SFT model to the merge with these weights."""
        told = " ".join(f"{name} {share:.6g}" for name, share in weights.items() if share)
        name = told if eta == 1 else f"{told}, η {eta:g}"
        return Candidate(name, None, scale(merged, eta), dict(weights), eta)

    def on_line(self, weights: Weights, eta: float) -> AdapterDelta:
        """Return η·(θ_merged − θ_sft)."""
        return scale(self.merged(weights), eta)


def measure_soup(soup: Soup, rule: ChooseConfig, measure: Measure) -> list[tuple[Point, Scored]]:
    """Measure each merge at the η of the rule, and at those that were tried on the way.

    Args:
        rule: names η, or the KL that the largest η has to stay within.
        measure: measures points, all at once.
    """
    merges = [(weights, soup.merged(weights), dict[float, float]()) for weights in soup.wanted]
    found = list[tuple[Point, Scored]]()
    while True:
        due = [
            (weights, merged, tried, eta)
            for weights, merged, tried in merges
            if (eta := next_eta(tried, rule)) is not None
        ]
        if not due:
            return found
        results = measure([soup.candidate(weights, own, eta) for weights, own, _, eta in due])
        for (_, _, tried, eta), (point, _) in zip(due, results, strict=True):
            tried[eta] = point.kl
        found += results


def next_eta(tried: Mapping[float, float], rule: ChooseConfig) -> float | None:
    """Return the η to measure next, or None where nothing better is to be expected.

    KL is taken for a power of η between two measurements, and for ∝ η² towards the SFT model.

    Args:
        tried: η → KL in nats.
    """
    if rule.eta is not None:
        return None if tried else rule.eta
    if not tried:
        return 1.0
    most = rule.max_kl or 0.0
    above = {eta: kl for eta, kl in tried.items() if not kl <= most}
    within = {eta: kl for eta, kl in tried.items() if kl <= most}
    if not above or (within and (max(within.values()) >= NEAR * most or len(tried) >= ROUNDS)):
        return None
    high = min(above)
    low = max((eta for eta in within if eta < high), default=0.0)
    if not math.isfinite(above[high]):
        return _three_digits((low + high) / 2)
    guess = high * (AIM * most / above[high]) ** (1 / _power(tried, low, high))
    margin = 0.02 * (high - low)
    return _three_digits(min(max(guess, low + margin), high - margin))


def _power(tried: Mapping[float, float], low: float, high: float) -> float:
    """Return p of KL ∝ η^p through η = high and the nearest other measurement; 2 without one."""
    others = [eta for eta, kl in tried.items() if eta != high and 0 < kl < math.inf]
    near = low if low in others else min(others, default=high)
    if near == high or tried[near] == tried[high]:
        return 2.0
    return max(math.log(tried[high] / tried[near]) / math.log(high / near), 0.1)


def _three_digits(eta: float) -> float:
    return float(f"{eta:.3g}")


def preference_front(points: Sequence[Point], rule: ChooseConfig) -> list[Point]:
    """Return one point for each measured λ: the largest η that the rule allows."""
    best: dict[tuple[tuple[str, float], ...], Point] = {}
    for point in sorted((p for p in points if p.weights), key=lambda point: point.liti or 0.0):
        if rule.eta is not None or point.kl <= (rule.max_kl or 0.0):
            best[tuple(point.weights.items())] = point
    return sorted(best.values(), key=lambda point: tuple(point.weights.values()), reverse=True)


def preference_json(
    soup: Soup,
    results: Sequence[tuple[Point, Scored]],
    rule: ChooseConfig,
    group: int,
    directions: Mapping[str, int],
) -> dict[str, Any]:
    """Return what front.json says of the preference front besides its points.

    The hypervolume is that of the rewards that policies are trained on, above those of the SFT
    model, or below where less is better. Its interval is over prompts, which are resampled for all
    points together.

    Args:
        results: of the front, of which the first is the SFT model.
        group: completions per prompt.
        directions: of the rewards that policies are trained on, see config/each.py.
    """
    if not soup.wanted:
        return {}
    front, sft = preference_front([point for point, _ in results], rule), results[0]
    names = [name for name in sft[0].rewards if name in directions]
    ways = {name: directions[name] for name in names}
    found = {
        "corners": dict(soup.corners),
        "directions": ways,
        "preference_front": [point.name for point in front],
    }
    if len(names) < 2 or not front:
        return found
    own = {point.name: scored for point, scored in results}
    means = np.array([_by_prompt(own[point.name], names, group) for point in front])
    base = _by_prompt(sft[1], names, group)
    signs = np.array([*ways.values()])
    volume, interval = _volume(means * signs, base * signs)
    return {**found, "hypervolume": volume, "hypervolume_ci": interval, "hypervolume_of": names}


def _by_prompt(scored: Scored, names: Sequence[str], group: int) -> Any:
    """Return (N, R) rewards of the prompts' completions; NaN where a reward does not apply."""
    assert isinstance(scored.rewards, Scores)
    parts = np.array([scored.rewards.parts[name] for name in names], dtype=float)
    there = np.isfinite(parts).reshape(len(names), -1, group)
    sums = np.where(there, parts.reshape(there.shape), 0.0).sum(-1)
    return np.divide(sums, there.sum(-1), out=np.full(sums.shape, np.nan), where=there.any(-1)).T


def _volume(means: Any, base: Any) -> tuple[float, list[float]]:
    """Return the hypervolume of points above a base, and its 95 % interval (bootstrap).

    Args:
        means: (points, N, R) rewards.
        base: (N, R).
    """
    generator = np.random.default_rng(0)

    def volume(rows: Any) -> float:
        points = np.nanmean(means[:, rows], axis=1).tolist()
        return dominated_volume(points, np.nanmean(base[rows], axis=0).tolist())

    prompts = len(base)
    draws = [volume(generator.integers(prompts, size=prompts)) for _ in range(RESAMPLES)]
    low, high = np.quantile(draws, [0.025, 0.975]).tolist()
    return volume(np.arange(prompts)), [low, high]
