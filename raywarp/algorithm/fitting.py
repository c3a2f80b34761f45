"""Checks that adapters can be averaged: finite numbers, and weights of one base model."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from raywarp.algorithm.factors import AdapterError, Factors

_LIMITS = ("layers_to_transform", "layers_pattern", "exclude_modules")


def check_finite(factors: Mapping[str, Factors], name: str) -> None:
    """Raise AdapterError if a number is NaN or infinite.

    Args:
        factors: module → its factors.
        name: of the adapter, for the message.
    """
    for module, f in factors.items():
        for letter, tensor in zip("BA", f, strict=True):
            # A sum is finite only if all its terms are. It reads the tensor once, without a copy.
            if not bool(tensor.sum().isfinite()) and not bool(tensor.isfinite().all()):
                raise AdapterError(f"{name}: lora_{letter} of {module} holds NaN or infinity")


def union(
    sizes: Sequence[Mapping[str, tuple[int, int]]], names: Sequence[str]
) -> dict[str, tuple[int, int]]:
    """Return module → (d_out, d_in) of all modules that any adapter changes.

    They are in the order of the layers where the adapters change different modules.

    Args:
        sizes: module → (d_out, d_in) of each adapter.
        names: of the adapters, for the message.

    Raises:
        AdapterError: two adapters have a module in different sizes.
    """
    first: dict[str, tuple[tuple[int, int], str]] = {}
    for ours, name in zip(sizes, names, strict=True):
        for module, size in ours.items():
            known, other = first.setdefault(module, (size, name))
            if size != known:
                raise AdapterError(
                    f"{module} is {known} in {other} and {size} in {name}: not of one base model"
                )
    differ = any(ours.keys() != first.keys() for ours in sizes)
    order = sorted(first, key=by_layer) if differ else list(first)
    return {module: first[module][0] for module in order}


def completed(
    factors: Mapping[str, Factors], sizes: Mapping[str, tuple[int, int]]
) -> dict[str, Factors]:
    """Return the factors over all of these modules, at rank 0 where there are none.

    Args:
        sizes: module → (d_out, d_in).
    """
    like = next((f.B for f in factors.values()), torch.empty(0))
    return {
        module: factors.get(module, Factors(like.new_empty(d_out, 0), like.new_empty(0, d_in)))
        for module, (d_out, d_in) in sizes.items()
    }


def joint_targets(
    adapters: Sequence[tuple[tuple[str, ...] | str, Mapping[str, Any]]], modules: Iterable[str]
) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Return the target modules of all adapters together, and the first one's other attributes.

    Where a pattern or a list of layers limits the targets, they are the paths of the modules.

    Args:
        adapters: target_modules and peft of each; see AdapterDelta.
        modules: the paths of all modules that any adapter changes.
    """
    lists = [() if isinstance(targets, str) else targets for targets, _ in adapters]
    limited = any(peft.get(key) for _, peft in adapters for key in _LIMITS)
    names = {name for own in lists for name in own}
    paths = dict.fromkeys(map(target_of, modules))
    targets = tuple(paths) if limited or not all(lists) else tuple(sorted(names))
    return targets, {k: v for k, v in adapters[0][1].items() if k not in _LIMITS}


def target_of(module: str) -> str:
    """Return the module that PEFT names as the target of a path in an adapter's file.

    In nn.MultiheadAttention the output projection is part of the attention's own target.
    """
    return module.removesuffix(".base_layer.out_proj")


def by_layer(module: str) -> list[tuple[int, int | str]]:
    """Return a sort key that puts layers in the order of their numbers."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in module.split(".")]
