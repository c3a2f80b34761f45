"""What a causal LM of transformers allows: states before the head's product, and shared prompts.

The class of a model shows neither, so both are tried when the model is loaded. Where one fails, the
plain way is used.
"""

import functools
import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from raywarp.model.attention import SHARED_ROWS, block_mask, dense_mask
from raywarp.model.attention_choice import (
    attentions_for_shared_rows,
    choose_attention,
    set_attention,
)
from raywarp.model.batches import Batch, MicroBatch, micro_batches
from raywarp.model.head import LogitHead
from raywarp.model.lengths import Lengths
from raywarp.model.probe import check_range, close, is_local, probe, single
from raywarp.model.quantised import QuantisedLinear

_PLAIN_HEAD = LogitHead(None)
_ATTENTION_SPEED = 0.25  # of attention's small products, relative to a layer's large ones


def last_states(model: Any, part: MicroBatch, head: LogitHead, lengths: Lengths) -> Tensor:
    """Return the (n, D) states that the head turns into the response tokens' logits.

    With the plain head, the states are the logits themselves.
    """
    if lengths.limits.lowest is None:
        return _pass(model, part, head)
    chosen, found = [], []
    for tokens, piece in lengths.passes(part):
        lengths.restore()
        chosen.append(tokens)
        found.append(_pass(model, piece, head))
    return torch.cat(found)[torch.cat(chosen).argsort()]


def _pass(model: Any, part: MicroBatch, head: LogitHead) -> Tensor:
    arguments: dict[str, Any] = {}
    if part.segments is not None:
        blocks = model.config._attn_implementation == SHARED_ROWS
        mask = block_mask(part.segments) if blocks else dense_mask(part.segments, model.dtype)
        arguments = {"attention_mask": mask, "position_ids": part.positions}
    if head.weight is None:
        states = model(input_ids=part.input_ids, use_cache=False, **arguments).logits
    else:
        states = model.base_model(
            input_ids=part.input_ids, use_cache=False, **arguments
        ).last_hidden_state
    predicting: Tensor = states.flatten(0, 1)[part.sources]
    return predicting


@torch.no_grad()
def find_head(model: Any, lengths: Lengths) -> LogitHead:
    """Return the model's head on its backbone's last hidden states.

    Where the head does more than a product with a scale or a soft cap, return the plain head. The
    whole model then gives the logits, for all positions of a micro-batch at once.
    """
    linear, config = model.get_output_embeddings(), model.config.get_text_config()
    if not isinstance(linear, torch.nn.Linear) or model.base_model is model:
        return _PLAIN_HEAD
    # Cohere has the first, Granite the second
    scale = (getattr(config, "logit_scale", None) or 1.0) / (
        getattr(config, "logits_scaling", None) or 1.0
    )
    head = LogitHead(
        linear.weight, linear.bias, scale, getattr(config, "final_logit_softcapping", None)
    )
    (part,) = micro_batches(single(probe(model), 2))
    try:
        states = last_states(model, part, head, lengths)
    except (AttributeError, TypeError):
        return _PLAIN_HEAD
    if states.dtype != linear.weight.dtype:  # Mamba has float32 states and a bfloat16 head
        return _PLAIN_HEAD
    return (
        head
        if close(head.logits(states), last_states(model, part, _PLAIN_HEAD, lengths))
        else _PLAIN_HEAD
    )


def choose_and_set_attention(model: Any, name: str, head: LogitHead, lengths: Lengths) -> None:
    """Set the fastest attention that agrees with the model's eager code on single sequences.

    See choose_attention.

    Raises:
        ConfigError: as choose_attention does, or float16 is too narrow for the model.
    """
    batch = probe(model)
    if model.dtype == torch.float16:  # first, since states that are not finite agree with none
        _check_logits(model, name, batch, lengths)
    (part,) = micro_batches(batch)

    def one_by_one() -> Tensor:
        return torch.cat(
            [
                last_states(model, micro_batches(single(batch, n))[0], head, lengths)
                for n in part.completions.tolist()
            ]
        )

    choose_attention(model, name, one_by_one, lambda: last_states(model, part, head, lengths))


@torch.no_grad()
def _check_logits(model: Any, name: str, batch: Batch, lengths: Lengths) -> None:
    """Check the largest logit of each token. A model may mask tokens by minus infinity."""
    (longest,) = micro_batches(single(batch, 0))
    logits = last_states(model, longest, _PLAIN_HEAD, lengths)
    check_range(name, model.dtype, logits.amax(-1))


@torch.no_grad()
def pairs_per_token(model: Any, head: LogitHead, lengths: Lengths) -> float | None:
    """Return how many query–key pairs of attention cost as much as one token of everything else.

    Returns:
        None where completions cannot share a row.
    """
    config = model.config.get_text_config()
    # Our own mask would replace the mask of a window.
    if is_local(model.config) or lengths.limits.lowest is not None:
        return None
    weights = sum(
        p.numel()
        for name, p in model.base_model.named_parameters()
        if p.ndim > 1 and "embed" not in name and "wte" not in name
    ) + sum(
        math.prod(layer.shape)
        for layer in model.base_model.modules()
        if isinstance(layer, QuantisedLinear)
    )
    cost: float = weights / config.num_hidden_layers / (2 * config.hidden_size) * _ATTENTION_SPEED
    batch = probe(model)
    (apart,), (together,) = micro_batches(batch), micro_batches(batch, pairs_per_token=1e9)
    separate = _in_order(apart, last_states(model, apart, head, lengths))
    for name in (names := attentions_for_shared_rows(model)):
        set_attention(model, name)
        try:
            shared = last_states(model, together, head, lengths)
        except Exception:  # the model's own code may not know this mask; any exception means no
            continue
        if close(_in_order(together, shared), separate):
            return cost
    set_attention(model, names[-1])
    return None


def _in_order(part: MicroBatch, states: Tensor) -> Tensor:
    """Return the (n, D) states of a micro-batch, in the order of the batch's completions."""
    rows = torch.repeat_interleave(
        part.completions, part.padded(torch.ones(len(states), device=states.device)).sum(-1).long()
    )
    return states[rows.argsort(stable=True)]


def keep_layers_unscaled(model: Any) -> None:
    """Turn off RWKV's rescaling.

    In evaluation, RWKV divides some weights in place, against overflow in float16. It would not
    divide what an adapter adds to them.
    """
    if getattr(model.config, "rescale_every", 0):
        model.config.rescale_every = 0


def checkpoint_blocks(model: torch.nn.Module) -> None:
    """Make each block keep only its input for the backward pass.

    transformers' own switch works only in training mode, which turns dropout on again.
    """
    for block in model.modules():
        if isinstance(block, GradientCheckpointingLayer):
            forward = functools.partial(
                checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False
            )
            block.forward = forward
