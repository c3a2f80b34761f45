"""The claims: which curves each compares, how, and the verdict. Effects are in standard deviations
of the SFT model's reward.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from bench.evidence import fronts
from bench.evidence.comparisons import (
    ANGLE_MARGIN,
    RATIO_MARGIN,
    Part,
    Sample,
    above,
    above_chord,
    at_the_end,
    geometry_parts,
    in_all_ways,
)
from bench.evidence.curves import CURVES, SFT, Curve
from bench.evidence.fronts import Effect, Verdict
from bench.evidence.results import Results
from bench.evidence.settings import ARMS, SFT_COEFS, Settings

from raywarp.identity import derive_seed

RESAMPLES = 1000


@dataclass(frozen=True)
class Claim:
    """text: what is claimed. The first of the parts gives the claim's effect. shown: curves in its
    figure, besides those compared.
    """

    name: str
    text: str
    parts: tuple[Part, ...]
    shown: tuple[Curve, ...] = ()
    hidden: tuple[Curve, ...] = ()

    @property
    def curves(self) -> list[Curve]:
        return list(
            dict.fromkeys(
                [
                    *(curve for part in self.parts for curve in part.curves),
                    *self.shown,
                    *self.hidden,
                ]
            )
        )


@dataclass(frozen=True)
class Judged:
    claim: Claim
    effects: Mapping[str, Effect]
    verdict: Verdict
    parts: Mapping[str, Verdict] = field(default_factory=dict)

    def as_json(self, command: str, facts: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The claim's entry in evidence.json; facts: see facts_of."""
        first = next(iter(self.effects.values()))
        rows = {
            part.name: {
                **_entry(self.effects[part.name]),
                "unit": part.unit,
                **({"verdict": self.parts[part.name]} if part.decides else {}),
            }
            for part in self.claim.parts
            if part.name in self.effects
        }
        return {
            "claim": self.claim.text,
            "verdict": self.verdict,
            **_entry(first),
            "command": command,
            "parts": rows,
            **({"facts": facts} if facts else {}),
        }


def _entry(effect: Effect) -> dict[str, Any]:
    values = [effect.value, effect.low, effect.high]
    value, low, high = (None if np.isnan(number) else round(number, 4) for number in values)
    return {
        "effect": value,
        "interval": [low, high],
        "seeds": len(effect.per_seed),
        "per_seed": [round(number, 4) for number in effect.per_seed],
    }


def samples(settings: Settings, results: Results, resamples: int = RESAMPLES) -> dict[int, Sample]:
    """Of every seed that has SFT's point."""
    found = {}
    for number, seed in sorted(results.seeds.items()):
        if SFT in seed.points:
            generator = np.random.default_rng(derive_seed("bootstrap", number))
            weights = fronts.resampling_weights(len(seed.points[SFT].reward), resamples, generator)
            found[number] = Sample(settings, seed, weights)
    return found


def judge(claim: Claim, of_seeds: Mapping[int, Sample]) -> Judged:
    """Effects with intervals, and the verdict: what all deciding parts say, else undecided. Other
    parts are left out that no seed has.
    """
    effects: dict[str, Effect] = {}
    for part in claim.parts:
        values = [
            part.effect(sample) for sample in of_seeds.values() if part.is_measured(sample.seed)
        ]
        if not values and not part.decides:
            continue
        stacked = np.stack(values) if values else np.zeros((0, 2))
        effects[part.name] = fronts.paired_bootstrap(
            stacked, np.random.default_rng(derive_seed(claim.name, part.name))
        )
    verdicts = {part.name: part.verdict(effects[part.name]) for part in claim.parts if part.decides}
    return Judged(claim, effects, combined(list(verdicts.values())), verdicts)


def combined(verdicts: list[Verdict]) -> Verdict:
    """reproduced if all are, not reproduced if one is not."""
    if "not reproduced" in verdicts:
        return "not reproduced"
    return "reproduced" if verdicts and set(verdicts) == {"reproduced"} else "undecided"


def facts_of(claim: Claim, results: Results) -> dict[str, Any]:
    """What belongs to a claim besides effects, from what every seed's runs said of themselves."""
    own = {number: seed.facts for number, seed in sorted(results.seeds.items())}
    if claim.name == "H11":
        return {
            f"{name}, seed {number}": facts[arm]["errors"]
            for arm, name in (
                ("warp", "A independent"),
                ("shared", "A shared at the start"),
                ("frozen", "A shared and frozen"),
            )
            for number, facts in own.items()
            if "errors" in facts.get(arm, {})
        }
    if claim.name == "H12":
        return {
            f"seed {number}": wall_clock(facts)
            for number, facts in own.items()
            if "ema-long" in facts and "warp-i2" in facts
        }
    return {}


def wall_clock(facts: Mapping[str, Any]) -> dict[str, float]:
    """Seconds of training, from the phases of a policy's step that has machine and engine to
    itself: WARP's I·T with one machine per policy, the one run's M·I·T.
    """
    step, steps = facts["ema-long"]["step_seconds"], facts["ema-long"]["steps"]
    policies = ARMS["warp-i2"].policies
    return {
        "step_seconds": step,
        "warp_on_m_machines": round(step * steps / policies, 1),
        "one_run": round(step * steps, 1),
    }


def _claims() -> dict[str, Claim]:
    c = CURVES
    policies, four = (c["policy-1"], c["policy-2"]), tuple(c[f"policy-{m}"] for m in (1, 2, 3, 4))
    ends, trainings = ("policy-1@1", "policy-2@1"), (c["training-1"], c["training-2"])
    h3 = Claim(
        "H3",
        "At equal KL the merge of two policies beats each of them, scaled.",
        (
            *in_all_ways(c["slerp"], policies, "SLERP over each policy"),
            above(c["lerp"], policies, "LERP over each policy"),
            above(c["slerp"], (c["lerp"],), "SLERP over LERP"),
            at_the_end(
                "SLERP over LERP at η = 1, not at equal KL",
                c["slerp"],
                "slerp@1",
                (c["lerp"],),
                ("lerp@1",),
            ),
            at_the_end(
                "… and its KL more than LERP's",
                c["slerp"],
                "slerp@1",
                (c["lerp"],),
                ("lerp@1",),
                "kl",
            ),
            at_the_end(
                "SLERP over each policy at η = 1, not at equal KL",
                c["slerp"],
                "slerp@1",
                policies,
                ends,
            ),
        ),
        hidden=(c["slerp-weights"], c["lerp-weights"]),
    )
    h5 = Claim(
        "H5",
        "The front of LITI lies above its chord and above the policies' training.",
        (
            *in_all_ways(c["slerp"], trainings, "LITI front over the policies' training"),
            above_chord(c["slerp"]),
            above(policies[0], trainings[:1], "policy 1, scaled, over its own training"),
            above(policies[1], trainings[1:], "policy 2, scaled, over its own training"),
        ),
    )
    exact = c["slerp"]
    h11 = Claim(
        "H11",
        "The exact average in ΔW gives a better front than averages of the factors.",
        (
            *in_all_ways(exact, (c["factors"],), "exact over SLERP of A and B apart"),
            above(exact, (c["peft"],), "exact over PEFT linear"),
            above(exact, (c["peft"],), "exact over PEFT linear", upper=True),
            above(exact, (c["svd"],), "exact over SVD back to r"),
            above(exact, (c["svd"],), "exact over SVD back to r", upper=True),
            above(
                c["shared"],
                (c["shared-factors"],),
                "A shared at the start: exact over SLERP of A and B apart",
            ),
            above(exact, (c["shared"],), "A independent over A shared at the start"),
            above(exact, (c["frozen"],), "A independent over A shared and frozen"),
            above(exact, (c["frozen"],), "A independent over A shared and frozen", upper=True),
        ),
    )
    ema, warp = c["ema-long"], c["slerp-i2"]
    anchored = [(c[f"sft-{coef:g}-long"], c[f"sft-{coef:g}-training"]) for coef in H12_COEFS]
    h12 = Claim(
        "H12",
        "At equal compute WARP's front (M = 2, I = 2) lies above that of one run of M·I·T steps.",
        (
            *in_all_ways(warp, (ema,), "WARP over one run, EMA anchor, scaled"),
            *(
                part
                for run, _ in anchored
                for part in in_all_ways(warp, (run,), f"WARP over {run.label}")
            ),
            *(
                above(run, (training,), f"{run.label}, over its own training")
                for run, training in anchored
            ),
            above(c["slerp-i2-init"], (warp,), "WARP anchored at each init over WARP with the EMA"),
            above(
                c["slerp-i2-init"],
                (c["sft-0.1-long"],),
                "WARP anchored at each init over one run of 4T, SFT anchor, scaled",
            ),
            above(warp, (c["ema-training"],), "WARP over one run, EMA anchor, as it trained"),
            above(warp, policies, "WARP over the policies of its first iteration, scaled"),
            above(
                warp, four, "WARP over the best of four policies of T steps, scaled", rival=np.max
            ),
            above(c["slerp"], (c["ema-half"],), "I = 1 over one run of 2T, EMA anchor, scaled"),
            above(
                c["slerp"],
                (c["ema-half"],),
                "I = 1 over one run of 2T, EMA anchor, scaled",
                upper=True,
            ),
            above(
                warp,
                (c["ema-half"],),
                "equal wall clock on M machines: WARP over one run of 2T, EMA anchor, scaled",
            ),
        ),
    )
    runs = [
        (c[f"sft-{coef:g}-long"], c[f"sft-{coef:g}-training"])
        for coef in sorted(SFT_COEFS, key=lambda coef: coef != BEST_COEF)
    ]
    h1 = Claim(
        "H1",
        "The front along training is better with the EMA as the anchor than with the SFT model,"
        " whatever β.",
        (
            *(
                above(
                    c["ema-training"],
                    (training,),
                    f"EMA anchor over {training.label}",
                    decides=True,
                )
                for _, training in runs
            ),
            *(
                above(
                    c["ema-training"], (training,), f"EMA anchor over {training.label}", upper=True
                )
                for _, training in runs
            ),
            *(
                above(ema, (run,), f"EMA anchor, scaled, over {run.label}", upper=True)
                for run, _ in runs
            ),
            above(c["sft-0.3-long"], (c["sft-0.1-long"],)),
        ),
    )
    h6 = Claim(
        "H6",
        "More policies, a better front.",
        (
            above(c["slerp-m4"], (c["slerp"],), "M = 4 over M = 2", decides=True),
            above(c["slerp-m4"], (c["slerp"],), "M = 4 over M = 2", upper=True),
            above(c["slerp"], four, "M = 2 over M = 1, each scaled"),
            above(c["slerp-m3"], (c["slerp"],), "M = 3 over M = 2"),
            above(c["slerp-m4"], (c["slerp-m3"],), "M = 4 over M = 3"),
            above(c["slerp-m4"], four, "M = 4 over M = 1, each scaled", decides=True),
        ),
    )
    h8 = Claim(
        "H8",
        "Each iteration improves the front.",
        (
            *in_all_ways(c["slerp-i2"], (c["slerp"],), "I = 2 over I = 1"),
            *in_all_ways(c["slerp-i3"], (c["slerp-i2"],), "I = 3 over I = 2"),
        ),
    )
    h4 = Claim(
        "H4",
        f"Task vectors of one block are orthogonal (90 ± {ANGLE_MARGIN:g} degrees) and of one"
        f" length (ratio above {1 - RATIO_MARGIN:g}).",
        (
            *geometry_parts("warp", "A independent", decides=True),
            *geometry_parts("shared", "A shared at the start", decides=False),
            *geometry_parts("frozen", "A shared and frozen", decides=False),
            *geometry_parts("half-lr", "half the learning rate", decides=False),
            *geometry_parts("double-lr", "twice the learning rate", decides=False),
            *in_all_ways(
                c["half-lr"],
                (c["slerp"],),
                "front with half the learning rate over that with all of it",
                decides=False,
            ),
            *in_all_ways(
                c["double-lr"],
                (c["slerp"],),
                "front with twice the learning rate over that with once",
                decides=False,
            ),
        ),
        shown=(c["slerp"], c["shared"], c["frozen"]),
    )
    h3_rank = Claim(
        "H3-rank",
        "With four times the rank, too, the merge of two policies beats each of them, scaled, at"
        " equal KL.",
        (
            *in_all_ways(
                c["high-rank"],
                (c["high-rank-1"], c["high-rank-2"]),
                "SLERP over each policy, four times the rank",
            ),
            *in_all_ways(
                c["high-rank"],
                (c["slerp"],),
                "front with four times the rank over that with once",
                decides=False,
            ),
            *geometry_parts("high-rank", "four times the rank", decides=False),
        ),
    )
    return {claim.name: claim for claim in (h3, h5, h11, h12, h1, h4, h6, h8, h3_rank)}


H12_COEFS = (0.03, 0.1)
BEST_COEF = 0.1  # has the highest front from 2 to 6 nats
CLAIMS = _claims()
FIRST_TIER = ("H3", "H5", "H11", "H12")
