"""Fronts and how they are compared: pure functions on arrays.

A front is P points, each with a KL to SFT in nats and a reward; SFT itself, at a KL of 0, is one of
them. B resamples, S seeds, N prompts, K values of KL. Leading axes (…) are carried along.
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Array = NDArray[np.float64]
Outcome = Literal["better", "worse", "equal", "undecided"]

SEEDS_NEEDED = 3
MARGIN = 0.05  # standard deviations of the SFT model's reward: a difference below it is none
LEAST = 0.02  # below it a difference is no gain, however sure


def reward_at(kl: Array, reward: Array, at: Array) -> Array:
    """The front's reward at fixed KL: its points joined by lines in √KL.

    Along a scaled task vector both √KL and reward are linear in its length to first order, so that
    fronts with unequally spaced points compare without the bias that straight lines in KL would
    have. Ask for nothing beyond the last point: the last line goes on there.

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


def resampling_weights(prompts: int, resamples: int, generator: np.random.Generator) -> Array:
    """(1 + B, N): the first row is the plain mean, the others are bootstrap draws of the prompts.
    One matrix serves all points of a seed, which makes their comparison paired.
    """
    drawn = generator.multinomial(prompts, np.full(prompts, 1 / prompts), size=resamples)
    return np.concatenate([np.ones((1, prompts)), drawn]) / prompts


@dataclass(frozen=True)
class Effect:
    """A difference between fronts.

    Attributes:
        value: the mean over the seeds.
        low, high: its 95 % t-interval over the seeds.
        prompts: its 95 % bootstrap interval over the prompts of these very seeds.
        per_seed: its value in each.
    """

    value: float
    low: float
    high: float
    prompts: tuple[float, float]
    per_seed: tuple[float, ...]

    def as_json(self) -> dict[str, Any]:
        return {
            "effect": _rounded(self.value),
            "interval": [_rounded(self.low), _rounded(self.high)],
            "interval_over_prompts": [_rounded(value) for value in self.prompts],
            "seeds": len(self.per_seed),
            "per_seed": [_rounded(value) for value in self.per_seed],
            "outcome": outcome(self),
        }


def effect_of(effects: Array) -> Effect:
    """An effect with its intervals.

    Args:
        effects: (S, 1 + B), the first column without resampling; seeds with NaN in it do not count.
    """
    effects = effects[~np.isnan(effects[:, 0])]
    own = tuple(float(value) for value in effects[:, 0])
    if not own:
        return Effect(np.nan, np.nan, np.nan, (np.nan, np.nan), ())
    value, half = float(np.mean(own)), t_half(own)
    low, high = np.nanpercentile(effects[:, 1:].mean(0), [2.5, 97.5])
    return Effect(value, value - half, value + half, (float(low), float(high)), own)


def t_half(values: Any) -> float:
    """Half of the 95 % interval of the mean of independent values, by Student's t."""
    count = len(values)
    if count < 2:
        return np.inf
    return float(stats.t.ppf(0.975, count - 1) * np.std(values, ddof=1) / np.sqrt(count))


def outcome(effect: Effect, needed: int = SEEDS_NEEDED) -> Outcome:
    """better or worse: the whole t-interval is on one side of 0, and the effect is at least LEAST.
    equal: the whole interval is within ± MARGIN. undecided: anything else, and too few seeds.
    """
    if len(effect.per_seed) < needed:
        return "undecided"
    if effect.low > 0 and effect.value >= LEAST:
        return "better"
    if effect.high < 0 and effect.value <= -LEAST:
        return "worse"
    return "equal" if effect.low >= -MARGIN and effect.high <= MARGIN else "undecided"


def _rounded(value: float) -> float | None:
    return round(value, 4) if np.isfinite(value) else None
