"""How alike task vectors are: norms and angles of the weights, and the cosine of what they do.

Norms and angles follow from the Gram matrix of each group of modules. The KL cosine follows from
the KLs of the policies and of their mean.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from raywarp.algorithm.deltas import AdapterDelta, Granularity, aligned, grouped
from raywarp.algorithm.factors import Stack

# Where the least eigenvalue of the cosines is below this, some combination of the vectors almost
# vanishes. An angle to it magnifies the error of float32 products (4e-8).
_DEPENDENT = 0.1
_NO_KL = 1e-6  # nats per completion; below it, a KL is rounding


def gram_matrices(
    deltas: Sequence[AdapterDelta], granularity: Granularity = "block"
) -> dict[str, Tensor]:
    """Return group → (M, M) float64 matrix of ⟨δ_i, δ_j⟩, summed over all matrices of the group."""
    deltas = aligned(deltas)
    grams = {}
    for group, modules in grouped(deltas[0].factors, granularity).items():
        stacks = [Stack.of([delta.factors[module] for delta in deltas]) for module in modules]
        grams[group] = refined(summed_gram(stacks, exact=False), partial(summed_gram, stacks))
    return grams


def summed_gram(stacks: Sequence[Stack], exact: bool = True) -> Tensor:
    """Return the (M, M) float64 inner products of M summands over all weights; see Stack.gram."""
    return torch.stack([stack.gram(exact) for stack in stacks]).sum(0)


def refined(quick: Tensor, exact: Callable[[], Tensor]) -> Tensor:
    """Return the quick float32 Gram matrix, or the exact one where vectors are nearly dependent.

    The condition covers every angle between combinations of the vectors, as between SLERP's running
    merge and the next vector: with a cosine c, the least eigenvalue is at most 2·(1 − |c|).
    """
    moved = quick.diagonal() > 0
    cosines = cosine_matrix(quick[moved][:, moved])
    if len(cosines) < 2 or not bool(cosines.isfinite().all()):
        return quick
    return exact() if float(torch.linalg.eigvalsh(cosines)[0]) < _DEPENDENT else quick


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


def kl_cosine(policies: Sequence[float], lerp: float) -> float | None:
    """Return how alike M policies changed the model: 1 if they did the same, 0 if independently.

    It is the mean inner product of two of their changes over their mean square length, in the
    metric of the KL: c = (M·KL(LERP) / mean KL − 1) / (M − 1). It is exact where KL is quadratic in
    the change of the weights, that is for small changes.

    Args:
        policies: KL(θ_m ‖ θ_init) of each policy, in nats.
        lerp: KL of their plain mean, likewise.

    Returns:
        None for one policy, or where the policies have not moved.
    """
    count, mean = len(policies), sum(policies) / len(policies)
    if count < 2 or not mean > _NO_KL:
        return None
    return (count * lerp / mean - 1) / (count - 1)


def kl_cosine_interval(policies: Sequence[Sequence[float]], lerp: Sequence[float]) -> float | None:
    """Return half the width of the 95 % interval of the KL cosine, by the jackknife over prompts.

    Args:
        policies: M sequences of N KLs, one per prompt.
        lerp: N KLs of the policies' mean on the same prompts.

    Returns:
        None where the cosine is None, or with one prompt.
    """
    prompts = len(lerp)
    totals, total = [sum(own) for own in policies], sum(lerp)
    left_out = [
        kl_cosine([t - own[n] for t, own in zip(totals, policies, strict=True)], total - lerp[n])
        for n in range(prompts)
    ]
    found = [cosine for cosine in left_out if cosine is not None]
    if prompts < 2 or len(found) < prompts:
        return None
    mean = sum(found) / prompts
    spread = sum((cosine - mean) ** 2 for cosine in found)
    return 1.96 * math.sqrt(spread * (prompts - 1) / prompts)


def kl_summary(policies: Sequence[Sequence[float]], lerp: Sequence[float]) -> dict[str, Any]:
    """Return the KL cosine, its interval, the gain, and the mean KLs that they come from.

    Args:
        policies: M sequences of N KLs, one per prompt.
        lerp: N KLs of the policies' mean on the same prompts.
    """
    prompts = len(lerp)
    kl_policies, kl_lerp = [sum(own) / prompts for own in policies], sum(lerp) / prompts
    cosine = kl_cosine(kl_policies, kl_lerp)
    return {
        "kl_cosine": cosine,
        "kl_cosine_ci": kl_cosine_interval(policies, lerp),
        "kl_gain": None if cosine is None else kl_gain(cosine, len(policies)),
        "kl_policies": kl_policies,
        "kl_lerp": kl_lerp,
        "prompts": prompts,
    }


def kl_gain(cosine: float, policies: int) -> float:
    """Return the largest share of √KL that averaging M policies of this KL cosine can save.

    Their mean keeps √((1 + (M − 1)·c) / M) of √KL. No more than what differs can be averaged away.
    """
    kept = (1 + (policies - 1) * cosine) / policies
    return 1 - math.sqrt(min(max(kept, 0.0), 1.0))
