"""P8: which share of its seed's ceiling each line has, at the same prompts."""

from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np
from bench.evidence import fronts
from bench.evidence.claims import BEFORE, BEYOND, SHARE_KLS, SHARE_OF, Sample
from bench.evidence.curves import CURVES, SFT
from bench.evidence.fronts import Array, Effect

from raywarp.run.ceiling import Ceiling


def ceiling_of(sample: Sample) -> Ceiling | None:
    """The seed's ceiling; None where it was not measured."""
    rewards = sample.seed.ceiling
    return None if rewards is None else _ceiling(rewards.tobytes(), rewards.shape)


@cache
def _ceiling(rewards: bytes, shape: tuple[int, ...]) -> Ceiling:
    return Ceiling.of("", np.frombuffer(rewards).reshape(shape).tolist())


def lines() -> list[str]:
    """The curves whose share is told: all but those of which the end alone is measured."""
    return [name for name, curve in CURVES.items() if not curve.alone]


def own_front(sample: Sample, curve: str) -> tuple[Array, Array]:
    """(P,) KL and raw reward of a curve on the ceiling's prompts."""
    assert sample.seed.ceiling is not None
    prompts = len(sample.seed.ceiling)
    points = [sample.seed.points[name] for name in CURVES[curve].front(sample.seed.points)]
    kl = np.array([point.kl[:prompts].mean() for point in points])
    return kl, np.array([point.reward[:prompts].mean() for point in points])


def gain_lost(sample: Sample, curve: str, at: float) -> tuple[float, float] | None:
    """(share of the ceiling's gain, reward − ceiling in SFT standard deviations) at a KL; None
    where the curve or the ceiling was not measured.
    """
    ceiling = ceiling_of(sample)
    if ceiling is None or not sample.has(curve):
        return None
    kl, reward = own_front(sample, curve)
    if kl.max() * BEYOND < at or kl[kl > 0].min() > at * BEFORE or ceiling.end < at:
        return None
    own = float(fronts.reward_at(kl, reward, np.array([at]))[0])
    share, limit = ceiling.share(at, own), ceiling.at(at)
    deviation = float(sample.seed.points[SFT].reward.std())
    return None if share is None or limit is None else (share, (own - limit[0]) / deviation)


def shares(of_seeds: Mapping[int, Sample]) -> dict[str, dict[str, Any]]:
    """Curve → KL → its share over the seeds."""
    found: dict[str, dict[str, Any]] = {}
    for curve in lines():
        rows = {}
        for at in SHARE_KLS:
            own = [gain[0] for s in of_seeds.values() if (gain := gain_lost(s, curve, at))]
            if own:
                rows[f"{at:g}"] = _row(own)
        if rows:
            found[curve] = {"arm": CURVES[curve].arm, "label": CURVES[curve].label, "share": rows}
    return found


def _row(values: list[float]) -> dict[str, Any]:
    mean, half = float(np.mean(values)), fronts.t_half(values)
    interval = [mean - half, mean + half] if np.isfinite(half) else [None, None]
    return {
        "share": round(mean, 4),
        "interval": [None if value is None else round(value, 4) for value in interval],
        "per_seed": [round(value, 4) for value in values],
    }


def effect(of_seeds: Mapping[int, Sample], at: float = SHARE_KLS[1]) -> Effect:
    """How far WARP's front is from the ceiling, in SFT standard deviations of reward."""
    own = [gain[1] for s in of_seeds.values() if (gain := gain_lost(s, SHARE_OF, at))]
    return fronts.effect_of(np.repeat(np.array(own, dtype=float)[:, None], 2, axis=1))
