"""Averages of adapters that are not exact in ΔW, as they are found elsewhere, and how far they are
off.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from raywarp.algorithm.averaging import slerp_coefficients
from raywarp.algorithm.deltas import AdapterDelta
from raywarp.algorithm.factors import Factors, inner


def slerp_of_factors(deltas: Sequence[AdapterDelta]) -> AdapterDelta:
    """SLERP of the A and of the B tensors apart, each tensor with an angle of its own: what tools
    for whole weights make of adapters.
    """

    def merge(module: str, _: Factors) -> Factors:
        factors = [delta.factors[module] for delta in deltas]
        return Factors(
            _slerp_tensors([f.B for f in factors]), _slerp_tensors([f.A for f in factors])
        )

    return deltas[0].map(merge)


def peft_linear(deltas: Sequence[AdapterDelta]) -> AdapterDelta:
    """PEFT's add_weighted_adapter(combination_type="linear") with weights 1/M: (Σ √w B)(Σ √w A),
    for scaling 1 or folded into B.
    """
    root = len(deltas) ** -0.5

    def merge(module: str, _: Factors) -> Factors:
        factors = [delta.factors[module] for delta in deltas]
        return Factors(
            sum((f.B for f in factors[1:]), factors[0].B) * root,
            sum((f.A for f in factors[1:]), factors[0].A) * root,
        )

    return deltas[0].map(merge)


def relative_error(found: AdapterDelta, exact: AdapterDelta) -> float:
    """‖found − exact‖ / ‖exact‖ in ΔW, over all modules."""
    wrong = total = 0.0
    for module, own in exact.factors.items():
        other = found.factors[module]
        square = inner(own, own)
        wrong += inner(other, other) - 2 * inner(other, own) + square
        total += square
    return float((max(wrong, 0.0) / total) ** 0.5)


def length_ratio(found: AdapterDelta, exact: AdapterDelta) -> float:
    """‖found‖ / ‖exact‖ in ΔW, over all modules."""
    squares = [sum(inner(f, f) for f in delta.factors.values()) for delta in (found, exact)]
    return float((squares[0] / squares[1]) ** 0.5)


def _slerp_tensors(tensors: Sequence[Tensor]) -> Tensor:
    flat = torch.stack([tensor.double().flatten() for tensor in tensors])
    return (slerp_coefficients(flat @ flat.T) @ flat).view(tensors[0].shape).to(tensors[0].dtype)
