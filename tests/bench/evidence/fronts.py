"""Fronts and how they are compared: pure functions on arrays.

A front is P points, each with a KL to SFT in nats and a reward; SFT itself, at a KL of 0, is one of
them. B resamples, S seeds, N prompts, K values of KL. Leading axes (…) are carried along.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Verdict = Literal["reproduced", "not reproduced", "undecided"]

DRAWS = 10_000
SEEDS_NEEDED = 3
MARGIN = 0.05  # standard deviations of the SFT model's reward: a gain below it is none


def reward_at(kl: Array, reward: Array, at: Array) -> Array:
    """The front's reward at fixed KL: its points joined by lines in √KL, the last line going on
    beyond the end.

    Along a scaled task vector both √KL and reward are linear in its length to first order, so that
    fronts with unequally spaced points compare without the bias that straight lines in KL would
    have.

    Args:
        kl, reward: (…, P), in any order; P ≥ 2.
        at: (K,).

    Returns:
        (…, K).
    """
    order = np.argsort(kl, axis=-1, kind="stable")
    x = np.sqrt(np.maximum(np.take_along_axis(kl, order, -1), 0.0))
    y = np.take_along_axis(reward, order, -1)
    wanted = np.sqrt(at)
    right = np.clip((x[..., None, :] < wanted[:, None]).sum(-1), 1, x.shape[-1] - 1)
    x0, x1, y0, y1 = (
        np.take_along_axis(values, place, -1) for values in (x, y) for place in (right - 1, right)
    )
    share = (wanted - x0) / np.maximum(x1 - x0, 1e-9)
    result: Array = y0 + share * (y1 - y0)
    return result


def hypervolume(kl: Array, reward: Array, largest_kl: float, least_reward: Array | float) -> Array:
    """The area that a set of points dominates: KL up to largest_kl, reward from least_reward, which
    together are the reference point.

    Args:
        kl, reward: (…, P), in any order. least_reward: (…) or a number.

    Returns:
        (…): nats × reward.
    """
    order = np.argsort(kl, axis=-1, kind="stable")
    x = np.clip(np.take_along_axis(kl, order, -1), 0.0, largest_kl)
    inside = np.take_along_axis(kl, order, -1) <= largest_kl
    gain = (
        np.maximum(np.take_along_axis(reward, order, -1) - np.asarray(least_reward)[..., None], 0.0)
        * inside
    )
    best = np.maximum.accumulate(gain, axis=-1)
    ends = np.concatenate([x[..., 1:], np.full((*x.shape[:-1], 1), largest_kl)], axis=-1)
    area: Array = (best * (ends - x)).sum(-1)
    return area


def front_hypervolume(
    kl: Array, reward: Array, largest_kl: float, least_reward: Array | float, steps: int = 100
) -> Array:
    """hypervolume of the front as a line (see reward_at), so that it does not depend on how densely
    it was measured; beyond its last point it has nothing more to offer.

    Args, returns: as hypervolume.
    """
    at = np.linspace(0.0, largest_kl, steps + 1)
    line = reward_at(kl, reward, at)
    last = kl.max(-1)[..., None]
    line = np.where(at <= last, line, -np.inf)
    return hypervolume(np.broadcast_to(at, line.shape), line, largest_kl, least_reward)


def chord_at(kl: Array, reward: Array, at: Array) -> Array:
    """The straight line in KL from the point of the least KL to that of the largest.

    Args, returns: as reward_at.
    """
    first, last = (
        np.take_along_axis(kl, place(kl, -1)[..., None], -1) for place in (np.argmin, np.argmax)
    )
    low, high = (
        np.take_along_axis(reward, place(kl, -1)[..., None], -1) for place in (np.argmin, np.argmax)
    )
    line: Array = low + (at - first) / np.maximum(last - first, 1e-9) * (high - low)
    return line


def resampling_weights(prompts: int, resamples: int, generator: np.random.Generator) -> Array:
    """(1 + B, N): the first row is the plain mean, the others are bootstrap draws of the prompts.
    One matrix serves all points of a seed, which makes their comparison paired.
    """
    drawn = generator.multinomial(prompts, np.full(prompts, 1 / prompts), size=resamples)
    return np.concatenate([np.ones((1, prompts)), drawn]) / prompts


@dataclass(frozen=True)
class Effect:
    """value: the mean over the seeds. low, high: its 95 % interval. per_seed: its value in each."""

    value: float
    low: float
    high: float
    per_seed: tuple[float, ...]


def paired_bootstrap(effects: Array, generator: np.random.Generator) -> Effect:
    """An effect's interval over seeds and prompts: draw S seeds with replacement, and for each one
    of its resamples of the prompts.

    Of three seeds, one alone is drawn three times in 4 % of the draws: an interval that excludes 0
    means that every seed says the same.

    Args:
        effects: (S, 1 + B), the first column without resampling; seeds with NaN in it do not count.
    """
    effects = effects[~np.isnan(effects[:, 0])]
    if not len(effects):
        return Effect(np.nan, np.nan, np.nan, ())
    seeds, resamples = len(effects), effects.shape[1] - 1
    chosen = generator.integers(seeds, size=(DRAWS, seeds))
    resampled = 1 + generator.integers(resamples, size=(DRAWS, seeds))
    means = effects[chosen, resampled].mean(1)
    low, high = np.nanpercentile(means, [2.5, 97.5])
    return Effect(
        float(effects[:, 0].mean()),
        float(low),
        float(high),
        tuple(float(value) for value in effects[:, 0]),
    )


def verdict(effect: Effect, margin: float = MARGIN, needed: int = SEEDS_NEEDED) -> Verdict:
    """reproduced: the whole interval is above 0. not reproduced: it is below the margin, so that
    there is no gain or a negligible one.
    undecided: anything else, and fewer seeds than needed.
    """
    if len(effect.per_seed) < needed:
        return "undecided"
    if effect.low > 0:
        return "reproduced"
    return "not reproduced" if effect.high < margin else "undecided"


def within(effect: Effect, margin: float, needed: int = SEEDS_NEEDED) -> Verdict:
    """Of a claim that something is 0. reproduced: all of the interval is nearer to it than the
    margin; not reproduced: all is farther.
    """
    if len(effect.per_seed) < needed:
        return "undecided"
    if -margin < effect.low and effect.high < margin:
        return "reproduced"
    return "not reproduced" if effect.low > margin or effect.high < -margin else "undecided"
