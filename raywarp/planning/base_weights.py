"""The base as base.quantize has it: whether it can be held so, and its fingerprint."""

from pathlib import Path
from typing import Any

import torch

from raywarp.config.schema import Config, ConfigError
from raywarp.data.quantised_models import refuse_quantised
from raywarp.model.quantised import NF4, require_bitsandbytes
from raywarp.model.targets import quantisable


def check_base(config: Config, model: str, settings: Any) -> None:
    """Check that the base can be held as base.quantize says.

    Args:
        model: folder or hub id of the model. The files of a hub id are checked where they are read.
        settings: transformers' configuration of the model.

    Raises:
        ConfigError: the model is quantised already; or with nf4, bitsandbytes is not installed,
            nothing of the model can be quantised, or vLLM could not be given the trainer's weights.
    """
    from transformers import AutoModelForCausalLM

    from raywarp.rollout.quantised_files import quantised_tensors

    refuse_quantised(settings.to_dict(), f"model={config.model}")
    if config.base.quantize != NF4:
        return
    require_bitsandbytes()
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(
            settings, trust_remote_code=config.trust_remote_code
        )
    if not quantisable(base):
        raise ConfigError(
            f"base.quantize=nf4: model={config.model} ({settings.model_type}) has no linear layer"
            " that transformers quantises; set base.quantize=none"
        )
    if config.rollout.engine == "vllm" and Path(model).is_dir():
        quantised_tensors(model, config.trust_remote_code)


def base_fingerprint(config: Config, fingerprint: str) -> str:
    """Return the fingerprint of the base that policies are trained on.

    Args:
        fingerprint: of the model's files.
    """
    return f"{fingerprint} in {NF4}" if config.base.quantize == NF4 else fingerprint
