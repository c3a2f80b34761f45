"""One weight's update as factors ΔW = B·A, and several of them side by side.

All of it is exact in ΔW, with the scaling folded into B. Only `dense` forms ΔW, for tests and small
uses. Letters: M adapters, r rank, R = Σ r_m, d_out and d_in a weight's sizes.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# Products of this many rows are summed in float32 before float64 takes over. The error is 4e-8 of a
# norm, at 2.5 times float64's speed.
_CHUNK = 256
# Between these, float32 holds the squares of a column's numbers.
_SMALLEST_SQUARE, _LARGEST_SQUARE = 1e-20, 1e30
# Below this share of its summands' squares, ‖ΔW‖² has lost the digits of float32.
_CANCELLED = 0.05


class AdapterError(ValueError):
    """An adapter that cannot be read or averaged exactly; the message says which and why."""


class Factors(NamedTuple):
    """One weight's update ΔW = B·A.

    Attributes:
        B: (d_out, r), with the scaling alpha/r folded in.
        A: (r, d_in).
    """

    B: Tensor
    A: Tensor

    @property
    def rank(self) -> int:
        return self.A.shape[0]


def inner(x: Factors, y: Factors) -> float:
    """Return ⟨ΔW_x, ΔW_y⟩ = Σ (B_xᵀB_y ∘ A_xA_yᵀ), in float64 at O(r²(d_in + d_out)).

    `dense` is the long way to the same number.
    """
    left = x.B.double().T @ y.B.double()
    right = x.A.double() @ y.A.double().T
    return float((left * right).sum())


class Stack(NamedTuple):
    """One weight's factors of M adapters side by side: Σ_m ΔW_m = [s₁B₁ … s_MB_M]·[A₁; …; A_M].

    Attributes:
        B: (d_out, R).
        A: (R, d_in).
        ranks: r_1 … r_M.
        scalings: s_1 … s_M, 1 by default.
    """

    B: Tensor
    A: Tensor
    ranks: tuple[int, ...]
    scalings: tuple[float, ...] = ()

    @classmethod
    def of(
        cls,
        parts: Sequence[Factors],
        memory: Tensor | None = None,
        scalings: Sequence[float] = (),
    ) -> "Stack":
        """Stack the factors of one weight.

        Args:
            parts: the factors of M adapters.
            memory: flat memory to put the stack into; new memory by default.
            scalings: of the parts, where it is not folded into them.
        """
        ranks = tuple(f.rank for f in parts)
        B = A = None
        if memory is not None:
            d_out, d_in, rank = len(parts[0].B), parts[0].A.shape[1], sum(ranks)
            B, A = (
                memory[: d_out * rank].view(d_out, rank),
                memory[d_out * rank : (d_out + d_in) * rank].view(rank, d_in),
            )
        return cls(
            torch.cat([f.B for f in parts], dim=1, out=B),
            torch.cat([f.A for f in parts], out=A),
            ranks,
            tuple(scalings),
        )

    def parts(self) -> list[Factors]:
        """Return the M summands."""
        scalings = self.scalings or [1.0] * len(self.ranks)
        split = self.B.split(self.ranks, dim=1), self.A.split(self.ranks), scalings
        return [Factors(B if s == 1 else B * s, A) for B, A, s in zip(*split, strict=True)]

    def gram(self, exact: bool = True) -> Tensor:
        """Return the (M, M) float64 inner products ⟨ΔW_i, ΔW_j⟩ of the summands.

        Args:
            exact: multiply in float64. Otherwise float32 factors are multiplied in float32, in
                chunks that are summed in float64, wherever that keeps seven digits.
        """
        multiply = _products if exact else _quick_products
        products = multiply(self.B) * multiply(self.A.T)
        owner = torch.repeat_interleave(torch.arange(len(self.ranks)), torch.tensor(self.ranks))
        member = (owner == torch.arange(len(self.ranks))[:, None]).double()
        gram = member @ products @ member.T
        uncancelled = (member @ products.abs() @ member.T).diagonal()
        if not exact and bool((gram.diagonal() < _CANCELLED * uncancelled).any()):
            return self.gram(exact=True)
        if self.scalings:
            scalings = torch.tensor(self.scalings, dtype=torch.float64)
            gram *= torch.outer(scalings, scalings)
        return gram

    def weigh(self, coefficients: Sequence[float], in_place: bool = False) -> Factors:
        """Return Σ_m c_m ΔW_m, exactly; summands of weight 0 are left out.

        Args:
            coefficients: c_1 … c_M.
            in_place: the stack's own memory may be used for the result.
        """
        scalings = self.scalings or [1.0] * len(self.ranks)
        summands = zip(coefficients, scalings, self.ranks, strict=True)
        weights = [c * s for c, s, rank in summands for _ in range(rank)]
        B, A, kept = (
            self.B,
            self.A,
            [column for column, weight in enumerate(weights) if weight != 0],
        )
        if len(kept) < len(weights):
            B, A, weights = B[:, kept], A[kept], [weights[column] for column in kept]
        scales = torch.tensor(weights, dtype=B.dtype, device=B.device)
        return Factors(B.mul_(scales) if in_place else B * scales, A)


def _products(columns: Tensor) -> Tensor:
    """Return XᵀX of X (d, R), in float64."""
    wide = columns.double()
    return wide.T @ wide


def _quick_products(columns: Tensor) -> Tensor:
    """Return XᵀX of X (d, R), multiplied in float32 where that can hold the squares."""
    if columns.dtype != torch.float32 or not columns.shape[1]:
        return _products(columns)
    whole = len(columns) // _CHUNK * _CHUNK
    chunks = columns[:whole].view(-1, _CHUNK, columns.shape[1])
    products = torch.bmm(chunks.transpose(1, 2), chunks).sum(0, dtype=torch.float64)
    products += _products(columns[whole:])
    squares = products.diagonal()
    unheld = ~((squares > _SMALLEST_SQUARE) & (squares < _LARGEST_SQUARE))
    return _products(columns) if bool(columns[:, unheld].any()) else products


def norm(f: Factors) -> float:
    """Return the Frobenius norm ‖ΔW‖."""
    return math.sqrt(max(inner(f, f), 0.0))


def dense(factors: Factors) -> Tensor:
    """Return ΔW itself, (d_out, d_in) float64."""
    return factors.B.double() @ factors.A.double()
