"""The points of a front: completions with their scores, and their summaries.

Every point is measured on held-out prompts with the same sampling. KL is KL(π ‖ SFT) in nats per
completion, by the full-vocabulary estimator at the sampling temperature. Intervals are 95 %.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any

from raywarp.algorithm.deltas import AdapterDelta
from raywarp.algorithm.finite import NotFiniteError
from raywarp.rollout.protocol import Scores


@dataclass(frozen=True)
class Scored:
    """One adapter's completions of N prompts, with their scores. Each list has N entries.

    A prompt that is sampled several times counts as several prompts.

    Attributes:
        texts: the completions.
        lengths: tokens of each completion.
        finished: whether each completion ended by itself.
        rewards: reward of each completion.
        control: score that training never saw; None without one.
        kl: KL to the SFT model, in nats per completion.
        work: (actor, start, end) of each piece of the work, in Unix seconds.
        text_losses: cross-entropy of each text of retention, in nats, summed over its tokens.
    """

    texts: list[str]
    lengths: list[int]
    finished: list[bool]
    rewards: list[float]
    control: list[float] | None
    kl: list[float]
    work: list[tuple[str, float, float]] = field(default_factory=list, compare=False)
    text_losses: list[float] = field(default_factory=list)

    def json(self) -> dict[str, Any]:
        """Return it without `work` as JSON, with null where there is no reward; see `read`."""
        parts = self.rewards.parts if isinstance(self.rewards, Scores) else {}
        return {
            "texts": self.texts,
            "lengths": self.lengths,
            "finished": self.finished,
            "rewards": list(map(or_none, self.rewards)),
            "parts": {name: list(map(or_none, part)) for name, part in parts.items()},
            "control": None if self.control is None else list(map(or_none, self.control)),
            "kl": list(self.kl),
            "text_losses": list(self.text_losses),
        }

    @classmethod
    def read(cls, tree: Mapping[str, Any]) -> "Scored":
        """Return what `json` gave."""
        rewards = _scores(tree["rewards"])
        rewards.parts = {name: _scores(part) for name, part in tree["parts"].items()}
        control = None if tree["control"] is None else _scores(tree["control"])
        rest = {name: value for name, value in tree.items() if name != "parts"}
        return cls(**{**rest, "rewards": rewards, "control": control})


@dataclass(frozen=True)
class Point:
    """One model on the front.

    Attributes:
        name: sft, policy m, lerp, liti η, slerp, or the shares of another merge.
        eta: position on the line from SFT (0) through SLERP (1); None for points off that line.
        reward: mean reward.
        reward_ci: half the width of the reward's 95 % interval over prompts.
        kl: mean KL to the SFT model, in nats per completion.
        kl_ci: likewise for kl.
        control: mean of the score that training never saw; None without one.
        control_ci: likewise for control.
        distinct_2: different pairs of successive words over all pairs.
        length: mean length of a completion in tokens.
        eos_rate: share of completions that ended by themselves.
        extrapolated: whether η is above 1, further from SFT than SLERP.
        retention: cross-entropy of texts that have nothing to do with the reward, minus SFT's, in
            nats per token. Above 0: it has forgotten. None without texts.
        retention_ci: half the width of its 95 % interval over texts.
        rewards: mean of each of several rewards, by its name; none with a single one.
        rewards_ci: half the width of the 95 % interval of each of them.
        weights: shares of the policies in a merge off the line, by reward or by policy; none of
            other points.
        liti: position on the line from SFT (0) through that merge (1); None for other points.
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
    extrapolated: bool = False
    retention: float | None = None
    retention_ci: float | None = None
    rewards: Mapping[str, float] = field(default_factory=dict)
    rewards_ci: Mapping[str, float] = field(default_factory=dict)
    weights: Mapping[str, float] = field(default_factory=dict)
    liti: float | None = None

    @property
    def title(self) -> str:
        """The name, with a † where the point is extrapolated."""
        return f"{self.name} †" if self.extrapolated else self.name


def point_json(point: Point) -> dict[str, Any]:
    """Return a point as JSON, without what only points with several rewards or weights have."""
    absent: dict[str, Any] = {"rewards": {}, "rewards_ci": {}, "weights": {}, "liti": None}
    row = asdict(point)
    return {name: row[name] for name in row if name not in absent or row[name] != absent[name]}


@dataclass(frozen=True)
class Candidate:
    """A point before it is measured.

    Attributes:
        name: see Point.
        eta: see Point.
        delta: its change from the SFT model; None for the SFT model itself.
        weights, liti: see Point.
    """

    name: str
    eta: float | None
    delta: AdapterDelta | None
    weights: Mapping[str, float] = field(default_factory=dict)
    liti: float | None = None


def summarise(
    candidate: Candidate,
    scored: Scored,
    group: int,
    sft: Scored | None = None,
    text_tokens: Sequence[int] = (),
) -> Point:
    """Return the means and intervals of one point's completions.

    Args:
        candidate: the point.
        scored: its completions, those of a prompt next to each other.
        group: completions per prompt.
        sft: the SFT model's, whose text losses retention is the change from.
        text_tokens: predicted tokens of each text; none without texts.
    """
    kept = (
        retention(scored.text_losses, (sft or scored).text_losses, text_tokens)
        if text_tokens
        else (None, None)
    )
    reward, reward_ci = mean_interval(scored.rewards, group)
    kl, kl_ci = mean_interval(scored.kl, group)
    parts = _of_parts(scored.rewards, group)
    if math.isnan(reward):
        raise NotFiniteError(
            f"the reward applies to no completion of {candidate.name} on the held-out prompts"
        )
    if wrong := [value for value in scored.kl if not math.isfinite(value)]:
        raise NotFiniteError(
            f"the KL of {candidate.name} to SFT is {wrong[0]} on a held-out prompt: its policies"
            " have gone too far. Lower optim.lr, and set another out"
        )
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
        extrapolated=(candidate.eta or 0.0) > 1,
        retention=kept[0],
        retention_ci=kept[1],
        rewards={name: mean for name, (mean, _) in parts.items()},
        rewards_ci={name: half for name, (_, half) in parts.items()},
        weights=candidate.weights,
        liti=candidate.liti,
    )


def _of_parts(rewards: Sequence[float], group: int) -> dict[str, tuple[float, float]]:
    """Return mean and interval of each of several rewards that has scores."""
    parts = rewards.parts if isinstance(rewards, Scores) else {}
    found = {name: mean_interval(part, group) for name, part in parts.items()}
    return {name: own for name, own in found.items() if not math.isnan(own[0])}


def mean_interval(values: Sequence[float], group: int = 1) -> tuple[float, float]:
    """Return the mean, and half the width of its 95 % interval over prompts.

    The interval is the normal approximation. A prompt's `group` values are averaged first. NaN
    stands for a value that there is not.
    """
    groups = [values[i : i + group] for i in range(0, len(values), group)]
    there = [[value for value in own if not math.isnan(value)] for own in groups]
    means = [sum(own) / len(own) for own in there if own]
    if not means:
        return math.nan, math.inf
    mean = sum(means) / len(means)
    if len(means) < 2:
        return mean, math.inf
    variance = sum((value - mean) ** 2 for value in means) / (len(means) - 1)
    return mean, 1.96 * math.sqrt(variance / len(means))


def retention(
    losses: Sequence[float], sft_losses: Sequence[float], tokens: Sequence[int]
) -> tuple[float, float]:
    """Return the change of the cross-entropy per token from SFT, with its interval.

    All tokens weigh the same: the change is a ratio of sums, not a mean of the texts' means.
    The interval is over texts, and paired, as each text is compared with itself.

    Args:
        losses: cross-entropy of each text in nats, summed over its tokens.
        sft_losses: likewise of the SFT model.
        tokens: predicted tokens of each text.

    Returns:
        (change, half the width of its 95 % interval), in nats per token.
    """
    changes = [own - sft for own, sft in zip(losses, sft_losses, strict=True)]
    mean_tokens = sum(tokens) / len(tokens)
    rate = sum(changes) / sum(tokens)
    # Linearisation of a ratio: its error is that of the mean of these residuals.
    residuals = [
        (change - rate * count) / mean_tokens for change, count in zip(changes, tokens, strict=True)
    ]
    return rate, mean_interval(residuals)[1]


def distinct_2(texts: Sequence[str]) -> float:
    """Return different pairs of successive words over all pairs (Li et al. 2016).

    All texts count together. The result is 0 if there is no pair.
    """
    pairs = [pair for words in map(str.split, texts) for pair in pairwise(words)]
    return len(set(pairs)) / len(pairs) if pairs else 0.0


def or_none(value: float) -> float | None:
    return None if math.isnan(value) else value


def _scores(values: Sequence[float | None]) -> Scores:
    return Scores(math.nan if value is None else value for value in values)
