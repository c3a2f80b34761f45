"""The shapes of a model and its adapters without its weights: transformers' own model, on torch's meta device."""

from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from raywarp.adapted_model import replace_targets
from raywarp.adapters import block_of
from raywarp.attention import NAME as SHORT_ROWS
from raywarp.attention import SHORT
from raywarp.config import LoraConfig
from raywarp.memory import Shapes


def model_shapes(
    model_config: Any,
    lora: LoraConfig,
    dtype: str = "float32",
    rows: int = 0,
    length: int = 0,
    gpu: bool = False,
    trust_remote_code: bool = False,
) -> Shapes:
    """Shapes of a causal language model.

    Args:
        model_config: transformers' configuration.
        rows, length: of the micro-batch whose activations are counted; 0 leaves them out.

    Raises:
        ConfigError: lora.target_modules does not fit the model.
    """
    with torch.device("meta"):
        base: Any = AutoModelForCausalLM.from_config(model_config, dtype=getattr(torch, dtype), trust_remote_code=trust_remote_code)
    base.requires_grad_(False).eval()
    parameters = sum(parameter.numel() for parameter in base.parameters())
    _, layers = replace_targets(base, lora)
    adapted = {name: (layer.weight.shape[0], layer.weight.shape[1]) for name, layer in layers.items()}
    blocks = {block_of(name) for name in adapted}
    in_blocks = sum(p.numel() for name, p in base.named_parameters() if block_of(name.rpartition(".")[0]) in blocks)
    text = model_config.get_text_config()
    heads = text.num_attention_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // heads
    saved = 0
    if rows:
        if not gpu and length <= SHORT and getattr(base, "_supports_attention_backend", False):
            base.set_attn_implementation(SHORT_ROWS)
        saved = _saved_bytes(base, layers, lora, rows, length)
    return Shapes(
        parameters=parameters,
        adapted=adapted,
        block_parameters=in_blocks,
        kv_numbers=2 * text.num_hidden_layers * (getattr(text, "num_key_value_heads", None) or heads) * size,
        hidden=text.hidden_size,
        layers=text.num_hidden_layers,
        vocabulary=text.vocab_size,
        saved_bytes=saved,
    )


def classifier_parameters(model_config: Any) -> int:
    """Numbers in a sequence classifier with one label."""
    model_config.num_labels = 1
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in AutoModelForSequenceClassification.from_config(model_config).parameters())


def _saved_bytes(base: Any, layers: Any, lora: LoraConfig, rows: int, length: int) -> int:
    """Bytes that autograd keeps of one trained pass through the backbone: each storage once, weights not counted."""
    weights = {parameter.untyped_storage()._cdata for parameter in base.parameters()}
    storages: dict[int, tuple[Any, int]] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            storages[storage._cdata] = (storage, storage.nbytes())  # kept alive, so that no other gets its place
        return tensor

    for layer in layers.values():
        layer.add("policy", lora.rank, 1.0)
        layer.activate(["policy"], "policy")
        layer.adapters["policy"].A.requires_grad_(lora.init != "frozen")
        layer.adapters["policy"].B.requires_grad_()
    with torch.device("meta"), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        ids, positions = torch.zeros(2, rows, length, dtype=torch.long)
        mask = torch.zeros(rows, 1, length, length, dtype=base.dtype)  # given, so that no code looks at values, of which there are none
        base.base_model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False)
    return sum(size for _, size in storages.values())
