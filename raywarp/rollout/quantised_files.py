"""The stored weights of a base that is held in 4 bits, as an engine has to run them.

An engine that reads a model's files runs W' (see model/quantised.py) where the trainer holds 4
bits, in its own dtype. So both run the same policy.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from raywarp.adapters.tensor_file import TensorFile
from raywarp.config.schema import ConfigError
from raywarp.data.models import read_model_config
from raywarp.model.quantised import rounded
from raywarp.model.targets import quantisable
from raywarp.rollout.base_weights import checkpoint_files, match_names

# Stored tensor → whether it is stored as (d_in, d_out), as GPT-2's are.
Quantised = Mapping[str, bool]
LOAD_FORMAT = "raywarp_nf4"  # of vLLM's loader in vllm/nf4.py


def quantised_tensors(model: str, trust_remote_code: bool) -> dict[str, bool]:
    """Return which stored tensors of a model the trainer holds in 4 bits; see Quantised.

    Args:
        model: folder or hub id.
        trust_remote_code: whether the model's own code may run.

    Raises:
        ConfigError: a layer's weight is not stored as one tensor of its shape.
    """
    from transformers import AutoModelForCausalLM

    config = read_model_config(model, trust_remote_code, f"model={model}")
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    layers = {name: base.get_submodule(name) for name in quantisable(base)}
    shapes: dict[str, tuple[int, ...]] = {}
    for file in checkpoint_files(model):
        shapes |= TensorFile(file).shapes
    stored = [name.removesuffix(".weight") for name in shapes if name.endswith(".weight")]
    found = match_names(layers, stored)
    for module, layer in layers.items():
        tensor = f"{found.get(module)}.weight"
        if shapes.get(tensor) != tuple(layer.weight.shape):
            raise ConfigError(
                f"base.quantize=nf4 with rollout.engine=vllm: model={model} does not store the"
                f" weight of {module} as one tensor of its shape, so vLLM could not be given the"
                " trainer's; set rollout.engine=transformers, or base.quantize=none"
            )
    return {f"{found[name]}.weight": isinstance(layer, Conv1D) for name, layer in layers.items()}


def as_held(quantised: Quantised, name: str, weight: Tensor) -> Tensor:
    """Return a stored tensor, or W' in its place."""
    return rounded(weight, quantised[name]) if name in quantised else weight


def loader_arguments(quantised: Quantised, has_worker: bool) -> dict[str, Any]:
    """Return vLLM's arguments by which it loads W'; none where nothing is quantised.

    Args:
        has_worker: whether vLLM's workers have methods of this project's already.
    """
    if not quantised:
        return {}
    worker = "raywarp.rollout.vllm.nf4.Nf4Worker"
    return {
        "load_format": LOAD_FORMAT,
        "model_loader_extra_config": {"quantised": dict(quantised)},
        **({} if has_worker else {"worker_extension_cls": worker}),
    }
