"""Tests of the KL cosine of a merge, where the KLs are known exactly."""

import math

import pytest
import torch
from torch.distributions import MultivariateNormal, kl_divergence

from raywarp.algorithm.geometry import kl_cosine, kl_cosine_interval, kl_gain


def gaussian_kls(deltas: torch.Tensor, covariance: torch.Tensor) -> tuple[list[float], float]:
    """KL of N(δ, Σ) to N(0, Σ) for each δ and for their mean, as torch.distributions has it."""
    start = MultivariateNormal(torch.zeros_like(deltas[0]), covariance)
    rows = [*deltas, deltas.mean(0)]
    *own, mean = [float(kl_divergence(MultivariateNormal(d, covariance), start)) for d in rows]
    return own, mean


@pytest.mark.parametrize("count", [2, 3, 5])
def test_the_kl_cosine_is_the_cosine_in_the_fisher_metric(count: int) -> None:
    """Vectors of equal Fisher length: the mean of the pairs' cosines. KL = ½ δᵀFδ, F = Σ⁻¹."""
    g = torch.Generator().manual_seed(count)
    root = torch.randn(4, 4, generator=g, dtype=torch.float64)
    covariance = root @ root.T + torch.eye(4, dtype=torch.float64)
    fisher = torch.linalg.inv(covariance)
    deltas = torch.randn(count, 4, generator=g, dtype=torch.float64)
    deltas /= (deltas @ fisher * deltas).sum(-1, keepdim=True).sqrt()
    cosines = deltas @ fisher @ deltas.T
    expected = float(cosines.triu(1).sum() / (count * (count - 1) / 2))
    own, mean = gaussian_kls(deltas, covariance)
    found = kl_cosine(own, mean)
    assert found == pytest.approx(expected, abs=1e-9)
    assert found is not None
    assert (1 - kl_gain(found, count)) * math.sqrt(own[0]) == pytest.approx(math.sqrt(mean))


def test_policies_that_went_unequally_far() -> None:
    """By hand: δ = (2, 0) and (1, 1) under the identity. KLs 2 and 1, of their mean 1.25."""
    own, mean = gaussian_kls(torch.tensor([[2.0, 0.0], [1.0, 1.0]]), torch.eye(2))
    assert (own, mean) == ([pytest.approx(2), pytest.approx(1)], pytest.approx(1.25))
    assert kl_cosine(own, mean) == pytest.approx(2 / 3)  # ⟨δ₁, δ₂⟩ = 2 over (4 + 2) / 2


def test_alike_independent_opposite_and_unmoved() -> None:
    assert kl_cosine([3.0, 3.0], 3.0) == 1
    assert kl_cosine([3.0, 3.0, 3.0], 1.0) == 0
    assert kl_cosine([3.0, 3.0], 0.0) == -1
    assert (kl_gain(1, 2), kl_gain(-1, 2)) == (0, 1)
    assert kl_gain(0, 4) == 0.5
    assert kl_gain(0.72, 2) == pytest.approx(1 - math.sqrt(0.86))
    assert kl_gain(1.2, 2) == 0  # by noise
    assert kl_cosine([2.0], 2.0) is None
    assert kl_cosine([0.0, 0.0], 0.0) is None
    assert kl_cosine([1e-9, -1e-9], 1e-9) is None
    assert kl_cosine([math.nan, 1.0], 1.0) is None
    assert kl_cosine_interval([[0.0, 0.0]] * 2, [0.0, 0.0]) is None
    assert kl_cosine_interval([[1.0], [2.0]], [1.0]) is None


def test_the_interval_covers_the_true_cosine() -> None:
    """Prompts with different KLs, and a true cosine of .6: 95 % of 400 intervals, within noise."""
    g = torch.Generator().manual_seed(1)
    covered, widths = 0, []
    for _ in range(400):
        scale = torch.rand(32, generator=g) * 2
        noise = torch.rand(3, 32, generator=g) + 0.5
        one, two, mean = (scale * noise * torch.tensor([[1.0], [1.0], [0.8]])).tolist()
        half = kl_cosine_interval([one, two], mean)
        found = kl_cosine([sum(one), sum(two)], sum(mean))
        assert half is not None
        assert found is not None
        covered += abs(found - 0.6) <= half
        widths.append(half)
    assert 0.9 < covered / 400 < 0.99
    assert 0.1 < sum(widths) / 400 < 0.4
