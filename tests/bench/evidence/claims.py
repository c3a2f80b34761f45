"""The claims, each named before anything was measured for it: which fronts it compares, over which
KLs, and by which rule. Effects are in standard deviations of the SFT model's reward.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from bench.evidence import fronts
from bench.evidence.curves import CURVES, SFT, SHARES
from bench.evidence.fronts import Array, Effect
from bench.evidence.results import Results, Seed
from bench.evidence.settings import Settings

from raywarp.algorithm.hypervolume import dominated_volume
from raywarp.identity import derive_seed

RESAMPLES = 1000
BEFORE, BEYOND = 1.3, 1.05  # how far outside its points, in KL, a front is told


@dataclass(frozen=True)
class Part:
    """One comparison at equal KL: the mean of some curves' fronts over the mean of others'.

    joint: compared are the hypervolumes that the curves of a side reach together in the two
    rewards above SFT's, each as the side of a square of that size.
    """

    name: str
    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    joint: bool = False

    @property
    def curves(self) -> tuple[str, ...]:
        return (*self.ours, *self.theirs)


@dataclass(frozen=True)
class Claim:
    """text: what is claimed. The first of the parts gives the claim's effect and outcome."""

    name: str
    text: str
    parts: tuple[Part, ...]

    @property
    def arms(self) -> tuple[str, ...]:
        names = [name for part in self.parts for name in part.curves]
        return tuple(dict.fromkeys(CURVES[name].arm for name in names))


TWO, FOUR = ("policy-1", "policy-2"), tuple(f"policy-{m}" for m in (1, 2, 3, 4))
AVERAGED = {"(2, 128)": "sft-m2", "(4, 64)": "sft-m4", "(1, 256)": "sft-8t"}
RIVALS = {
    "(1, 256) with rate decay": "sft-decay",
    "(1, 256), its last five checkpoints": "sft-last",
    "(1, 64), batch × 4": "sft-batch",
}


def _p5(anchor: str) -> Claim:
    long, half = f"{anchor}-4t", f"{anchor}-2t"
    kind = {"ema": "an EMA anchor", "sft": "the SFT anchor"}[anchor]
    return Claim(
        f"P5.{anchor}",
        f"WARP (M = I = 2) has a higher front than one run of 4T with {kind}.",
        (
            Part("at equal compute: WARP over one run of 4T", ("slerp-i2",), (long,)),
            Part("at equal clock: WARP over one run of 2T", ("slerp-i2",), (half,)),
        ),
    )


def _p6() -> Claim:
    first = Part("(2, 128) over (1, 256) with rate decay", ("sft-m2",), ("sft-decay",))
    others = [
        Part(f"{ours} over {theirs}", (AVERAGED[ours],), (RIVALS[theirs],))
        for ours in AVERAGED
        for theirs in RIVALS
    ]
    among = [
        Part("(2, 128) over (1, 256)", ("sft-m2",), ("sft-8t",)),
        Part("(4, 64) over (1, 256)", ("sft-m4",), ("sft-8t",)),
        Part("(4, 64) over (2, 128)", ("sft-m4",), ("sft-m2",)),
    ]
    return Claim(
        "P6",
        "At equal compute, runs with the SFT anchor that are averaged have a higher front than one"
        " run with rate decay.",
        tuple(dict.fromkeys([first, *others, *among])),
    )


def _p7() -> Claim:
    soup = tuple(f"soup-{share:g}" for share in SHARES)
    return Claim(
        "P7",
        "Merges of two policies on two rewards reach a larger hypervolume of both than runs with"
        " fixed mixtures.",
        tuple(
            Part(
                f"all λ of two runs over {count} mixtures, at {compute} compute",
                soup,
                tuple(f"mix-{count}-{m}" for m in range(1, count + 1)),
                joint=True,
            )
            for count, compute in ((2, "equal"), (4, "twice the"))
        ),
    )


CLAIMS = {
    claim.name: claim
    for claim in (
        Claim(
            "P1",
            "SLERP of two policies has a higher front than each of them.",
            (Part("SLERP over its two policies", ("slerp",), TWO),),
        ),
        Claim(
            "P2",
            "LITI's line has a higher front than the policies' training.",
            (Part("LITI over training", ("slerp",), ("training-1", "training-2")),),
        ),
        Claim(
            "P3",
            "SLERP of four policies has a higher front than each of them.",
            (
                Part("SLERP of four over its policies", ("slerp-m4",), FOUR),
                Part("SLERP of four over SLERP of two", ("slerp-m4",), ("slerp",)),
            ),
        ),
        Claim(
            "P4",
            "The exact average in ΔW has a higher front than averages of the factors.",
            (
                Part("exact over both inexact averages", ("slerp",), ("factors", "peft")),
                Part("exact over SLERP of A and B apart", ("slerp",), ("factors",)),
                Part("exact over PEFT linear", ("slerp",), ("peft",)),
            ),
        ),
        _p5("ema"),
        _p5("sft"),
        _p6(),
        _p7(),
    )
}
CEILING = "P8"  # every line's share of the ceiling, which is no comparison of fronts
SHARE_KLS = (1.0, 2.0, 3.0)
SHARE_OF = "slerp-i2"  # the line that gives P8's effect: WARP itself
NAMES = (*CLAIMS, CEILING)
FIRST_TIER = tuple(name for name in NAMES if name not in ("P6", "P7"))
OF_BOTH = "P7"  # the claim of the task with two rewards, and the only one
ARMS_OF = {name: CLAIMS[name].arms if name in CLAIMS else () for name in NAMES}


class Sample:
    """One seed's means, plain and under resamples of its prompts, which are the same for every
    point.
    """

    def __init__(self, settings: Settings, number: int, seed: Seed, resamples: int = RESAMPLES):
        self.settings, self.seed = settings, seed
        generator = np.random.default_rng(derive_seed("bootstrap", number))
        prompts = len(seed.points[SFT].reward)
        self.weights = fronts.resampling_weights(prompts, resamples, generator)
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

    def has(self, curve: str) -> bool:
        """Whether the curve's arm is measured."""
        done = self.seed.facts.get(CURVES[curve].arm, {}).get("curves", [])
        return curve in done

    def front(self, curve: str, quantity: str = "reward") -> tuple[Array, Array]:
        """(1 + B, P) KL and score."""
        points = CURVES[curve].front(self.seed.points)
        kl, score = (
            np.stack([self.mean(point, wanted) for point in points], -1)
            for wanted in ("kl", quantity)
        )
        return kl, score

    def compared(self, part: Part) -> list[float]:
        """The KLs at which all curves of a part have been measured: between the first point of
        each and its last, or a little beyond: in √KL a line is straight.
        """
        measured = [self.front(curve)[0][0] for curve in part.curves]
        first = max(kl[kl > 0].min() for kl in measured)
        last = min(kl.max() for kl in measured)
        return [kl for kl in self.settings.kls if first / BEFORE <= kl <= last * BEYOND]

    def effect(self, part: Part, quantity: str = "reward") -> Array:
        """(1 + B,) the mean over the compared KLs; NaN where there is none."""
        at = np.array(self.compared(part))
        if not len(at):
            return np.full(len(self.weights), np.nan)
        if part.joint and quantity == "reward":
            joint: Array = self.side(part.ours, at) - self.side(part.theirs, at)
            return joint
        ours, theirs = (
            np.mean(
                [fronts.reward_at(*self.front(curve, quantity), at).mean(-1) for curve in curves],
                axis=0,
            )
            for curves in (part.ours, part.theirs)
        )
        gain: Array = ours - theirs
        return gain

    def side(self, curves: Sequence[str], at: Array) -> Array:
        """(1 + B,) √ of the hypervolume of both rewards above SFT's, the mean over the KLs."""
        both = [
            np.stack(
                [fronts.reward_at(*self.front(curve, one), at) for curve in curves], axis=-1
            )  # (1 + B, K, curves)
            for one in ("reward", "control")
        ]
        points = np.stack(both, axis=-1)
        base = np.stack([self.mean(SFT, one) for one in ("reward", "control")], axis=-1)
        return np.array(
            [
                np.mean([dominated_volume(own.tolist(), low.tolist()) ** 0.5 for own in at_kls])
                for at_kls, low in zip(points, base, strict=True)
            ]
        )


def samples(settings: Settings, results: Results) -> dict[int, Sample]:
    """Of every seed that has SFT's point."""
    return {
        number: Sample(settings, number, seed)
        for number, seed in sorted(results.seeds.items())
        if SFT in seed.points
    }


@dataclass(frozen=True)
class Judged:
    """A comparison, judged. compared: the KLs really compared, by seed."""

    part: Part
    effect: Effect
    control: Effect
    vader: Effect
    compared: Mapping[int, list[float]]

    def as_json(self) -> dict[str, Any]:
        others = {
            name: {key: value for key, value in effect.as_json().items() if key != "seeds"}
            for name, effect in (("control", self.control), ("vader", self.vader))
        }
        kls = [kl for own in self.compared.values() for kl in own]
        return {
            **self.effect.as_json(),
            "kl_range": [min(kls), max(kls)] if kls else [],
            "compared_kls": {str(seed): own for seed, own in self.compared.items()},
            **others,
        }


def judge(part: Part, of_seeds: Mapping[int, Sample]) -> Judged:
    """The effect in reward, and in the two scores that training never saw."""
    own = {
        number: sample for number, sample in of_seeds.items() if all(map(sample.has, part.curves))
    }
    reward, control, vader = (
        fronts.effect_of(
            np.stack([sample.effect(part, quantity) for sample in own.values()])
            if own
            else np.zeros((0, 2))
        )
        for quantity in ("reward", "control", "vader")
    )
    compared = {number: sample.compared(part) for number, sample in own.items()}
    return Judged(part, reward, control, vader, compared)
