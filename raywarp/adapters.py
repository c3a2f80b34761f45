"""A LoRA update as factors: inner products, concatenation, compression, and PEFT's files.

ΔW = B·A with the scaling folded into B. No function here forms ΔW (except `dense`, for tests and small uses), and none
averages A and B apart. G blocks, M adapters, r rank, d_out and d_in a weight's sizes.
"""

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

ADAPTER_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
_PREFIX = "base_model.model."
_UNSUPPORTED = {
    "use_dora": "DoRA is not linear in its factors",
    "lora_bias": "a trained bias is not part of B·A",
    "modules_to_save": "fully trained modules are not part of B·A",
    "trainable_token_indices": "trained tokens are not part of B·A",
    "layer_replication": "replicated layers share one base weight",
}


class AdapterError(ValueError):
    """An adapter that cannot be read or averaged exactly; the message names the file and the reason."""


class Factors(NamedTuple):
    """One weight's update ΔW = B·A.

    B: (d_out, r), the scaling alpha/r folded in.
    A: (r, d_in).
    """

    B: Tensor
    A: Tensor

    @property
    def rank(self) -> int:
        return self.A.shape[0]


@dataclass(frozen=True)
class AdapterDelta:
    """The change ΔW that an adapter makes, as factors per module of the base model.

    factors: module path in the base model (`model.layers.0.self_attn.q_proj`) → Factors.
    target_modules: the names by which PEFT finds these modules; by default the last part of each path.
    base_model: name of the base model, for the adapter's config file.
    fan_in_fan_out: the base stores its weights as (d_in, d_out), as GPT-2's Conv1D does. B and A are the same in both layouts.
    """

    factors: Mapping[str, Factors]
    target_modules: tuple[str, ...] = ()
    base_model: str = ""
    fan_in_fan_out: bool = False

    def blocks(self) -> dict[str, list[str]]:
        """Transformer block → its modules, in the order of the factors."""
        grouped: dict[str, list[str]] = {}
        for module in self.factors:
            grouped.setdefault(block_of(module), []).append(module)
        return grouped

    @property
    def rank(self) -> int:
        """The largest rank of any module."""
        return max((f.rank for f in self.factors.values()), default=0)

    def map(self, change: Callable[[str, Factors], Factors]) -> "AdapterDelta":
        return replace(self, factors={module: change(module, f) for module, f in self.factors.items()})


def block_of(module: str) -> str:
    """`model.layers.3.mlp.up_proj` → `model.layers.3`; a module outside the blocks is a block of its own."""
    match = re.match(r"(.*?\.\d+)\.", module)
    return match.group(1) if match else module


def inner(x: Factors, y: Factors) -> float:
    """⟨ΔW_x, ΔW_y⟩ = Σ (B_xᵀB_y ∘ A_xA_yᵀ), in float64 at O(r²(d_in + d_out)); see `dense` for the long way."""
    left = x.B.double().T @ y.B.double()
    right = x.A.double() @ y.A.double().T
    return float((left * right).sum())


def dense(factors: Factors) -> Tensor:
    """ΔW itself, (d_out, d_in) float64."""
    return factors.B.double() @ factors.A.double()


def zeros_like(delta: AdapterDelta) -> AdapterDelta:
    """The adapter that changes nothing: rank 0 everywhere."""
    return delta.map(lambda _, f: Factors(f.B[:, :0], f.A[:0]))


def scale(delta: AdapterDelta, coefficient: float) -> AdapterDelta:
    """coefficient·ΔW: one factor is scaled (scaling both would give its square)."""
    return delta.map(lambda _, f: Factors(f.B * coefficient, f.A))


def concatenate(deltas: Sequence[AdapterDelta], coefficients: Mapping[str, Sequence[float]] | Sequence[float]) -> AdapterDelta:
    """Σ_m c_m ΔW_m exactly, as [c₁B₁ … c_MB_M]·[A₁; …; A_M].

    Args:
        deltas: M adapters of the same modules.
        coefficients: M numbers for all modules, or block → M numbers.

    Raises:
        AdapterError: the adapters change different modules, or weights of different sizes.
    """
    check_same_modules(deltas)

    def stack(module: str, _: Factors) -> Factors:
        c = coefficients[block_of(module)] if isinstance(coefficients, Mapping) else coefficients
        parts = [(delta.factors[module], float(weight)) for delta, weight in zip(deltas, c, strict=True) if weight != 0]
        if not parts:
            first = deltas[0].factors[module]
            return Factors(first.B[:, :0], first.A[:0])
        return Factors(torch.cat([f.B * weight for f, weight in parts], dim=1), torch.cat([f.A for f, _ in parts]))

    return deltas[0].map(stack)


def add(*deltas: AdapterDelta) -> AdapterDelta:
    return concatenate(deltas, [1.0] * len(deltas))


def subtract(x: AdapterDelta, y: AdapterDelta) -> AdapterDelta:
    return concatenate([x, y], [1.0, -1.0])


def trailing(delta: AdapterDelta, rank: int) -> AdapterDelta:
    """The last summand of a concatenation, bit for bit: the last `rank` columns of every B and rows of every A."""
    return delta.map(lambda _, f: Factors(f.B[:, f.rank - rank :], f.A[f.rank - rank :]))


def check_same_modules(deltas: Sequence[AdapterDelta]) -> None:
    """Raises AdapterError unless all adapters change the same weights."""
    first = deltas[0].factors
    for index, delta in enumerate(deltas[1:], start=2):
        if odd := sorted(first.keys() ^ delta.factors.keys()):
            raise AdapterError(f"adapters 1 and {index} adapt different modules: only one of them has {odd[0]} ({len(odd)} in all)")
        for module, f in delta.factors.items():
            ours, theirs = _sizes(first[module]), _sizes(f)
            if ours != theirs:
                raise AdapterError(f"{module} is {ours} in adapter 1 and {theirs} in adapter {index}: not of one base model")


def compress(delta: AdapterDelta, tolerance: float = 1e-9) -> AdapterDelta:
    """The same ΔW at its true rank: QR of both stacks, SVD of the small core, all in float64.

    Args:
        tolerance: singular values below tolerance·(the module's largest), and those that are rounding noise of summands
            that cancel, are dropped.
    """

    def smallest(_: str, f: Factors) -> Factors:
        if f.rank == 0:
            return f
        q_out, r_out = torch.linalg.qr(f.B.double())
        q_in, r_in = torch.linalg.qr(f.A.double().T)
        u, s, vh = torch.linalg.svd(r_out @ r_in.T)
        noise = 1e-13 * float(r_out.norm() * r_in.norm())
        keep = int((s > max(tolerance * float(s[0]), noise)).sum())
        root = s[:keep].sqrt()
        B = (q_out @ u[:, :keep]) * root
        A = root[:, None] * (vh[:keep] @ q_in.T)
        return Factors(B.to(f.B.dtype), A.to(f.A.dtype))

    return delta.map(smallest)


def digest(delta: AdapterDelta) -> str:
    """SHA-256 of every module's name and factors: two adapters with one digest are the same adapter."""
    total = hashlib.sha256()
    for module, f in sorted(delta.factors.items()):
        total.update(f"{module} {f.rank} {f.B.dtype}".encode())
        for tensor in f:
            total.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def save_peft(delta: AdapterDelta, folder: Path) -> None:
    """Write adapter_config.json and adapter_model.safetensors, which PEFT and vLLM read.

    The scaling stays folded into B: every module's alpha equals its rank. A module of rank 0 gets one zero column.
    """
    from peft import LoraConfig, TaskType

    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for module, f in delta.factors.items():
        B, A = (f.B, f.A) if f.rank else (f.B.new_zeros(f.B.shape[0], 1), f.A.new_zeros(1, f.A.shape[1]))
        tensors[f"{_PREFIX}{module}.lora_A.weight"] = A.cpu().contiguous()
        tensors[f"{_PREFIX}{module}.lora_B.weight"] = B.cpu().contiguous()
        ranks[module] = A.shape[0]
    usual = Counter(ranks.values()).most_common(1)[0][0]
    unusual = {module: rank for module, rank in ranks.items() if rank != usual}
    config = LoraConfig(
        r=usual,
        lora_alpha=usual,
        rank_pattern=dict(unusual),
        alpha_pattern=dict(unusual),
        target_modules=sorted(delta.target_modules or {module.rsplit(".", 1)[-1] for module in ranks}),
        fan_in_fan_out=delta.fan_in_fan_out,
        base_model_name_or_path=delta.base_model or None,
        task_type=TaskType.CAUSAL_LM,
        inference_mode=True,
        lora_dropout=0.0,
    )
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(str(folder))
    save_file(tensors, str(folder / ADAPTER_FILE), metadata={"format": "pt"})


def load_peft(folder: str | Path) -> AdapterDelta:
    """Read a PEFT LoRA adapter, with its scaling (alpha/r or, for rsLoRA, alpha/√r, and their patterns) folded into B.

    Raises:
        AdapterError: missing or corrupt files, a pickle instead of safetensors, or a variant of LoRA that is not plain B·A.
    """
    folder = Path(folder)
    config = _read_config(folder)
    _refuse_unsupported(folder, config)
    try:
        tensors = load_file(str(folder / ADAPTER_FILE))
    except (OSError, SafetensorError) as error:
        raise AdapterError(f"cannot read {folder / ADAPTER_FILE}: {error}") from None
    return AdapterDelta(
        factors=_pair_factors(folder, tensors, config),
        target_modules=_named_targets(config),
        base_model=config.get("base_model_name_or_path") or "",
        fan_in_fan_out=bool(config.get("fan_in_fan_out")),
    )


def _sizes(f: Factors) -> tuple[int, int]:
    return f.B.shape[0], f.A.shape[1]


def _read_config(folder: Path) -> dict[str, Any]:
    if not (folder / CONFIG_FILE).is_file():
        raise AdapterError(f"{folder} is not a PEFT adapter: it has no {CONFIG_FILE}")
    if not (folder / ADAPTER_FILE).is_file():
        pickle = (folder / "adapter_model.bin").is_file()
        why = "adapter_model.bin is a pickle; save it with safetensors" if pickle else f"it has no {ADAPTER_FILE}"
        raise AdapterError(f"cannot read the adapter in {folder}: {why}")
    try:
        config = json.loads((folder / CONFIG_FILE).read_text())
    except ValueError as error:
        raise AdapterError(f"{folder / CONFIG_FILE} is not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise AdapterError(f"{folder / CONFIG_FILE} must hold an object")
    return config


def _refuse_unsupported(folder: Path, config: dict[str, Any]) -> None:
    if config.get("peft_type", "LORA") != "LORA":
        raise AdapterError(f"{folder} is a {config['peft_type']} adapter; only LoRA can be averaged here")
    for key, reason in _UNSUPPORTED.items():
        if config.get(key):
            raise AdapterError(f"{folder} uses {key}: {reason}, so it cannot be averaged exactly")
    if config.get("bias", "none") != "none":
        raise AdapterError(f"{folder} trains biases (bias={config['bias']}), which are not part of B·A")


def _named_targets(config: dict[str, Any]) -> tuple[str, ...]:
    targets = config.get("target_modules")
    return tuple(targets) if isinstance(targets, list) else ()


def _pair_factors(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Factors]:
    factors: dict[str, Factors] = {}
    for name in _module_names(folder, tensors):
        A = tensors.get(f"{_PREFIX}{name}.lora_A.weight")
        B = tensors.get(f"{_PREFIX}{name}.lora_B.weight")
        if A is None or B is None or B.shape[1] != A.shape[0]:
            raise AdapterError(f"{folder}: {name} has no matching pair of lora_A and lora_B")
        factors[name] = Factors(B.float() * _scaling(name, A.shape[0], config), A.float())
    if not factors:
        raise AdapterError(f"{folder / ADAPTER_FILE} holds no LoRA factors")
    return factors


def _module_names(folder: Path, tensors: Iterable[str]) -> list[str]:
    names: dict[str, None] = {}
    for key in tensors:
        match = re.fullmatch(re.escape(_PREFIX) + r"(.+)\.lora_[AB]\.weight", key)
        if match is None:
            raise AdapterError(f"{folder}: tensor {key} is not a factor of a linear layer, so the adapter is not plain B·A")
        names[match.group(1)] = None
    return list(names)


def _scaling(module: str, rank: int, config: dict[str, Any]) -> float:
    from peft.utils.other import get_pattern_key

    patterns: dict[str, float] = config.get("alpha_pattern") or {}
    alpha = patterns.get(get_pattern_key(list(patterns), module), config["lora_alpha"])
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)
