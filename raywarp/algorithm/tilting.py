"""The ceiling of a front, from rewards of SFT completions: the tilted optimum, and best of n.

No policy has more reward at a KL to SFT than π*_β ∝ π_sft·exp(r/β) has at its own. With n SFT
completions of a prompt, π*_β has the weights w = softmax(r/β), the reward Σ w·r and the KL
Σ w·log(n·w). All prompts share β, since the front's KL is a mean over prompts.

These plain estimates are too low: n completions show less of the distribution's upper tail than it
has. The jackknife over completions takes most of that away (see docs/reading-a-front.md).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

POINTS = 26  # of the line; even in √KL, in which the reward is nearly straight near 0
TEMPERATURES = 96  # values of β, besides 0
HOTTEST, COLDEST = 100.0, 1e-4  # largest and smallest β, in deviations of a prompt's rewards
HALF = 1.96  # standard errors in half of a 95 % interval


@dataclass(frozen=True)
class TiltedLine:
    """The highest reward at each KL. All lists have the same length.

    Attributes:
        kl: in nats per completion, from 0 to the end of what the completions can measure.
        reward: of the tilted optimum; the first is the SFT model's mean reward.
        reward_ci: half the width of the reward's 95 % interval.
        gain_ci: likewise for the reward above the SFT model's.
    """

    kl: list[float]
    reward: list[float]
    reward_ci: list[float]
    gain_ci: list[float]


@dataclass(frozen=True)
class BestOf:
    """The best of n SFT completions.

    Attributes:
        n: completions to choose from.
        kl: log n − (n − 1)/n, a bound of its KL to SFT (Beirami et al. 2024).
        reward: mean reward of the best.
        reward_ci: half the width of its 95 % interval over prompts.
    """

    n: int
    kl: float
    reward: float
    reward_ci: float


def tilted_line(rewards: Tensor) -> TiltedLine:
    """Return the line of the tilted optimum, up to log n − 1 nats or the end of the sample.

    Args:
        rewards: (P, n), of n SFT completions of each of P prompts; n is at least 3.
    """
    rewards = rewards.double()
    betas, means = _temperatures(rewards), rewards.mean(1)
    plain = torch.stack([_tilt(rewards, beta) for beta in betas.tolist()])  # (B, 2, P)
    corrected = torch.stack(
        [_jackknife(rewards, at, beta) for at, beta in zip(plain, betas.tolist(), strict=True)]
    )
    start = torch.stack([means.mean(), means.new_zeros(())])
    lines = [_rising(start, each.mean(2)) for each in (corrected, plain)]
    level = corrected[:, 0] - _slopes(lines[0], corrected[:, 1], betas)[:, None] * corrected[:, 1]
    errors = torch.stack([_half_widths(level), _half_widths(level - means)])  # (2, B)
    end = max(0.0, min(math.log(rewards.shape[1]) - 1, *(line[1, -1].item() for line in lines)))
    kl = end * torch.linspace(0, 1, POINTS if end > 0 else 1, dtype=torch.float64) ** 2
    best, low = (_interpolate(kl, line[1], line[0]) for line in lines)
    best = best.clamp(max=rewards.max())
    first = torch.stack([_half_widths(means[None]), means.new_zeros(1)])
    spread = torch.cat([first, errors], dim=1)
    halves = [_interpolate(kl, lines[0][1], each) + (best - low).abs() for each in spread]
    if len(rewards) < 2:
        halves = [torch.full_like(kl, math.inf)] * 2
    return TiltedLine(kl.tolist(), best.tolist(), halves[0].tolist(), halves[1].tolist())


def best_of(rewards: Tensor) -> list[BestOf]:
    """Return best of 2, 4, 8, … as far as there are so many completions.

    A prompt's mean over all choices of m of its n completions has no bias: the i-th smallest is
    the best of C(i − 1, m − 1) of the C(n, m) choices.

    Args:
        rewards: (P, n), of n SFT completions of each of P prompts.
    """
    ordered, n = rewards.double().sort(dim=1).values, rewards.shape[1]
    found = []
    for m in (2**k for k in range(1, n.bit_length())):
        shares = [math.comb(i, m - 1) / math.comb(n, m) for i in range(n)]
        values = ordered @ torch.tensor(shares, dtype=torch.float64)
        half = _half_widths(values[None]).item()
        found.append(BestOf(m, math.log(m) - (m - 1) / m, values.mean().item(), half))
    return found


def _temperatures(rewards: Tensor) -> Tensor:
    """Return the values of β, from large to small. The last is 0, the limit."""
    deviation = rewards.var(dim=1, correction=0).mean().sqrt()
    ratios = torch.logspace(
        math.log10(HOTTEST), math.log10(COLDEST), TEMPERATURES, dtype=torch.float64
    )
    return torch.cat([deviation * ratios, ratios.new_zeros(1)])


def _tilt(rewards: Tensor, beta: float) -> Tensor:
    """Return each prompt's reward and KL of the tilted optimum, as (2, P).

    Args:
        rewards: (P, n).
        beta: the KL coefficient; 0 stands for the limit, the mean over the best completions.
    """
    terms = _terms(rewards, _scores(rewards, beta))
    weights, rewarded, logged = (term.sum(1) for term in terms)
    return _moments(weights, rewarded, logged, rewards.shape[1])


def _jackknife(rewards: Tensor, plain: Tensor, beta: float) -> Tensor:
    """Return n·f_n − (n − 1)·mean f_{n−1} of `_tilt`, over all samples that lack one completion.

    Sums without a completion are the sums of all minus its own term. This is precise as long as the
    best completion stays, so the sample without the best one is computed on its own.

    Args:
        rewards: (P, n).
        plain: (2, P), `_tilt` of all completions.
        beta: see `_tilt`.
    """
    n = rewards.shape[1]
    rewards = rewards.sort(dim=1, descending=True).values
    terms = _terms(rewards, _scores(rewards, beta))
    weights, rewarded, logged = (term.sum(1, keepdim=True) - term[:, 1:] for term in terms)
    without_best = _tilt(rewards[:, 1:], beta)
    total = _moments(weights, rewarded, logged, n - 1).sum(2) + without_best
    return n * plain - (n - 1) * total / n


def _scores(rewards: Tensor, beta: float) -> Tensor:
    """Return (P, n) log weights, 0 for the best completion."""
    excess = rewards - rewards.amax(1, keepdim=True)
    return excess / beta if beta > 0 else excess.masked_fill(excess < 0, -math.inf)


def _terms(rewards: Tensor, scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return (P, n) w, w·r and w·log w of weights w = exp(scores)."""
    weights = scores.exp()
    return weights, weights * rewards, torch.special.xlogy(weights, weights)


def _moments(weights: Tensor, rewarded: Tensor, logged: Tensor, count: int) -> Tensor:
    """Return Σ p·r and Σ p·log(n·p) with p = w / Σ w, from the sums of w, w·r and w·log w.

    Args:
        weights, rewarded, logged: (…) sums over n completions.
        count: n.

    Returns:
        (2, …).
    """
    return torch.stack([rewarded / weights, logged / weights - weights.log() + math.log(count)])


def _slopes(line: Tensor, kl: Tensor, betas: Tensor) -> Tensor:
    """Return the line's slope at each β, to tell a prompt's reward at a fixed mean KL.

    Along the family dR = β·dKL. The KL of a sample is uncertain, too. So the slope is taken over
    the half interval of the KL to the left, where the line may be steeper than at its end.

    Args:
        line: (2, 1 + B), rewards and KLs.
        kl: (B, P), of each prompt.
        betas: (B,).
    """
    half = _half_widths(kl).nan_to_num(posinf=0.0)
    left = (line[1, 1:] - half).clamp(min=0.0)
    run = line[1, 1:] - left
    rise = line[0, 1:] - _interpolate(left, line[1], line[0])
    return torch.where(run > 0, rise / run, betas).maximum(betas)


def _rising(start: Tensor, points: Tensor) -> Tensor:
    """Return rewards and KLs that never fall, as (2, 1 + B).

    Args:
        start: (2,), reward and KL of the SFT model.
        points: (B, 2), reward and KL from large to small β.
    """
    return torch.cat([start[None], points]).cummax(dim=0).values.T


def _interpolate(at: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Return y at `at`, linear between the points (x, y), whose x do not fall."""
    place = torch.searchsorted(x.contiguous(), at, right=True).clamp(1, len(x) - 1)
    low, high = x[place - 1], x[place]
    share = torch.where(high > low, (at - low) / (high - low), 1.0).clamp(0, 1)
    return y[place - 1] + share * (y[place] - y[place - 1])


def _half_widths(values: Tensor) -> Tensor:
    """Return half the width of the 95 % interval over prompts of each row's mean.

    Args:
        values: (B, P).
    """
    if (prompts := values.shape[1]) < 2:
        return torch.full(values.shape[:1], math.inf, dtype=values.dtype)
    return HALF * values.std(dim=1) / math.sqrt(prompts)
