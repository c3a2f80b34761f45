"""Copies of the base's weights in an adapter's file.

PEFT saves them beside LoRA on lm_head or on embeddings, and for a resized vocabulary. A copy that
equals the base changes nothing. One that differs was trained or resized, and is no part of B·A.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from raywarp.adapters.tensor_file import TensorFile
from raywarp.adapters.weight_files import INDEX, WEIGHTS, stored_tensors
from raywarp.algorithm.factors import AdapterError
from raywarp.config.schema import ConfigError

_TIED = ("embed_tokens.weight", "wte.weight", "embed_in.weight")
_ROWS = 4096  # rows of an embedding that are compared at once


def check_copies(
    files: Mapping[str, TensorFile], copies: Mapping[str, str], base: str, revision: str | None
) -> list[str]:
    """Return which tensors change nothing, after comparison with the base where it is here.

    Args:
        files: tensor → the file that holds it.
        copies: tensor → the weight of the base that it has to equal.
        base: the base model's folder or hub id.
        revision: of the base on the hub.

    Raises:
        AdapterError: a copy differs from the base, or it may differ and the base is not here.
    """
    weights = _base_tensors(base, revision) if copies else {}
    for name, weight in copies.items():
        path = files[name].path
        theirs = weights.get(weight) or _tied(weights, weight)
        if theirs is None:
            if ".base_layer." in name:
                continue  # LoRA freezes it
            raise AdapterError(
                f"{path}: tensor {name} cannot be averaged: it is not a factor of a linear layer"
                f" but a whole weight, and the base ({base or 'unnamed'}) is not on this machine to"
                " tell whether it was trained; download the base, or save the adapter with"
                " save_embedding_layers=False"
            )
        if not _equal(files[name].tensor(name), theirs.tensor(_stored_name(theirs, weight))):
            raise AdapterError(
                f"{path}: {name} differs from {weight} of {base}: it was trained in full or its"
                " vocabulary was resized, which is not part of B·A; save the base with these"
                " weights, and train or merge adapters of that base"
            )
    return list(copies)


def _base_tensors(base: str, revision: str | None) -> dict[str, TensorFile]:
    """Return tensor → file of the base model; empty where it is not on this machine."""
    folder = Path(base).expanduser() if base else None
    if folder is None or not folder.is_dir():
        folder = _cached(base, revision)
    try:
        return stored_tensors(folder, str(folder)) if folder else {}
    except ConfigError:
        return {}


def _cached(base: str, revision: str | None) -> Path | None:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    for name in (INDEX, WEIGHTS):
        try:
            found = try_to_load_from_cache(base, name, revision=revision)
        except (HFValidationError, ValueError):
            return None
        if isinstance(found, str):
            return Path(found).parent
    return None


def _tied(weights: Mapping[str, TensorFile], weight: str) -> TensorFile | None:
    """Return the file of the input embedding for an output layer that shares its weight."""
    if not weight.endswith("lm_head.weight"):
        return None
    return next((file for name, file in weights.items() if name.endswith(_TIED)), None)


def _stored_name(file: TensorFile, weight: str) -> str:
    return weight if weight in file.shapes else next(n for n in file.shapes if n.endswith(_TIED))


def _equal(copy: Tensor, weight: Tensor) -> bool:
    """Return whether a copy is the weight, in its own or a model's dtype."""
    if copy.shape != weight.shape:
        return False
    dtypes = (copy.dtype, torch.bfloat16, torch.float16)
    return any(
        all(
            torch.equal(ours, theirs.to(dtype).to(copy.dtype))
            for ours, theirs in zip(copy.split(_ROWS), weight.split(_ROWS), strict=True)
        )
        for dtype in dtypes
    )
