"""Tests that adapters packed for transport come back bit for bit."""

from dataclasses import replace

from conftest import random_delta

from raywarp.algorithm.deltas import zeros_like
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
