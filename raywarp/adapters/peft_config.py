"""PEFT's adapter_config.json: the checks on reading it, and the one of a merged adapter.

Everything that is not plain ΔW = s·B·A is refused by name. PEFT itself is not imported, since that
costs 200 MB and two seconds.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from raywarp.adapters.weight_files import inside
from raywarp.algorithm.deltas import AdapterDelta
from raywarp.algorithm.factors import AdapterError
from raywarp.config.schema import ConfigError

ADAPTER_FILE = "adapter_model.safetensors"
ADAPTER_CONFIG_FILE = "adapter_config.json"
_UNSUPPORTED = {
    "use_dora": "DoRA's magnitudes are not linear in B·A",
    "lora_bias": "a trained bias is not part of B·A",
    "modules_to_save": "fully trained modules are not part of B·A",
    "trainable_token_indices": "trained tokens are not part of B·A",
    "target_parameters": "adapters of bare parameters are not covered",
    "layer_replication": "replicated layers share one base weight",
    "alora_invocation_tokens": "activated LoRA changes only some positions",
    "use_qalora": "QALoRA pools its inputs",
    "use_bdlora": "block-diagonal LoRA is not plain B·A",
    "kasa_config": "KaSA's singular values are not part of B·A",
    "monteclora_config": "MonteCLoRA's variational parts are not part of B·A",
    "arrow_config": "Arrow routes between adapters",
}
# These initialisations write to the base weights. B·A is then a change of another base than the one
# named.
_OTHER_BASE = re.compile(r"(pissa|olora|corda|loftq)", re.IGNORECASE)
_CARRIED = (
    "task_type",
    "revision",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "auto_mapping",
)


def read_adapter_config(folder: Path) -> dict[str, Any]:
    path = folder / ADAPTER_CONFIG_FILE
    if not path.is_file():
        raise AdapterError(f"{folder} is not a PEFT adapter: it has no {ADAPTER_CONFIG_FILE}")
    if not (folder / ADAPTER_FILE).is_file():
        pickle = (folder / "adapter_model.bin").is_file()
        why = (
            "adapter_model.bin is a pickle, which may run code; save it as safetensors"
            if pickle
            else f"it has no {ADAPTER_FILE}"
        )
        raise AdapterError(f"cannot read the adapter in {folder}: {why}")
    for name in (ADAPTER_CONFIG_FILE, ADAPTER_FILE):
        try:
            inside(folder, name, f"the adapter in {folder}")
        except ConfigError as error:
            raise AdapterError(str(error)) from None
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise AdapterError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise AdapterError(f"{path} must hold an object, not a {type(config).__name__}")
    _check_numbers(path, config)
    _refuse_unsupported(folder, config)
    return config


def _check_numbers(path: Path, config: dict[str, Any]) -> None:
    ranks = {"r": config.get("r"), **_pattern(path, config, "rank_pattern")}
    alphas = {"lora_alpha": config.get("lora_alpha"), **_pattern(path, config, "alpha_pattern")}
    for key, value in ranks.items():
        if type(value) is not int or value < 1:
            raise AdapterError(f"{path}: the rank {key} must be a positive integer, not {value!r}")
    for key, value in alphas.items():
        if type(value) not in (int, float) or not math.isfinite(value):
            raise AdapterError(f"{path}: the alpha {key} must be a number, not {value!r}")


def _pattern(path: Path, config: dict[str, Any], key: str) -> dict[str, Any]:
    pattern = config.get(key) or {}
    if not isinstance(pattern, dict):
        raise AdapterError(
            f"{path}: {key} must map module names to numbers, not be a {type(pattern).__name__}"
        )
    for name in pattern:
        try:
            re.compile(name)
        except re.error as error:
            raise AdapterError(
                f"{path}: {name!r} in {key} is not a valid pattern: {error}"
            ) from None
    return pattern


def _refuse_unsupported(folder: Path, config: dict[str, Any]) -> None:
    if config.get("peft_type", "LORA") != "LORA":
        raise AdapterError(
            f"{folder} is a {config['peft_type']} adapter; only LoRA can be averaged here"
        )
    for key, reason in _UNSUPPORTED.items():
        if config.get(key):
            raise AdapterError(f"{folder} uses {key}: {reason}, so it cannot be averaged exactly")
    if config.get("bias", "none") != "none":
        raise AdapterError(
            f"{folder} trains biases (bias={config['bias']}), which are not part of B·A"
        )
    if isinstance(start := config.get("init_lora_weights"), str) and _OTHER_BASE.match(start):
        raise AdapterError(
            f"{folder} uses init_lora_weights={start}, which changes the base weights too: "
            "convert it with PEFT's path_initial_model_for_weight_conversion first"
        )


def scaling_of(config: Mapping[str, Any], module: str, rank: int) -> float:
    """Return alpha/r or, for rsLoRA, alpha/√r, of a module whose factors have this rank.

    Raises:
        AdapterError: the configuration says another rank, so its scaling cannot be trusted.
    """
    expected = _pattern_value(config.get("rank_pattern"), module, config["r"])
    if rank != expected:
        raise AdapterError(f"{module} has rank {rank}, and {ADAPTER_CONFIG_FILE} says {expected}")
    alpha = float(_pattern_value(config.get("alpha_pattern"), module, config["lora_alpha"]))
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _pattern_value(pattern: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """Return the value of the first key that matches the end of the module's path: PEFT's rule.

    Keys are regular expressions.
    """
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


def without_factors(config: Mapping[str, Any]) -> AdapterDelta:
    """Return everything about an adapter except its factors."""
    targets = config.get("target_modules")
    return AdapterDelta(
        factors={},
        target_modules=targets if isinstance(targets, str) else tuple(targets or ()),
        base_model=config.get("base_model_name_or_path") or "",
        fan_in_fan_out=bool(config.get("fan_in_fan_out")),
        peft={key: config.get(key) for key in _CARRIED},
    )


def configuration(like: AdapterDelta, ranks: Mapping[str, int]) -> dict[str, Any]:
    """Return the configuration of an adapter whose scaling is folded into B.

    Every module's alpha then equals its rank.

    Args:
        like: gives the base, targets and task.
        ranks: module → r.
    """
    usual = Counter(ranks.values()).most_common(1)[0][0]
    unusual = {module: rank for module, rank in ranks.items() if rank != usual}
    targets = like.target_modules or sorted({module.rsplit(".", 1)[-1] for module in ranks})
    return {
        "task_type": "CAUSAL_LM",
        **like.peft,
        "peft_type": "LORA",
        "base_model_name_or_path": like.base_model or None,
        "r": usual,
        "lora_alpha": usual,
        "rank_pattern": unusual,
        "alpha_pattern": unusual,
        "use_rslora": False,
        "target_modules": targets if isinstance(targets, str) else sorted(targets),
        "fan_in_fan_out": like.fan_in_fan_out,
        "bias": "none",
        "lora_dropout": 0.0,
        "init_lora_weights": True,
        "inference_mode": True,
    }
