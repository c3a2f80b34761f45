"""How two curves are compared at one seed: at equal KL, by hypervolume, at their ends. Scores in
standard deviations of the SFT model's.
"""

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from bench.evidence import fronts
from bench.evidence.curves import SFT, Curve
from bench.evidence.fronts import Array, Effect, Verdict
from bench.evidence.results import Seed
from bench.evidence.settings import Settings

ANGLE_MARGIN, RATIO_MARGIN = 10.0, 0.2  # what counts as 90 degrees, and as equal norms


class Sample:
    """One seed's means, plain and under resamples of its prompts, which are the same for every
    point.
    """

    def __init__(self, settings: Settings, seed: Seed, weights: Array):
        self.settings, self.seed, self.weights = settings, seed, weights
        self._means: dict[tuple[str, str], Array] = {}

    def mean(self, point: str, quantity: str) -> Array:
        """(1 + B,) Scores but for KL in standard deviations of SFT's, from SFT's plain mean."""
        if (point, quantity) not in self._means:
            values: Array = getattr(self.seed.points[point], quantity)
            if quantity != "kl":
                sft = getattr(self.seed.points[SFT], quantity)
                values = (values - sft.mean()) / (sft.std() or 1.0)
            self._means[point, quantity] = self.weights @ values
        return self._means[point, quantity]

    def front(self, curve: Curve, quantity: str = "reward") -> tuple[Array, Array]:
        """(1 + B, P) KL and score."""
        kl, score = (
            np.stack([self.mean(point, wanted) for point in curve.front], -1)
            for wanted in ("kl", quantity)
        )
        return kl, score

    def reached(self, kls: tuple[float, ...], *curves: Curve) -> Array:
        """Those of the KLs between what all curves have measured: none is judged before its first
        point or beyond its last.
        """
        measured = [self.front(curve)[0][0] for curve in curves]
        nearest, furthest = (
            max(kl[kl > 0].min() for kl in measured),
            min(kl.max() for kl in measured),
        )
        return np.array([kl for kl in kls if nearest <= kl <= furthest])


@dataclass(frozen=True)
class Part:
    """One comparison.

    effect: of a seed, (1 + B,). decides: the claim's verdict depends on it. unit: of the effect.
    arms: whose facts it reads.
    verdict: what the effect says.
    """

    name: str
    curves: tuple[Curve, ...]
    effect: Callable[[Sample], Array]
    decides: bool = False
    unit: str = "SFT standard deviations of reward"
    arms: tuple[str, ...] = ()
    verdict: Callable[[Effect], Verdict] = fronts.verdict

    def is_measured(self, seed: Seed) -> bool:
        points = [point for curve in self.curves for point in [SFT, *curve.front]]
        return all(point in seed.points for point in points) and all(
            "geometry" in seed.facts.get(arm, {}) for arm in self.arms
        )


def above(
    curve: Curve,
    others: tuple[Curve, ...],
    name: str = "",
    upper: bool = False,
    score: str = "reward",
    decides: bool = False,
    rival: Callable[..., Any] = np.mean,
) -> Part:
    """How far a front lies above others at fixed KL, as far as all of them reach.

    rival: of the others: their mean; or np.max, the best in each resample, chosen by the very
    numbers it is compared by, which favours it.
    """

    def effect(sample: Sample) -> Array:
        kls = sample.settings.upper_kls if upper else sample.settings.kls
        at = sample.reached(kls, curve, *others)
        if not len(at):
            return np.full(len(sample.weights), np.nan)
        theirs = rival(
            [fronts.reward_at(*sample.front(other, score), at).mean(-1) for other in others], axis=0
        )
        gain: Array = fronts.reward_at(*sample.front(curve, score), at).mean(-1) - theirs
        return gain

    what = name or f"{curve.label} over {others[0].label}"
    what += ", upper KL" if upper else ""
    what += {"reward": "", "control": ", control model", "vader": ", VADER"}[score]
    return Part(what, (curve, *others), effect, decides, f"SFT standard deviations of {score}")


def in_all_ways(
    curve: Curve, others: tuple[Curve, ...], name: str = "", decides: bool = True
) -> tuple[Part, ...]:
    """At fixed KL (which decides), at higher KL, by hypervolume, and by the scores that training
    did not see.
    """
    return (
        above(curve, others, name, decides=decides),
        above(curve, others, name, upper=True),
        more_volume(curve, others, name),
        above(curve, others, name, score="control"),
        above(curve, others, name, score="vader"),
    )


def more_volume(curve: Curve, others: tuple[Curve, ...], name: str = "") -> Part:
    """Hypervolume beyond the mean of others', over the reference KL: the mean gain from 0 up to
    there. The reference point is SFT's reward at the reference KL.
    """

    def volume(sample: Sample, one: Curve) -> Array:
        limit = sample.settings.reference_kl
        return (
            fronts.front_hypervolume(*sample.front(one), limit, sample.mean(SFT, "reward")) / limit
        )

    def effect(sample: Sample) -> Array:
        gain: Array = volume(sample, curve) - np.mean(
            [volume(sample, other) for other in others], axis=0
        )
        return gain

    return Part(
        f"{name or f'{curve.label} over {others[0].label}'}, hypervolume / reference KL",
        (curve, *others),
        effect,
    )


def above_chord(curve: Curve) -> Part:
    """A front against the straight line between its ends, in KL and reward, at the KLs between
    them.
    """

    def effect(sample: Sample) -> Array:
        kl, reward = sample.front(curve)
        at = sample.reached(sample.settings.kls, curve)
        if not len(at):
            return np.full(len(sample.weights), np.nan)
        gain: Array = (fronts.reward_at(kl, reward, at) - fronts.chord_at(kl, reward, at)).mean(-1)
        return gain

    return Part(f"{curve.label} over its chord", (curve,), effect, decides=True)


def at_the_end(
    name: str,
    curve: Curve,
    point: str,
    others: tuple[Curve, ...],
    theirs: tuple[str, ...],
    quantity: str = "reward",
) -> Part:
    """The paper's comparison at η = 1, not at equal KL."""

    def effect(sample: Sample) -> Array:
        gain: Array = sample.mean(point, quantity) - np.mean(
            [sample.mean(other, quantity) for other in theirs], axis=0
        )
        return gain

    unit = "nats" if quantity == "kl" else f"SFT standard deviations of {quantity}"
    return Part(name, (curve, *others), effect, unit=unit)


def block_medians(facts: Mapping[str, Any]) -> tuple[float, float]:
    """Over an arm's blocks and pairs of policies: the median angle in degrees, and the median of
    the smaller norm over the larger one.
    """
    blocks = facts["geometry"].values()
    angles = [angle for block in blocks for angle in block["angles"]]
    ratios = [
        min(pair) / max(pair)
        for block in blocks
        for pair in itertools.combinations(block["norms"], 2)
    ]
    return float(np.median(angles)), float(np.median(ratios))


def geometry_parts(arm: str, name: str, decides: bool) -> tuple[Part, Part]:
    def effect(index: int, expected: float) -> Callable[[Sample], Array]:
        return lambda sample: np.full(
            len(sample.weights), block_medians(sample.seed.facts[arm])[index] - expected
        )

    def rule(margin: float) -> Callable[[Effect], Verdict]:
        return lambda effect: fronts.within(effect, margin)

    return (
        Part(
            f"{name}: median angle of a block − 90",
            (),
            effect(0, 90.0),
            decides,
            "degrees",
            (arm,),
            rule(ANGLE_MARGIN),
        ),
        Part(
            f"{name}: median norm ratio of a block − 1",
            (),
            effect(1, 1.0),
            decides,
            "ratio",
            (arm,),
            rule(RATIO_MARGIN),
        ),
    )
