"""Stages 2 and 3 of WARP: spherical merging of task vectors and interpolation towards the initialisation; and its EMA.

Everything here is linear algebra on LoRA factors (adapters.py): no model, no Ray, no files. Equations are those of Ramé et
al. 2024, "WARP: On the Benefits of Weight Averaged Rewarded Policies". M policies, δ_m a policy's task vector, one block at a time.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from raywarp.adapters import AdapterDelta, AdapterError, check_same_modules, compress, concatenate, inner

# cos Ω this close to ±1 leaves no angle to divide by; in float64 the Gram matrix is good to about 1e-15.
_COLLINEAR = 1e-12


class AntipodalError(AdapterError):
    """Two vectors point in opposite directions, so no shortest arc joins them."""


def gram_matrices(deltas: Sequence[AdapterDelta]) -> dict[str, Tensor]:
    """Block → (M, M) float64 matrix of ⟨δ_i, δ_j⟩, summed over all matrices of the block."""
    check_same_modules(deltas)
    count = len(deltas)
    grams = {}
    for block, modules in deltas[0].blocks().items():
        gram = torch.zeros(count, count, dtype=torch.float64)
        for i in range(count):
            for j in range(i + 1):
                gram[i, j] = gram[j, i] = math.fsum(inner(deltas[i].factors[m], deltas[j].factors[m]) for m in modules)
        grams[block] = gram
    return grams


def slerp_coefficients(gram: Tensor, weights: Sequence[float] | None = None) -> Tensor:
    """Weights c with slerp(δ_1..δ_M) = Σ c_m δ_m for one block, by the paper's recursion (eq. 26).

    Args:
        gram: (M, M) float64, inner products ⟨δ_i, δ_j⟩ of the block's task vectors.
        weights: M numbers ≥ 0; the m-th step goes λ_m = w_m / Σ_{j≤m} w_j of the way. Equal by default: λ_m = 1/m.

    Returns:
        (M,) float64. A zero task vector gets weight 0 and is not counted; M = 1 gives [1].

    Raises:
        AntipodalError: two vectors point in opposite directions.
    """
    count = gram.shape[0]
    shares = _check_weights(weights, count)
    norms = gram.diagonal().clamp(min=0).sqrt()
    merged = torch.zeros(count, dtype=torch.float64)
    total = 0.0
    for m in range(count):
        if norms[m] == 0 or shares[m] == 0:
            continue
        total += shares[m]
        merged = _arc(gram, merged, m, shares[m] / total) if merged.any() else _unit(count, m)
    return merged


def _arc(gram: Tensor, merged: Tensor, m: int, step: float) -> Tensor:
    """Coefficients of the point `step` of the way from Σ merged_j δ_j to δ_m along the great circle."""
    target = _unit(len(merged), m)
    norm = float(torch.sqrt(merged @ gram @ merged))
    cosine = float(merged @ gram[m]) / (norm * math.sqrt(float(gram[m, m])))
    cosine = max(-1.0, min(1.0, cosine))
    if cosine > 1 - _COLLINEAR:
        return (1 - step) * merged + step * target
    if cosine < -1 + _COLLINEAR:
        raise AntipodalError(f"task vector {m + 1} points opposite to those before it: their spherical mean is undefined")
    angle = math.acos(cosine)
    return (math.sin((1 - step) * angle) * merged + math.sin(step * angle) * target) / math.sin(angle)


def slerp(deltas: Sequence[AdapterDelta], weights: Sequence[float] | None = None) -> AdapterDelta:
    """Stage 2: the spherical mean of M task vectors, one angle per transformer block, exact in ΔW.

    Args:
        deltas: the task vectors θ_m − θ_init.
        weights: see slerp_coefficients. For M = 2, weights (1 − λ, λ) give slerp at λ.

    Returns:
        their merge as a concatenation, of rank Σ r_m.

    Raises:
        AntipodalError: in the block that the message names.
        AdapterError: the adapters do not change the same weights.
    """
    coefficients = {}
    for block, gram in gram_matrices(deltas).items():
        try:
            coefficients[block] = slerp_coefficients(gram, weights).tolist()
        except AntipodalError as error:
            raise AntipodalError(f"{block}: {error}") from None
    return concatenate(deltas, coefficients)


def lerp(deltas: Sequence[AdapterDelta], weights: Sequence[float] | None = None) -> AdapterDelta:
    """The plain mean of M task vectors, exact in ΔW: a concatenation of rank Σ r_m."""
    shares = _check_weights(weights, len(deltas))
    return concatenate(deltas, [share / sum(shares) for share in shares])


def liti(init: AdapterDelta, merged: AdapterDelta, rate: float) -> AdapterDelta:
    """Stage 3: (1 − η)·θ_init + η·θ_merged, at the smallest rank that holds it exactly.

    Args:
        init, merged: both as changes from the same base, for example θ_init − θ_sft and θ_slerp − θ_sft.
        rate: η in [0, 1].
    """
    if not 0 <= rate <= 1:
        raise ValueError(f"liti_rate must lie in [0, 1], not {rate}")
    return compress(concatenate([init, merged], [1 - rate, rate]))


@torch.no_grad()
def ema_update(ema: Sequence[Tensor], policy: Sequence[Tensor], rate: float) -> None:
    """Stage 1's anchor, in place: ema ← (1 − μ)·ema + μ·policy, after every optimiser step.

    On LoRA factors this is the EMA of A and of B, which is the EMA of ΔW only while A is frozen: (1−μ)B + μB' times
    (1−μ)A + μA' has cross terms of second order in the policy's motion.
    """
    torch._foreach_lerp_(list(ema), list(policy), rate)


def geometry(deltas: Sequence[AdapterDelta]) -> dict[str, dict[str, list[float]]]:
    """Block → {"norms": ‖δ_m‖ for each m, "angles": Ω in degrees for each pair (1,2), (1,3), …, (M−1,M)}.

    A pair with a zero task vector has the angle NaN.
    """
    result = {}
    for block, gram in gram_matrices(deltas).items():
        norms = gram.diagonal().clamp(min=0).sqrt()
        cosines = (gram / torch.outer(norms, norms)).clamp(-1, 1)
        pairs = torch.triu_indices(len(deltas), len(deltas), offset=1)
        angles = torch.rad2deg(torch.acos(cosines[pairs[0], pairs[1]]))
        result[block] = {"norms": norms.tolist(), "angles": angles.tolist()}
    return result


def _unit(count: int, m: int) -> Tensor:
    unit = torch.zeros(count, dtype=torch.float64)
    unit[m] = 1
    return unit


def _check_weights(weights: Sequence[float] | None, count: int) -> list[float]:
    if weights is None:
        return [1.0] * count
    if len(weights) != count or min(weights) < 0 or not math.isfinite(sum(weights)) or sum(weights) == 0:
        raise ValueError(f"need {count} weights that are at least 0 and not all 0, got {list(weights)}")
    return [float(w) for w in weights]
