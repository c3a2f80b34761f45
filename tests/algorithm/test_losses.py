"""Tests of the policy gradient against enumeration.

A toy policy has V = 3 tokens and completions of length 2, so that all 9 can be listed.
"""

import itertools
import math

import pytest
import torch

from raywarp.algorithm import losses
from raywarp.algorithm.advantages import advantages, batch_mean, rloo

VOCABULARY, LENGTH, TEMPERATURE = 3, 2, 0.7
SEQUENCES = torch.tensor(list(itertools.product(range(VOCABULARY), repeat=LENGTH)))
REWARDS = torch.tensor(
    [float(3 * a - b + a * b) for a, b in SEQUENCES.tolist()], dtype=torch.float64
)
EVERYWHERE = torch.ones(len(SEQUENCES), LENGTH, dtype=torch.float64)


def table(seed: int) -> torch.Tensor:
    """Logits of a toy policy: one row for the first token, then one per first token for the second;
    (1 + V, V).
    """
    return torch.randn(
        1 + VOCABULARY,
        VOCABULARY,
        generator=torch.Generator().manual_seed(seed),
        dtype=torch.float64,
    )


def logits_of(parameters: torch.Tensor) -> torch.Tensor:
    """(9, 2, V): the logits that each listed sequence's tokens are drawn from."""
    return torch.stack(
        [torch.stack([parameters[0], parameters[1 + int(first)]]) for first, _ in SEQUENCES]
    )


def logprobs_of(parameters: torch.Tensor) -> torch.Tensor:
    return (
        (logits_of(parameters) / TEMPERATURE)
        .log_softmax(-1)
        .gather(-1, SEQUENCES[..., None])[..., 0]
    )


def objective(parameters: torch.Tensor, anchor: torch.Tensor, beta: float) -> torch.Tensor:
    """E[r] − β·KL(π ‖ anchor), by enumeration."""
    logprobs = logprobs_of(parameters).sum(-1)
    return (logprobs.exp() * (REWARDS - beta * (logprobs - logprobs_of(anchor).sum(-1)))).sum()


def gradient(baseline: float, beta: float = 0.3) -> tuple[torch.Tensor, torch.Tensor]:
    """The estimator's mean over all sequences, through the losses of the package, and the mean of
    its square.
    """
    anchor, start = table(2), table(1)
    probabilities = logprobs_of(start).sum(-1).exp()
    mean, square = torch.zeros_like(start), torch.zeros_like(start)
    for n, probability in enumerate(probabilities):
        parameters = start.clone().requires_grad_()
        logprobs = logprobs_of(parameters)[n : n + 1]
        log_ratio = losses.sequence_log_ratio(
            logprobs.detach(), logprobs_of(anchor)[n : n + 1], EVERYWHERE[n : n + 1]
        )
        advantage = REWARDS[n : n + 1] - beta * log_ratio - baseline
        losses.policy_gradient_loss(
            logprobs, logprobs.detach(), advantage, EVERYWHERE[n : n + 1], 1
        ).backward()
        assert parameters.grad is not None
        mean += probability * -parameters.grad
        square += probability * parameters.grad**2
    return mean, square


def exact_gradient(beta: float = 0.3) -> torch.Tensor:
    parameters = table(1).requires_grad_()
    objective(parameters, table(2), beta).backward()
    assert parameters.grad is not None
    return parameters.grad


def test_reinforce_is_the_exact_gradient() -> None:
    """Mean of the estimator = d/dθ (E[r] − β·KL): the term through the log-ratio itself has mean
    zero.
    """
    torch.testing.assert_close(gradient(baseline=0.0)[0], exact_gradient(), rtol=1e-5, atol=1e-6)


def test_a_baseline_leaves_the_mean_and_lowers_the_variance() -> None:
    start = logprobs_of(table(1)).sum(-1)
    value = float((start.exp() * REWARDS).sum())
    with_baseline, without = gradient(value), gradient(0.0)
    torch.testing.assert_close(with_baseline[0], without[0], rtol=1e-5, atol=1e-6)
    assert with_baseline[1].sum() < without[1].sum()


def test_token_logprobs_at_the_sampling_temperature() -> None:
    torch.testing.assert_close(
        losses.token_logprobs(logits_of(table(1)), SEQUENCES, TEMPERATURE).double(),
        logprobs_of(table(1)),
        rtol=1e-5,
        atol=1e-6,
    )


def test_kl_estimators_agree_with_enumeration() -> None:
    policy, reference = table(1), table(2)
    logprobs, reference_logprobs = logprobs_of(policy), logprobs_of(reference)
    probabilities = logprobs.sum(-1).exp()
    exact = (probabilities * (logprobs - reference_logprobs).sum(-1)).sum().item()
    log_ratio = losses.sequence_log_ratio(logprobs, reference_logprobs, EVERYWHERE)
    full = (
        (
            losses.full_vocabulary_kl(logits_of(policy), logits_of(reference), TEMPERATURE)
            * EVERYWHERE
        )
        .sum(-1)
        .double()
    )
    assert (probabilities * log_ratio).sum().item() == pytest.approx(exact, abs=1e-6)
    assert (probabilities * full).sum().item() == pytest.approx(exact, abs=1e-5)
    variance = [(probabilities * (x - exact) ** 2).sum().item() for x in (full, log_ratio)]
    assert variance[0] < variance[1]  # Rao–Blackwell
    assert (
        losses.full_vocabulary_kl(logits_of(policy), logits_of(reference), TEMPERATURE) > -1e-6
    ).all()


def test_only_response_tokens_count() -> None:
    logprobs, anchor = torch.tensor([[-1.0, -2.0, -99.0]]), torch.tensor([[-1.5, -1.0, 7.0]])
    mask = torch.tensor([[1.0, 1.0, 0.0]])
    assert losses.sequence_log_ratio(logprobs, anchor, mask).tolist() == [-0.5]
    assert losses.sampler_gap(logprobs, anchor, mask).item() == 0.75
    lp = logprobs.clone().requires_grad_()
    losses.policy_gradient_loss(lp, logprobs, torch.tensor([2.0]), mask, completions=4).backward()
    assert lp.grad is not None
    assert lp.grad.tolist() == [[-0.5, -0.5, 0.0]]  # −A/N on response tokens


def test_importance_weights_are_capped_and_detached() -> None:
    logprobs = torch.tensor([[0.0, -1.0, -2.0]], requires_grad=True)
    weights = losses.importance_weights(logprobs, torch.tensor([[-3.0, -1.0, -1.0]]))
    assert not weights.requires_grad
    assert weights[0].tolist() == pytest.approx([2.0, 1.0, math.exp(-1)])


def test_leave_one_out() -> None:
    rewards = torch.tensor([1.0, 2.0, 6.0, 0.0, 0.0, 3.0])
    assert rloo(rewards, 3).tolist() == pytest.approx([1 - 4, 2 - 3.5, 6 - 1.5, -1.5, -1.5, 3.0])
    assert batch_mean(rewards).tolist() == pytest.approx(
        [1 - 11 / 5, 2 - 2, 6 - 6 / 5, -12 / 5, -12 / 5, 3 - 9 / 5]
    )
    assert torch.equal(advantages(rewards, "none", 3), rewards)
    with pytest.raises(ValueError, match="unknown baseline"):
        advantages(rewards, "median", 3)
