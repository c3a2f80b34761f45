"""Norms and angles of task vectors, from the Gram matrix of each group of modules."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from raywarp.algorithm.deltas import AdapterDelta, Granularity, check_same_modules, grouped
from raywarp.algorithm.factors import Stack

# Beyond this cosine an angle magnifies the error of float32 products (4e-8). The products are then
# taken in float64.
_STEEP = 0.95


def gram_matrices(
    deltas: Sequence[AdapterDelta], granularity: Granularity = "block"
) -> dict[str, Tensor]:
    """Return group → (M, M) float64 matrix of ⟨δ_i, δ_j⟩, summed over all matrices of the group."""
    check_same_modules(deltas)

    grams = {}
    for group, modules in grouped(deltas[0].factors, granularity).items():
        stacks = [Stack.of([delta.factors[module] for delta in deltas]) for module in modules]
        grams[group] = refined(summed_gram(stacks, exact=False), partial(summed_gram, stacks))
    return grams


def summed_gram(stacks: Sequence[Stack], exact: bool = True) -> Tensor:
    """Return the (M, M) float64 inner products of M summands over all weights; see Stack.gram."""
    return torch.stack([stack.gram(exact) for stack in stacks]).sum(0)


def refined(quick: Tensor, exact: Callable[[], Tensor]) -> Tensor:
    """Return the quick float32 Gram matrix, or the exact one where vectors are near parallel."""
    cosines = cosine_matrix(quick).fill_diagonal_(0)
    return exact() if bool((cosines.abs() > _STEEP).any()) else quick


def cosine_matrix(gram: Tensor) -> Tensor:
    """Return the (M, M) cosines of the angles between M vectors; NaN beside a zero vector."""
    norms = gram.diagonal().clamp(min=0).sqrt()
    return (gram / torch.outer(norms, norms)).clamp(-1, 1)


def geometry(
    deltas: Sequence[AdapterDelta], granularity: Granularity = "block"
) -> dict[str, dict[str, list[float]]]:
    """Return the norms of the task vectors and the angles between them, per group.

    Returns:
        Group → {"norms": ‖δ_m‖ for each m, "angles": Ω in degrees for each pair (1,2), (1,3), …,
            (M−1,M)}. A pair with a zero task vector has the angle NaN.
    """
    return {
        group: norms_and_angles(own) for group, own in gram_matrices(deltas, granularity).items()
    }


def norms_and_angles(gram: Tensor) -> dict[str, list[float]]:
    """Return what `geometry` says of one group, from its (M, M) Gram matrix."""
    pairs = torch.triu_indices(len(gram), len(gram), offset=1)
    angles = torch.rad2deg(torch.acos(cosine_matrix(gram)[pairs[0], pairs[1]]))
    return {"norms": gram.diagonal().clamp(min=0).sqrt().tolist(), "angles": angles.tolist()}
