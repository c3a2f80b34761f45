"""Learning curves of any length, reduced to few points.

A point is the mean over a stretch of steps, with its smallest and largest value. All stretches of a
curve are equally long.
"""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

POINTS = 4000  # points per metric, of all curves together
FEWEST, MOST = 40, 400  # points per curve
TRAJECTORY = 12  # points of a policy's path through the plane of KL and reward


class Metric(NamedTuple):
    """A metric that the page draws.

    Attributes:
        name: its name in metrics.jsonl.
        title: heading of its chart.
        unit: unit of the axis.
        about: explanation.
    """

    name: str
    title: str
    unit: str
    about: str


METRICS = (
    Metric("reward", "Reward", "", "mean over the step's completions; what training raises"),
    Metric(
        "kl_anchor",
        "KL to the anchor",
        "nats per completion",
        "to the policy's own moving average, which the penalty is about",
    ),
    Metric(
        "kl_sft",
        "KL to SFT",
        "nats per completion",
        "full-vocabulary estimate, every kl_to_sft_every steps",
    ),
    Metric(
        "entropy",
        "Entropy",
        "nats per token",
        "falling to 0 means that the policy says the same thing whatever it is asked",
    ),
    Metric("length", "Length", "tokens", "mean length of a completion"),
    Metric("eos_rate", "Ended by itself", "share", "completions that ended before max_new_tokens"),
    Metric(
        "sampler_gap",
        "Sampler–trainer gap",
        "nats per token",
        "how far the log-probs of the two are apart; should stay small",
    ),
    Metric(
        "adapter_effect",
        "Adapter's effect in the sampler",
        "",
        "over that in the trainer, at steps 0, 25, 50, …; should be 1",
    ),
    Metric(
        "engine_gap",
        "Engine gap",
        "nats per token",
        "sampler and trainer apart without an adapter, at the same steps",
    ),
    Metric("flat_groups", "Prompts without variance", "", "of a step; all rewards equal"),
    Metric("kl_coef", "KL coefficient", "", "beta, which warp.kl_target adapts"),
    Metric("loss_scale", "Loss scale", "", "of float16; halved where a gradient overflows"),
    Metric("grad_norm", "Gradient norm", "", "before clipping"),
)


class Curve(NamedTuple):
    """The fine-tuning of one policy.

    Attributes:
        iteration: counted from 1.
        policy: counted from 1.
        key: the policy's key.
        steps: (N,), ascending.
        values: metric → (N,), NaN where it was not measured.
    """

    iteration: int
    policy: int
    key: str
    steps: NDArray[np.float64]
    values: dict[str, NDArray[np.float64]]


def number(value: Any) -> float:
    """Return a finite number as it is, and NaN for anything else."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else math.nan


def curves(rows: Iterable[Mapping[str, Any]]) -> list[Curve]:
    """Return the rows of metrics.jsonl as curves, one per iteration and policy.

    Rows without an iteration, policy or step are left out.
    """
    groups: dict[tuple[int, int], dict[int, Mapping[str, Any]]] = {}
    for row in rows:
        iteration, policy, step = row.get("iteration"), row.get("policy"), row.get("step")
        if type(iteration) is int and type(policy) is int and type(step) is int:
            groups.setdefault((iteration, policy), {})[step] = row
    found = []
    known = [*METRICS, *_rewards({name for row in rows for name in row})]
    for (iteration, policy), by_step in sorted(groups.items()):
        own = [by_step[step] for step in sorted(by_step)]
        values = {
            metric.name: np.array([number(row.get(metric.name)) for row in own]) for metric in known
        }
        found.append(
            Curve(
                iteration,
                policy,
                str(own[-1].get("key", "")),
                np.array(sorted(by_step), dtype=float),
                values,
            )
        )
    return found


def _rewards(names: Collection[str]) -> list[Metric]:
    """Return the metrics of several rewards, whose names in metrics.jsonl are reward/NAME."""
    about = "one of the rewards: mean of its standardised score, before its weight"
    return [
        Metric(name, f"Reward {name.removeprefix('reward/')}", "", about)
        for name in sorted(names)
        if name.startswith("reward/")
    ]


def summary(found: Sequence[Curve], share: float = 1.0) -> dict[str, Any]:
    """Return what the page draws.

    Args:
        found: the curves.
        share: share of the page's size that the curves may take, 0 to 1.

    Returns:
        metrics: those that were measured.
        curves: the reduced curves.
        stretch: the most steps that became one point.
        steps: steps of all curves together.
    """
    metrics = [
        metric
        for metric in [*METRICS, *_rewards({name for curve in found for name in curve.values})]
        if any(np.isfinite(curve.values[metric.name]).any() for curve in found)
    ]
    limit = min(MOST, max(FEWEST, int(share * POINTS) // max(len(found), 1)))
    drawn = [_drawn(curve, metrics, limit) for curve in found]
    return {
        "metrics": [metric._asdict() for metric in metrics],
        "curves": drawn,
        "stretch": max((math.ceil(len(curve.steps) / limit) for curve in found), default=1),
        "steps": sum(len(curve.steps) for curve in found),
    }


def _drawn(curve: Curve, metrics: Sequence[Metric], limit: int) -> dict[str, Any]:
    cuts = stretches(len(curve.steps), limit)
    whole = len(cuts) == len(curve.steps)
    values: dict[str, Any] = {}
    for metric in metrics:
        own = curve.values[metric.name]
        values[metric.name] = {"mean": _listed(_reduce(np.nanmean, own, cuts))}
        if not whole:
            values[metric.name] |= {
                "low": _listed(_reduce(np.nanmin, own, cuts)),
                "high": _listed(_reduce(np.nanmax, own, cuts)),
            }
    steps = [round(float(curve.steps[cut].mean()), 1) for cut in cuts]
    return {
        "iteration": curve.iteration,
        "policy": curve.policy,
        "steps": steps,
        "last": int(curve.steps[-1]),
        "values": values,
    }


def trajectory(curve: Curve) -> list[list[float]]:
    """Return the path of a policy while it trained, as points [KL to SFT, reward, step].

    Each point is the mean over a stretch of steps. Stretches without a measured KL are left out.
    """
    kl, reward = curve.values["kl_sft"], curve.values["reward"]
    points = []
    for cut in stretches(len(curve.steps), TRAJECTORY):
        if np.isfinite(kl[cut]).any() and np.isfinite(reward[cut]).any():
            points.append(
                [
                    four_digits(float(np.nanmean(kl[cut]))),
                    four_digits(float(np.nanmean(reward[cut]))),
                    round(float(curve.steps[cut].mean()), 1),
                ]
            )
    return points


def stretches(count: int, limit: int) -> list[slice]:
    """Return at most `limit` slices of equal length that cover 0..count.

    The last slice may be shorter.
    """
    length = max(1, math.ceil(count / limit))
    return [slice(start, min(start + length, count)) for start in range(0, count, length)]


def _reduce(function: Any, values: NDArray[np.float64], cuts: Sequence[slice]) -> list[float]:
    """Return the function of each stretch's measured values; NaN where nothing was measured."""
    length = max(cut.stop - cut.start for cut in cuts)
    padded = np.concatenate([values, np.full(length * len(cuts) - len(values), np.nan)]).reshape(
        len(cuts), length
    )
    known = np.isfinite(padded).any(axis=1)
    reduced = np.full(len(cuts), np.nan)
    reduced[known] = function(padded[known], axis=1)
    return [float(value) for value in reduced]


def _listed(values: Iterable[float]) -> list[float | None]:
    return [None if math.isnan(value) else four_digits(value) for value in values]


def four_digits(value: float) -> float:
    """Return four significant digits of the value, which is more than a screen shows."""
    return float(f"{value:.4g}")
