"""Tests of a layer that has adapters beside its weight.

Rows are found by their bits. Tokens get their own adapter. The sum is rounded once.
"""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from raywarp.algorithm.factors import Factors
from raywarp.rollout.row_signatures import ModuleRows, row_signatures
from raywarp.rollout.unmerged import NO_ADAPTER, PASS, Product

TOKENS, D_IN = 7, 32


@pytest.fixture(autouse=True)
def no_pass_is_left_behind() -> Iterator[None]:
    yield
    PASS.begin([], torch.empty(0, dtype=torch.long))


def numbers(*shape: int, seed: int = 0, size: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * size


def factors(d_out: int, d_in: int, rank: int, seed: int, size: float = 0.3) -> Factors:
    return Factors(
        numbers(d_out, rank, seed=seed, size=size), numbers(rank, d_in, seed=seed + 100, size=size)
    )


def everybody(slot: int) -> None:
    PASS.begin([slot], torch.tensor([TOKENS]))


def test_stacked_and_reordered_modules_are_found_by_their_rows() -> None:
    """q, k and v in one layer, q's heads of 4 rows in another order, as engines keep them."""
    q, k, v = numbers(8, D_IN, seed=1), numbers(4, D_IN, seed=2), numbers(4, D_IN, seed=3)
    layer = Product(torch.cat([q[4:], q[:4], k, v]))
    layer.find(
        {
            name: ModuleRows.of(weight, 1)
            for name, weight in {"k": k, "q": q, "v": v, "other": numbers(8, D_IN, seed=9)}.items()
        },
        0,
    )
    assert layer.shares.keys() == {"q", "k", "v"}
    # nothing on k; ranks differ
    adapter = {
        "q": factors(8, D_IN, 2, 1),
        "v": factors(4, D_IN, 3, 2),
    }
    assert layer.take({0: adapter}) is None
    everybody(0)
    x = numbers(TOKENS, D_IN, seed=4)
    changed = {"q": q + adapter["q"].B @ adapter["q"].A, "v": v + adapter["v"].B @ adapter["v"].A}
    expected = x @ torch.cat([changed["q"][4:], changed["q"][:4], k, changed["v"]]).T
    torch.testing.assert_close(layer(x, torch.empty(0), None), expected, rtol=1e-5, atol=1e-5)
    everybody(NO_ADAPTER)
    torch.testing.assert_close(
        layer(x, torch.empty(0), None), x @ torch.cat([q[4:], q[:4], k, v]).T, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("order", [[0, 1, -1, 1, 0, -1, 1], [1, 1, 1, -1, 0, 0, -1]])
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_each_token_has_its_own_adapter(dtype: torch.dtype, count: int, order: list[int]) -> None:
    """Rows of one pass, scattered and in runs: one or two adapters, and none; each as in a pass of
    its own, and a bias with all of them.
    """
    weight, bias = numbers(16, D_IN, seed=1).to(dtype), numbers(16, seed=2).to(dtype)
    layer = Product(weight)
    layer.find({"up": ModuleRows.of(weight, 1)}, 0)
    two = [{"up": factors(16, D_IN, 2, 1)}, {"up": factors(16, D_IN, 5, 2)}]
    layer.take(dict(enumerate(two[:count])))
    x = numbers(TOKENS, D_IN, seed=3).to(dtype)
    slots = torch.tensor(order).clamp(max=count - 1)
    alone = {}
    for slot in range(-1, count):
        everybody(slot)
        alone[slot] = layer(x, torch.empty(0), bias)
    assert (alone[-1] - alone[count - 1]).abs().mean() > 0.1
    PASS.begin(slots.tolist(), torch.ones(TOKENS, dtype=torch.long))
    mixed = layer(x, torch.empty(0), bias)
    assert torch.equal(layer(x[None], torch.empty(0), bias), mixed[None])
    expected = torch.stack([alone[int(slot)][n] for n, slot in enumerate(slots)])
    torch.testing.assert_close(
        mixed, expected, rtol=1e-5 if dtype == torch.float32 else 8e-3, atol=1e-5
    )


def test_a_change_below_half_a_step_of_the_product_is_kept_on_average() -> None:
    """bfloat16: δ is a thousandth of y. The layer's own outputs, regressed on the exact δ, have
    slope 1; merged weights have less.
    """
    weight = numbers(256, D_IN, seed=1).bfloat16()
    adapter = factors(256, D_IN, 4, 5, size=0.02)
    layer = Product(weight)
    layer.find({"up": ModuleRows.of(weight, 1)}, 0)
    layer.take({0: {"up": adapter}})
    x = numbers(512, D_IN, seed=6).bfloat16()
    exact = x.double() @ (adapter.B.double() @ adapter.A.double()).T
    plain = x.double() @ weight.double().T
    everybody(0)
    ours = layer(x, torch.empty(0), None).double() - plain
    rounded = (weight.float() + adapter.B @ adapter.A).bfloat16()
    merged = torch.nn.functional.linear(x, rounded).double() - plain
    slopes = [float((change * exact).sum() / (exact * exact).sum()) for change in (ours, merged)]
    assert exact.std() < 2e-3 * plain.std()
    assert abs(slopes[0] - 1) < 0.05
    assert abs(slopes[1] - 1) > 0.3


def test_shares_of_a_split_input() -> None:
    """Two processes with half of the columns each: their sums add up to the whole."""
    weight, adapter = numbers(16, D_IN, seed=1), factors(16, D_IN, 3, 2)
    rows, x = ModuleRows.of(weight, 2), numbers(TOKENS, D_IN, seed=3)
    everybody(0)
    total = torch.zeros(TOKENS, 16)
    for part, columns in enumerate((slice(0, 16), slice(16, 32))):
        layer = Product(weight[:, columns].contiguous())
        layer.find({"down": rows}, part)
        layer.take({0: {"down": adapter}})
        total += layer(x[:, columns].contiguous(), torch.empty(0), None)
    torch.testing.assert_close(total, x @ (weight + adapter.B @ adapter.A).T, rtol=1e-5, atol=1e-5)


def test_one_bit_makes_another_row() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        weight = numbers(6, 40, seed=1).to(dtype)
        other = weight.clone()
        other.view({4: torch.int32, 2: torch.int16}[weight.element_size()])[2, 3] ^= 1
        same = row_signatures(weight) == row_signatures(other)
        assert same.tolist() == [True, True, False, True, True, True]
        assert len(set(row_signatures(weight).tolist())) == 6
