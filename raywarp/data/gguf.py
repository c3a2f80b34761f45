"""The conversion of SmolLM2's GGUF file to what transformers and vLLM load."""

from pathlib import Path
from typing import Any

# The GGUF file's metadata say this; the file is pinned by its hash.
SMOLLM2_SHAPE: dict[str, Any] = {
    **{
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
    },
    **{
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
    },
    **{
        "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    },
}
SMOLLM2_TOKENS = {
    "bos_token": "<|im_start|>",
    "eos_token": "<|im_end|>",
    "pad_token": "<|im_end|>",
    "unk_token": "<|endoftext|>",
}


def convert_weights(gguf_file: Path, folder: Path) -> None:
    """Write config.json, generation_config.json and model.safetensors (bfloat16).

    The gguf package reads the file. transformers' loader (5.19) parses it three times and takes
    three times as long.
    """
    import torch
    from gguf import MODEL_ARCH, GGUFReader, dequantize, get_tensor_name_map
    from safetensors.torch import save_file
    from transformers import GenerationConfig, LlamaConfig

    config = LlamaConfig(**SMOLLM2_SHAPE, architectures=["LlamaForCausalLM"], dtype="bfloat16")
    config.save_pretrained(folder)
    GenerationConfig(
        **{key: SMOLLM2_SHAPE[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    ).save_pretrained(folder)
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    names = _hf_names(
        get_tensor_name_map(MODEL_ARCH.LLAMA, config.num_hidden_layers), config.num_hidden_layers
    )
    weights = {}
    for tensor in GGUFReader(gguf_file).tensors:
        weight = torch.tensor(dequantize(tensor.data, tensor.tensor_type), dtype=torch.bfloat16)
        # llama.cpp interleaves the two halves of each rotary head
        if count := heads.get(tensor.name.split(".")[-2]):
            weight = (
                weight.view(count, -1, 2, config.hidden_size).transpose(1, 2).reshape(weight.shape)
            )
        weights[names[tensor.name.removesuffix(".weight")]] = weight
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)


def _hf_names(name_map: Any, layers: int) -> dict[str, str]:
    """Return GGUF's tensor names, without suffix → Hugging Face's."""
    attention = [f"self_attn.{part}_proj" for part in "qkvo"]
    parts = [
        *attention,
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
        "input_layernorm",
        "post_attention_layernorm",
    ]
    modules = [
        "model.embed_tokens",
        "model.norm",
        *(f"model.layers.{layer}.{part}" for layer in range(layers) for part in parts),
    ]
    return {name_map.get_name(module): f"{module}.weight" for module in modules}


def convert_tokenizer(gguf_file: Path, folder: Path) -> None:
    """Write the tokenizer's files, with its chat template."""
    from tokenizers import pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    read = PreTrainedTokenizerFast.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name)
    backend = read.backend_tokenizer
    # SmolLM2 splits numbers into digits. transformers 5.19 does not know GGUF's pre-tokenizer
    # "smollm" and omits that step.
    digits, byte_level = (
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, model_max_length=8192, **SMOLLM2_TOKENS
    )
    tokenizer.chat_template = read.chat_template
    tokenizer.save_pretrained(folder)
