"""A LoRA update as factors: inner products, concatenation, compression and truncation, all exact in
ΔW.

ΔW = B·A with the scaling folded into B. No function here forms ΔW (except `dense`, for tests and
small uses), and none averages A and B apart. G blocks, M adapters, r rank, R = Σ r_m, d_out and
d_in a weight's sizes. Their files: peft_files.py.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

Granularity = Literal["block", "tensor", "global"]
_NEGLIGIBLE = 1e-9  # a singular value below this share of the largest is none
# and neither is one that rounding made of summands that cancel, relative to the factors' norms
_ROUNDING = 1e-13
# rows whose products are summed in float32 before float64 takes over: 4e-8 of a norm off, at 2.5
# times float64's speed
_CHUNK = 256


class AdapterError(ValueError):
    """An adapter that cannot be read or averaged exactly; the message names the file and the
    reason.
    """


class Factors(NamedTuple):
    """One weight's update ΔW = B·A.

    B: (d_out, r), the scaling alpha/r folded in.
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

    factors: module path in the base model (`model.layers.0.self_attn.q_proj`) → Factors.
    target_modules: the names by which PEFT finds these modules, or one pattern; by default the last
    part of each path.
    base_model: name of the base model, for the adapter's config file.
    fan_in_fan_out: the base stores its weights as (d_in, d_out), as GPT-2's Conv1D does. B and A
    are the same in both layouts.
    peft: what else of PEFT's configuration belongs to this adapter: task_type, layers_to_transform,
    ...
    """

    factors: Mapping[str, Factors]
    target_modules: tuple[str, ...] | str = ()
    base_model: str = ""
    fan_in_fan_out: bool = False
    peft: Mapping[str, Any] = field(default_factory=dict)

    def blocks(self) -> dict[str, list[str]]:
        """Transformer block → its modules, in the order of the factors."""
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
    """`model.layers.3.mlp.up_proj` → `model.layers.3`; a module outside the blocks is a block of
    its own.
    """
    match = re.match(r"(.*?\.\d+)\.", module)
    return match.group(1) if match else module


def group_of(module: str, granularity: Granularity) -> str:
    """The modules that share an angle: a block's, a weight alone, or all of them (`global`)."""
    return {"block": block_of(module), "tensor": module, "global": "global"}[granularity]


def grouped(modules: Iterable[str], granularity: Granularity = "block") -> dict[str, list[str]]:
    """Group → its modules, both in the order in which they come."""
    groups: dict[str, list[str]] = {}
    for module in modules:
        groups.setdefault(group_of(module, granularity), []).append(module)
    return groups


def inner(x: Factors, y: Factors) -> float:
    """⟨ΔW_x, ΔW_y⟩ = Σ (B_xᵀB_y ∘ A_xA_yᵀ), in float64 at O(r²(d_in + d_out)); see `dense` for the
    long way.
    """
    left = x.B.double().T @ y.B.double()
    right = x.A.double() @ y.A.double().T
    return float((left * right).sum())


class Stack(NamedTuple):
    """One weight's factors of M adapters side by side: Σ_m ΔW_m = [B₁ … B_M]·[A₁; …; A_M].

    B: (d_out, R). A: (R, d_in). ranks: r_1 … r_M.
    """

    B: Tensor
    A: Tensor
    ranks: tuple[int, ...]

    @classmethod
    def of(cls, parts: Sequence[Factors], memory: Tensor | None = None) -> "Stack":
        """
        Args:
            memory: flat, for the stack to lie in; new memory by default.
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
        """The M summands, as views."""
        return [
            Factors(B, A)
            for B, A in zip(self.B.split(self.ranks, dim=1), self.A.split(self.ranks), strict=True)
        ]

    def gram(self, exact: bool = True) -> Tensor:
        """(M, M) float64 inner products ⟨ΔW_i, ΔW_j⟩ of the summands.

        Args:
            exact: multiply in float64; else float32 factors are multiplied in float32, in chunks
                that are summed in float64.
        """
        multiply = _products if exact else _quick_products
        products = multiply(self.B) * multiply(self.A.T)
        owner = torch.repeat_interleave(torch.arange(len(self.ranks)), torch.tensor(self.ranks))
        member = (owner == torch.arange(len(self.ranks))[:, None]).double()
        return member @ products @ member.T

    def weigh(self, coefficients: Sequence[float], in_place: bool = False) -> Factors:
        """Σ_m c_m ΔW_m, exactly; summands of weight 0 are left out.

        Args:
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
    """XᵀX of X (d, R), in float64."""
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
    """‖ΔW‖, Frobenius."""
    return math.sqrt(max(inner(f, f), 0.0))


def dense(factors: Factors) -> Tensor:
    """ΔW itself, (d_out, d_in) float64."""
    return factors.B.double() @ factors.A.double()


def zeros_like(delta: AdapterDelta) -> AdapterDelta:
    """The adapter that changes nothing: rank 0 everywhere."""
    return delta.map(lambda _, f: Factors(f.B[:, :0], f.A[:0]))


def scale(delta: AdapterDelta, coefficient: float) -> AdapterDelta:
    """coefficient·ΔW: one factor is scaled (scaling both would give its square)."""
    return delta.map(lambda _, f: Factors(f.B * coefficient, f.A))


def concatenate(
    deltas: Sequence[AdapterDelta], coefficients: Mapping[str, Sequence[float]] | Sequence[float]
) -> AdapterDelta:
    """Σ_m c_m ΔW_m exactly, as [c₁B₁ … c_MB_M]·[A₁; …; A_M].

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
    """The last summand of a concatenation, bit for bit: the last `rank` columns of every B and rows
    of every A.
    """
    return delta.map(lambda _, f: Factors(f.B[:, f.rank - rank :], f.A[f.rank - rank :]))


def check_same_modules(deltas: Sequence[AdapterDelta]) -> None:
    """Raises AdapterError unless all adapters change the same weights."""
    sizes = [
        {module: (f.B.shape[0], f.A.shape[1]) for module, f in delta.factors.items()}
        for delta in deltas
    ]
    check_same_sizes(sizes, [f"adapter {index}" for index in range(1, len(deltas) + 1)])


def check_same_sizes(sizes: Sequence[Mapping[str, tuple[int, int]]], names: Sequence[str]) -> None:
    """Raises AdapterError unless all map the same modules to the same (d_out, d_in).

    Args:
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
    """The same ΔW at its true rank: QR of both stacks, SVD of the small core. Nothing but rounding
    is lost.
    """
    return delta.map(lambda _, f: shrink(f).factors)


def difference(x: Factors, y: Factors) -> Factors:
    """ΔW_x − ΔW_y at its true rank: what both have in common is gone, and equal ones leave rank
    0.
    """
    return shrink(Stack.of([x, Factors(-y.B, y.A)]).weigh([1.0, 1.0])).factors


def truncate(
    delta: AdapterDelta, rank: int | None = None, energy: float | None = None
) -> tuple[AdapterDelta, dict[str, float]]:
    """Every module's best approximation of a smaller rank, and block → the share of its norm that
    is retained; see `shrink`.
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
    """factors: the approximation, with the singular values' roots in both. kept, total: its squared
    norm, and ΔW's.
    """

    factors: Factors
    kept: float
    total: float


def shrink(f: Factors, rank: int | None = None, energy: float | None = None) -> Shrunk:
    """The best approximation of ΔW of a smaller rank (Eckart–Young), by QR of both factors and SVD
    of the small core in float64.

    Args:
        rank: the largest rank to keep; by default the true one, which loses nothing.
        energy: or the share of ‖ΔW‖² to keep, in (0, 1], by the smallest rank that does; 1 loses
            nothing.
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
