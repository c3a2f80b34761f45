"""Findings: what a person should know before believing a front, in plain words.

The first of them is over-optimisation.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from raywarp.run.ceiling import Ceiling, points_above
from raywarp.run.points import Point

REPETITIVE = 0.75  # of SFT's distinct-2; below it, texts repeat themselves
LONGER, SHORTER = 1.5, 0.67  # times SFT's length
# Nats per token. Beyond this gap, importance weights do more than correct the last bits.
GAP = 0.1
# The sampler runs an adapter too weakly or too strongly if its effect differs from 1 by more than
# this and twice its standard error.
EFFECT = 0.1
FORGOTTEN = 0.1  # nats per token; beyond it, what is kept has changed for a reader
NARROW = 45.0  # degrees; below it, the policies moved in much the same direction


@dataclass(frozen=True)
class Finding:
    """One finding about a run.

    Attributes:
        level: "warning" (look before you believe the reward) or "note".
        title: heading.
        text: explanation.
    """

    level: str
    title: str
    text: str


def findings(
    points: Sequence[Point],
    chosen: str | None,
    gaps: Sequence[float],
    angles: Sequence[float],
    effects: Sequence[tuple[float, float]] = (),
    ceiling: Ceiling | None = None,
) -> list[Finding]:
    """Return all findings about a run.

    Args:
        points: points of the front.
        chosen: name of the chosen point.
        gaps: sampler_gap of the steps, in nats per token.
        angles: in degrees, of all blocks and pairs of policies in the last iteration.
        effects: (adapter_effect, its standard error) of the steps where it was measured.
        ceiling: the ceiling of the front, if it was measured.
    """
    found = [*(above_ceiling(points, ceiling) if ceiling else [])]
    found += [*over_optimisation(points), *_gain(points), *_texts(points, chosen)]
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


def above_ceiling(points: Sequence[Point], ceiling: Ceiling) -> list[Finding]:
    """Return a warning if a point is above the ceiling by more than both intervals.

    No policy can be there, so it is a fault of the measurement.
    """
    above = points_above(points, ceiling)
    if not above:
        return []
    worst = max(above, key=lambda point: point.reward - (ceiling.at(point.kl) or (0.0, 0.0))[0])
    limit, half = ceiling.at(worst.kl) or (0.0, 0.0)
    names = ", ".join(point.name for point in above)
    text = (
        f"{names}: no policy can be there. At {worst.kl:.2f} nats {worst.name} has a reward of"
        f" {worst.reward:.2f} ± {worst.reward_ci:.2f}, and the most that these nats can buy is"
        f" {limit:.2f} ± {half:.2f}. Either the reward is not that of the texts that were measured,"
        " or KL and reward are of different policies. Do not believe this front before you know"
        " which."
    )
    title = "A point is above the ceiling" if len(above) == 1 else "Points are above the ceiling"
    return [Finding("warning", title, text)]


def over_optimisation(points: Sequence[Point]) -> list[Finding]:
    """Return a warning if the reward keeps rising along the front but the control score does not.

    The front runs from SFT to SLERP. Training never saw the control score.

    The control's best point is compared with the points beyond it. Only those count whose reward
    is higher by more than the error of both. The scores part where the control is lower by more
    than the error of both. The control has stopped where at least half of the reward's gain
    brings it nothing.
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
    return _is_flat(front)


def _is_flat(front: Sequence[Point]) -> list[Finding]:
    """Return a warning if the control does not rise while the reward does.

    This holds along the whole front, or from the middle of the reward's gain on.
    """
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
    return [*found, *_forgotten(point)]


def _forgotten(point: Point) -> list[Finding]:
    """Return a note if the loss on unrelated texts has clearly grown by more than FORGOTTEN."""
    if point.retention is None or point.retention - (point.retention_ci or 0.0) <= FORGOTTEN:
        return []
    text = (
        f"On texts that have nothing to do with the reward, {point.name} loses"
        f" {point.retention:.2f} ± {point.retention_ci:.2f} nats per token against SFT: it holds a"
        f" typical token of them for {math.exp(point.retention):.1f} times less likely. A smaller η"
        " keeps more."
    )
    return [Finding("note", "The chosen point has forgotten", text)]


def _differ(higher: float | None, lower: float | None, error: float) -> bool:
    return higher is not None and lower is not None and higher - lower > error


def _error(a: Point, b: Point, interval: str) -> float:
    """Return half the width of the 95 % interval of a difference of two means.

    The means are treated as independent. They share prompts, so the true width is smaller.
    """
    return math.hypot(getattr(a, interval) or 0.0, getattr(b, interval) or 0.0)


def _eta(point: Point) -> str:
    return f"{point.eta:g}"


def points_of(front: Mapping[str, Any]) -> list[Point]:
    """Return the points of front.json, or none if there is no front."""
    return [Point(**point) for point in front["points"]] if front else []
