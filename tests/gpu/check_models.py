"""Random models for the GPU check, and their log-probs by other code than the trainer's."""

from pathlib import Path
from typing import Any

# hidden, layers, heads, key-value heads, inner, vocabulary, tied; as Qwen3-0.6B, Qwen2.5-1.5B and
# Llama-3.1-8B
SHAPES = {
    "0.6B": (1024, 28, 16, 8, 3072, 151_936, True),
    "1.5B": (1536, 28, 12, 2, 8960, 151_936, True),
    "8B": (4096, 32, 32, 8, 14_336, 128_256, False),
    "tiny": (64, 2, 2, 1, 96, 512, True),
}


def save_model(folder: Path, shape: str, device: str, layers: int | None = None) -> str:
    """Save a random Llama of a shape, without a tokenizer. Its bfloat16 numbers fit float16."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, depth, heads, kv_heads, inner, vocabulary, tied = SHAPES[shape]
    config = LlamaConfig(
        hidden_size=hidden,
        num_hidden_layers=layers or depth,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=inner,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
        max_position_embeddings=2048,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.02 if hidden > 64 else 0.2,
        dtype=torch.bfloat16,
    )
    torch.manual_seed(0)
    with torch.device(device):
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return str(folder)


def round_by_bitsandbytes(model: Any) -> None:
    """Quantise and dequantise the matrices of a model's blocks, on the CPU."""
    import torch
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    for layer in model.base_model.modules():
        if isinstance(layer, torch.nn.Linear):
            weight = layer.weight.data.to("cpu", torch.bfloat16)
            codes, state = quantize_4bit(weight, blocksize=64, quant_type="nf4")
            layer.weight.data.copy_(dequantize_4bit(codes, state))


def logprobs_of(model: Any, probe: Any) -> list[float]:
    """Return a plain model's log-probs of a probe's scored tokens."""
    import torch

    rows = []
    with torch.no_grad():
        for row in probe.sequences:
            ids = torch.tensor([row], device=model.device)
            logits = model(ids).logits[0, :-1].float().log_softmax(-1)
            rows.append(logits.gather(-1, ids[0, 1:, None])[:, 0].tolist())
    found: list[float] = probe.scored(rows)
    return found
