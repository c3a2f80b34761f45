"""The KL–reward front: every point of it measured on held-out prompts with the same sampling.

KL is KL(π ‖ SFT) in nats per completion by the full-vocabulary estimator, at the sampling
temperature; intervals are 95 %.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any

from raywarp.algorithm.averaging import lerp, slerp
from raywarp.algorithm.deltas import AdapterDelta, add, compress, scale
from raywarp.config.schema import ChooseConfig, Config, FrontConfig
from raywarp.data.text import Prompt


@dataclass(frozen=True)
class Scored:
    """One adapter's completions of N prompts, with what was asked of them: each list has N entries.

    work: who was at it from when to when, in Unix seconds.
    """

    texts: list[str]
    lengths: list[int]
    finished: list[bool]
    rewards: list[float]
    control: list[float] | None
    kl: list[float]
    work: list[tuple[str, float, float]] = field(default_factory=list, compare=False)


@dataclass(frozen=True)
class Point:
    """One model on the front.

    name: sft, policy m, lerp, liti η, or slerp.
    eta: how far along the line from SFT to SLERP; None for points off that line.
    reward, reward_ci: mean and the half-width of its 95 % interval over prompts; likewise kl and
    control.
    kl: nats per completion. control: mean of the score that training never saw (None without one).
    distinct_2: different pairs of successive words over all pairs. length: tokens. eos_rate:
    completions that ended by themselves.
    """

    name: str
    eta: float | None
    reward: float
    reward_ci: float
    kl: float
    kl_ci: float
    control: float | None
    control_ci: float | None
    distinct_2: float
    length: float
    eos_rate: float


@dataclass(frozen=True)
class Candidate:
    """A point before it is measured: its change from the SFT model (None: SFT itself)."""

    name: str
    eta: float | None
    delta: AdapterDelta | None


def candidates(
    init: AdapterDelta, task_vectors: Sequence[AdapterDelta], etas: Sequence[float]
) -> list[Candidate]:
    """SFT, each policy, LERP, and the LITI front η·(θ_slerp − θ_sft), of which η = 1 is SLERP.

    Args:
        init: θ_init − θ_sft of the last iteration.
        task_vectors: θ_m − θ_init of the last iteration's policies.
        etas: points of the front besides 0 and 1, which are always there.
    """
    merged = compress(add(init, slerp(task_vectors)))
    points = [Candidate("sft", 0.0, None)]
    points += [
        Candidate(f"policy {m}", None, add(init, vector))
        for m, vector in enumerate(task_vectors, start=1)
    ]
    points += [Candidate("lerp", None, compress(add(init, lerp(task_vectors))))]
    points += [
        Candidate(f"liti {eta:g}", eta, scale(merged, eta))
        for eta in sorted(set(etas) - {0.0, 1.0})
    ]
    return [*points, Candidate("slerp", 1.0, merged)]


def summarise(candidate: Candidate, scored: Scored, group: int) -> Point:
    """Means and intervals of one point's completions, `group` of them per prompt."""
    reward, reward_ci = mean_interval(scored.rewards, group)
    kl, kl_ci = mean_interval(scored.kl, group)
    control, control_ci = (
        mean_interval(scored.control, group) if scored.control is not None else (None, None)
    )
    return Point(
        name=candidate.name,
        eta=candidate.eta,
        reward=reward,
        reward_ci=reward_ci,
        kl=kl,
        kl_ci=kl_ci,
        control=control,
        control_ci=control_ci,
        distinct_2=distinct_2(scored.texts),
        length=sum(scored.lengths) / len(scored.lengths),
        eos_rate=sum(scored.finished) / len(scored.finished),
    )


def mean_interval(values: Sequence[float], group: int = 1) -> tuple[float, float]:
    """Mean, and half the width of its 95 % interval over prompts (normal approximation; a prompt's
    `group` values are averaged first).
    """
    means = [sum(values[i : i + group]) / group for i in range(0, len(values), group)]
    mean = sum(means) / len(means)
    if len(means) < 2:
        return mean, math.inf
    variance = sum((value - mean) ** 2 for value in means) / (len(means) - 1)
    return mean, 1.96 * math.sqrt(variance / len(means))


def distinct_2(texts: Sequence[str]) -> float:
    """Different pairs of successive words over all pairs, in all texts together (Li et al. 2016); 0
    where there is no pair.
    """
    pairs = [pair for words in map(str.split, texts) for pair in pairwise(words)]
    return len(set(pairs)) / len(pairs) if pairs else 0.0


def choose(points: Sequence[Point], rule: ChooseConfig) -> Point:
    """The point that adapter/ will hold: η as given, or the largest η on the front whose KL stays
    within max_kl (at least SFT's 0).
    """
    front = [point for point in points if point.eta is not None]
    if rule.eta is not None:
        return next(point for point in front if point.eta == rule.eta)
    return max(
        (point for point in front if point.kl <= (rule.max_kl or 0)),
        key=lambda point: point.eta or 0,
    )


def sample_rows(
    results: Sequence[tuple[Point, Scored]], held_out: Sequence[Prompt], front: FrontConfig
) -> list[dict[str, Any]]:
    """Rows of the first prompts: {"prompt": …, point's name: its first completion, …}; "rewards",
    "kl" and "control" (where there is one) have that completion's own values, by point.
    """
    rows = []
    for n, prompt in enumerate(held_out[: min(front.samples, front.prompts)]):
        first = n * front.completions_per_prompt
        texts = {point.name: scored.texts[first] for point, scored in results}
        values: dict[str, dict[str, float]] = {
            "rewards": {point.name: scored.rewards[first] for point, scored in results},
            "kl": {point.name: scored.kl[first] for point, scored in results},
            "control": {
                point.name: scored.control[first]
                for point, scored in results
                if scored.control is not None
            },
        }
        rows.append(
            {"prompt": prompt.text, **texts, **{name: own for name, own in values.items() if own}}
        )
    return rows


def wanted_etas(config: Config) -> list[float]:
    """front.etas, and the eta that front.choose names."""
    chosen = config.front.choose.eta
    return [*config.front.etas, *([chosen] if chosen is not None else [])]


def front_json(points: Sequence[Point], chosen: Point, config: Config) -> dict[str, Any]:
    """front.json: what was measured, how, and which point was chosen."""
    return {
        "chosen": chosen.name,
        "chosen_eta": chosen.eta,
        "choose": config.front.choose.model_dump(),
        "prompts": config.front.prompts,
        "completions_per_prompt": config.front.completions_per_prompt,
        "temperature": config.rollout.temperature,
        "kl_unit": "nats per completion, KL(policy || SFT)",
        "interval": "half-width of 95 % over prompts",
        "points": [asdict(point) for point in points],
    }
