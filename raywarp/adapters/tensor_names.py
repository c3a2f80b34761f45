"""The names of an adapter's tensors: which module and factor each is, and which are no factors.

Wrappers leave traces in names: torch.compile, DDP, FSDP, and PEFT's own adapter names. They change
nothing of ΔW and are taken off. What is not a factor is skipped where it changes nothing, and
refused with the reason otherwise.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from raywarp.algorithm.factors import AdapterError
from raywarp.algorithm.fitting import by_layer

PREFIX = "base_model.model."
_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_FACTOR = re.compile(
    re.escape(PREFIX) + r"(?P<module>.+)\.lora_(?P<letter>[AB])(\.(?P<adapter>[^.]+))?\.weight"
)
_ODD_TENSORS = {
    "lora_magnitude_vector": "DoRA's magnitudes are not linear in B·A; merge full weights instead",
    "lora_embedding_": "an embedding's adapter looks rows up instead of multiplying",
    ".lora_B.bias": "a trained bias (lora_bias) is not part of B·A",
    ".lora_bias": "a trained bias (lora_bias) is not part of B·A",
    ".modules_to_save.": "modules_to_save are trained in full, which is not part of B·A",
    "trainable_tokens_": "trained tokens are not part of B·A",
    "lora_down": "this is kohya's format; convert it to PEFT's first",
    "lora_up": "this is kohya's format; convert it to PEFT's first",
}
_MLX = re.compile(r".*\.lora_[ab]")
# Buffers that every model computes for itself.
_BUFFERS = ("rotary_emb.inv_freq",)
_EMBEDDINGS = ("embed_tokens.weight", "lm_head.weight", "wte.weight", "embed_in.weight")
MLX_ADAPTER = (
    "it is an MLX adapter; write lora_A = lora_aᵀ and lora_B = scale·lora_bᵀ under PEFT's names,"
    " with lora_alpha = r"
)


def tensor_name(module: str, letter: str) -> str:
    """Return the name that PEFT gives to a factor."""
    return f"{PREFIX}{module}.lora_{letter}.weight"


class Names(NamedTuple):
    """What an adapter's tensors are.

    Attributes:
        factors: module → the names of its A and B, in the order of the layers.
        copies: tensor → the weight of the base that it has to equal.
        skipped: tensors that change nothing.
    """

    factors: dict[str, tuple[str, str]]
    copies: dict[str, str]
    skipped: list[str]


def read_names(path: Path, shapes: Mapping[str, Sequence[int]]) -> Names:
    """Return what each tensor of an adapter is.

    Args:
        path: of the file, for the messages.
        shapes: name → shape of every tensor.

    Raises:
        AdapterError: a tensor that changes the model, and is no factor of a linear layer; factors
            without a partner; or those of two adapters.
    """
    found: dict[str, dict[str, str]] = {}
    others: dict[str, str] = {}
    adapters: dict[str, str] = {}
    for name in shapes:
        clean = _unwrapped(name)
        if match := _FACTOR.fullmatch(clean):
            known = found.setdefault(match["module"], {}).setdefault(match["letter"], name)
            adapters.setdefault(match["adapter"] or "", name)
            if known != name or len(adapters) > 1:
                raise AdapterError(
                    f"{path} holds more than one adapter: {min(known, *adapters.values())} and"
                    f" {name}; save the one that is meant with save_pretrained(selected_adapters=…)"
                )
        else:
            others[name] = clean
    copies, skipped = _no_factors(path, others, found.keys())
    if not found:
        raise AdapterError(f"{path} holds no LoRA factors")
    factors = {module: _pair(path, module, found[module]) for module in sorted(found, key=by_layer)}
    return Names(factors, copies, skipped)


def _unwrapped(name: str) -> str:
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    while parts[0] == "module" and len(parts) > 1:
        parts = parts[1:]
    return ".".join(parts)


def _pair(path: Path, module: str, names: Mapping[str, str]) -> tuple[str, str]:
    if missing := next((letter for letter in "AB" if letter not in names), None):
        raise AdapterError(
            f"{path}: {module} has no matching pair of lora_A and lora_B: lora_{missing} is missing"
        )
    return names["A"], names["B"]


def _no_factors(
    path: Path, others: Mapping[str, str], modules: Iterable[str]
) -> tuple[dict[str, str], list[str]]:
    """Return the copies of the base's weights, and the tensors that change nothing."""
    copies, skipped, known = {}, [], set(modules)
    for name, clean in others.items():
        short = clean.removeprefix(PREFIX)
        if clean.endswith(_BUFFERS):
            skipped.append(name)
        elif (frozen := _frozen(short, known)) or (
            clean.startswith(PREFIX) and short.endswith(_EMBEDDINGS)
        ):
            copies[name] = frozen or short
        else:
            raise AdapterError(f"{path}: tensor {name} cannot be averaged: {_reason(clean)}")
    return copies, skipped


def _frozen(name: str, modules: set[str]) -> str | None:
    """Return the weight of the base that a tensor below an adapted module is a copy of."""
    module, found, rest = name.partition(".base_layer.")
    if not found or module not in modules or "lora_" in rest:
        return None
    return f"{module}.{rest}"


def _reason(name: str) -> str:
    if _MLX.fullmatch(name):
        return MLX_ADAPTER
    for part, why in _ODD_TENSORS.items():
        if part in name:
            return why
    if ".lora_A" in name or ".lora_B" in name:
        if not name.startswith(PREFIX):
            return (
                f"its name lacks PEFT's prefix {PREFIX}; save the adapter with PEFT's"
                " save_pretrained"
            )
        if name.endswith((".lora_A", ".lora_B")):
            return "it adapts a bare parameter (target_parameters), which is not covered"
    return "it is not a factor of a linear layer"


def factor_shape(
    path: Path, module: str, A: Sequence[int], B: Sequence[int]
) -> tuple[int, int, int]:
    """Return (d_out, r, d_in) of one module.

    Raises:
        AdapterError: these are no factors of one linear layer.
    """
    if any(list(shape) == [0] for shape in (A, B)):
        raise AdapterError(
            f"{path}: the factors of {module} are empty: they were saved under DeepSpeed ZeRO-3"
            " without gathering them; save again with stage3_gather_16bit_weights_on_model_save, or"
            " convert the checkpoint with zero_to_fp32.py"
        )
    if len(A) != 2 or len(B) != 2:
        raise AdapterError(
            f"{path}: the factors of {module} have {max(len(A), len(B))} dimensions: only linear"
            " layers are covered"
        )
    if B[1] != A[0] or 0 in (*A, *B):
        raise AdapterError(
            f"{path}: {module} has no matching pair of lora_A {tuple(A)} and lora_B {tuple(B)}"
        )
    return B[0], A[0], A[1]
