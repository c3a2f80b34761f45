"""The policy gradient and its KL terms, as functions from tensors to tensors.

N completions, T response positions, V vocabulary. A mask is 1 on response tokens (an emitted EOS
included) and 0 on padding.
"""

from torch import Tensor


def token_logprobs(logits: Tensor, tokens: Tensor, temperature: float) -> Tensor:
    """Return log π(token) at the sampling temperature.

    Args:
        logits: (N, T, V), position t predicting token t.
        tokens: (N, T).
        temperature: of the sampling distribution.

    Returns:
        (N, T) float32.
    """
    scaled = logits.float() / temperature
    return scaled.gather(-1, tokens.unsqueeze(-1)).squeeze(-1) - scaled.logsumexp(-1)


def full_vocabulary_kl(logits: Tensor, reference_logits: Tensor, temperature: float) -> Tensor:
    """Return KL(π(·|prefix) ‖ π_ref(·|prefix)) in nats at each position, over the whole vocabulary.

    Summed over a completion sampled from π and averaged over completions, it estimates the sequence
    KL without bias. Its variance is lower than that of the sampled tokens' log-ratio
    (Rao–Blackwell).

    Args:
        logits, reference_logits: (N, T, V).
        temperature: of both distributions.

    Returns:
        (N, T) float32, never negative except by rounding.
    """
    logprobs = (logits.float() / temperature).log_softmax(-1)
    reference = (reference_logits.float() / temperature).log_softmax(-1)
    return (logprobs.exp() * (logprobs - reference)).sum(-1)


def sequence_log_ratio(logprobs: Tensor, anchor_logprobs: Tensor, mask: Tensor) -> Tensor:
    """Return log(π_θ(y|x) / π_anchor(y|x)) in nats per completion, over response tokens only.

    Args:
        logprobs, anchor_logprobs: (N, T) token log-probs.
        mask: (N, T).

    Returns:
        (N,)
    """
    return ((logprobs - anchor_logprobs) * mask).sum(-1)


def importance_weights(logprobs: Tensor, sampler_logprobs: Tensor, cap: float = 2.0) -> Tensor:
    """Return detached weights min(π_trainer / π_sampler, cap) per token.

    They correct for the sampler's slightly different numbers.

    Args:
        logprobs, sampler_logprobs: (N, T).

    Returns:
        (N, T)
    """
    return (logprobs.detach() - sampler_logprobs).exp().clamp(max=cap)


def policy_gradient_loss(
    logprobs: Tensor,
    sampler_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    completions: int,
    cap: float = 2.0,
) -> Tensor:
    """Return −1/N · Σ_n A_n · Σ_t min(π_trainer/π_sampler, cap) · log π_θ(y_t).

    It is neither normalised by length nor divided by a deviation, so that its gradient is that of
    E[r_β].

    Args:
        logprobs: (n, T) with gradient; n ≤ N is a micro-batch.
        sampler_logprobs: (n, T).
        advantages: (n,), no gradient.
        mask: (n, T).
        completions: N of the whole optimiser step, so that micro-batches add up.

    Returns:
        A scalar with gradient.
    """
    weights = importance_weights(logprobs, sampler_logprobs, cap) * mask
    return -(advantages.detach() * (weights * logprobs).sum(-1)).sum() / completions


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Return the mean of (N, T) values over the response tokens."""
    return (values * mask).sum() / mask.sum().clamp(min=1)


def sampler_gap(logprobs: Tensor, sampler_logprobs: Tensor, mask: Tensor) -> Tensor:
    """Return the mean |Δ log-prob| per response token between trainer and sampler, in nats.

    It is 0 where both compute exactly the same numbers.
    """
    return masked_mean((logprobs - sampler_logprobs).abs(), mask)
