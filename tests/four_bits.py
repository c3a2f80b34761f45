"""A base in 4 bits as transformers and bitsandbytes have it, without this project's code."""

from pathlib import Path

import torch
from tiny_models import save_tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.integrations.bitsandbytes import dequantize_bnb_weight
from transformers.pytorch_utils import Conv1D


def of_bitsandbytes(folder: Path) -> dict[str, Tensor]:
    """Module → its (d_out, d_in) weight, as transformers and bitsandbytes dequantise it."""
    four_bits = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=four_bits, dtype=torch.bfloat16, device_map="cpu"
    )
    return {
        name: dequantize_bnb_weight(module.weight)
        for name, module in model.named_modules()
        if type(module).__name__ == "Linear4bit"
    }


def replaced(folder: Path, place: Path) -> Path:
    """The same model with bitsandbytes' weights in float32, as a model of its own."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for name, weight in of_bitsandbytes(folder).items():
        layer = model.get_submodule(name)
        layer.weight.data.copy_(weight.T if isinstance(layer, Conv1D) else weight)
    model.save_pretrained(place)
    save_tokenizer(place)
    return place
