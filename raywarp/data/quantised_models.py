"""Models that are published in a quantised form, refused by name before anything is loaded.

A trainer and a sampler read such a form by kernels of their own, and would run two policies.
"""

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from raywarp.adapters.tensor_file import DTYPES
from raywarp.adapters.weight_files import stored_tensors
from raywarp.config.schema import ConfigError
from raywarp.data.models import local_folder

# Method → the class of transformers that dequantises it while it loads.
_DEQUANTISERS = {
    "mxfp4": "Mxfp4Config",
    "fp8": "FineGrainedFP8Config",
    "compressed-tensors": "CompressedTensorsConfig",
}
# Files that say how a folder's weights are quantised, where config.json may not: NVIDIA's ModelOpt,
# AutoGPTQ and AutoAWQ write them.
_SIDECARS = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")


def quantisation(settings: Mapping[str, Any]) -> str | None:
    """Return the method by which a model is quantised, for example gptq; None if it is not.

    Args:
        settings: the content of config.json. A wrapper of a language model may say it inside.
    """
    for part in (settings, *(part for part in settings.values() if isinstance(part, Mapping))):
        for key in ("quantization_config", "compression_config"):
            if (found := part.get(key)) is not None:
                return _in_words(found)
    return None


def folder_quantisation(folder: Path) -> str | None:
    """Return how a folder's model is quantised, as messages name it; None if it is not.

    config.json says it, a file beside it, or the dtype of a stored weight. Buffers may hold
    integers. Files that cannot be read are left to those that load them.
    """
    with suppress(OSError, ValueError, AttributeError):
        if method := quantisation(json.loads((folder / "config.json").read_text())):
            return method
    for name in _SIDECARS:
        if (folder / name).is_file():
            return name
    with suppress(ConfigError):
        for name, file in stored_tensors(folder, "").items():
            kind, _ = file.stored(name)
            is_weight = kind.startswith(("F4", "F6", "F8")) or "weight" in name.rpartition(".")[2]
            if is_weight and kind not in DTYPES and len(file.shapes[name]) > 1:
                return f"{name} is {kind}"
    return None


def refuse_quantised_model(model: str, what: str) -> None:
    """Raise ConfigError if a base is quantised.

    Of a hub id those files are looked at that are in the hub's cache.

    Args:
        model: folder or hub id.
        what: how messages call the model.
    """
    folder = local_folder(model)
    if folder is not None and (method := folder_quantisation(folder)) is not None:
        _refuse(method, what)


def refuse_quantised(settings: Mapping[str, Any], what: str) -> None:
    """Raise ConfigError if a base is quantised by its configuration.

    Args:
        settings: see quantisation.
        what: how messages call the model.
    """
    if (method := quantisation(settings)) is not None:
        _refuse(method, what)


def _refuse(method: str, what: str) -> None:
    own = _DEQUANTISERS.get(method)
    saved = (
        f"; if it is published in no other form, load it in bfloat16 by transformers with"
        f" quantization_config={own}(dequantize=True), and save it with save_pretrained"
        if own
        else ""
    )
    raise ConfigError(
        f"{what} is quantised ({method}), and trainer and sampler would read its numbers"
        " differently; name the model that it was made from, which base.quantize=nf4 holds in 4"
        f" bits{saved}"
    )


def _in_words(settings: Any) -> str:
    """Return the method that config.json names, and of bitsandbytes which of its two."""
    if not isinstance(settings, Mapping) or not settings.get("quant_method"):
        return settings if settings and isinstance(settings, str) else "an unnamed method"
    method = str(settings["quant_method"])
    kind = settings.get("bnb_4bit_quant_type") if settings.get("load_in_4bit") else None
    return f"{method}, {kind}" if kind else method
