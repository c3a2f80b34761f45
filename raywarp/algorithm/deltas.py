"""LoRA updates as factors: inner products, concatenation, compression and truncation.

All of it is exact in ΔW = B·A, with the scaling folded into B. No function here forms ΔW except
`dense`, which is for tests and small uses. None averages A and B separately.

Letters: G blocks, M adapters, r rank, R = Σ r_m, d_out and d_in a weight's sizes. The adapters'
files are in adapters/peft.py.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

Granularity = Literal["block", "tensor", "global"]
_NEGLIGIBLE = 1e-9  # a singular value below this share of the largest counts as zero
# Rounding leaves singular values where summands cancel. Below this share of the factors' norms they
# count as zero, too.
_ROUNDING = 1e-13
# Products of this many rows are summed in float32 before float64 takes over. The error is 4e-8 of a
# norm, at 2.5 times float64's speed.
_CHUNK = 256


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


@dataclass(frozen=True)
class AdapterDelta:
    """The change ΔW that an adapter makes, as factors per module of the base model.

    Attributes:
        factors: module path in the base model (`model.layers.0.self_attn.q_proj`) → Factors.
        target_modules: the names by which PEFT finds these modules, or one pattern; by default the
            last part of each path.
        base_model: name of the base model, for the adapter's config file.
        fan_in_fan_out: the base stores its weights as (d_in, d_out), as GPT-2's Conv1D does. B and
            A are the same in both layouts.
        peft: the rest of PEFT's configuration of this adapter: task_type, layers_to_transform, ...
    """

    factors: Mapping[str, Factors]
    target_modules: tuple[str, ...] | str = ()
    base_model: str = ""
    fan_in_fan_out: bool = False
    peft: Mapping[str, Any] = field(default_factory=dict)

    def blocks(self) -> dict[str, list[str]]:
        """Return transformer block → its modules, in the order of the factors."""
        return grouped(self.factors)

    @property
    def rank(self) -> int:
        """The largest rank of any module."""
        return max((f.rank for f in self.factors.values()), default=0)

    def map(self, change: Callable[[str, Factors], Factors]) -> "AdapterDelta":
        return replace(
            self, factors={module: change(module, f) for module, f in self.factors.items()}
        )


def block_of(module: str) -> str:
    """Return a module's block: `model.layers.3.mlp.up_proj` → `model.layers.3`.

    A module outside the blocks is a block of its own.
    """
    match = re.match(r"(.*?\.\d+)\.", module)
    return match.group(1) if match else module


def group_of(module: str, granularity: Granularity) -> str:
    """Return the name of the module's group, which shares an angle.

    A group is a block, a single weight (`tensor`), or all modules (`global`).
    """
    return {"block": block_of(module), "tensor": module, "global": "global"}[granularity]


def grouped(modules: Iterable[str], granularity: Granularity = "block") -> dict[str, list[str]]:
    """Return group → its modules, both in the order in which the modules come."""
    groups: dict[str, list[str]] = {}
    for module in modules:
        groups.setdefault(group_of(module, granularity), []).append(module)
    return groups


def inner(x: Factors, y: Factors) -> float:
    """Return ⟨ΔW_x, ΔW_y⟩ = Σ (B_xᵀB_y ∘ A_xA_yᵀ), in float64 at O(r²(d_in + d_out)).

    `dense` is the long way to the same number.
    """
    left = x.B.double().T @ y.B.double()
    right = x.A.double() @ y.A.double().T
    return float((left * right).sum())


class Stack(NamedTuple):
    """One weight's factors of M adapters side by side: Σ_m ΔW_m = [B₁ … B_M]·[A₁; …; A_M].

    Attributes:
        B: (d_out, R).
        A: (R, d_in).
        ranks: r_1 … r_M.
    """

    B: Tensor
    A: Tensor
    ranks: tuple[int, ...]

    @classmethod
    def of(cls, parts: Sequence[Factors], memory: Tensor | None = None) -> "Stack":
        """Stack the factors of one weight.

        Args:
            parts: the factors of M adapters.
            memory: flat memory to put the stack into; new memory by default.
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
        )

    def parts(self) -> list[Factors]:
        """Return the M summands, as views."""
        return [
            Factors(B, A)
            for B, A in zip(self.B.split(self.ranks, dim=1), self.A.split(self.ranks), strict=True)
        ]

    def gram(self, exact: bool = True) -> Tensor:
        """Return the (M, M) float64 inner products ⟨ΔW_i, ΔW_j⟩ of the summands.

        Args:
            exact: multiply in float64. Otherwise float32 factors are multiplied in float32, in
                chunks that are summed in float64.
        """
        multiply = _products if exact else _quick_products
        products = multiply(self.B) * multiply(self.A.T)
        owner = torch.repeat_interleave(torch.arange(len(self.ranks)), torch.tensor(self.ranks))
        member = (owner == torch.arange(len(self.ranks))[:, None]).double()
        return member @ products @ member.T

    def weigh(self, coefficients: Sequence[float], in_place: bool = False) -> Factors:
        """Return Σ_m c_m ΔW_m, exactly; summands of weight 0 are left out.

        Args:
            coefficients: c_1 … c_M.
            in_place: the stack's own memory may be used for the result.
        """
        weights = [
            weight
            for weight, rank in zip(coefficients, self.ranks, strict=True)
            for _ in range(rank)
        ]
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
    if columns.dtype == torch.float64:
        return _products(columns)
    whole = len(columns) // _CHUNK * _CHUNK
    chunks = columns[:whole].view(-1, _CHUNK, columns.shape[1])
    return torch.bmm(chunks.transpose(1, 2), chunks).sum(0, dtype=torch.float64) + _products(
        columns[whole:]
    )


def norm(f: Factors) -> float:
    """Return the Frobenius norm ‖ΔW‖."""
    return math.sqrt(max(inner(f, f), 0.0))


def dense(factors: Factors) -> Tensor:
    """Return ΔW itself, (d_out, d_in) float64."""
    return factors.B.double() @ factors.A.double()


def zeros_like(delta: AdapterDelta) -> AdapterDelta:
    """Return the adapter that changes nothing: rank 0 everywhere."""
    return delta.map(lambda _, f: Factors(f.B[:, :0], f.A[:0]))


def scale(delta: AdapterDelta, coefficient: float) -> AdapterDelta:
    """Return coefficient·ΔW. Only one factor is scaled, since scaling both would square it."""
    return delta.map(lambda _, f: Factors(f.B * coefficient, f.A))


def concatenate(
    deltas: Sequence[AdapterDelta], coefficients: Mapping[str, Sequence[float]] | Sequence[float]
) -> AdapterDelta:
    """Return Σ_m c_m ΔW_m exactly, as [c₁B₁ … c_MB_M]·[A₁; …; A_M].

    Args:
        deltas: M adapters of the same modules.
        coefficients: M numbers for all modules, or M numbers per module, per block, or (under
            "global") for the rest.

    Raises:
        AdapterError: the adapters change different modules, or weights of different sizes.
    """
    check_same_modules(deltas)

    def combine(module: str, _: Factors) -> Factors:
        return Stack.of([delta.factors[module] for delta in deltas]).weigh(
            _coefficients_of(module, coefficients)
        )

    return deltas[0].map(combine)


def _coefficients_of(
    module: str, coefficients: Mapping[str, Sequence[float]] | Sequence[float]
) -> Sequence[float]:
    if not isinstance(coefficients, Mapping):
        return coefficients
    groups = (group_of(module, granularity) for granularity in ("tensor", "block", "global"))
    return next(coefficients[group] for group in groups if group in coefficients)


def add(*deltas: AdapterDelta) -> AdapterDelta:
    return concatenate(deltas, [1.0] * len(deltas))


def subtract(x: AdapterDelta, y: AdapterDelta) -> AdapterDelta:
    return concatenate([x, y], [1.0, -1.0])


def trailing(delta: AdapterDelta, rank: int) -> AdapterDelta:
    """Return the last summand of a concatenation, bit for bit.

    It is the last `rank` columns of every B and the last `rank` rows of every A.
    """
    return delta.map(lambda _, f: Factors(f.B[:, f.rank - rank :], f.A[f.rank - rank :]))


def check_same_modules(deltas: Sequence[AdapterDelta]) -> None:
    """Raise AdapterError unless all adapters change the same weights."""
    sizes = [
        {module: (f.B.shape[0], f.A.shape[1]) for module, f in delta.factors.items()}
        for delta in deltas
    ]
    check_same_sizes(sizes, [f"adapter {index}" for index in range(1, len(deltas) + 1)])


def check_same_sizes(sizes: Sequence[Mapping[str, tuple[int, int]]], names: Sequence[str]) -> None:
    """Raise AdapterError unless all map the same modules to the same (d_out, d_in).

    Args:
        sizes: module → (d_out, d_in) of each adapter.
        names: of the adapters, for the message.
    """
    for ours, name in zip(sizes[1:], names[1:], strict=True):
        if odd := sorted(sizes[0].keys() ^ ours.keys()):
            raise AdapterError(
                f"{names[0]} and {name} adapt different modules: only one of them has {odd[0]}"
                f" ({len(odd)} in all)"
            )
        for module, size in ours.items():
            if size != sizes[0][module]:
                raise AdapterError(
                    f"{module} is {sizes[0][module]} in {names[0]} and {size} in {name}: not of one"
                    " base model"
                )


def compress(delta: AdapterDelta) -> AdapterDelta:
    """Return the same ΔW at its true rank, with no loss but rounding.

    Both stacks are decomposed by QR, and the small core by SVD.
    """
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
    """
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
    squares = s.square()
    noise = max(_NEGLIGIBLE * float(s[:1].sum()), _ROUNDING * float(r_out.norm() * r_in.norm()))
    keep = int((s > noise).sum())
    if rank is not None:
        keep = min(rank, keep)
    if energy is not None and energy < 1:
        keep = min(keep, int((squares.cumsum(0) < energy * squares.sum()).sum()) + 1)
    root = s[:keep].sqrt()  # in both factors, so that neither overflows a narrow dtype
    B, A = (q_out @ u[:, :keep]) * root, root[:, None] * (vh[:keep] @ q_in.T)
    return Shrunk(
        Factors(B.to(f.B.dtype), A.to(f.A.dtype)), float(squares[:keep].sum()), float(squares.sum())
    )
