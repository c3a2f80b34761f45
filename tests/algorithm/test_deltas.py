"""Tests of the algebra of adapters: sums, inner products, compression, truncation and digests."""

import math

import pytest
import torch
from conftest import assert_same_change, random_delta

from raywarp.algorithm.deltas import (
    add,
    block_of,
    concatenate,
    group_of,
    scale,
    subtract,
    trailing,
    zeros_like,
)
from raywarp.algorithm.factors import AdapterError, Factors, Stack, dense, inner, norm
from raywarp.algorithm.truncation import compress, difference, shrink, truncate
from raywarp.rollout.transport import digest


def test_blocks() -> None:
    assert block_of("model.layers.12.self_attn.q_proj") == "model.layers.12"
    assert block_of("transformer.h.3.attn.c_attn") == "transformer.h.3"
    assert block_of("model.layers.2.mlp.experts.7.w1") == "model.layers.2"
    assert block_of("lm_head") == "lm_head"
    assert [group_of("model.layers.3.mlp.up_proj", g) for g in ("block", "tensor", "global")] == [
        *("model.layers.3", "model.layers.3.mlp.up_proj", "global"),
    ]


def test_algebra_is_exact_in_the_change() -> None:
    x, y = random_delta(1), random_delta(2, ranks=(1, 4, 2, 5))
    for module, f in concatenate([x, y], [0.3, -2.0]).factors.items():
        expected = 0.3 * dense(x.factors[module]) - 2 * dense(y.factors[module])
        torch.testing.assert_close(dense(f), expected)
        assert f.rank == x.factors[module].rank + y.factors[module].rank
    for module, f in x.factors.items():
        g = y.factors[module]
        assert inner(f, g) == pytest.approx(float((dense(f) * dense(g)).sum()), rel=1e-12)
        torch.testing.assert_close(dense(scale(x, 0.5).factors[module]), 0.5 * dense(f))
    assert_same_change(subtract(add(x, y), y), x)
    assert zeros_like(x).rank == 0


def test_coefficients_per_block() -> None:
    x, y = random_delta(1), random_delta(2)
    mixed = concatenate([x, y], {"model.layers.0": [1, 0], "model.layers.1": [0, 2]})
    for module, f in mixed.factors.items():
        expected = (
            dense(x.factors[module])
            if module.startswith("model.layers.0")
            else 2 * dense(y.factors[module])
        )
        torch.testing.assert_close(dense(f), expected)


def test_coefficients_per_module_block_and_rest() -> None:
    """The nearest coefficients count: the module's own, else its block's, else those of
    "global".
    """
    x, y = random_delta(1), random_delta(2)
    mixed = concatenate(
        [x, y], {"model.layers.0.attn.q": [1, 1], "model.layers.0": [3, 0], "global": [0, -1]}
    )
    for module, f in mixed.factors.items():
        a, b = dense(x.factors[module]), dense(y.factors[module])
        expected = {"model.layers.0.attn.q": a + b, "model.layers.0.mlp.up": 3 * a}.get(module, -b)
        torch.testing.assert_close(dense(f), expected)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-7)])
def test_gram_of_a_stack(dtype: torch.dtype, tolerance: float) -> None:
    """Longer than one chunk of quick products and not a multiple of it, unequal ranks, one of them
    zero.
    """
    generator = torch.Generator().manual_seed(1)
    parts = [
        Factors(
            torch.randn(700, r, generator=generator, dtype=dtype),
            torch.randn(r, 530, generator=generator, dtype=dtype),
        )
        for r in (3, 0, 5, 1)
    ]
    flat = torch.stack([dense(f).flatten() for f in parts])
    stack = Stack.of(parts)
    largest = (flat @ flat.T).abs().max()
    for exact in (True, False):
        bound = 1e-13 if exact else tolerance
        assert ((stack.gram(exact) - flat @ flat.T).abs().max() / largest).item() < bound
    for f, part in zip(parts, stack.parts(), strict=True):
        assert torch.equal(f.A, part.A)
        assert torch.equal(f.B, part.B)


def test_a_stack_in_given_memory() -> None:
    parts = [random_delta(seed).factors["model.layers.0.attn.q"] for seed in (1, 2)]
    memory = torch.full((100,), torch.nan, dtype=torch.float64)
    placed, free = Stack.of(parts, memory), Stack.of(parts)
    assert torch.equal(placed.B, free.B)
    assert torch.equal(placed.A, free.A)
    merged = placed.weigh([0.5, 2.0], in_place=True)
    assert torch.equal(merged.B, free.weigh([0.5, 2.0]).B)
    assert merged.B.data_ptr() == memory.data_ptr()


def test_truncation_loses_the_tail_of_the_singular_values() -> None:
    x = random_delta(1, ranks=(4, 4, 4, 4))
    for f in x.factors.values():
        s = torch.linalg.svdvals(dense(f))
        assert norm(f) == pytest.approx(float(s.norm()))
        for rank in (1, 2, 3):
            small = shrink(f, rank=rank)
            assert small.factors.rank == rank
            assert (dense(small.factors) - dense(f)).norm().item() == pytest.approx(
                float(s[rank:].norm()), rel=1e-9
            )
            assert (small.kept, small.total) == pytest.approx(
                (float(s[:rank].square().sum()), float(s.square().sum()))
            )
        share = float(s[:2].square().sum() / s.square().sum())
        assert shrink(f, energy=share - 1e-9).factors.rank == 2
        assert shrink(f, energy=share + 1e-9).factors.rank == 3
        assert shrink(f, energy=1.0).factors.rank == shrink(f).factors.rank == 4


def test_truncation_reports_each_blocks_retained_norm() -> None:
    x = random_delta(1, ranks=(4, 4, 4, 4))
    small, retained = truncate(x, rank=2)
    for block, modules in x.blocks().items():
        kept, whole = (math.sqrt(sum(norm(d.factors[m]) ** 2 for m in modules)) for d in (small, x))
        assert retained[block] == pytest.approx(kept / whole)
        assert retained[block] < 0.999
    assert truncate(x)[1] == pytest.approx(dict.fromkeys(x.blocks(), 1.0))
    assert truncate(zeros_like(x), rank=2)[1] == dict.fromkeys(x.blocks(), 1.0)


def test_difference_cancels_before_anything_is_squared() -> None:
    """θ − θ₀ of adapters that differ by a millionth: right to 1e-8 of itself, where their Gram
    matrix has 1e-4.
    """
    init, step = (
        random_delta(1).factors["model.layers.1.attn.q"],
        random_delta(2).factors["model.layers.1.attn.q"],
    )
    moved = Stack.of([init, step]).weigh([1.0, 1e-6])
    found = difference(moved, init)
    torch.testing.assert_close(dense(found), 1e-6 * dense(step), rtol=0, atol=1e-14)
    assert difference(init, init).rank == 0


def test_compression_is_lossless_and_finds_the_true_rank() -> None:
    x = random_delta(1, ranks=(2, 2, 2, 2))
    doubled = concatenate([x, x, x], [1.0, 2.0, -0.5])
    small = compress(doubled)
    assert [f.rank for f in small.factors.values()] == [2, 2, 2, 2]
    assert_same_change(small, scale(x, 2.5))
    assert compress(subtract(x, x)).rank == 0
    assert compress(zeros_like(x)).rank == 0


def test_compression_stops_at_the_size_of_the_weight() -> None:
    many = add(*(random_delta(s, ranks=(4, 4, 4, 4)) for s in range(4)))
    small = compress(many)
    # min(d_out, d_in), below 16 = 4 x 4
    assert [f.rank for f in small.factors.values()] == [
        5,
        4,
        5,
        4,
    ]
    assert_same_change(small, many)


def test_trailing_takes_back_the_last_summand_bit_for_bit() -> None:
    x, y = random_delta(1), random_delta(2, ranks=(2, 2, 2, 2))
    for module, f in trailing(add(x, y), 2).factors.items():
        assert torch.equal(f.A, y.factors[module].A)
        assert torch.equal(f.B, y.factors[module].B)


def test_different_sizes_are_refused() -> None:
    x = random_delta(1)
    with pytest.raises(AdapterError, match="not of one base model"):
        add(x, x.map(lambda _, f: Factors(f.B, torch.zeros(f.rank, 9))))


def test_digest_is_of_the_content() -> None:
    x = random_delta(1)
    assert digest(x) == digest(random_delta(1))
    assert digest(x) != digest(random_delta(2))
    assert digest(x) != digest(scale(x, 1 + 1e-15))
