"""What a causal LM of transformers lets us do: take its hidden states before the vocabulary's product, and let completions share a prompt.

Neither can be read off a model's class, so both are tried on a few tokens when it is loaded; where one fails, the plain way is taken.
"""

import functools
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from raywarp.batch import collate
from raywarp.completion import Completion
from raywarp.logit_head import LogitHead
from raywarp.packing import MicroBatch, micro_batches

_PLAIN = LogitHead(None)
_TOLERANCE = 0.02  # relative: far above bfloat16's rounding, far below what an ignored mask or scale does
_ATTENTION_SPEED = 0.25  # of attention's small products, relative to a layer's large ones


def last_states(model: Any, part: MicroBatch, head: LogitHead) -> Tensor:
    """(n, D) states that the head turns into the logits of the response tokens; the logits themselves where the head is the plain one."""
    arguments: dict[str, Any] = {}
    if part.visible is not None:
        hidden = torch.zeros(part.visible.shape, dtype=model.dtype, device=part.visible.device)
        hidden.masked_fill_(~part.visible, torch.finfo(model.dtype).min)
        arguments = {"attention_mask": hidden.unsqueeze(1), "position_ids": part.positions}
    if head.weight is None:
        states = model(input_ids=part.input_ids, use_cache=False, **arguments).logits
    else:
        states = model.base_model(input_ids=part.input_ids, use_cache=False, **arguments).last_hidden_state
    predicting: Tensor = states.flatten(0, 1)[part.sources]
    return predicting


@torch.no_grad()
def find_head(model: Any) -> LogitHead:
    """The model's head on its backbone's last hidden states, or the plain one (the whole model gives the logits, all positions of a
    micro-batch at once) where it does more than a product with a scale or a soft cap."""
    linear, config = model.get_output_embeddings(), model.config.get_text_config()
    if not isinstance(linear, torch.nn.Linear) or model.base_model is model:
        return _PLAIN
    scale = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)  # Cohere's, Granite's
    head = LogitHead(linear.weight, linear.bias, scale, getattr(config, "final_logit_softcapping", None))
    (part,) = micro_batches(_probe(model))
    try:
        states = last_states(model, part, head)
    except (AttributeError, TypeError):
        return _PLAIN
    return head if _close(head.logits(states), last_states(model, part, _PLAIN)) else _PLAIN


@torch.no_grad()
def pairs_per_token(model: Any, head: LogitHead) -> float | None:
    """How many query–key pairs of attention cost as much as one token of everything else; None where completions cannot share a row."""
    config = model.config.get_text_config()
    if getattr(config, "sliding_window", None):  # a mask of our own would take the place of the window
        return None
    weights = sum(p.numel() for name, p in model.base_model.named_parameters() if p.ndim > 1 and "embed" not in name and "wte" not in name)
    cost = weights / config.num_hidden_layers / (2 * config.hidden_size) * _ATTENTION_SPEED
    batch = _probe(model)
    (apart,), (together,) = micro_batches(batch), micro_batches(batch, pairs_per_token=1e9)
    try:
        shared = last_states(model, together, head)
    except Exception:  # a model's own code meets a mask that it may not know: whatever it raises means no
        return None
    return cost if _close(shared, last_states(model, apart, head)) else None


def checkpoint_blocks(model: torch.nn.Module) -> None:
    """A block keeps only its input for the backward. transformers' own switch works in training mode only, which brings dropout back."""
    for block in model.modules():
        if isinstance(block, GradientCheckpointingLayer):
            forward = functools.partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
            block.forward = forward


def _probe(model: Any) -> Any:
    """Two completions of one prompt, from whichever tokens the model has."""
    count = model.config.get_text_config().vocab_size
    ids = [n * 7919 % count for n in range(1, 12)]
    completions = [Completion(tuple(part), (0.0,) * len(part), "", False) for part in (ids[3:7], ids[7:])]
    return collate([ids[:3]] * 2, completions).to(model.device)


def _close(ours: Tensor, theirs: Tensor) -> bool:
    return bool((ours - theirs).abs().max() <= _TOLERANCE * theirs.abs().max())
