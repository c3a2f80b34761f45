"""Attention over short rows on CPUs: three batched products and a softmax.

torch 2.13's fused kernel is slow there. Measured for 8 rows of 99 tokens, 9 heads of 64, on two
Zen 5 cores:

- bfloat16: 1.1 ms forward and 0.9 ms backward, against torch's 1.8 and 9.7 ms.
- float32: 1.4 and 2.7 ms, against torch's 1.9 and 3.8 ms.

Longer rows use torch's kernel, which does not keep the (L, L) probabilities.

R rows, L tokens, H heads, K key–value heads, E size of a head.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

SHORT = 256
NAME = "raywarp_short_rows"
# The mask already contains the sliding window.
_NEUTRAL_OPTIONS = {
    "scaling",
    "dropout",
    "is_causal",
    "sliding_window",
    "position_ids",
    "use_cache",
}
# The options that torch's kernel respects, as transformers 5.19 calls it.
KNOWN_OPTIONS = _NEUTRAL_OPTIONS | {
    "position_bias",
    "cache",
    "output_attentions",
}


def attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Return the attended values, with the interface of transformers' attention functions.

    Args:
        module: the attention layer.
        query: (R, H, L, E).
        key, value: (R, K, L, E).
        attention_mask: boolean or additive; None for causal attention.
        options: those of transformers. Unusual ones make torch's kernel run instead.

    Returns:
        (R, L, H, E), and None in place of the probabilities.
    """
    unusual = options.get("dropout") or any(
        value is not None for name, value in options.items() if name not in _NEUTRAL_OPTIONS
    )
    if attention_mask is not None:  # unusual: one for each head, or trained (Doge)
        unusual = unusual or attention_mask.shape[1] > 1 or attention_mask.requires_grad
    causal = attention_mask is not None or options.get(
        "is_causal", getattr(module, "is_causal", True)
    )
    if unusual or not causal or query.shape[2] != key.shape[2] or query.shape[2] > SHORT:
        result: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, **options
        )
        return result
    if attention_mask is None:
        length = query.shape[2]
        attention_mask = torch.ones(length, length, dtype=torch.bool).tril()[None, None]
    if attention_mask.dtype == torch.bool:
        attention_mask = torch.zeros(attention_mask.shape).masked_fill_(
            ~attention_mask, torch.finfo(torch.float32).min
        )
    scale = options.get("scaling") or query.shape[-1] ** -0.5
    attended: Tensor = _Attention.apply(query, key, value, attention_mask, scale)  # type: ignore[no-untyped-call]
    return attended.transpose(1, 2).contiguous(), None


class _Attention(torch.autograd.Function):
    """The short-row kernel.

    Scores are float32 in any precision. The backward pass uses the probabilities, which are kept in
    the precision of the values.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float
    ) -> Tensor:
        (rows, heads, length, _), groups = query.shape, key.shape[1]
        wide = torch.promote_types(query.dtype, torch.float32)
        # Heads that share a key form one long query, so keys are not repeated.
        scores = torch.bmm(
            _stacked(query, groups).to(wide) * scale, _stacked(key, groups).to(wide).transpose(1, 2)
        )
        scores = scores.view(rows, groups, heads // groups, length, length).add_(mask.unsqueeze(2))
        probabilities = scores.softmax(-1).to(value.dtype).view(rows * groups, -1, length)
        ctx.save_for_backward(query, key, value, probabilities)
        ctx.scale = scale
        return torch.bmm(probabilities, _stacked(value, groups)).view(
            rows, heads, length, value.shape[-1]
        )

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, probabilities = ctx.saved_tensors
        groups = key.shape[1]
        grad = _stacked(gradients[0], groups)
        grad_value = torch.bmm(probabilities.transpose(1, 2), grad)
        grad_probabilities = torch.bmm(grad, _stacked(value, groups).transpose(1, 2))
        grad_scores = (
            torch._softmax_backward_data(grad_probabilities, probabilities, -1, probabilities.dtype)
            * ctx.scale
        )
        grad_query = torch.bmm(grad_scores, _stacked(key, groups))
        grad_key = torch.bmm(grad_scores.transpose(1, 2), _stacked(query, groups))
        return (
            grad_query.view(query.shape),
            grad_key.view(key.shape),
            grad_value.view(value.shape),
            None,
            None,
        )


def _stacked(heads: Tensor, groups: int) -> Tensor:
    """Reshape (R, H, L, E) → (R·K, H/K·L, E)."""
    return heads.reshape(heads.shape[0] * groups, -1, heads.shape[-1])


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)
