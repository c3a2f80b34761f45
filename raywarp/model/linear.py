"""A frozen linear layer with LoRA adapters on it: W·x + Σ s·B·(A·x) over the active adapters.

The sum over adapters is one pair of small products.

The result is rounded once: round(W·x + δ). round(round(W·x) + δ) would lose every δ below half a
unit in the last place of W·x.

n tokens, d_in and d_out the layer's sizes, r an adapter's rank, R the sum of the active ranks.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Linear, Module, Parameter
from transformers.pytorch_utils import Conv1D

from raywarp.model.quantised import QuantisedLinear

# MKL's float32 product runs at half speed on AMD's CPUs, with AVX2 code: 220 GFLOP/s on two Zen 5
# cores, against oneDNN's 480.
_HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(
    torch.ops.mkldnn, "_linear_pointwise"
)
_HAS_BFLOAT16 = _HAS_ONEDNN and torch.ops.mkldnn._is_mkldnn_bf16_supported()
# By default cuBLAS may round the parts of a split sum to float16, where they may overflow.
torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False


@dataclass
class LayerAdapter:
    """One adapter's share of a layer.

    Attributes:
        A: (r, d_in), float32.
        B: (d_out, r), float32.
        scale: alpha / r.
    """

    A: Parameter
    B: Parameter
    scale: float

    @property
    def rank(self) -> int:
        return self.A.shape[0]


class Active(NamedTuple):
    """The adapters that take part, stacked in the layer's own precision.

    Attributes:
        A: (R, d_in).
        B: (d_out, R), scaled.
        adapter: the one with gradients, or None.
        trained: its rows of A and columns of B.
    """

    A: Tensor
    B: Tensor
    adapter: LayerAdapter | None
    trained: slice


class AdaptedLinear(Module):
    """A replacement for a linear layer, with adapters.

    `activate` decides before every forward pass which adapters take part.

    Args:
        base: the replaced layer.

    Attributes:
        always: names of the adapters that take part in every pass.
    """

    def __init__(self, base: Linear | Conv1D | QuantisedLinear):
        super().__init__()
        self.base = base
        self.always: tuple[str, ...] = ()
        # Not registered as parameters of this module: the model's own stay the frozen ones.
        self.adapters: dict[str, LayerAdapter] = {}
        self.active: Active | None = None

    @property
    def weight(self) -> Tensor:
        """The (d_out, d_in) weight, for both layouts in which bases store it."""
        return self.base.weight.T if isinstance(self.base, Conv1D) else self.base.weight

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in)."""
        d_out, d_in = (
            self.base.shape if isinstance(self.base, QuantisedLinear) else self.weight.shape
        )
        return d_out, d_in

    @property
    def fan_in_fan_out(self) -> bool:
        """Whether the replaced layer stores its weight as (d_in, d_out)."""
        if isinstance(self.base, QuantisedLinear):
            return self.base.fan_in_fan_out
        return isinstance(self.base, Conv1D)

    @property
    def _like(self) -> Tensor | QuantisedLinear:
        """What has the weight's dtype and device; a 4-bit weight is not dequantised for them."""
        return self.base if isinstance(self.base, QuantisedLinear) else self.base.weight

    def add(self, name: str, rank: int, scale: float) -> LayerAdapter:
        """Add an adapter of zeros."""
        d_out, d_in = self.shape
        A, B = (
            Parameter(torch.zeros(*shape, device=self._like.device), requires_grad=False)
            for shape in ((rank, d_in), (d_out, rank))
        )
        self.adapters[name] = LayerAdapter(A, B, scale)
        return self.adapters[name]

    @torch.no_grad()
    def activate(self, names: Sequence[str], trained: str | None = None) -> None:
        """Make these adapters take part from now on.

        Args:
            names: of the adapters, besides those that always do.
            trained: the one of them that gets gradients, in float32; None for no gradients.
        """
        names = [*self.always, *names]
        chosen = [self.adapters[name] for name in names if self.adapters[name].rank]
        self.active = None
        if not chosen:
            return
        dtype, start = self._like.dtype, 0
        adapter = self.adapters[trained] if trained and self.adapters[trained].rank else None
        if adapter and trained:
            start = sum(self.adapters[name].rank for name in names[: names.index(trained)])
        self.active = Active(
            A=_side_by_side([a.A for a in chosen], dtype, dim=0),
            B=_side_by_side([_scaled(a.B, a.scale) for a in chosen], dtype, dim=1),
            adapter=adapter,
            trained=slice(start, start + adapter.rank if adapter else start),
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.active is None:
            y = product(x.reshape(-1, x.shape[-1]), self.weight, self.base.bias)
        elif self.active.adapter is None or not torch.is_grad_enabled():
            y, _ = _adapted_product(
                x.reshape(-1, x.shape[-1]),
                self.weight,
                self.base.bias,
                self.active.A,
                self.active.B,
            )
        else:
            adapter = self.active.adapter
            y = _TrainedProduct.apply(  # type: ignore[no-untyped-call]
                x.reshape(-1, x.shape[-1]),
                adapter.A,
                adapter.B,
                self,
                self.active,
            )
        return y.view(*x.shape[:-1], y.shape[-1])


def layer_sizes(model: Any, names: Iterable[str]) -> dict[str, tuple[int, int]]:
    """Return module → (d_out, d_in) of linear layers of a model."""
    return {name: AdaptedLinear(model.get_submodule(name)).shape for name in names}


def _side_by_side(factors: Sequence[Tensor], dtype: torch.dtype, dim: int) -> Tensor:
    """Return a copy of the factors in one tensor."""
    return (
        factors[0].to(dtype, copy=True)
        if len(factors) == 1
        else torch.cat(list(factors), dim).to(dtype)
    )


def _scaled(tensor: Tensor, scale: float) -> Tensor:
    return tensor if scale == 1 else tensor * scale


def product(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, added: Tensor | None = None
) -> Tensor:
    """Return x·weightᵀ + bias + added, summed in float32 and rounded once.

    float64 is summed in float64. Adding after the product's own rounding would lose every change
    below half a unit in the last place of the product.

    Args:
        x: (n, d_in).
        weight: (d_out, d_in).
        bias: (d_out,).
        added: (n, d_out), in x's dtype. The result may be in its place, which saves a copy.
    """
    if x.dtype == torch.float16 and x.device.type == "cpu":
        return _widened_product(x, weight, bias, added)
    if _onednn_takes(x, weight, biased_sum=bias is not None and added is not None):
        if added is None:
            y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        else:
            y = torch.ops.mkldnn._linear_pointwise.binary(x, added, weight, bias, "add")
        return y
    if added is None:
        return torch.nn.functional.linear(x, weight, bias)
    if bias is None:
        return added.addmm_(x, weight.T)
    return (_wide_product(x, weight) + bias).add_(added).to(x.dtype)


def _widened_product(
    x: Tensor, weight: Tensor, bias: Tensor | None, added: Tensor | None
) -> Tensor:
    """Return `product` of float16 tensors, calculated in float32.

    On a CPU without float16 arithmetic, torch 2.13's own product takes five times as long.
    """
    bias, added = (None if tensor is None else tensor.float() for tensor in (bias, added))
    return product(x.float(), weight.float(), bias, added).to(x.dtype)


def pack(weight: Tensor) -> Tensor:
    """Return a (d_out, d_in) weight in the layout that `packed_product` reads fastest.

    Use it for a weight that nothing else reads.
    """
    packed: Tensor = (
        torch.ops.mkldnn._reorder_linear_weight(weight, None)
        if _onednn_takes(weight, weight, True)
        else weight
    )
    return packed


def packed_product(
    x: Tensor, weight: Tensor, bias: Tensor | None, added: Tensor | None = None
) -> Tensor:
    """Return what `product` returns, with a weight from `pack`. It supports no gradients."""
    if not weight.is_mkldnn:
        return product(x, weight, bias, added)
    if added is None:
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    else:
        y = torch.ops.mkldnn._linear_pointwise.binary(x, added, weight, bias, "add")
    return y


def _onednn_takes(x: Tensor, weight: Tensor, biased_sum: bool) -> bool:
    """Return whether oneDNN's product, with its sum in the accumulator, is possible and worthwhile.

    In bfloat16, torch's own calls reach oneDNN too, and take 5 % less time in an update. Only a
    bias besides the sum is beyond them. oneDNN's product has no autograd. With a part of a larger
    matrix it is a thousand times slower (torch 2.13).
    """
    if (
        not _HAS_ONEDNN
        or x.device.type != "cpu"
        or not x.numel()
        or (torch.is_grad_enabled() and x.requires_grad)
    ):
        return False
    if not (weight.is_contiguous() or weight.T.is_contiguous()):
        return False
    return x.dtype == torch.float32 or (x.dtype == torch.bfloat16 and _HAS_BFLOAT16 and biased_sum)


def _wide_product(x: Tensor, weight: Tensor) -> Tensor:
    """Return x·weightᵀ before it is rounded to 16 bits."""
    if x.dtype in (torch.float32, torch.float64):
        return torch.nn.functional.linear(x, weight)
    if x.device.type == "cuda" and not torch.is_grad_enabled():
        return torch.mm(x, weight.T, out_dtype=torch.float32)
    return torch.nn.functional.linear(x.float(), weight.float())


def _adapted_product(
    x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor
) -> tuple[Tensor, Tensor]:
    """Return (n, d_out) of the adapted layer and (n, R) of A alone."""
    low = product(x, A)
    return product(x, weight, bias, added=product(low, B)), low


class _TrainedProduct(torch.autograd.Function):
    """The product that trains an adapter.

    It keeps the layer's input and r numbers per token for the backward pass. With B alone trained,
    it keeps only the latter.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        A: Parameter,
        B: Parameter,
        layer: AdaptedLinear,
        active: Active,
    ) -> Tensor:
        weight = layer.weight
        y, low = _adapted_product(x, weight, layer.base.bias, active.A, active.B)
        ctx.layer, ctx.active = layer, active
        ctx.save_for_backward(
            x if ctx.needs_input_grad[1] else None,
            low[:, active.trained].contiguous(),
            # A dequantised weight would take the room that 4 bits save.
            None if isinstance(layer.base, QuantisedLinear) else weight,
        )
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), active = gradients, ctx.active
        x, low, weight = ctx.saved_tensors
        weight = ctx.layer.weight if weight is None else weight
        needs_x, needs_A, needs_B = ctx.needs_input_grad[:3]
        grad_low = product(grad, active.B.T)
        grad_x = product(grad, weight.T, added=product(grad_low, active.A.T)) if needs_x else None
        grad_A = _over_tokens(grad_low[:, active.trained], x) if needs_A else None
        grad_B = _scaled(_over_tokens(grad, low), active.adapter.scale) if needs_B else None
        return grad_x, grad_A, grad_B, None, None


def _over_tokens(left: Tensor, right: Tensor) -> Tensor:
    """Return leftᵀ·right in float32, a sum over n tokens.

    A sum of float16 numbers is not rounded to 16 bits first, since it may overflow.
    """
    if left.dtype == torch.float16:
        return _wide_product(left.T, right.T)
    return (left.T @ right).float()
