"""Tests of what adapters have to have in common, against dense float64 sums."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from conftest import random_delta

from raywarp.algorithm.averaging import ema, karcher, lerp, liti, slerp
from raywarp.algorithm.deltas import AdapterDelta, add, concatenate, subtract
from raywarp.algorithm.factors import AdapterError, Factors, dense
from raywarp.algorithm.geometry import geometry
from raywarp.algorithm.truncation import compress, truncate

POISONED = "model.layers.1.mlp.up"
TOGETHER: dict[str, Callable[[AdapterDelta, AdapterDelta], object]] = {
    "slerp": lambda x, y: slerp([x, y]),
    "slerp of one": lambda x, y: slerp([y]),
    "slerp from an init": lambda x, y: slerp([x, x], init=y),
    "karcher": lambda x, y: karcher([x, y]),
    "karcher from an init": lambda x, y: karcher([x, y], init=x),
    "lerp": lambda x, y: lerp([x, y]),
    "ema": lambda x, y: ema([x, y], 0.5),
    "ema that forgets it": lambda x, y: ema([y, x], 1.0),
    "liti": lambda x, y: liti(x, y, 0.5),
    "add": add,
    "subtract": subtract,
    "concatenate": lambda x, y: concatenate([x, y], [1.0, 0.0]),
    "geometry": lambda x, y: geometry([x, y]),
}
ALONE: dict[str, Callable[[AdapterDelta], object]] = {
    "compress": compress,
    "truncate to a rank": lambda x: truncate(x, rank=1),
    "truncate to an energy": lambda x: truncate(x, energy=0.5),
}


def poisoned(value: float, letter: str = "B") -> AdapterDelta:
    def poison(module: str, f: Factors) -> Factors:
        B, A = (tensor.clone() for tensor in f)
        if module == POISONED:
            (B if letter == "B" else A)[0, 0] = value
        return Factors(B, A)

    return random_delta(2).map(poison)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("letter", ["A", "B"])
@pytest.mark.parametrize("name", [*TOGETHER, *ALONE])
def test_nothing_is_made_of_nan_or_infinity(name: str, letter: str, value: float) -> None:
    bad, together = poisoned(value, letter), TOGETHER.get(name)
    with pytest.raises(AdapterError, match=rf"lora_{letter} of {POISONED} holds NaN") as refused:
        _ = together(random_delta(1), bad) if together else ALONE[name](bad)
    assert str(refused.value).startswith(("adapter ", "the init: ", "the adapter: "))


def test_numbers_near_the_largest_are_finite() -> None:
    """Their sum is not."""
    x = random_delta(1).map(
        lambda _, f: Factors(torch.full_like(f.B, 6e4).half(), f.A.clamp(-1, 1).half())
    )
    assert all(bool(f.B.isfinite().all()) for f in lerp([x]).factors.values())


def without(part: str, seed: int) -> AdapterDelta:
    factors = random_delta(seed).factors
    return AdapterDelta({m: f for m, f in factors.items() if part not in m})


def change(delta: AdapterDelta, module: str) -> torch.Tensor:
    """ΔW of a module, zero where the adapter lacks it."""
    f = random_delta(1).factors[module]
    zero = torch.zeros(f.B.shape[0], f.A.shape[1], dtype=torch.float64)
    return dense(delta.factors[module]) if module in delta.factors else zero


@pytest.mark.parametrize("parts", [("mlp", "attn"), ("layers.0", "mlp"), ("none", "layers.1")])
def test_a_module_that_one_lacks_has_the_change_zero_there(parts: Sequence[str]) -> None:
    x, y = (without(part, seed) for seed, part in enumerate(parts, start=1))
    modules = list(random_delta(1).factors)
    for found, weights in ((lerp([x, y], [1, 3]), (0.25, 0.75)), (subtract(x, y), (1.0, -1.0))):
        assert list(found.factors) == [m for m in modules if m in {*x.factors, *y.factors}]
        for module, f in found.factors.items():
            expected = weights[0] * change(x, module) + weights[1] * change(y, module)
            torch.testing.assert_close(dense(f), expected)


def test_a_block_that_one_lacks_is_the_others_in_a_spherical_mean() -> None:
    x, y = random_delta(1), without("layers.0", 2)
    for average in (slerp, karcher):
        merged = average([x, y])
        for module in ("model.layers.0.attn.q", "model.layers.0.mlp.up"):
            torch.testing.assert_close(dense(merged.factors[module]), change(x, module))


def test_the_targets_of_a_merge_cover_those_of_all() -> None:
    x = replace(without("mlp", 1), target_modules=("q",), peft={"task_type": "CAUSAL_LM"})
    y = replace(without("attn", 2), target_modules=("up",))
    assert add(x, y).target_modules == ("q", "up")
    assert add(x, y).peft == {"task_type": "CAUSAL_LM"}
    limited = replace(y, peft={"layers_to_transform": [0, 1]})
    for other in (limited, replace(y, target_modules=r".*\.up"), replace(y, target_modules=())):
        assert set(add(x, other).target_modules) == set(random_delta(1).factors)
        assert "layers_to_transform" not in add(other, x).peft
