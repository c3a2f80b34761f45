"""Tests of SLERP, LERP, LITI, EMA and Karcher mean against dense and hand-worked values."""

import math
from collections.abc import Callable

import pytest
import torch
from conftest import random_delta
from hypothesis import given, settings
from hypothesis import strategies as st

from raywarp.algorithm.averaging import (
    AntipodalError,
    ema,
    ema_coefficients,
    ema_update,
    karcher,
    karcher_coefficients,
    lerp,
    liti,
    slerp,
    slerp_coefficients,
    task_vectors,
    towards,
)
from raywarp.algorithm.deltas import AdapterDelta, Granularity, add, scale, zeros_like
from raywarp.algorithm.factors import Factors, dense
from raywarp.algorithm.geometry import geometry, gram_matrices


def flat(delta: AdapterDelta, block: str | None = None) -> torch.Tensor:
    """ΔW of all modules (of one block) as one float64 vector: the dense truth that factored algebra
    is compared with.
    """
    modules = [m for b, names in delta.blocks().items() for m in names if block in (None, b)]
    return torch.cat([dense(delta.factors[m]).flatten() for m in modules])


def dense_slerp(x: torch.Tensor, y: torch.Tensor, step: float) -> torch.Tensor:
    angle = torch.acos((x @ y / (x.norm() * y.norm())).clamp(-1, 1))
    return (torch.sin((1 - step) * angle) * x + torch.sin(step * angle) * y) / torch.sin(angle)


def single(vector: list[float]) -> AdapterDelta:
    """One module of one block whose ΔW is this row."""
    return AdapterDelta(
        {
            "model.layers.0.q": Factors(
                torch.ones(1, 1, dtype=torch.float64), torch.tensor([vector], dtype=torch.float64)
            )
        }
    )


def unit_norm(delta: AdapterDelta) -> AdapterDelta:
    norms = {block: flat(delta, block).norm() for block in delta.blocks()}
    return delta.map(lambda m, f: Factors(f.B / norms[".".join(m.split(".")[:3])], f.A))


def gauge(delta: AdapterDelta, seed: int) -> AdapterDelta:
    """(B, A) → (BG, G⁻¹A) with a random G of condition 4 at most: other factors, the same ΔW."""
    g = torch.Generator().manual_seed(seed)

    def turn(_: str, f: Factors) -> Factors:
        Q, _ = torch.linalg.qr(torch.randn(f.rank, f.rank, generator=g, dtype=torch.float64))
        G = Q * (0.5 + 1.5 * torch.rand(f.rank, generator=g, dtype=torch.float64))
        return Factors(f.B @ G, torch.linalg.solve(G, f.A))

    return delta.map(turn)


def test_gram_equals_dense_with_unequal_ranks() -> None:
    deltas = [
        random_delta(1),
        random_delta(2, ranks=(1, 5, 2, 3)),
        random_delta(3, ranks=(2, 2, 2, 2)),
    ]
    for block, gram in gram_matrices(deltas).items():
        stacked = torch.stack([flat(delta, block) for delta in deltas])
        torch.testing.assert_close(gram, stacked @ stacked.T, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("step", [0.0, 0.2, 0.5, 0.9, 1.0])
def test_slerp_equals_dense_slerp_per_block(step: float) -> None:
    x, y = random_delta(1), random_delta(2)
    merged = slerp([x, y], weights=[1 - step, step])
    for block in x.blocks():
        torch.testing.assert_close(
            flat(merged, block),
            dense_slerp(flat(x, block), flat(y, block), step),
            rtol=1e-10,
            atol=1e-12,
        )


def test_endpoints_are_the_policies() -> None:
    x, y = random_delta(1), random_delta(2)
    torch.testing.assert_close(flat(slerp([x, y], [1, 0])), flat(x))
    torch.testing.assert_close(flat(slerp([x, y], [0, 1])), flat(y))


def test_equal_norms_are_kept_and_lerp_shrinks_them() -> None:
    x, y = unit_norm(random_delta(1)), unit_norm(random_delta(2))
    for step in (0.25, 0.5, 0.75):
        spherical, linear = slerp([x, y], [1 - step, step]), lerp([x, y], [1 - step, step])
        for block in x.blocks():
            cosine = float(flat(x, block) @ flat(y, block))
            assert flat(spherical, block).norm().item() == pytest.approx(1, abs=1e-6)
            assert flat(linear, block).norm().item() == pytest.approx(
                math.sqrt(1 - 2 * (1 - cosine) * (step - step**2)), abs=1e-9
            )


def test_angle_to_the_first_grows_linearly() -> None:
    x, y = unit_norm(random_delta(1)), unit_norm(random_delta(2))
    for block in x.blocks():
        omega = math.acos(float(flat(x, block) @ flat(y, block)))
        for step in (0.1, 0.5, 0.8):
            merged = flat(slerp([x, y], [1 - step, step]), block)
            assert math.acos(float(flat(x, block) @ merged / merged.norm())) == pytest.approx(
                step * omega, abs=1e-9
            )


def test_half_way_is_lerp_over_cos_half_angle_for_any_norms() -> None:
    x, y = random_delta(1), scale(random_delta(2), 3.0)
    for block, gram in gram_matrices([x, y]).items():
        omega = math.acos(float(gram[0, 1] / (gram[0, 0] * gram[1, 1]).sqrt()))
        torch.testing.assert_close(
            flat(slerp([x, y]), block), flat(lerp([x, y]), block) / math.cos(omega / 2)
        )


def test_two_policies_commute() -> None:
    x, y = random_delta(1), random_delta(2)
    torch.testing.assert_close(flat(slerp([x, y])), flat(slerp([y, x])))


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (1, [1.0]),
        (2, [0.7071, 0.7071]),
        (3, [0.6124, 0.6124, 0.5]),
        (4, [0.5658, 0.5658, 0.4619, 0.3827]),
    ],
)
def test_recursion_on_orthonormal_vectors(count: int, expected: list[float]) -> None:
    """slerp(e1,e2,1/2) = (e1+e2)/√2; then λ=1/3: sin 60°/sin 90°/√2 = .612 and sin 30° = .5; then
    λ=1/4: sin 22.5° = .383.
    """
    assert slerp_coefficients(torch.eye(count, dtype=torch.float64)).tolist() == pytest.approx(
        expected, abs=1e-4
    )


def test_weights_of_the_recursion() -> None:
    """λ_m = w_m / Σ_{j≤m} w_j; weights (1, 1, 0) leave the third out, and only proportions
    count.
    """
    gram = gram_matrices([random_delta(s) for s in (1, 2, 3)])["model.layers.0"]
    torch.testing.assert_close(
        slerp_coefficients(gram, [1, 1, 0])[:2], slerp_coefficients(gram[:2, :2])
    )
    torch.testing.assert_close(
        slerp_coefficients(gram, [2, 4, 6]), slerp_coefficients(gram, [1, 2, 3])
    )
    for wrong in ([1, 1], [1, -1, 1], [0, 0, 0], [1, 1, float("nan")]):
        with pytest.raises(ValueError, match="need 3 weights"):
            slerp_coefficients(gram, wrong)


def test_one_policy_is_itself() -> None:
    x = random_delta(1)
    torch.testing.assert_close(flat(slerp([x])), flat(x))


def test_block_angle_uses_all_matrices_and_blocks_are_independent() -> None:
    x, y = random_delta(1), random_delta(2)
    changed = y.map(lambda m, f: Factors(f.B * 7, f.A) if m == "model.layers.1.mlp.up" else f)
    before, after = slerp([x, y]), slerp([x, changed])
    for module, f in before.factors.items():
        same = all(torch.equal(a, b) for a, b in zip(f, after.factors[module], strict=True))
        assert same == module.startswith("model.layers.0"), module
    # the other matrix of block 1 changed although its own factors did not: the angle is the block's
    q = "model.layers.1.attn.q"
    assert not torch.allclose(dense(before.factors[q]), dense(after.factors[q]))


@given(seed=st.integers(0, 10_000), rate=st.floats(0, 1))
@settings(max_examples=30, deadline=None)
def test_gauge_invariance(seed: int, rate: float) -> None:
    deltas = [random_delta(seed + n) for n in range(3)]
    turned = [gauge(delta, seed + n) for n, delta in enumerate(deltas)]
    for block, gram in gram_matrices(deltas).items():
        torch.testing.assert_close(gram_matrices(turned)[block], gram, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(flat(slerp(turned)), flat(slerp(deltas)), rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(
        flat(liti(turned[0], turned[1], rate)),
        flat(liti(deltas[0], deltas[1], rate)),
        rtol=1e-7,
        atol=1e-8,
    )
    angles = [g["angles"] for g in geometry(deltas).values()]
    assert [g["angles"] for g in geometry(turned).values()] == [pytest.approx(a) for a in angles]


def test_averaging_the_factors_apart_would_be_wrong() -> None:
    """What public code does instead, for the record: of equal norm, and far from the merge."""
    x, y = random_delta(1), random_delta(2)
    apart = x.map(lambda m, f: Factors((f.B + y.factors[m].B) / 2, (f.A + y.factors[m].A) / 2))
    exact = flat(lerp([x, y]))
    assert (flat(apart) - exact).norm() > 0.5 * exact.norm()


@pytest.mark.parametrize("angle", [0.0, 1e-12, 1e-9, 1e-7, 1e-5])
def test_small_angles_fall_back_to_lerp(angle: float) -> None:
    merged = slerp([single([1, 0]), single([math.cos(angle), math.sin(angle)])])
    assert flat(merged).tolist() == pytest.approx(
        [math.cos(angle / 2), math.sin(angle / 2)], abs=1e-9
    )


def test_float32_cosine_above_one_is_no_nan() -> None:
    x = single([0.1, 0.2, 0.3]).map(lambda _, f: Factors(f.B.float(), f.A.float()))
    assert torch.isfinite(flat(slerp([x, scale(x, 1.0000001)]))).all()


def test_antipodal_vectors_raise_and_name_the_block() -> None:
    with pytest.raises(AntipodalError, match=r"model\.layers\.0: task vector 2 points opposite"):
        slerp([single([1, 2]), single([-2, -4])])


def test_zero_vectors_are_skipped_and_not_counted() -> None:
    x, y = random_delta(1), random_delta(2)
    zero = zeros_like(x)
    torch.testing.assert_close(flat(slerp([x, zero, y])), flat(slerp([x, y])))
    torch.testing.assert_close(flat(slerp([zero, x])), flat(x))
    assert flat(slerp([zero, zero])).abs().max() == 0


def test_liti_is_linear_in_eta() -> None:
    init, target = random_delta(1), random_delta(2)
    for rate in (0.0, 0.3, 1.0):
        torch.testing.assert_close(
            flat(liti(init, target, rate)), (1 - rate) * flat(init) + rate * flat(target)
        )
    zero = zeros_like(init)
    torch.testing.assert_close(flat(liti(zero, target, 0.5)), 0.5 * flat(target))
    with pytest.raises(ValueError, match="liti_rate"):
        liti(init, target, 1.5)


def test_liti_from_a_common_init_adds_no_rank() -> None:
    """init appears on both sides; the compressed result has the rank of init + task vector, not of
    init twice.
    """
    sizes = ((16, 16),) * 4
    init, vector = random_delta(1, (2, 2, 2, 2), sizes), random_delta(2, (3, 3, 3, 3), sizes)
    moved = liti(init, add(init, vector), 0.3)
    assert moved.rank == 5
    torch.testing.assert_close(flat(moved), flat(init) + 0.3 * flat(vector))


@pytest.mark.parametrize("granularity", ["block", "tensor", "global"])
def test_granularity_is_what_shares_an_angle(granularity: Granularity) -> None:
    x, y = random_delta(1), random_delta(2)
    merged = slerp([x, y], [0.7, 0.3], granularity=granularity)
    groups = gram_matrices([x, y], granularity)
    assert len(groups) == {"block": 2, "tensor": 4, "global": 1}[granularity]
    for module, f in merged.factors.items():
        group = {"block": module.rsplit(".", 2)[0], "tensor": module, "global": None}[granularity]
        a, b = (
            torch.cat(
                [
                    dense(d.factors[m]).flatten()
                    for m in d.factors
                    if group is None or m.startswith(group)
                ]
            )
            for d in (x, y)
        )
        cosine = a @ b / (a.norm() * b.norm())
        torch.testing.assert_close(cosine, groups[group or "global"][0, 1] / (a.norm() * b.norm()))
        angle = torch.acos(cosine)
        expected = (
            torch.sin(0.7 * angle) * dense(x.factors[module])
            + torch.sin(0.3 * angle) * dense(y.factors[module])
        ) / torch.sin(angle)
        torch.testing.assert_close(dense(f), expected)


@pytest.mark.parametrize("average", [slerp, karcher])
def test_from_a_non_zero_init(average: Callable[..., AdapterDelta]) -> None:
    """init + slerp of θ_m − init: the same whether the task vectors or the policies are given; η <
    1 stops on the way.
    """
    init, vectors = random_delta(9), [random_delta(s) for s in (1, 2, 3)]
    policies = [add(init, vector) for vector in vectors]
    merged = average(policies, init=init)
    torch.testing.assert_close(
        flat(merged), flat(init) + flat(average(vectors)), rtol=1e-9, atol=1e-9
    )
    for found, vector in zip(task_vectors(policies, init), vectors, strict=True):
        torch.testing.assert_close(flat(found), flat(vector), rtol=1e-9, atol=1e-9)
        # what is shared with the init is gone: 4, and rounding at most
        assert found.rank <= vector.rank + 1
    torch.testing.assert_close(flat(average([policies[0]], init=init)), flat(policies[0]))
    torch.testing.assert_close(
        flat(average([policies[0], init, policies[1]], init=init)),
        flat(average(policies[:2], init=init)),
    )
    fewer = AdapterDelta({m: f for m, f in init.factors.items() if "mlp" not in m})
    filled = init.map(lambda m, f: f if "mlp" not in m else Factors(f.B[:, :0], f.A[:0]))
    torch.testing.assert_close(
        flat(average(policies, init=fewer)), flat(average(policies, init=filled))
    )


def test_weights_towards_an_init() -> None:
    assert towards([0.5, 0.7]) == pytest.approx([0.5, 0.7, -0.2])
    assert towards([0.5, 0.7], 0.3) == pytest.approx([0.15, 0.21, 0.64])


def test_karcher_mean_of_orthonormal_vectors_is_their_diagonal() -> None:
    """slerp's recursion gives (.612, .612, .5) there; the Karcher mean has no favourites: 1/√M
    each.
    """
    for count in (1, 2, 3, 4):
        expected = [count**-0.5] * count
        assert karcher_coefficients(
            torch.eye(count, dtype=torch.float64)
        ).tolist() == pytest.approx(expected, abs=1e-12)


@given(seed=st.integers(0, 10_000), count=st.integers(2, 5))
@settings(max_examples=40, deadline=None)
def test_karcher_mean_does_not_depend_on_the_order_and_balances_the_arcs(
    seed: int, count: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(count, 12, generator=generator, dtype=torch.float64) + 1
    weights = (torch.rand(count, generator=generator, dtype=torch.float64) + 0.1).tolist()
    mean = karcher_coefficients(vectors @ vectors.T, weights) @ vectors
    order = torch.randperm(count, generator=generator)
    shuffled = vectors[order]
    again = karcher_coefficients(shuffled @ shuffled.T, [weights[i] for i in order]) @ shuffled
    torch.testing.assert_close(mean, again, rtol=1e-10, atol=1e-10)
    # its definition: the arcs from the mean to the vectors, weighted, cancel; and its length is the
    # mean of theirs
    direction, units = mean / mean.norm(), vectors / vectors.norm(dim=1, keepdim=True)
    cosines = units @ direction
    arcs = (units - cosines[:, None] * direction) * (
        torch.acos(cosines) / torch.sin(torch.acos(cosines))
    )[:, None]
    assert (torch.tensor(weights, dtype=torch.float64) @ arcs).norm() < 1e-9
    share = torch.tensor(weights, dtype=torch.float64) / sum(weights)
    assert mean.norm().item() == pytest.approx(float(share @ vectors.norm(dim=1)))


def test_karcher_mean_of_two_equal_norms_is_slerp() -> None:
    x, y = unit_norm(random_delta(1)), unit_norm(random_delta(2))
    torch.testing.assert_close(flat(karcher([x, y], [0.3, 0.7])), flat(slerp([x, y], [0.3, 0.7])))


def test_karcher_mean_where_there_is_little_to_average() -> None:
    x, zero = random_delta(1), zeros_like(random_delta(1))
    torch.testing.assert_close(flat(karcher([x])), flat(x))
    torch.testing.assert_close(flat(karcher([zero, x, zero])), flat(x))
    torch.testing.assert_close(flat(karcher([x, x, scale(x, 3)])), flat(x) * 5 / 3)
    assert flat(karcher([zero, zero])).abs().max() == 0
    with pytest.raises(AntipodalError, match=r"model\.layers\.0: .*cancel"):
        karcher([single([1, 2]), single([-2, -4])])
    with pytest.raises(AntipodalError):
        karcher(
            [single([1, 0, 0]), single([-0.5, 3**0.5 / 2, 0]), single([-0.5, -(3**0.5) / 2, 0])]
        )


def test_near_antipodes_are_multiplied_in_float64() -> None:
    """At 179.4° an error of 1e-8 in the cosine would be one of 1e-4 in the coefficients; float32
    files lose nothing there.
    """
    x = random_delta(1, (8, 8, 8, 8), ((900, 700),) * 4).map(
        lambda _, f: Factors(f.B.float(), f.A.float())
    )
    y = add(scale(x, -1), scale(random_delta(2, (8, 8, 8, 8), ((900, 700),) * 4), 0.01)).map(
        lambda _, f: Factors(f.B.float(), f.A.float())
    )
    for block in x.blocks():
        found, expected = (
            flat(slerp([x, y]), block),
            dense_slerp(flat(x, block), flat(y, block), 0.5),
        )
        assert ((found - expected).norm() / expected.norm()).item() < 1e-5


def test_ema_over_checkpoints_is_the_ema_of_the_change() -> None:
    checkpoints = [random_delta(s) for s in (1, 2, 3)]
    expected = flat(checkpoints[0])
    for checkpoint in checkpoints[1:]:
        expected = 0.8 * expected + 0.2 * flat(checkpoint)
    torch.testing.assert_close(flat(ema(checkpoints, 0.2)), expected)
    assert ema_coefficients(3, 0.2).tolist() == pytest.approx([0.64, 0.16, 0.2])
    assert ema_coefficients(1, 0.2).tolist() == [1]
    assert ema_coefficients(3, 0).tolist() == [1, 0, 0]
    assert ema_coefficients(3, 1).tolist() == [0, 0, 1]
    with pytest.raises(ValueError, match="ema_rate"):
        ema(checkpoints, 1.1)


def test_ema() -> None:
    policy = [torch.tensor([1.0, 2.0])]
    for rate, expected in ((0.0, [5.0, 5.0]), (1.0, [1.0, 2.0])):
        ema = [torch.tensor([5.0, 5.0])]
        ema_update(ema, policy, rate)
        assert ema[0].tolist() == expected
    ema = [torch.zeros(2)]
    for _ in range(7):
        ema_update(ema, policy, 0.1)
    # a constant policy: what is left of the start is (1−μ)^t
    torch.testing.assert_close(ema[0], (1 - 0.9**7) * policy[0])


def test_geometry_of_known_vectors() -> None:
    x, y, zero = single([3, 0]), single([1, 1]), single([0, 0])
    block = geometry([x, y, zero])["model.layers.0"]
    assert block["norms"] == pytest.approx([3, math.sqrt(2), 0])
    assert block["angles"][0] == pytest.approx(45)
    assert math.isnan(block["angles"][1])
