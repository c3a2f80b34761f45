"""Tests that adapters packed for transport come back bit for bit."""

from dataclasses import replace

import pytest
import torch
from conftest import random_delta

from raywarp.algorithm.deltas import add, zeros_like
from raywarp.algorithm.factors import Factors
from raywarp.rollout.loaders import split
from raywarp.rollout.transport import PackedAdapter, digest


def test_packed_adapters_come_back_bit_for_bit() -> None:
    delta = replace(
        random_delta(0), target_modules=("q", "up"), base_model="base", fan_in_fan_out=True
    )
    packed = PackedAdapter.pack(delta)
    packed.numbers.flags.writeable = False  # as in an object store
    back = packed.unpack()
    assert digest(back) == digest(delta) == packed.digest()
    assert replace(back, factors={}) == replace(delta, factors={})
    assert PackedAdapter.pack(zeros_like(delta)).unpack().rank == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_adapter_travels_in_the_engines_precision(dtype: torch.dtype) -> None:
    """In a quarter of the bytes of float64, as the numbers that the engine would round it to."""
    delta = random_delta(0)
    packed = PackedAdapter.pack(delta, dtype)
    assert packed.numbers.nbytes * 4 == PackedAdapter.pack(delta).numbers.nbytes
    rounded = delta.map(lambda _, f: Factors(f.B.to(dtype), f.A.to(dtype)))
    assert digest(packed.unpack()) == packed.digest() == digest(rounded) != digest(delta)


def test_parts_of_unequal_precision_keep_their_own() -> None:
    """Side by side they have the wider one; taken apart they are as they came."""
    one = random_delta(0)
    half = random_delta(1).map(lambda _, f: Factors(f.B.bfloat16(), f.A.bfloat16()))
    for parts in ([one, half], [half, one], [half, half]):
        apart = split(add(*parts).factors, parts)
        assert [digest(part) for part in apart] == [digest(part) for part in parts]
