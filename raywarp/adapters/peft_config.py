"""PEFT's adapter_config.json: the checks on reading it, and the one of a merged adapter.

Everything that is not plain ΔW = s·B·A is refused by name. PEFT itself is not imported, since that
costs 200 MB and two seconds.
"""

import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from raywarp.adapters.tensor_names import MLX_ADAPTER
from raywarp.algorithm.deltas import AdapterDelta
from raywarp.algorithm.factors import AdapterError
from raywarp.algorithm.fitting import target_of

ADAPTER_FILE = "adapter_model.safetensors"
ADAPTER_CONFIG_FILE = "adapter_config.json"
_LARGEST = 3e38  # of float32
INDEX_FILE = f"{ADAPTER_FILE}.index.json"
_MLX_FILE, _PICKLE = "adapters.safetensors", "adapter_model.bin"
_UNSUPPORTED = {
    "use_dora": "DoRA's magnitudes are not linear in B·A",
    "lora_bias": "a trained bias is not part of B·A",
    "modules_to_save": "modules that are trained in full are not part of B·A",
    "trainable_token_indices": "trained tokens are not part of B·A",
    "target_parameters": "adapters of bare parameters are not covered",
    "layer_replication": "replicated layers share one base weight",
    "alora_invocation_tokens": "activated LoRA changes only some positions",
    "use_qalora": "QALoRA pools its inputs",
    "use_bdlora": "block-diagonal LoRA is not plain B·A",
    "kasa_config": "KaSA's singular values are not part of B·A",
    "monteclora_config": "MonteCLoRA's variational parts are not part of B·A",
    "arrow_config": "Arrow routes between adapters",
    "megatron_config": "Megatron splits each weight over processes",
}
# What these train is no change B·A of the weights, or B·A times something else.
_OTHER_KINDS = {
    "ADALORA": "its P·Λ·Q has singular values of its own",
    "LOHA": "a Hadamard product is not of low rank",
    "LOKR": "a Kronecker product is not of low rank",
    "VERA": "its factors are random, shared and scaled",
    "IA3": "it rescales activations",
    "OFT": "it rotates weights",
    "BOFT": "it rotates weights",
}
# These initialisations leave the base weights as they are. Others write to them, so that B·A is a
# change of another base than the one named.
_PLAIN_STARTS = ("gaussian", "eva", "orthogonal", "mica", "true", "false")
# What only says how an adapter was trained or is computed.
_NEUTRAL = (
    "eva_config",
    "corda_config",
    "loftq_config",
    "lora_ga_config",
    "velora_config",
    "runtime_config",
)
# Not PEFT's, which ignores it: how the base is held that an adapter belongs to (base.quantize).
BASE_QUANTIZE = "base_quantize"
_CARRIED = (
    "task_type",
    "revision",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "auto_mapping",
    BASE_QUANTIZE,
)
_TEXTS = ("base_model_name_or_path", "revision", "task_type", BASE_QUANTIZE)
_FLAGS = ("use_rslora", "fan_in_fan_out")


def held_base(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of an adapter's settings that says how its base is held."""
    return {BASE_QUANTIZE: settings[BASE_QUANTIZE]} if BASE_QUANTIZE in settings else {}


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """Return the content of adapter_config.json.

    Raises:
        AdapterError: it cannot be read, or says that the adapter is no plain LoRA.
    """
    path = folder / ADAPTER_CONFIG_FILE
    try:
        config = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{path} is not valid JSON: {_pointer(path) or error}") from None
    if not isinstance(config, dict):
        raise AdapterError(f"{path} must hold an object, not a {type(config).__name__}")
    if "peft_type" not in config and ("fine_tune_type" in config or "lora_parameters" in config):
        raise AdapterError(f"{folder} is not a PEFT adapter: {MLX_ADAPTER}")
    _check_types(path, config)
    _refuse_unsupported(folder, config)
    _check_numbers(path, config)
    return config


def weight_paths(folder: Path) -> list[Path]:
    """Return the files that hold an adapter's tensors: one, or those that an index names.

    Raises:
        AdapterError: they or the configuration are missing, or they are a pickle.
    """
    if not (config := folder / ADAPTER_CONFIG_FILE).is_file():
        raise AdapterError(f"{folder} is not a PEFT adapter: {_missing(config)}{_below(folder)}")
    path, index = folder / ADAPTER_FILE, folder / INDEX_FILE
    if path.is_file():
        if why := _pointer(path):
            raise AdapterError(f"cannot read {path}: {why}")
        return [path]
    if index.is_file():
        return _shards(folder, index)
    why = _missing(path)
    if (folder / _PICKLE).is_file():
        why = (
            f"{_PICKLE} is a pickle, which may run code; save it as safetensors: torch.load(…,"
            " weights_only=True), then safetensors.torch.save_file"
        )
    elif (folder / _MLX_FILE).is_file():
        why = MLX_ADAPTER
    raise AdapterError(f"cannot read the adapter in {folder}: {why}")


def _shards(folder: Path, index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        safe = all(Path(name).name == name for name in names)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        names, safe = [], False
    if not names or not safe:
        raise AdapterError(f"{index} does not map tensors to files of its folder")
    if missing := next((name for name in names if not (folder / name).is_file()), None):
        raise AdapterError(f"{folder} lacks {missing}, which {INDEX_FILE} names")
    return [folder / name for name in names]


def _missing(path: Path) -> str:
    """Return why a file is not there."""
    if path.is_symlink():
        return (
            f"{path.name} is a link to {os.readlink(path)}, which is not here; fetch it first (git"
            " annex get, dvc pull)"
        )
    return f"it has no {path.name}"


def _below(folder: Path) -> str:
    """Return which subfolders hold an adapter: checkpoints, or PEFT's named adapters."""
    names = sorted(p.parent.name for p in folder.glob(f"*/{ADAPTER_CONFIG_FILE}"))
    return f", but its subfolder {names[0]} has ({len(names)} in all); name that" if names else ""


def _pointer(path: Path) -> str | None:
    """Return what to fetch where a file is a pointer to its content."""
    with path.open("rb") as file:
        start = file.read(64)
    if start.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer; fetch the file with git lfs pull"
    if start.startswith(b"/annex/objects/"):
        return "it is a git-annex pointer; fetch the file with git annex get"
    return None


def _check_types(path: Path, config: dict[str, Any]) -> None:
    for key in _TEXTS:
        if not isinstance(config.get(key), str | None):
            raise AdapterError(f"{path}: {key} must be a text, not {config[key]!r}")
    for key in _FLAGS:
        if not isinstance(config.get(key), bool | None):
            raise AdapterError(f"{path}: {key} must be true or false, not {config[key]!r}")
    targets = config.get("target_modules")
    names = targets if isinstance(targets, list) else []
    if not isinstance(targets, str | list | None) or not all(isinstance(n, str) for n in names):
        raise AdapterError(f"{path}: target_modules must be names or one pattern, not {targets!r}")


def _check_numbers(path: Path, config: dict[str, Any]) -> None:
    ranks = {"r": config.get("r"), **_pattern(path, config, "rank_pattern")}
    alphas = {"lora_alpha": config.get("lora_alpha"), **_pattern(path, config, "alpha_pattern")}
    for key, value in ranks.items():
        if type(value) is not int or value < 1:
            raise AdapterError(f"{path}: the rank {key} must be a positive integer, not {value!r}")
    for key, value in alphas.items():
        if type(value) not in (int, float) or not abs(value) < _LARGEST:
            raise AdapterError(f"{path}: the alpha {key} must be a number, not {value!r:.99}")


def _pattern(path: Path, config: dict[str, Any], key: str) -> dict[str, Any]:
    pattern = config.get(key) or {}
    if not isinstance(pattern, dict):
        raise AdapterError(
            f"{path}: {key} must map module names to numbers, not be a {type(pattern).__name__}"
        )
    for name in pattern:
        try:
            re.compile(rf"(.*\.)?({name})$")
        except (re.error, OverflowError, RecursionError) as error:
            raise AdapterError(
                f"{path}: {name!r} in {key} is not a valid pattern: {error}"
            ) from None
    return pattern


def _refuse_unsupported(folder: Path, config: dict[str, Any]) -> None:
    if (kind := config.get("peft_type", "LORA")) != "LORA":
        why = _OTHER_KINDS.get(str(kind), "what it trains is no low-rank change of the weights")
        raise AdapterError(
            f"{folder} is a {kind} adapter; only LoRA can be averaged here: {why}; fold it into the"
            " base, and average whole models"
        )
    for key, reason in _UNSUPPORTED.items():
        if config.get(key):
            raise AdapterError(f"{folder} uses {key}: {reason}, so it cannot be averaged exactly")
    known = {*_UNSUPPORTED, *_NEUTRAL, *_FLAGS}
    for key in sorted(config.keys() - known):
        if (key.startswith("use_") or key.endswith("_config")) and config[key]:
            raise AdapterError(
                f"{folder} uses {key}, which raywarp does not know, so it may not be plain B·A"
            )
    if config.get("bias") not in ("none", None):
        raise AdapterError(
            f"{folder} trains biases (bias={config['bias']}), which are not part of B·A"
        )
    _check_start(folder, config.get("init_lora_weights"))


def _check_start(folder: Path, start: Any) -> None:
    """Raise AdapterError if the initialisation of the factors changed the base weights."""
    if not isinstance(start, str | bool | None):
        raise AdapterError(f"{folder}: init_lora_weights must be a name, not {start!r}")
    if isinstance(start, str) and start.lower() not in _PLAIN_STARTS:
        raise AdapterError(
            f"{folder} uses init_lora_weights={start}, which changes the base weights too: convert"
            " it with path_initial_model_for_weight_conversion of PEFT's save_pretrained, or set"
            " init_lora_weights to true if base_model_name_or_path holds the changed weights"
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
        peft={
            key: config[key]
            for key in _CARRIED
            if key in config and (key == "task_type" or config[key] is not None)
        },
    )


def configuration(like: AdapterDelta, ranks: Mapping[str, int]) -> dict[str, Any]:
    """Return the configuration of an adapter whose scaling is folded into B.

    Every module's alpha then equals its rank. Only keys that have a value are written, since old
    versions of PEFT refuse those that they do not know.

    Args:
        like: gives the base, targets and task.
        ranks: module → r.
    """
    usual = Counter(ranks.values()).most_common(1)[0][0]
    keys = _pattern_keys(ranks)
    pattern = {keys[module]: rank for module, rank in ranks.items() if rank != usual}
    targets = like.target_modules or sorted({target_of(m).rsplit(".", 1)[-1] for m in ranks})
    return {
        "task_type": "CAUSAL_LM",
        **like.peft,
        "peft_type": "LORA",
        "base_model_name_or_path": like.base_model or None,
        "r": usual,
        "lora_alpha": usual,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "target_modules": targets if isinstance(targets, str) else sorted(targets),
        "fan_in_fan_out": like.fan_in_fan_out,
        "bias": "none",
        "lora_dropout": 0.0,
        "init_lora_weights": True,
        "inference_mode": True,
    }


def common_ranks(ranks: Mapping[str, int], per_module: bool) -> dict[str, int]:
    """Return the rank to write each module at; smaller factors are padded with zeros.

    Args:
        ranks: module → the rank of its factors.
        per_module: keep unequal ranks, except within what has one rank in PEFT or vLLM: the two
            parts of nn.MultiheadAttention, and the experts of a layer.
    """
    group = _one_rank if per_module else lambda _: ""
    largest: dict[str, int] = {}
    for module, rank in ranks.items():
        largest[group(module)] = max(rank, largest.get(group(module), 1))
    return {module: largest[group(module)] for module in ranks}


def _one_rank(module: str) -> str:
    """Return what a module shares its rank with."""
    experts = re.fullmatch(r"(.*\.experts)\.\d+\..*", module)
    return experts[1] if experts else target_of(module)


def _pattern_keys(modules: Iterable[str]) -> dict[str, str]:
    """Return module → its key in rank_pattern: its path.

    PEFT matches a key with the end of each path. So where a path ends another one, its key is
    anchored, which PEFT 0.12 does not understand yet.
    """
    paths = {module: target_of(module) for module in modules}
    ends = {
        path[dot + 1 :] for path in paths.values() for dot, sign in enumerate(path) if sign == "."
    }
    plain = re.compile(r"[\w.-]+")
    return {
        module: path if path not in ends and plain.fullmatch(path) else f"^{re.escape(path)}"
        for module, path in paths.items()
    }
