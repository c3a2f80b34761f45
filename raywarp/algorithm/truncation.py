"""Compression to the true rank, and the best approximation of a given rank or energy."""

import math
from dataclasses import replace
from typing import NamedTuple

import torch

from raywarp.algorithm.deltas import AdapterDelta
from raywarp.algorithm.factors import Factors, Stack
from raywarp.algorithm.fitting import check_finite

_NEGLIGIBLE = 1e-9  # a singular value below this share of the largest counts as zero


# Rounding leaves singular values where summands cancel. Below this share of the factors' norms they
# count as zero, too.
_ROUNDING = 1e-13


def compress(delta: AdapterDelta) -> AdapterDelta:
    """Return the same ΔW at its true rank, with no loss but rounding.

    Both stacks are decomposed by QR, and the small core by SVD.

    Raises:
        AdapterError: a number is NaN or infinite.
    """
    check_finite(delta.factors, "the adapter")
    return delta.map(lambda _, f: shrink(f).factors)


def difference(x: Factors, y: Factors) -> Factors:
    """Return ΔW_x − ΔW_y at its true rank.

    What both have in common cancels, so equal updates give rank 0.
    """
    return shrink(Stack.of([x, Factors(-y.B, y.A)]).weigh([1.0, 1.0])).factors


def truncate(
    delta: AdapterDelta, rank: int | None = None, energy: float | None = None
) -> tuple[AdapterDelta, dict[str, float]]:
    """Return every module's best approximation of a smaller rank; see `shrink`.

    Returns:
        The truncated adapter, and block → the share of its norm that is retained.

    Raises:
        AdapterError: a number is NaN or infinite.
    """
    check_finite(delta.factors, "the adapter")
    small = {module: shrink(f, rank, energy) for module, f in delta.factors.items()}
    retained = {}
    for block, modules in delta.blocks().items():
        kept, total = (
            math.fsum(getattr(small[module], part) for module in modules)
            for part in ("kept", "total")
        )
        retained[block] = math.sqrt(kept / total) if total else 1.0
    return replace(delta, factors={module: own.factors for module, own in small.items()}), retained


class Shrunk(NamedTuple):
    """The result of `shrink`.

    Attributes:
        factors: the approximation, with the roots of the singular values in both factors.
        kept: its squared norm.
        total: the squared norm of ΔW.
    """

    factors: Factors
    kept: float
    total: float


def shrink(f: Factors, rank: int | None = None, energy: float | None = None) -> Shrunk:
    """Return the best approximation of ΔW of a smaller rank (Eckart–Young).

    It takes a QR of both factors and an SVD of the small core, in float64.

    Args:
        rank: the largest rank to keep; by default the true one, which loses nothing.
        energy: the share of ‖ΔW‖² to keep, in (0, 1]. The smallest rank that keeps it is taken; 1
            loses nothing.
    """
    q_out, r_out = torch.linalg.qr(f.B.double())
    q_in, r_in = torch.linalg.qr(f.A.double().T)
    u, s, vh = torch.linalg.svd(r_out @ r_in.T, full_matrices=False)
    noise = max(_NEGLIGIBLE * float(s[:1].sum()), _ROUNDING * float(r_out.norm() * r_in.norm()))
    s = s.where(s > noise, 0)
    squares, keep = s.square(), int((s > 0).sum())
    if rank is not None:
        keep = min(rank, keep)
    if energy is not None and energy < 1:
        keep = min(keep, int((squares.cumsum(0) < energy * squares.sum()).sum()) + 1)
    root = s[:keep].sqrt()  # in both factors, so that neither overflows a narrow dtype
    B, A = (q_out @ u[:, :keep]) * root, root[:, None] * (vh[:keep] @ q_in.T)
    return Shrunk(
        Factors(B.to(f.B.dtype), A.to(f.A.dtype)), float(squares[:keep].sum()), float(squares.sum())
    )
