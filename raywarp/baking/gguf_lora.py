"""An adapter as a GGUF file, which llama.cpp loads beside a GGUF base with `--lora`.

llama.cpp has one alpha for a whole file, and scales each pair of factors by alpha over its rank.
So every pair gets the same rank, by columns of zeros, and alpha equals that rank: the scale is 1.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from raywarp.adapters.peft import AdapterFile
from raywarp.adapters.recipe import check_liti_rate
from raywarp.algorithm.factors import Factors
from raywarp.baking.bake import Dtype, check_unused, new_model
from raywarp.baking.base import Base, open_base
from raywarp.config.schema import ConfigError

FILE = "adapter.gguf"


class _Architecture(NamedTuple):
    """How llama.cpp's converter stores a class of transformers.

    Attributes:
        name: of its architecture in gguf.MODEL_ARCH.
        interleaved: whether the rows of q and k are reordered: llama.cpp rotates neighbours, and
            transformers the two halves of a head.
    """

    name: str
    interleaved: bool = False


# The converter changes no linear layer of these but for q and k. Its other classes are refused.
_ARCHITECTURES = {
    "LlamaForCausalLM": _Architecture("LLAMA", interleaved=True),
    "MistralForCausalLM": _Architecture("LLAMA", interleaved=True),
    "Qwen2ForCausalLM": _Architecture("QWEN2"),
    "Qwen3ForCausalLM": _Architecture("QWEN3"),
    "GemmaForCausalLM": _Architecture("GEMMA"),
    "Gemma2ForCausalLM": _Architecture("GEMMA2"),
    "Gemma3ForCausalLM": _Architecture("GEMMA3"),
}


def write_gguf(
    adapter: str | Path,
    out: str | Path,
    liti_rate: float = 1.0,
    dtype: Dtype = "auto",
    base: str | None = None,
    trust_remote_code: bool = False,
    allow_different_base: bool = False,
) -> Path:
    """Write η·ΔW to adapter.gguf in a new folder, and return the file.

    Args:
        dtype: of the factors: float32 (auto) or float16.
        adapter, out, liti_rate, base, trust_remote_code, allow_different_base: see bake.bake. Only
            the base's configuration is read.

    Raises:
        AdapterError: an adapter that is no plain B·A, or not whole.
        ConfigError: an architecture whose names or layout are not known exactly, another base, or
            an `out` that is in use.
    """
    check_liti_rate(liti_rate)
    if dtype == "bfloat16":
        raise ConfigError("the factors of a GGUF file are float32 or float16; set --dtype")
    check_unused(out)
    file = AdapterFile(adapter)
    opened = open_base(file, base, trust_remote_code, allow_different_base, weights=False)
    architecture = _architecture(opened)
    names = _tensor_names(opened, architecture, file)
    file.require_finite()
    with new_model(out) as folder:
        _write(file, folder / FILE, architecture, names, liti_rate, dtype == "float16", opened)
    return Path(out) / FILE


def _architecture(base: Base) -> _Architecture:
    (kind, *_) = base.config.architectures or ("a model without a class",)
    if kind not in _ARCHITECTURES:
        raise ConfigError(
            f"{base.what} is {kind}, whose layout in GGUF is not known exactly here, only that of"
            f" {', '.join(_ARCHITECTURES)}; use llama.cpp's convert_lora_to_gguf.py"
        )
    return _ARCHITECTURES[kind]


def _tensor_names(base: Base, architecture: _Architecture, file: AdapterFile) -> dict[str, str]:
    """Return module → name of its weight in GGUF.

    Raises:
        ConfigError: a module is not in the base, has another size there, or is a head that GGUF
            stores as the embedding.
    """
    from gguf import MODEL_ARCH, get_tensor_name_map

    model = next(base.skeletons())
    modules = dict(model.named_modules())
    arch = getattr(MODEL_ARCH, architecture.name)
    known = get_tensor_name_map(arch, base.config.num_hidden_layers)
    names = {}
    for module, size in file.sizes.items():
        weight = getattr(modules.get(module), "weight", None)
        if weight is None or tuple(weight.shape) != size:
            raise ConfigError(
                f"{file.name} does not fit {base.what}: {module} is {size} in the adapter and"
                f" {'not there' if weight is None else tuple(weight.shape)} in the base"
            )
        if weight is model.get_input_embeddings().weight:
            raise ConfigError(
                f"{module} of {base.what} is the embedding, too: llama.cpp has no head of its own"
                " to adapt; bake it into full weights instead"
            )
        name = known.get_name(f"{module}.weight", try_suffixes=(".weight",))
        if name is None:
            raise ConfigError(f"{module} of {base.what} has no name in GGUF")
        names[module] = name
    return names


def _write(
    file: AdapterFile,
    path: Path,
    architecture: _Architecture,
    names: dict[str, str],
    rate: float,
    half: bool,
    base: Base,
) -> None:
    from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, GGUFType, GGUFWriter, Keys

    rank = max(r for _, r, _ in file.shapes.values())
    writer = GGUFWriter(path, MODEL_ARCH_NAMES[getattr(MODEL_ARCH, architecture.name)])
    writer.add_type(GGUFType.ADAPTER)
    writer.add_string(Keys.Adapter.TYPE, "lora")
    writer.add_float32(Keys.Adapter.LORA_ALPHA, float(rank))
    for module, name in names.items():
        B, A = _padded(file.read(module), rank)
        if architecture.interleaved:
            B = interleaved(B, _heads(base.config, module))
        writer.add_tensor(f"{name}.lora_a", _numbers(A, half, module))
        writer.add_tensor(f"{name}.lora_b", _numbers(B * rate, half, module))
        file.release(module)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _padded(factors: Factors, rank: int) -> Factors:
    """Return the same product at a larger rank."""
    more = rank - factors.rank
    pad = torch.nn.functional.pad
    return Factors(pad(factors.B, (0, more)), pad(factors.A, (0, 0, 0, more)))


def _heads(config: Any, module: str) -> int | None:
    """Return the number of rotary heads in a module's rows; None if it has none."""
    heads: dict[str, int] = {
        "q_proj": config.num_attention_heads,
        "k_proj": config.num_key_value_heads or config.num_attention_heads,
    }
    return heads.get(module.rpartition(".")[2])


def interleaved(rows: Tensor, heads: int | None) -> Tensor:
    """Return the rows of each head in the order first, middle, second, middle + 1, …

    Args:
        rows: (heads · size, n), each head's first half before its second one.
        heads: None for rows that no rotation pairs.
    """
    if heads is None:
        return rows
    halves = rows.view(heads, 2, -1, rows.shape[1])
    return halves.transpose(1, 2).reshape(rows.shape)


def _numbers(factor: Tensor, half: bool, module: str) -> "np.ndarray[Any, Any]":
    numbers = factor.to(torch.float16 if half else torch.float32).contiguous()
    if not bool(numbers.isfinite().all()):
        raise ConfigError(f"{module} has numbers too large for float16; use float32")
    array: np.ndarray[Any, Any] = numbers.numpy().copy()
    return array
