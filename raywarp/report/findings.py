"""What a person should know before believing a front, in plain words: over-optimisation first of
all.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from raywarp.run.front import Point

REPETITIVE = 0.75  # of SFT's distinct-2, below which texts repeat themselves
LONGER, SHORTER = 1.5, 0.67  # of SFT's length
GAP = 0.1  # nats per token, beyond which importance weights do more than correct the last bits
# beyond 1 ± this, and twice its standard error, the sampler runs an adapter too weakly or too
# strongly
EFFECT = 0.1
NARROW = 45.0  # degrees, below which the policies went much the same way


@dataclass(frozen=True)
class Finding:
    """level: warning (do not believe the reward without looking) or note."""

    level: str
    title: str
    text: str


def findings(
    points: Sequence[Point],
    chosen: str | None,
    gaps: Sequence[float],
    angles: Sequence[float],
    effects: Sequence[tuple[float, float]] = (),
) -> list[Finding]:
    """Everything that can be said of a run.

    Args:
        points: of the front. chosen: name of one of them.
        gaps: sampler_gap of the steps, nats per token. angles: of the last iteration, degrees, of
            all blocks and pairs.
        effects: adapter_effect of the steps where it was measured, and its standard error.
    """
    found = [*over_optimisation(points), *_gain(points), *_texts(points, chosen)]
    gaps, angles = [g for g in gaps if math.isfinite(g)], [a for a in angles if math.isfinite(a)]
    if gaps and median(gaps) > GAP:
        text = (
            f"Their log-probs are {median(gaps):.2f} nats per token apart (median). Rollouts are"
            " not quite from the policy that is updated."
        )
        found.append(Finding("warning", "Sampler and trainer disagree", text))
    if off := [(value, error) for value, error in effects if abs(value - 1) - 2 * error > EFFECT]:
        value, error = max(off, key=lambda one: abs(one[0] - 1))
        text = (
            f"An adapter's effect in the sampler was {value:.2f} ± {error:.2f} times that in the"
            f" trainer, {len(off)} of {len(effects)} times that it was measured (± is the standard"
            " error). Rollouts and rewards are of another policy than KL and gradients."
        )
        found.append(Finding("warning", "The sampler runs another policy", text))
    if angles and median(angles) < NARROW:
        text = (
            f"The median angle between task vectors is {median(angles):.0f}°. Near 90° averaging"
            " gains most; near 0° it gains nothing."
        )
        found.append(Finding("note", "The policies went much the same way", text))
    return found


def over_optimisation(points: Sequence[Point]) -> list[Finding]:
    """Whether, along the front from SFT to SLERP, the reward goes on rising while the control
    score, which training never saw, does not.

    The control's best point is compared with those beyond it, whose reward is higher by more than
    the error of both: they part where the control is lower there by more than the error of both,
    and it has stopped where at least half of the reward's gain brings nothing.
    """
    front = sorted(
        (point for point in points if point.eta is not None and point.control is not None),
        key=lambda point: point.eta or 0.0,
    )
    if len(front) < 2:
        return []
    best = max(front, key=lambda point: point.control or 0.0)
    beyond = [
        point
        for point in front
        if (point.eta or 0) > (best.eta or 0)
        and _differ(point.reward, best.reward, _error(best, point, "reward_ci"))
    ]
    fallen = [
        point
        for point in beyond
        if _differ(best.control, point.control, _error(best, point, "control_ci"))
    ]
    if fallen:
        first = fallen[0]
        text = (
            f"From η = {_eta(best)} to η = {_eta(first)} the reward rises from {best.reward:.2f} to"
            f" {first.reward:.2f}, but the control score, which training never saw, falls from"
            f" {best.control:.2f} to {first.control:.2f}. That is over-optimisation: the policy"
            " pleases the reward model and not what it stands for. Read the texts beyond η ="
            f" {_eta(best)}, and choose an η of at most {_eta(best)}."
        )
        return [Finding("warning", "Reward and control part", text)]
    return _flat(front)


def _flat(front: Sequence[Point]) -> list[Finding]:
    """A control that does not rise where the reward does, all along or from the middle on."""
    last = front[-1]
    for start in front[:-1]:
        gained = _differ(last.reward, start.reward, _error(start, last, "reward_ci"))
        share = (last.reward - start.reward) / max(last.reward - front[0].reward, 1e-12)
        if gained and share >= 0.5 and not _differ(last.control, start.control, 0.0):
            text = (
                f"From η = {_eta(start)} to η = {_eta(last)} the reward rises from"
                f" {start.reward:.2f} to {last.reward:.2f}, and the control score, which training"
                f" never saw, does not ({start.control:.2f} and {last.control:.2f}). Read the texts"
                " before choosing a large η."
            )
            return [Finding("warning", "The control score does not follow the reward", text)]
    return []


def _gain(points: Sequence[Point]) -> list[Finding]:
    sft = next((point for point in points if point.name == "sft"), None)
    others = [point for point in points if point.name != "sft"]
    if (
        sft
        and others
        and not any(
            _differ(point.reward, sft.reward, _error(sft, point, "reward_ci")) for point in others
        )
    ):
        text = (
            "No point has more reward than SFT by more than the error of both: train longer, raise"
            " optim.lr, or evaluate on more prompts."
        )
        return [Finding("warning", "Nothing was gained yet", text)]
    return []


def _texts(points: Sequence[Point], chosen: str | None) -> list[Finding]:
    by_name = {point.name: point for point in points}
    sft, point = by_name.get("sft"), by_name.get(chosen or "")
    if sft is None or point is None or point is sft:
        return []
    found = []
    if point.distinct_2 < REPETITIVE * sft.distinct_2:
        text = (
            f"Distinct-2 fell from {sft.distinct_2:.2f} (SFT) to {point.distinct_2:.2f}"
            f" ({point.name}): its texts resemble each other."
        )
        found.append(Finding("warning", "The chosen point repeats itself", text))
    ratio = point.length / max(sft.length, 1e-9)
    if ratio > LONGER or ratio < SHORTER:
        way = "longer" if ratio > 1 else "shorter"
        text = (
            f"{point.length:.1f} tokens against SFT's {sft.length:.1f}. Rewards often favour one"
            " length; look whether that is all."
        )
        found.append(Finding("warning", f"Texts became {way}", text))
    return found


def _differ(higher: float | None, lower: float | None, error: float) -> bool:
    return higher is not None and lower is not None and higher - lower > error


def _error(a: Point, b: Point, interval: str) -> float:
    """Half the width of the 95 % interval of a difference of two means, as if they were
    independent; they share prompts, so it is less.
    """
    return math.hypot(getattr(a, interval) or 0.0, getattr(b, interval) or 0.0)


def _eta(point: Point) -> str:
    return f"{point.eta:g}"


def points_of(front: Mapping[str, Any]) -> list[Point]:
    """The points of front.json; none where there is no front."""
    return [Point(**point) for point in front["points"]] if front else []
