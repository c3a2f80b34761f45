"""LoRA adapters as task vectors: factors of ΔW per module, sums, differences and multiples.

All of it is exact in ΔW, and none averages A and B separately. Files of adapters are in
adapters/peft.py.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from raywarp.algorithm.factors import Factors, Stack
from raywarp.algorithm.fitting import check_finite, completed, joint_targets, union

Granularity = Literal["block", "tensor", "global"]


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
    def sizes(self) -> dict[str, tuple[int, int]]:
        """Module → (d_out, d_in)."""
        return {module: (f.B.shape[0], f.A.shape[1]) for module, f in self.factors.items()}

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
        deltas: M adapters. A module that one of them lacks has the change zero there.
        coefficients: M numbers for all modules, or M numbers per module, per block, or (under
            "global") for the rest.

    Raises:
        AdapterError: a number is NaN or infinite, or weights have different sizes.
    """
    deltas = aligned(deltas)

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


def aligned(
    deltas: Sequence[AdapterDelta], names: Sequence[str] | None = None
) -> list[AdapterDelta]:
    """Return the adapters over all modules that any of them has, at rank 0 where one has none.

    Raises:
        AdapterError: a number is NaN or infinite, or two have a module in different sizes.
    """
    names = names or [f"adapter {number}" for number in range(1, len(deltas) + 1)]
    for delta, name in zip(deltas, names, strict=True):
        check_finite(delta.factors, name)
    sizes = union([delta.sizes for delta in deltas], names)
    if all(delta.factors.keys() == sizes.keys() for delta in deltas):
        return list(deltas)
    targets, peft = joint_targets([(d.target_modules, d.peft) for d in deltas], sizes)
    whole = replace(deltas[0], target_modules=targets, peft=peft)
    return [replace(whole, factors=completed(delta.factors, sizes)) for delta in deltas]
