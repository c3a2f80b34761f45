"""The check of the measurement, before any statistics: whether reward and KL of a point belong to
one policy. An arm that fails it is not reported.

The slope compares the sampler's log-ratios with the trainer's, token by token. The texts' log-ratio
is the sampler's alone; its mean is the KL, measured a second time. And what reward is left beside
KL must not follow ‖ΔW‖: it did (r = .90) while policies were sampled from rounded weights.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from bench.evidence.claims import FOUR, TWO
from bench.evidence.curves import CURVES, END, SFT
from bench.evidence.fronts import Array
from bench.evidence.results import Measured, Results
from bench.evidence.settings import ARMS

from raywarp.algorithm.geometry import kl_cosine

SLOPES = (0.95, 1.05)
KL_RATIOS = (0.95, 1.05)
ERRORS = 2.0  # standard errors by which a ratio must be off as well
RESIDUAL_KL = 4.0  # nats, up to which residuals are taken
LERPS = {
    **{"warp": "lerp", "warp-m4": "lerp-m4", "sft-m2": "sft-m2-lerp", "sft-m4": "sft-m4-lerp"},
    "soup": "soup-lerp",
}
POLICIES = {
    "warp": TWO,
    "warp-m4": FOUR,
    "sft-m2": tuple(f"sft-m2-policy-{m}" for m in (1, 2)),
    "sft-m4": tuple(f"sft-m4-policy-{m}" for m in (1, 2, 3, 4)),
    "soup": ("soup-1", "soup-0"),
}


@dataclass(frozen=True)
class Checked:
    """What an arm's points say of their measurement, over all seeds.

    Attributes:
        points: how many.
        slope, slope_error: pooled over the points, each weighted by its mean square log-ratio.
        gap: mean |sampler − trainer|, in nats per token.
        kl_ratio, kl_ratio_error: the texts' own log-ratio over the reported KL of the same texts.
        norm: smallest and largest ‖ΔW‖.
    """

    points: int
    slope: float
    slope_error: float
    gap: float
    kl_ratio: float
    kl_ratio_error: float
    norm: tuple[float, float]

    @property
    def fault(self) -> str:
        """What is wrong; empty if nothing is."""
        if not SLOPES[0] <= self.slope <= SLOPES[1]:
            return f"slope {self.slope:.3f} ± {self.slope_error:.3f}"
        off = abs(self.kl_ratio - 1) > ERRORS * self.kl_ratio_error
        if off and not KL_RATIOS[0] <= self.kl_ratio <= KL_RATIOS[1]:
            return f"texts' log-ratio {self.kl_ratio:.3f} times the KL"
        return ""

    def as_json(self) -> dict[str, Any]:
        return {
            "points": self.points,
            "slope": round(self.slope, 4),
            "slope_error": round(self.slope_error, 4),
            "gap": round(self.gap, 4),
            "kl_ratio": round(self.kl_ratio, 4),
            "kl_ratio_error": round(self.kl_ratio_error, 4),
            "norm": [round(value, 3) for value in self.norm],
            "passes": not self.fault,
        }


def check_arm(points: Sequence[Measured]) -> Checked:
    """Pool the points of an arm, without SFT's."""
    weights = np.array([point.rms**2 for point in points])
    slopes = np.array([point.slope for point in points])
    errors = np.array([point.slope_error for point in points])
    ratio, ratio_error = _kl_ratio(points)
    norms = [point.norm for point in points]
    return Checked(
        len(points),
        float((weights * slopes).sum() / weights.sum()),
        float(np.sqrt(((weights * errors) ** 2).sum()) / weights.sum()),
        float(np.mean([point.gap for point in points])),
        ratio,
        ratio_error,
        (min(norms), max(norms)),
    )


def _kl_ratio(points: Sequence[Measured]) -> tuple[float, float]:
    """Σ log-ratio / Σ KL over the same texts, and its standard error over texts."""
    ratios = np.concatenate([point.log_ratio for point in points])
    kls = np.concatenate([point.kl[: len(point.log_ratio)] for point in points])
    ratio = ratios.sum() / kls.sum()
    residuals = ratios - ratio * kls
    return float(ratio), float(residuals.std() * np.sqrt(len(kls)) / kls.sum())


def arms(results: Results) -> dict[str, Checked]:
    """Every arm that has points."""
    of_arm: dict[str, list[Measured]] = {}
    for seed in results.seeds.values():
        for name, point in seed.points.items():
            if name != SFT:
                of_arm.setdefault(CURVES[name.partition("@")[0]].arm, []).append(point)
    return {name: check_arm(of_arm[name]) for name in ARMS if name in of_arm}


def cosines(results: Results) -> dict[str, list[float]]:
    """KL cosine of each merging arm's policies, by seed."""
    found: dict[str, list[float]] = {}
    for seed in results.seeds.values():
        for arm, names in POLICIES.items():
            wanted = [f"{name}@{END}" for name in (*names, LERPS[arm])]
            if all(name in seed.points for name in wanted):
                *own, mean = (float(seed.points[name].kl.mean()) for name in wanted)
                if (cosine := kl_cosine(own, mean)) is not None:
                    found.setdefault(arm, []).append(cosine)
    return found


@dataclass(frozen=True)
class Residuals:
    """What reward is left beside KL, and whether it follows ‖ΔW‖.

    Attributes:
        points: how many, of lines that are not SFT's and up to RESIDUAL_KL.
        correlation: of the residual of reward on KL with log ‖ΔW‖, over all points.
        within: the same within the lines of one arm and seed, where only the average differs.
    """

    points: int
    correlation: float
    within: float


def residuals(results: Results) -> Residuals:
    """Fit reward = a·√KL + b·KL in each seed, and correlate what is left with log ‖ΔW‖."""
    left, norms, groups = list[float](), list[float](), list[tuple[int, str]]()
    for number, seed in results.seeds.items():
        own = {name: point for name, point in seed.points.items() if _counts(name, point)}
        if len(own) < 4:
            continue
        kl = np.array([point.kl.mean() for point in own.values()])
        reward = np.array([point.reward.mean() for point in own.values()])
        sft = seed.points[SFT].reward
        left += list(_left(kl, (reward - sft.mean()) / (sft.std() or 1.0)))
        norms += [float(np.log(point.norm)) for point in own.values()]
        groups += [(number, CURVES[name.partition("@")[0]].arm) for name in own]
    return Residuals(
        len(left),
        _correlation(np.array(left), np.array(norms)),
        _correlation(_centred(left, groups), _centred(norms, groups)),
    )


def _counts(name: str, point: Measured) -> bool:
    return name != SFT and point.norm > 0 and float(point.kl.mean()) <= RESIDUAL_KL


def _left(kl: Array, reward: Array) -> Array:
    terms = np.stack([np.sqrt(np.maximum(kl, 0.0)), kl], -1)
    left: Array = reward - terms @ np.linalg.lstsq(terms, reward, rcond=None)[0]
    return left


def _centred(values: Sequence[float], groups: Sequence[Any]) -> Array:
    array = np.array(values)
    means = {
        group: np.mean([v for v, own in zip(values, groups, strict=True) if own == group])
        for group in set(groups)
    }
    centred: Array = array - np.array([means[group] for group in groups])
    return centred


def _correlation(x: Array, y: Array) -> float:
    return float(np.corrcoef(x, y)[0, 1]) if len(x) > 2 and x.std() and y.std() else float("nan")
