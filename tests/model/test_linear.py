"""Tests of an adapted linear layer, above all in 16 bits.

A change below half a unit in the last place of the output must still count on average.
"""

import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import Linear
from transformers.pytorch_utils import Conv1D

from raywarp.model import linear
from raywarp.model.linear import Active, AdaptedLinear, product

TOKENS, D_IN, D_OUT, RANK = 600, 320, 448, 4
# Changes of a tenth of half a unit in the last place at 1, which are 2⁻⁸ and 2⁻¹¹.
SMALL = {torch.bfloat16: 4e-4, torch.float16: 5e-5}
LAYERS: dict[str, Callable[[], Linear | Conv1D]] = {
    "linear": lambda: Linear(D_IN, D_OUT, bias=False),
    "bias": lambda: Linear(D_IN, D_OUT),
    "conv1d": lambda: Conv1D(D_OUT, D_IN),
}


def adapted(kind: str, change: float, dtype: torch.dtype = torch.bfloat16) -> AdaptedLinear:
    """A layer of unit outputs, a bias of the same size where it has one, and an adapter `policy` of
    changes of this size.
    """
    torch.manual_seed(0)
    base = LAYERS[kind]()
    base.weight.data.normal_(std=D_IN**-0.5)
    if base.bias is not None:
        base.bias.data.normal_()
    layer = AdaptedLinear(base.to(dtype).requires_grad_(False))
    adapter = layer.add("policy", RANK, 2.0)
    adapter.A.data.normal_(std=D_IN**-0.5)
    adapter.B.data.normal_(std=change / 2 * RANK**-0.5)
    return layer


def active(layer: AdaptedLinear) -> Active:
    assert layer.active is not None
    return layer.active


def slope(measured: Tensor, expected: Tensor) -> float:
    """Of the measured change on the exact one, through zero."""
    measured, expected = measured.double(), expected.double()
    return float((measured * expected).sum() / (expected**2).sum())


@pytest.mark.parametrize("onednn", [True, False])
@pytest.mark.parametrize("trained", ["policy", None])
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("dtype", SMALL)
def test_a_small_change_of_the_output_counts(
    dtype: torch.dtype,
    kind: str,
    trained: str | None,
    onednn: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Added after the rounding, a third of it is left."""
    monkeypatch.setattr(linear, "_HAS_ONEDNN", onednn and linear._HAS_ONEDNN)
    layer, x = adapted(kind, SMALL[dtype], dtype), torch.randn(TOKENS, D_IN).to(dtype)
    layer.activate([])
    plain = layer(x)
    layer.activate(["policy"], trained)
    if trained:
        layer.adapters["policy"].A.requires_grad_()
    changed = layer(x).detach()
    exact = x.double() @ active(layer).A.double().T @ active(layer).B.double().T
    assert slope(changed - plain, exact) == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize("onednn", [True, False])
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("dtype", SMALL)
def test_a_small_change_of_the_gradient_counts(
    dtype: torch.dtype, kind: str, onednn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gradient of the input is grad·W + grad·B·A, rounded once."""
    monkeypatch.setattr(linear, "_HAS_ONEDNN", onednn and linear._HAS_ONEDNN)
    layer, grad = adapted(kind, SMALL[dtype], dtype), torch.randn(TOKENS, D_OUT).to(dtype)
    x = torch.randn(TOKENS, D_IN).to(dtype).requires_grad_()
    layer.activate(["policy"], "policy")
    (with_adapter,) = torch.autograd.grad(layer(x), x, grad)
    exact = grad.double() @ active(layer).B.double() @ active(layer).A.double()
    layer.activate([])
    (plain,) = torch.autograd.grad(layer(x), x, grad)
    assert slope(with_adapter - plain, exact) == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", LAYERS)
def test_wide_numbers_are_the_formula(kind: str, dtype: torch.dtype) -> None:
    layer, x = adapted(kind, change=0.3, dtype=dtype), torch.randn(3, 5, D_IN, dtype=dtype)
    layer.activate(["policy"])
    adapter = layer.adapters["policy"]
    expected = x.double() @ (layer.weight.double() + 2 * adapter.B.double() @ adapter.A.double()).T
    if layer.base.bias is not None:
        expected = expected + layer.base.bias.double()
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(layer(x).double(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("tokens", [0, 1, 7])
def test_sums_are_rounded_once_whatever_the_layout(tokens: int, dtype: torch.dtype) -> None:
    """Few rows, none, and operands that are views: the result is the exact sum's nearest number,
    but for the order of a sum.
    """
    torch.manual_seed(1)
    x, added, bias = (
        torch.randn(64, tokens).to(dtype).T,
        torch.randn(96, tokens).to(dtype).T,
        torch.randn(96).to(dtype),
    )
    weight = torch.randn(64, 96).to(dtype).T
    exact = x.double() @ weight.double().T + bias.double() + added.double()
    ours = product(x, weight, bias, added)
    assert ours.dtype == dtype
    step = {torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float32: 1e-5}[dtype]
    torch.testing.assert_close(ours, exact.to(dtype), atol=1e-5, rtol=step)
    assert (ours != exact.to(dtype)).double().sum() <= (
        1 if dtype == torch.float32 else 0.02
    ) * exact.numel()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_part_of_a_larger_matrix_is_no_slower(dtype: torch.dtype) -> None:
    """oneDNN's own operator takes a second for it, not a millisecond."""
    x, added, larger = (
        torch.randn(400, 512).to(dtype),
        torch.randn(400, 384).to(dtype),
        torch.randn(400, 600).to(dtype),
    )
    start = time.process_time()
    ours = product(x, larger[:384, :512], added=added.clone())
    assert time.process_time() - start < 0.5
    tolerance = 0.5 if dtype == torch.bfloat16 else 1e-3  # a unit in the last place of the largest
    torch.testing.assert_close(
        ours, product(x, larger[:384, :512].contiguous(), added=added), atol=tolerance, rtol=0
    )


def test_a_float16_sum_over_tokens_may_exceed_float16() -> None:
    """600 tokens of 20 each, times a gradient of 20: 240,000, which float32 adapters hold."""
    layer = AdaptedLinear(Linear(2, 2, bias=False).half().requires_grad_(False))
    adapter = layer.add("policy", 1, 1.0)
    adapter.A.data.fill_(1.0)
    adapter.B.data.fill_(1.0)
    layer.activate(["policy"], "policy")
    for factor in (adapter.A, adapter.B):
        factor.requires_grad_()
    x = torch.tensor([[20.0, 0.0]]).half().repeat(TOKENS, 1)
    A, B = torch.autograd.grad(
        layer(x), [adapter.A, adapter.B], torch.full((TOKENS, 2), 20.0).half()
    )
    assert A.tolist() == [[TOKENS * 20 * (20 + 20), 0.0]]
    assert B.tolist() == [[TOKENS * 20 * 20.0]] * 2
