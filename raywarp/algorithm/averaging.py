"""The averages of WARP: the EMA anchor, spherical merging (stage 2) and LITI (stage 3).

Everything here is linear algebra on LoRA factors (deltas.py): no model, no Ray, no files. The
equations are those of Ramé et al. 2024, "WARP: On the Benefits of Weight Averaged Rewarded
Policies".

M is the number of policies and δ_m the task vector of policy m. Every average is Σ c_m δ_m, and the
averages differ in c alone. The weights c follow from the M×M Gram matrix of each group of modules
that share an angle. By default such a group is a transformer block.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from raywarp.algorithm.deltas import AdapterDelta, Granularity, aligned, concatenate
from raywarp.algorithm.factors import AdapterError, Factors
from raywarp.algorithm.geometry import gram_matrices
from raywarp.algorithm.truncation import compress, difference

# When cos Ω is this close to ±1, no angle is left to divide by. In float64 the Gram matrix is
# accurate to about 1e-15.
_COLLINEAR = 1e-12


class AntipodalError(AdapterError):
    """Two vectors point in opposite directions, so no shortest arc joins them."""


def slerp_coefficients(gram: Tensor, weights: Sequence[float] | None = None) -> Tensor:
    """Return the weights c of slerp(δ_1..δ_M) = Σ c_m δ_m for one block (Ramé et al. 2024, eq. 26).

    Args:
        gram: (M, M) float64, inner products ⟨δ_i, δ_j⟩ of the block's task vectors.
        weights: M numbers ≥ 0. Step m of the recursion goes λ_m = w_m / Σ_{j≤m} w_j of the way.
            Equal by default: λ_m = 1/m.

    Returns:
        (M,) float64. A zero task vector gets weight 0 and is not counted; M = 1 gives [1].

    Raises:
        AntipodalError: two vectors point in opposite directions.
    """
    count = gram.shape[0]
    shares = checked_weights(weights, count)
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
    """Return the coefficients of the point `step` of the way along the arc from merged to δ_m.

    `merged` holds the coefficients of the start, Σ merged_j δ_j, and the arc is part of a great
    circle.
    """
    target = _unit(len(merged), m)
    norm = float(torch.sqrt(merged @ gram @ merged))
    cosine = float(merged @ gram[m]) / (norm * math.sqrt(float(gram[m, m])))
    cosine = max(-1.0, min(1.0, cosine))
    if cosine > 1 - _COLLINEAR:
        return (1 - step) * merged + step * target
    if cosine < -1 + _COLLINEAR:
        raise AntipodalError(
            f"task vector {m + 1} points opposite to those before it: their spherical mean is"
            " undefined"
        )
    angle = math.acos(cosine)
    return (math.sin((1 - step) * angle) * merged + math.sin(step * angle) * target) / math.sin(
        angle
    )


def lerp_coefficients(gram: Tensor, weights: Sequence[float] | None = None) -> Tensor:
    """Return the (M,) float64 weights w_m / Σ w of the plain mean.

    Only the size of `gram`, (M, M), is read.
    """
    shares = torch.tensor(checked_weights(weights, gram.shape[0]), dtype=torch.float64)
    return shares / shares.sum()


def karcher_coefficients(
    gram: Tensor, weights: Sequence[float] | None = None, iterations: int = 1000
) -> Tensor:
    """Return the weights c of the Karcher mean of M task vectors.

    Its direction has the least mean squared angle to the δ_m; its norm is the mean of their norms.
    Unlike the recursion of SLERP, it does not depend on the order of the δ_m. For two vectors of
    equal norm both give the same.

    Source: Grove and Karcher 1973. The mean is found by Riemannian gradient descent, whose steps
    need the Gram matrix alone.

    Args:
        gram: (M, M) float64, inner products ⟨δ_i, δ_j⟩ of the block's task vectors.
        weights: M numbers ≥ 0; equal by default.
        iterations: the most steps of the descent.

    Returns:
        (M,) float64. A zero task vector gets weight 0 and is not counted; M = 1 gives [1].

    Raises:
        AntipodalError: the vectors cancel, or are spread so far that the mean direction is not
            unique.
    """
    norms = gram.diagonal().clamp(min=0).sqrt()
    shares = torch.tensor(checked_weights(weights, gram.shape[0]), dtype=torch.float64) * (
        norms > 0
    )
    if not shares.any():
        return torch.zeros_like(norms)
    shares, safe = shares / shares.sum(), torch.where(norms > 0, norms, 1.0)
    # Cosines of the unit vectors u_m = δ_m / ‖δ_m‖.
    cosines = (gram / torch.outer(safe, safe)).clamp(-1, 1)
    mean = _normalised(shares, cosines)  # the mean direction is Σ mean_m u_m
    for _ in range(iterations):
        to_mean = (cosines @ mean).clamp(-1, 1)
        if bool((to_mean[shares > 0] < -1 + _COLLINEAR).any()):
            break
        angles = torch.acos(to_mean)
        # Σ_m w_m·log_mean(u_m), before its component along the mean is removed.
        pull = shares * torch.where(angles > 1e-7, angles / torch.sin(angles), 1.0)
        tangent = pull - (pull @ to_mean) * mean
        length = float((tangent @ cosines @ tangent).clamp(min=0).sqrt())
        moved = _normalised(
            math.cos(length) * mean + (math.sin(length) / length if length else 1.0) * tangent,
            cosines,
        )
        settled, mean = float((moved - mean).abs().max()) < 1e-14, moved
        if settled:
            return float(shares @ norms) * mean / safe * (norms > 0)
    raise AntipodalError(
        "the task vectors point so far apart that their Karcher mean is not unique"
    )


def _normalised(coefficients: Tensor, cosines: Tensor) -> Tensor:
    square = float(coefficients @ cosines @ coefficients)
    if square < _COLLINEAR:
        raise AntipodalError("the task vectors cancel: their spherical mean is undefined")
    return coefficients / math.sqrt(square)


def ema_coefficients(count: int, rate: float) -> Tensor:
    """Return the (K,) float64 weights of an EMA at rate μ over K checkpoints, the oldest first.

    The first checkpoint gets (1−μ)^(K−1), the k-th gets μ(1−μ)^(K−k).
    """
    check_rate(rate, "ema_rate")
    weights = [rate * (1 - rate) ** (count - k) for k in range(1, count + 1)]
    return torch.tensor([(1 - rate) ** (count - 1), *weights[1:]], dtype=torch.float64)


def slerp(
    deltas: Sequence[AdapterDelta],
    weights: Sequence[float] | None = None,
    init: AdapterDelta | None = None,
    granularity: Granularity = "block",
) -> AdapterDelta:
    """Return the spherical mean of M task vectors, exact in ΔW: stage 2.

    Args:
        deltas: the task vectors θ_m − θ_init; with `init`, the policies θ_m themselves.
        weights: see slerp_coefficients. For M = 2, weights (1 − λ, λ) give slerp at λ.
        init: θ_init; the result is then θ_init + slerp(θ_m − θ_init).
        granularity: what shares an angle: a transformer block, a single weight, or the whole model.

    Returns:
        Their merge as a concatenation, of rank Σ r_m (plus init's).

    Raises:
        AntipodalError: two vectors of one group are opposite; the message names the group.
        AdapterError: see deltas.aligned.
    """
    return _spherical(slerp_coefficients, deltas, weights, init, granularity)


def karcher(
    deltas: Sequence[AdapterDelta],
    weights: Sequence[float] | None = None,
    init: AdapterDelta | None = None,
    granularity: Granularity = "block",
) -> AdapterDelta:
    """Return the spherical mean that does not depend on the order of the policies.

    See karcher_coefficients for the mean, and slerp for arguments, result and errors.
    """
    return _spherical(karcher_coefficients, deltas, weights, init, granularity)


def _spherical(
    coefficients: Callable[[Tensor, Sequence[float] | None], Tensor],
    deltas: Sequence[AdapterDelta],
    weights: Sequence[float] | None,
    init: AdapterDelta | None,
    granularity: Granularity,
) -> AdapterDelta:
    vectors = deltas if init is None else task_vectors(deltas, init)
    weighted = {
        group: in_group(group, coefficients, own, weights).tolist()
        for group, own in gram_matrices(vectors, granularity).items()
    }
    if init is None:
        return concatenate(deltas, weighted)
    return concatenate([*deltas, init], {group: towards(c) for group, c in weighted.items()})


def in_group(
    group: str,
    coefficients: Callable[[Tensor, Sequence[float] | None], Tensor],
    own: Tensor,
    weights: Sequence[float] | None,
) -> Tensor:
    """Return coefficients(own, weights); an AntipodalError names the group."""
    try:
        return coefficients(own, weights)
    except AntipodalError as error:
        raise AntipodalError(f"{group}: {error}") from None


def task_vectors(policies: Sequence[AdapterDelta], init: AdapterDelta) -> list[AdapterDelta]:
    """Return the task vectors θ_m − θ_init.

    What policies and init have in common is cancelled before anything is squared.

    Raises:
        AdapterError: see deltas.aligned.
    """
    names = [f"adapter {number}" for number in range(1, len(policies) + 1)]
    *policies, start = aligned([*policies, init], [*names, "the init"])
    return [
        policy.map(lambda module, f: difference(f, start.factors[module])) for policy in policies
    ]


def towards(coefficients: Sequence[float], rate: float = 1.0) -> list[float]:
    """Return the weights of θ_1, …, θ_M, θ_init in θ_init + η·Σ c_m (θ_m − θ_init), η the rate."""
    moved = [rate * c for c in coefficients]
    return [*moved, 1 - math.fsum(moved)]


def lerp(deltas: Sequence[AdapterDelta], weights: Sequence[float] | None = None) -> AdapterDelta:
    """Return the plain mean of M adapters, exact in ΔW: a concatenation of rank Σ r_m.

    The mean is the same from every init, so none is taken.

    Args:
        weights: M numbers ≥ 0; equal by default.
    """
    shares = checked_weights(weights, len(deltas))
    return concatenate(deltas, [share / sum(shares) for share in shares])


def mean(deltas: Sequence[AdapterDelta], one_A: bool = False) -> AdapterDelta:
    """Return the plain mean of M adapters, exact in ΔW, as lerp does.

    Args:
        one_A: all adapters have the same A. The mean then has their rank, and not Σ r_m.
    """
    if not one_A:
        return lerp(deltas)

    def average(module: str, first: Factors) -> Factors:
        return Factors(torch.stack([d.factors[module].B for d in deltas]).mean(0), first.A)

    return deltas[0].map(average)


def ema(checkpoints: Sequence[AdapterDelta], rate: float) -> AdapterDelta:
    """Return the exponential moving average of ΔW over checkpoints: ema ← (1 − μ)·ema + μ·θ.

    It is exact, unlike `ema_update`, which averages the factors. The result is a concatenation of
    rank Σ r_k.

    Args:
        checkpoints: the oldest first.
        rate: μ in [0, 1].
    """
    return concatenate(checkpoints, ema_coefficients(len(checkpoints), rate).tolist())


def liti(init: AdapterDelta, merged: AdapterDelta, rate: float) -> AdapterDelta:
    """Return (1 − η)·θ_init + η·θ_merged, at the smallest rank that holds it exactly: stage 3.

    Args:
        init, merged: both as changes from the same base, for example θ_init − θ_sft and θ_slerp −
            θ_sft.
        rate: η in [0, 1].
    """
    check_rate(rate, "liti_rate")
    return compress(concatenate([init, merged], [1 - rate, rate]))


@torch.no_grad()
def ema_update(ema: Sequence[Tensor], policy: Sequence[Tensor], rate: float) -> None:
    """Update stage 1's anchor in place: ema ← (1 − μ)·ema + μ·policy, after every optimiser step.

    On LoRA factors this is the EMA of A and of B. It equals the EMA of ΔW only while A is frozen:
    the product of (1−μ)B + μB' and (1−μ)A + μA' has cross terms. They are of second order in the
    policy's motion.
    """
    torch._foreach_lerp_(list(ema), list(policy), rate)


def _unit(count: int, m: int) -> Tensor:
    unit = torch.zeros(count, dtype=torch.float64)
    unit[m] = 1
    return unit


def check_rate(rate: float, name: str) -> None:
    if not 0 <= rate <= 1:
        raise ValueError(f"{name} must lie in [0, 1], not {rate}")


def checked_weights(weights: Sequence[float] | None, count: int) -> list[float]:
    """Return the weights, all 1 by default.

    Raises:
        ValueError: there are not `count` of them, one is negative or not finite, or all are 0.
    """
    if weights is None:
        return [1.0] * count
    if (
        len(weights) != count
        or min(weights) < 0
        or not math.isfinite(sum(weights))
        or sum(weights) == 0
    ):
        raise ValueError(
            f"need {count} weights that are at least 0 and not all 0, got {list(weights)}"
        )
    return [float(w) for w in weights]
