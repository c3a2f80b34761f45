"""Shapes of well-known models, for `raywarp plan` on machines that cannot reach the hub.

They are copied from the models' config.json files on the Hugging Face hub, as far as they decide
memory. A run reads the model's own files.
"""

from typing import Any

_LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 128256,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rms_norm_eps": 1e-5,
}
_QWEN: dict[str, Any] = {
    "model_type": "qwen2",
    "vocab_size": 151936,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
}
_MISTRAL: dict[str, Any] = {
    "model_type": "mistral",
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 32768,
}


def _sizes(
    hidden: int, intermediate: int, layers: int, heads: int, **others: Any
) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "tie_word_embeddings": False,
        **others,
    }


_LLAMA_1B = {
    **_LLAMA,
    **_sizes(
        2048, 8192, 16, 32, head_dim=64, max_position_embeddings=131072, tie_word_embeddings=True
    ),
}
_LLAMA_3B = {
    **_LLAMA,
    **_sizes(3072, 8192, 28, 24, max_position_embeddings=131072, tie_word_embeddings=True),
}
_LLAMA_8B = {**_LLAMA, **_sizes(4096, 14336, 32, 32, max_position_embeddings=131072)}
_LLAMA_70B = {**_LLAMA, **_sizes(8192, 28672, 80, 64, max_position_embeddings=131072)}
_QWEN_HALF_B = {
    **_QWEN,
    **_sizes(896, 4864, 24, 14, num_key_value_heads=2, tie_word_embeddings=True),
}
_QWEN_1_5B = {
    **_QWEN,
    **_sizes(1536, 8960, 28, 12, num_key_value_heads=2, tie_word_embeddings=True),
}
_QWEN_7B = {**_QWEN, **_sizes(3584, 18944, 28, 28, num_key_value_heads=4, vocab_size=152064)}
_MISTRAL_7B = {**_MISTRAL, **_sizes(4096, 14336, 32, 32, vocab_size=32768)}
_QWEN3: dict[str, Any] = {
    **_QWEN,
    "model_type": "qwen3",
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
}
_QWEN3_0_6B = {**_QWEN3, **_sizes(1024, 3072, 28, 16, tie_word_embeddings=True)}
_QWEN3_8B = {**_QWEN3, **_sizes(4096, 12288, 36, 32)}
_QWEN3_32B = {**_QWEN3, **_sizes(5120, 25600, 64, 64)}
_GPT2: dict[str, Any] = {
    "model_type": "gpt2",
    "n_embd": 768,
    "n_layer": 12,
    "n_head": 12,
    "n_positions": 1024,
    "vocab_size": 50257,
}

CONFIGS: dict[str, dict[str, Any]] = {
    "meta-llama/Llama-3.1-8B": _LLAMA_8B,
    "meta-llama/Llama-3.1-8B-Instruct": _LLAMA_8B,
    "meta-llama/Llama-3.1-70B-Instruct": _LLAMA_70B,
    "meta-llama/Llama-3.2-1B": _LLAMA_1B,
    "meta-llama/Llama-3.2-1B-Instruct": _LLAMA_1B,
    "meta-llama/Llama-3.2-3B-Instruct": _LLAMA_3B,
    "Qwen/Qwen2.5-0.5B-Instruct": _QWEN_HALF_B,
    "Qwen/Qwen2.5-1.5B-Instruct": _QWEN_1_5B,
    "Qwen/Qwen2.5-7B-Instruct": _QWEN_7B,
    "Qwen/Qwen3-0.6B": _QWEN3_0_6B,
    "Qwen/Qwen3-8B": _QWEN3_8B,
    "Qwen/Qwen3-32B": _QWEN3_32B,
    "mistralai/Mistral-7B-Instruct-v0.3": _MISTRAL_7B,
    "openai-community/gpt2": _GPT2,
    "lvwerra/gpt2-imdb": _GPT2,
    "Skywork/Skywork-Reward-V2-Llama-3.2-1B": _LLAMA_1B,
}


def known_config(name: str) -> Any:
    """Return transformers' configuration of a hub id in the table; None for any other name."""
    from transformers import AutoConfig

    if name not in CONFIGS:
        return None
    settings = dict(CONFIGS[name])
    return AutoConfig.for_model(settings.pop("model_type"), **settings)
