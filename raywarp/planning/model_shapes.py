"""Shapes of a model and its adapters, found without its weights.

transformers builds the model on torch's meta device, where tensors have shapes but no data.
"""

import contextlib
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from raywarp.algorithm.deltas import block_of
from raywarp.config.policies import LoraConfig
from raywarp.model.adapted import replace_targets
from raywarp.model.attention import NAME as SHORT_ROWS
from raywarp.model.attention import SHORT
from raywarp.model.attention_choice import (
    may_use_short_rows,
    options_that_sdpa_drops,
    set_attention,
)
from raywarp.model.linear import layer_sizes
from raywarp.model.targets import quantisable
from raywarp.planning.memory import Shapes


def model_shapes(
    model_config: Any,
    lora: LoraConfig,
    dtype: str = "float32",
    rows: int = 0,
    length: int = 0,
    gpu: bool = False,
    trust_remote_code: bool = False,
) -> Shapes:
    """Return the shapes of a causal language model with adapters.

    Args:
        model_config: transformers' configuration of the model.
        dtype: dtype of the base model.
        rows: completions of the micro-batch whose activations are counted; 0 counts none.
        length: tokens of a prompt and completion in that micro-batch.
        gpu: whether the policies are trained on GPUs.

    Raises:
        ConfigError: lora.target_modules does not fit the model.
    """
    with torch.device("meta"):
        base: Any = AutoModelForCausalLM.from_config(
            model_config, dtype=getattr(torch, dtype), trust_remote_code=trust_remote_code
        )
    base.requires_grad_(False).eval()
    parameters = sum(parameter.numel() for parameter in base.parameters())
    quantised = layer_sizes(base, quantisable(base))
    targets, layers = replace_targets(base, lora)
    adapted = {name: layer.shape for name, layer in layers.items()}
    blocks = {block_of(name) for name in adapted}
    in_blocks = sum(
        p.numel()
        for name, p in base.named_parameters()
        if block_of(name.rpartition(".")[0]) in blocks
    )
    text = model_config.get_text_config()
    # A state-space model has no heads. Its state is small compared with a KV cache.
    heads = getattr(text, "num_attention_heads", 0)
    size = getattr(text, "head_dim", None) or (text.hidden_size // heads if heads else 0)
    saved = 0
    if rows:
        _set_attention(base, gpu, length)
        saved = _saved_bytes(base, layers, lora, rows, length)
    return Shapes(
        parameters=parameters,
        adapted=adapted,
        block_parameters=in_blocks,
        kv_numbers=2
        * text.num_hidden_layers
        * (getattr(text, "num_key_value_heads", None) or heads)
        * size,
        hidden=text.hidden_size,
        layers=text.num_hidden_layers,
        vocabulary=text.vocab_size,
        saved_bytes=saved,
        left=targets.left,
        quantisable=quantised,
    )


def classifier_parameters(model_config: Any) -> int:
    """Return how many numbers a sequence classifier with one label has."""
    model_config.num_labels = 1
    with torch.device("meta"):
        return sum(
            parameter.numel()
            for parameter in AutoModelForSequenceClassification.from_config(
                model_config
            ).parameters()
        )


def _set_attention(base: Any, gpu: bool, length: int) -> None:
    """Set the attention that choose_attention would choose, as far as shapes alone decide it."""
    if base.config._attn_implementation != "sdpa":
        return
    dropped: set[str] = set()
    with (
        options_that_sdpa_drops(dropped),
        torch.device("meta"),
        contextlib.suppress(Exception),  # as in _saved_bytes
    ):
        _forward(base, 1, 2)
    if dropped:
        set_attention(base, "eager")
    elif not gpu and length <= SHORT and may_use_short_rows(base):
        set_attention(base, SHORT_ROWS)


def _forward(base: Any, rows: int, length: int) -> None:
    """Run one pass through the backbone on the meta device.

    Code that reads values fails there, because meta tensors have none.
    """
    for module in base.modules():
        if isinstance(kind := getattr(module, "rope_type", None), str):
            # The other types read the positions' values. The sizes are the same.
            module.rope_type = "default"
        elif isinstance(kind, dict):  # layer type → its rope type
            module.rope_type = dict.fromkeys(kind, "default")
    ids, positions = torch.zeros(2, rows, length, dtype=torch.long)
    # The mask is given, because transformers would make one from values.
    mask = torch.zeros(rows, 1, length, length, dtype=base.dtype)
    try:
        base.base_model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False)
    except Exception:  # the model accepts no such mask
        base.base_model(input_ids=ids, use_cache=False)


def _saved_bytes(base: Any, layers: Any, lora: LoraConfig, rows: int, length: int) -> int:
    """Return the bytes that autograd keeps for one trained pass through the backbone.

    Each storage counts once, and weights do not count. If the model's code fails without data, the
    estimate is twice the input and output of every adapted layer.
    """
    size: int = base.dtype.itemsize
    # In torch 2.13, fused experts run on the meta device only in bfloat16.
    for dtype in (base.dtype, torch.bfloat16):
        with contextlib.suppress(Exception):  # a model's own code may raise anything here
            return _kept_bytes(base.to(dtype), layers, lora, rows, length) * size // dtype.itemsize
    return 2 * rows * length * sum(sum(layer.weight.shape) for layer in layers.values()) * size


def _kept_bytes(base: Any, layers: Any, lora: LoraConfig, rows: int, length: int) -> int:
    """Return the bytes of all storages that autograd keeps in one pass, except those of weights."""
    weights = {parameter.untyped_storage()._cdata for parameter in base.parameters()}
    storages: dict[int, tuple[Any, int]] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            # The reference keeps the storage alive, so that no other one gets its address.
            storages[storage._cdata] = (storage, storage.nbytes())
        return tensor

    for layer in layers.values():
        layer.add("policy", lora.rank, 1.0)
        layer.activate(["policy"], "policy")
        layer.adapters["policy"].A.requires_grad_(lora.init != "frozen")
        layer.adapters["policy"].B.requires_grad_()
    with (
        torch.device("meta"),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        _forward(base, rows, length)
    return sum(size for _, size in storages.values())
