"""Tests of the SFT adapter as the first part of every adapter in a file."""

from dataclasses import replace
from pathlib import Path

import torch
from conftest import assert_same_change, random_delta

from raywarp.adapters.peft import load_peft, save_peft
from raywarp.adapters.start import Start, load_start, of_base, of_sft, start_rank
from raywarp.algorithm.deltas import AdapterDelta
from raywarp.algorithm.factors import Factors, dense


def narrow(seed: int) -> AdapterDelta:
    """An SFT adapter of three of the four modules, of unequal ranks."""
    whole = random_delta(seed, (2, 5, 1, 3))
    first = next(iter(whole.factors))
    return replace(whole, factors={m: f for m, f in whole.factors.items() if m != first})


def change_of_sft(seed: int) -> AdapterDelta:
    """A change that leaves a module of the SFT adapter alone, at rank 0."""
    return random_delta(seed, (3, 0, 4, 1))


def test_a_change_of_the_sft_model_becomes_one_of_the_base_and_back() -> None:
    start, change = Start(narrow(1)), change_of_sft(2)
    whole = start.of_base(change)
    for module, f in change.factors.items():
        own = start.delta.factors.get(module)
        expected = dense(f) + (dense(own) if own else 0)
        torch.testing.assert_close(dense(whole.factors[module]), expected, rtol=0, atol=1e-12)
    back = start.of_sft(whole)
    for module, f in change.factors.items():
        assert torch.equal(back.factors[module].B, f.B)
        assert torch.equal(back.factors[module].A, f.A)


def test_without_an_sft_adapter_nothing_changes() -> None:
    change = change_of_sft(3)
    assert load_start(None) is None
    assert of_base(None, change) is change
    assert of_sft(None, change) is change
    assert start_rank(None) == 0


def test_it_is_read_with_its_scaling_and_comes_back_from_a_file(tmp_path: Path) -> None:
    save_peft(narrow(4), tmp_path / "sft", torch.float32)
    start = Start.load(str(tmp_path / "sft"))
    assert_same_change(
        start.delta.map(lambda _, f: Factors(f.B.double(), f.A.double())), narrow(4), 1e-6
    )
    assert start_rank(str(tmp_path / "sft")) == start.rank == 5
    assert start.numbers == sum(f.B.numel() + f.A.numel() for f in narrow(4).factors.values())
    change = change_of_sft(5).map(lambda _, f: Factors(f.B.float(), f.A.float()))
    save_peft(start.of_base(change), tmp_path / "policy")
    read = start.of_sft(load_peft(tmp_path / "policy"))
    for module, f in change.factors.items():
        assert torch.equal(read.factors[module].B, f.B)
