"""Attention of our own: over short rows on CPUs, and over rows of several completions on GPUs.

For short rows it is three batched products and a softmax, since torch 2.13's fused kernel is slow
there. Measured for 8 rows of 99 tokens, 9 heads of 64, on two Zen 5 cores:

- bfloat16: 1.1 ms forward and 0.9 ms backward, against torch's 1.8 and 9.7 ms.
- float32: 1.4 and 2.7 ms, against torch's 1.9 and 3.8 ms.

Longer rows use torch's kernel, which does not keep the (L, L) probabilities.

On a GPU, rows of several completions use FlexAttention, which needs no (L, L) mask.

R rows, L tokens, H heads, K key–value heads, E size of a head.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

SHORT = 256
NAME, SHARED_ROWS = "raywarp_short_rows", "raywarp_shared_rows"
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


def attend_in_shared_rows(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | BlockMask | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Return what `attend` does, by FlexAttention under a BlockMask, else by torch's kernel."""
    blocks = isinstance(attention_mask, BlockMask)
    kernel: Any = flex_attention_forward if blocks else sdpa_attention_forward
    attended, _ = kernel(module, query, key, value, attention_mask, **options)
    return attended, None


def block_mask(segments: Tensor) -> BlockMask:
    """Return the mask of (R, L) segments (see MicroBatch) as blocks."""

    def visible(row: Tensor, _: Tensor, one: Tensor, other: Tensor) -> Tensor:
        segment = segments[row, other]
        return (one >= other) & ((segment == segments[row, one]) | (segment == 0))

    rows, length = segments.shape
    return create_block_mask(visible, rows, None, length, length, segments.device)


def dense_mask(segments: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the mask of (R, L) segments as (R, 1, L, L) numbers that are added to scores."""
    length, theirs = segments.shape[1], segments[:, None, None, :]
    causal = torch.ones(length, length, dtype=torch.bool, device=segments.device).tril()
    visible = causal & ((theirs == segments[:, None, :, None]) | (theirs == 0))
    hidden = torch.zeros(visible.shape, dtype=dtype, device=segments.device)
    return hidden.masked_fill_(~visible, torch.finfo(dtype).min)


def blocks_train(config: Any, dtype: torch.dtype, device: torch.device) -> bool:
    """Return whether FlexAttention gives the dense mask's values and gradients on this device.

    Args:
        config: of a language model of transformers.
        dtype: of its numbers.
        device: of its weights.
    """
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    g = torch.Generator().manual_seed(0)
    made = [torch.randn(2, n, 200, size, generator=g) for n in (heads, groups, groups)]
    segments = torch.tensor([[0] * 120 + [1] * 40 + [2] * 40, [0] * 150 + [1] * 40 + [-1] * 10])
    module, found = torch.nn.Identity(), []
    vars(module)["num_key_value_groups"] = heads // groups
    for mask in (block_mask(segments.to(device)), dense_mask(segments.to(device), dtype)):
        q, k, v = (tensor.to(device, dtype).requires_grad_() for tensor in made)
        try:
            with torch.enable_grad():
                attended, _ = attend_in_shared_rows(module, q, k, v, mask, scaling=size**-0.5)
                loss = attended[segments.to(device) >= 0].square().sum()
                gradients = torch.autograd.grad(loss, (q, k, v))
        except Exception:  # any exception means no, as in the probes of a model
            return False
        found.append(torch.cat([gradient.flatten().double() for gradient in gradients]))
    one, other = found
    return float((one - other).norm() / other.norm()) < (1e-4 if dtype == torch.float32 else 0.02)


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
AttentionInterface.register(SHARED_ROWS, attend_in_shared_rows)
AttentionMaskInterface.register(SHARED_ROWS, sdpa_mask)
