"""LoRA adapters as task vectors: factors of ΔW per module, sums, differences and multiples.

All of it is exact in ΔW, and none averages A and B separately. Files of adapters are in
adapters/peft.py.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from raywarp.algorithm.factors import AdapterError, Factors, Stack

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
