"""Log-probs and KL from hidden states, a few rows of logits at a time: no (n, V) tensor exists, nor is one saved for the backward.

n response tokens, D hidden size, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from raywarp.adapted_linear import product

CHUNK_BYTES = 32 << 20  # of float32 logits at a time: about what the last-level cache holds


@dataclass(frozen=True)
class LogitHead:
    """How a model turns hidden states into logits: softcap·tanh(scale·(h·Wᵀ + b) / softcap).

    weight: (V, D), frozen; None says that the states are logits already.
    bias: (V,) or None. softcap: None for no tanh.
    """

    weight: Tensor | None
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, states: Tensor) -> Tensor:
        """(n, V) from (n, D), in the states' dtype."""
        if self.weight is None:
            return states
        logits = product(states, self.weight, self.bias)
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.softcap is None else (logits / self.softcap).tanh() * self.softcap

    def pull_back(self, gradient: Tensor, logits: Tensor) -> Tensor:
        """(n, D) gradient of the states from the (n, V) gradient of the logits."""
        if self.weight is None:
            return gradient
        if self.softcap is not None:
            gradient = gradient * (1 - (logits.to(gradient.dtype) / self.softcap) ** 2)
        return product(gradient.to(self.weight.dtype), self.weight.T).to(gradient.dtype) * self.scale


def token_logprobs(states: Tensor, head: LogitHead, tokens: Tensor, temperature: float) -> Tensor:
    """log π(token) at the sampling temperature, differentiable in the states.

    Args:
        states: (n, D).
        tokens: (n,).

    Returns:
        (n,) float32.
    """
    if states.requires_grad and torch.is_grad_enabled():
        logprobs: Tensor = _TokenLogprobs.apply(states, head, tokens, temperature)  # type: ignore[no-untyped-call]
        return logprobs
    return torch.cat([_chunk_logprobs(h, head, t, temperature)[0].float() for h, t in _chunks(head, states, tokens)])


@torch.no_grad()
def full_vocabulary_kl(states: Tensor, reference_states: Tensor, head: LogitHead, temperature: float) -> Tensor:
    """(n,) KL(π ‖ π_ref) in nats at each token; see losses.full_vocabulary_kl."""
    from raywarp import losses

    pairs = _chunks(head, states, reference_states)
    return torch.cat([losses.full_vocabulary_kl(head.logits(h), head.logits(ref), temperature).float() for h, ref in pairs])


class _TokenLogprobs(torch.autograd.Function):
    """d log π(token) / d state is a vector of D numbers, known while the chunk's logits are at hand: it is kept instead of them,
    and the backward is one multiplication, with neither the logits saved nor the vocabulary's product done again."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, head: LogitHead, tokens: Tensor, temperature: float) -> Tensor:
        logprobs, slopes = [], []
        for h, t in _chunks(head, states, tokens):
            values, logits, probabilities = _chunk_logprobs(h, head, t, temperature)
            slope = probabilities.neg_()
            slope.scatter_add_(-1, t.unsqueeze(-1), torch.ones_like(values).unsqueeze(-1))
            logprobs.append(values.float())
            slopes.append(head.pull_back(slope, logits) / temperature)
        ctx.save_for_backward(torch.cat(slopes))
        ctx.dtype = states.dtype
        return torch.cat(logprobs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (slopes,) = ctx.saved_tensors
        return (slopes * gradients[0].unsqueeze(-1)).to(ctx.dtype), None, None, None


def _chunk_logprobs(states: Tensor, head: LogitHead, tokens: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """(n,) log-probs, (n, V) logits and (n, V) probabilities."""
    logits = head.logits(states)
    scaled = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    everything = scaled.log_softmax(-1)
    return everything.gather(-1, tokens.unsqueeze(-1)).squeeze(-1), logits, everything.exp_()


def _chunks(head: LogitHead, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
    vocabulary = tensors[0].shape[-1] if head.weight is None else head.weight.shape[0]
    rows = max(1, CHUNK_BYTES // (4 * vocabulary))
    return list(zip(*(tensor.split(rows) for tensor in tensors), strict=True))
