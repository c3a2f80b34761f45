"""An adapter's numbers in the dtype of its file: balanced factors, and what the dtype loses."""

import torch

from raywarp.algorithm.factors import Factors, Stack

# Columns whose largest number is within these hold all of float16's digits. Its normal numbers go
# from 2^-14 to 2^16.
_SMALL, _LARGE = 2.0**-10, 2.0**15
_LARGEST_POWER = 120  # float32 holds two to this power, and its inverse


def balanced(f: Factors, dtype: torch.dtype) -> Factors:
    """Return the same ΔW, exactly, with factors that can be written in a narrower dtype.

    A column of B and its row of A get the same size, by powers of two, where one of them would sink
    into float16's subnormal numbers or overflow. A column or row of zeros makes both zero.

    Args:
        dtype: of the file.
    """
    if _holds(dtype, f.B.dtype) or not (dtype == torch.float16 or f.B.dtype == torch.float64):
        return f
    B, A = f.B.abs().amax(0), f.A.abs().amax(1)
    powers = ((A.log2() - B.log2()) / 2).round().clamp(-_LARGEST_POWER, _LARGEST_POWER)
    powers[(torch.minimum(B, A) >= _SMALL) & (torch.maximum(B, A) < _LARGE)] = 0
    empty = (B == 0) | (A == 0)
    up, down = (torch.exp2(p).masked_fill(empty, 0) for p in (powers, -powers))
    return Factors(f.B * up, f.A * down[:, None])


def squared_loss(f: Factors, dtype: torch.dtype) -> float:
    """Return ‖round(B)·round(A) − ΔW‖² for factors that are written in a dtype."""
    if _holds(dtype, f.B.dtype) or not f.rank:
        return 0.0
    B, A = (factor.to(dtype).to(factor.dtype) for factor in f)
    # (round(B) − B)·round(A) + B·(round(A) − A): the difference, without its cancellation.
    parts = torch.cat([B - f.B, f.B], dim=1), torch.cat([A, A - f.A])
    return max(0.0, float(Stack(*parts, (2 * f.rank,)).gram(exact=False)))


def _holds(dtype: torch.dtype, other: torch.dtype) -> bool:
    """Return whether a dtype holds every number of another."""
    return torch.promote_types(dtype, other) == dtype
