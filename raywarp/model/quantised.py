"""Weights in 4 bits (NF4, by bitsandbytes), and linear layers that hold theirs so.

A weight W of such a base stands for W' = dequantised(quantised(W)), and every process runs W'. It
follows from the checkpoint alone: W is rounded to bfloat16, quantised on the CPU, and W' is
bfloat16 again, whatever the run's dtype. A block of 64 numbers in a row has one float32 scale. Rows
of another length share blocks, and the last block may be shorter.

d_out and d_in are a layer's sizes.
"""

import importlib.util
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import Linear, Module
from transformers.pytorch_utils import Conv1D

from raywarp.config.schema import ConfigError
from raywarp.model.targets import quantisable

NF4 = "nf4"
Codes = tuple[Tensor, Tensor]  # see quantise
BLOCK = 64  # numbers that share a scale
_NO_BITSANDBYTES = (
    "base.quantize=nf4 needs bitsandbytes, which is not installed: pip install 'raywarp[nf4]'"
)


def require_bitsandbytes() -> None:
    """Raise ConfigError if bitsandbytes is not installed."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(_NO_BITSANDBYTES)


def quantise(weight: Tensor) -> Codes:
    """Return a weight's codes and scales, calculated on the CPU.

    Args:
        weight: (d_out, d_in).

    Returns:
        (d_out·d_in / 2,) uint8, two codes in each, and (d_out·d_in / 64,) float32; both rounded up.
    """
    numbers = weight.detach().to("cpu", torch.bfloat16).contiguous()
    with _float32_tables():
        codes, state = _functional().quantize_4bit(numbers, blocksize=BLOCK, quant_type=NF4)
    return codes.view(-1), state.absmax


def dequantise(codes: Tensor, scales: Tensor, shape: tuple[int, int]) -> Tensor:
    """Return the (d_out, d_in) bfloat16 weight that codes and scales stand for."""
    functional = _functional()
    state = functional.QuantState(
        scales, torch.Size(shape), blocksize=BLOCK, quant_type=NF4, dtype=torch.bfloat16
    )
    weight: Tensor = functional.dequantize_4bit(codes.view(-1, 1), state)
    return weight


def rounded(weight: Tensor, transposed: bool = False) -> Tensor:
    """Return W' of a weight in bfloat16, on the CPU.

    Args:
        weight: (d_out, d_in), or (d_in, d_out) if transposed.
        transposed: as GPT-2's Conv1D stores it. Blocks are of the (d_out, d_in) weight, as they are
            when transformers quantises such a layer.
    """
    plain = weight.T if transposed else weight
    found = dequantise(*quantise(plain), (plain.shape[0], plain.shape[1]))
    return found.T.contiguous() if transposed else found


def stored_codes(load: Callable[..., Any], dtype: torch.dtype) -> dict[str, Codes]:
    """Return the codes of a model's quantisable layers, if its weights in `dtype` give other ones.

    They do in float16, which rounds a stored number before bfloat16 does. The model is then loaded
    for its codes alone; else there are none.

    Args:
        load: gives the model on the CPU, in its argument `dtype`.
        dtype: of the run.
    """
    if dtype != torch.float16:
        return {}
    model = load(dtype=torch.bfloat16)
    return {name: quantise(_plain(model.get_submodule(name))) for name in quantisable(model)}


@torch.no_grad()
def round_layers(model: Any, codes: Mapping[str, Codes] | None = None) -> None:
    """Replace the weights of a model's quantisable layers by W', in the model's dtype.

    Args:
        codes: see stored_codes.
    """
    for name in quantisable(model):
        layer = model.get_submodule(name)
        held = QuantisedLinear(layer, (codes or {}).get(name))
        weight = held.weight.T.contiguous() if held.fan_in_fan_out else held.weight
        layer.weight.data = weight.to(layer.weight.device)


def hold_in_4_bits(model: Any, codes: Mapping[str, Codes] | None = None) -> None:
    """Replace a model's quantisable layers by QuantisedLinear.

    Args:
        codes: see stored_codes.
    """
    for name in quantisable(model):
        held = QuantisedLinear(model.get_submodule(name), (codes or {}).get(name))
        model.set_submodule(name, held)


def check_device(device: torch.device) -> None:
    """Raise ConfigError if a device dequantises to other bits than the CPU, which samplers use."""
    if device.type == "cpu":
        return
    generator = torch.Generator().manual_seed(0)
    codes, scales = quantise(torch.randn(64, 1024, generator=generator))
    here = dequantise(codes, scales, (64, 1024))
    there = dequantise(codes.to(device), scales.to(device), (64, 1024)).cpu()
    if not torch.equal(here, there):
        raise ConfigError(
            f"base.quantize=nf4: this bitsandbytes dequantises to other numbers on {device} than on"
            " a CPU, so a sampler would not run the trained policy; set base.quantize=none"
        )


class QuantisedLinear(Module):
    """A frozen linear layer whose weight is held in 4 bits, and dequantised for each product.

    Args:
        layer: the replaced layer.
        codes: of its weight, by default those of the weight that it has; see quantise.

    Attributes:
        shape: (d_out, d_in).
        fan_in_fan_out: whether the replaced layer stores its weight as (d_in, d_out).
    """

    codes: Tensor
    scales: Tensor
    like: Tensor

    def __init__(self, layer: Linear | Conv1D, codes: Codes | None = None):
        super().__init__()
        self.fan_in_fan_out = isinstance(layer, Conv1D)
        weight = _plain(layer)
        self.shape = (weight.shape[0], weight.shape[1])
        for name, tensor in zip(("codes", "scales"), codes or quantise(weight), strict=True):
            self.register_buffer(name, tensor)
        self.bias = layer.bias
        # Without numbers. Who casts a model's tensors for a pass casts this one, too.
        self.register_buffer("like", torch.empty(0, dtype=weight.dtype))

    @property
    def dtype(self) -> torch.dtype:
        return self.like.dtype

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def weight(self) -> Tensor:
        """The (d_out, d_in) weight; each access dequantises it."""
        return dequantise(self.codes, self.scales, self.shape).to(self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _FrozenProduct.apply(x, self)  # type: ignore[no-untyped-call]
        return y


class _FrozenProduct(torch.autograd.Function):
    """x·Wᵀ + b, which keeps nothing for its backward pass, and dequantises again there."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantisedLinear) -> Tensor:
        ctx.layer = layer
        return torch.nn.functional.linear(x, layer.weight, layer.bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] @ ctx.layer.weight, None


def _plain(layer: Linear | Conv1D) -> Tensor:
    """Return a layer's (d_out, d_in) weight."""
    return layer.weight.T if isinstance(layer, Conv1D) else layer.weight


def _functional() -> Any:
    """Return bitsandbytes.functional.

    Raises:
        ConfigError: bitsandbytes is not installed.
    """
    require_bitsandbytes()
    with _quiet():
        import bitsandbytes.functional

        return bitsandbytes.functional


@contextmanager
def _float32_tables() -> Iterator[None]:
    """Make float32 torch's default dtype.

    In it bitsandbytes 0.50 makes, and keeps, the tables by which it quantises. vLLM loads models
    under their own dtype, and would get other codes than the trainer.
    """
    if (before := torch.get_default_dtype()) == torch.float32:
        yield
        return
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence bitsandbytes 0.50, which warns of a kernel for inference that is not needed here."""
    logger = logging.getLogger("bitsandbytes")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
