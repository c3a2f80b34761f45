"""Log-probs and KL from hidden states, computed over a few rows of logits at a time.

No (n, V) tensor exists, and none is saved for the backward pass.

n response tokens, D hidden size, V vocabulary.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from raywarp.model.linear import product

# Bytes of float32 logits in one product, and of those that are normalised at a time. On a CPU the
# first is about what the last-level cache holds, and every pass finds the second in it.
CHUNK_BYTES, SLICE_BYTES = 32 << 20, 4 << 20
# Both elsewhere, where few large kernels are faster: 65,536 tokens of a vocabulary of 128,256 take
# 2,271 kernels instead of 104,112.
GPU_BYTES = 256 << 20
_BOOSTED = 2.0**15  # at most, of float16's 65,504


def chunk_bytes(device: str) -> int:
    """Return the bytes of float32 logits in one product on a kind of device, such as "cpu"."""
    return CHUNK_BYTES if device == "cpu" else GPU_BYTES


@dataclass(frozen=True)
class LogitHead:
    """How a model turns hidden states into logits: softcap·tanh(scale·(h·Wᵀ + b) / softcap).

    Attributes:
        weight: (V, D), frozen. None means that the states are already logits.
        bias: (V,) or None.
        scale: of the logits.
        softcap: None for no tanh.
    """

    weight: Tensor | None
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, states: Tensor) -> Tensor:
        """Return (n, V) logits from (n, D) states, in the states' dtype."""
        if self.weight is None:
            return states
        logits = product(states, self.weight, self.bias)
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.softcap is None else (logits / self.softcap).tanh() * self.softcap

    @functools.cached_property
    def largest_weight(self) -> float:
        """max |W|."""
        return 1.0 if self.weight is None else float(self.weight.abs().max())

    def boost(self, dtype: torch.dtype, temperature: float) -> float:
        """Return the power of two by which derivatives of log-probs are multiplied.

        In float16, those of improbable tokens would be rounded to 0. The derivatives by the states
        are at most 2·max |W|·scale / temperature, and must not overflow.

        Args:
            dtype: of the derivatives.
            temperature: of the sampling.
        """
        if dtype != torch.float16:
            return 1.0
        largest = max(1.0, 2 * self.largest_weight) * self.scale / temperature
        return 2.0 ** math.floor(math.log2(_BOOSTED / largest))

    def pull_back(self, gradient: Tensor) -> Tensor:
        """Return the (n, D) gradient of the states from the (n, V) gradient of the product h·Wᵀ."""
        return gradient if self.weight is None else product(gradient, self.weight.T)


def chunked_logprobs(states: Tensor, head: LogitHead, tokens: Tensor, temperature: float) -> Tensor:
    """Return log π(token) at the sampling temperature, differentiable in the states.

    Args:
        states: (n, D).
        head: turns states into logits.
        tokens: (n,).
        temperature: of the sampling.

    Returns:
        (n,) float32.
    """
    if states.requires_grad and torch.is_grad_enabled():
        logprobs: Tensor = _TokenLogprobs.apply(states, head, tokens, temperature)  # type: ignore[no-untyped-call]
        return logprobs
    return torch.cat(
        [_chunk_logprobs(h, head, t, temperature)[0] for h, t in _chunks(head, states, tokens)]
    )


@torch.no_grad()
def chunked_kl(
    states: Tensor, reference_states: Tensor, head: LogitHead, temperature: float
) -> Tensor:
    """Return the (n,) KL(π ‖ π_ref) in nats at each token; see losses.full_vocabulary_kl.

    Args:
        states, reference_states: (n, D) each.
        head: turns states into logits.
        temperature: of the sampling.
    """
    from raywarp.algorithm import losses

    pairs = _chunks(head, states, reference_states)
    return torch.cat(
        [
            losses.full_vocabulary_kl(head.logits(h), head.logits(ref), temperature).float()
            for h, ref in pairs
        ]
    )


class _TokenLogprobs(torch.autograd.Function):
    """Log-probs that keep their derivative instead of the logits.

    d log π(token) / d state is a vector of D numbers, known while the chunk's logits exist. With it
    the backward pass is one multiplication. No logits are saved, and the vocabulary's product is
    not repeated.
    """

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, head: LogitHead, tokens: Tensor, temperature: float
    ) -> Tensor:
        chunks = [
            _chunk_logprobs(h, head, t, temperature, slopes=True)
            for h, t in _chunks(head, states, tokens)
        ]
        ctx.save_for_backward(torch.cat([slope for _, slope in chunks]))
        ctx.boost = head.boost(states.dtype, temperature)
        return torch.cat([logprobs for logprobs, _ in chunks])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (slopes,) = ctx.saved_tensors
        gradient = (gradients[0] / ctx.boost).to(slopes.dtype)
        return slopes * gradient.unsqueeze(-1), None, None, None


def _chunk_logprobs(
    states: Tensor, head: LogitHead, tokens: Tensor, temperature: float, slopes: bool = False
) -> tuple[Tensor, Tensor]:
    """Return (n,) float32 log-probs and, with `slopes`, their (n, D) derivatives by the states.

    The derivatives are multiplied by the head's boost. Without `slopes`, the second result has no
    meaning.
    """
    logits = head.logits(states)
    if slopes and head.weight is None:
        logits = logits.clone()  # since they are overwritten below
    boost, logprobs = head.boost(logits.dtype, temperature) if slopes else 1.0, []
    size = SLICE_BYTES if logits.device.type == "cpu" else GPU_BYTES
    rows = max(1, size // (4 * logits.shape[-1]))
    for part, chosen in zip(logits.split(rows), tokens.unsqueeze(-1).split(rows), strict=True):
        scaled = part.to(torch.promote_types(part.dtype, torch.float32), copy=True).div_(
            temperature
        )
        if not slopes:
            logprobs.append(scaled.log_softmax(-1).gather(-1, chosen).squeeze(-1).float())
            continue
        probabilities = scaled.softmax(-1)
        # The largest probability is 1 / Σ exp(x − max x). So the normaliser's logarithm needs no
        # second pass of exponentials.
        own = (
            scaled.gather(-1, chosen)
            - scaled.amax(-1, keepdim=True)
            + probabilities.amax(-1, keepdim=True).log()
        )
        logprobs.append(own.squeeze(-1).float())
        factor = boost * head.scale / temperature
        slope = probabilities.mul_(-factor).scatter_add_(-1, chosen, torch.full_like(own, factor))
        if head.softcap is not None:
            slope *= 1 - (part.to(slope.dtype) / head.softcap) ** 2
        part.copy_(slope)  # in place of the logits, which are no longer needed
    return torch.cat(logprobs), head.pull_back(logits) if slopes else logits


def _chunks(head: LogitHead, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
    vocabulary = tensors[0].shape[-1] if head.weight is None else head.weight.shape[0]
    rows = max(1, chunk_bytes(tensors[0].device.type) // (4 * vocabulary))
    return list(zip(*(tensor.split(rows) for tensor in tensors), strict=True))
