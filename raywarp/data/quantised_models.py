"""Models that are published in a quantised form, refused by name before anything is loaded.

A trainer and a sampler read such a form by kernels of their own, and would run two policies.
"""

from collections.abc import Mapping
from typing import Any

from raywarp.config.schema import ConfigError

# Method → the class of transformers that dequantises it while it loads.
_DEQUANTISERS = {
    "mxfp4": "Mxfp4Config",
    "fp8": "FineGrainedFP8Config",
    "compressed-tensors": "CompressedTensorsConfig",
}


def quantisation(settings: Mapping[str, Any]) -> str | None:
    """Return the method by which a model is quantised, for example gptq; None if it is not.

    Args:
        settings: the content of config.json. A wrapper of a language model may say it inside.
    """
    for part in (settings, *(part for part in settings.values() if isinstance(part, Mapping))):
        if found := part.get("quantization_config") or part.get("compression_config"):
            method = found.get("quant_method") if isinstance(found, Mapping) else None
            return _in_words(found) if method else "an unnamed method"
    return None


def refuse_quantised(settings: Mapping[str, Any], what: str) -> None:
    """Raise ConfigError if a base is quantised.

    Args:
        settings: see quantisation.
        what: how messages call the model.
    """
    if (method := quantisation(settings)) is None:
        return
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


def _in_words(settings: Mapping[str, Any]) -> str:
    """Return the method, and of bitsandbytes which of its two."""
    method = str(settings["quant_method"])
    kind = settings.get("bnb_4bit_quant_type") if settings.get("load_in_4bit") else None
    return f"{method}, {kind}" if kind else method
