"""Float32 forward passes of a model loaded in a narrower precision, without a second copy of it.

One block's weights at a time are widened before its forward pass and restored after it. 16 bits
widen exactly. So the pass gives what the same files give when they are loaded in float32. Files
stored wider than the model is loaded are the exception. So are numbers of bfloat16 files below 1e-5
in a float16 model, which lose digits.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from transformers.modeling_layers import GradientCheckpointingLayer

from raywarp.model.head import LogitHead
from raywarp.model.linear import AdaptedLinear


@contextmanager
def in_float32(base: Module, adapters: Sequence[str]) -> Iterator[None]:
    """Make the model's forward passes float32 inside the context, with these adapters active.

    Afterwards no adapter is active. Passes with gradients are not supported: what autograd would
    keep is narrowed too early.
    """
    units = [_Wide(module, adapters) for module in _blocks(base)]
    handles = [handle for unit in units for handle in unit.hook()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for unit in units:
            unit.narrow()


def widened(head: LogitHead) -> LogitHead:
    """Return the same head in float32.

    A model's own head has no weight here: it is one of the model's modules.
    """
    if head.weight is None:
        return head
    return replace(
        head, weight=head.weight.float(), bias=None if head.bias is None else head.bias.float()
    )


class _Wide:
    """A module whose weights are float32 while its forward pass runs."""

    def __init__(self, module: Module, adapters: Sequence[str]):
        self.module, self.adapters = module, adapters
        self.kept: list[tuple[Tensor, Tensor]] = []

    def hook(self) -> list[Any]:
        return [
            self.module.register_forward_pre_hook(lambda module, inputs: self.widen()),
            self.module.register_forward_hook(lambda module, inputs, output: self.narrow()),
        ]

    def widen(self) -> None:
        for tensor in chain(self.module.parameters(), self.module.buffers()):
            if tensor.is_floating_point() and tensor.dtype != torch.float32:
                self.kept.append((tensor, tensor.data))
                tensor.data = tensor.data.float()
        for layer in self._layers():
            layer.activate(self.adapters)  # in the weight's present precision

    def narrow(self) -> None:
        for tensor, data in self.kept:
            tensor.data = data
        self.kept = []
        for layer in self._layers():
            layer.active = None

    def _layers(self) -> list[AdaptedLinear]:
        return [layer for layer in self.module.modules() if isinstance(layer, AdaptedLinear)]


def _blocks(module: Module) -> Iterator[Module]:
    """Yield whole blocks and adapted layers, and elsewhere the modules that own weights.

    Blocks and adapted layers are whole, since a block's code may use a layer's weight without
    calling the layer.
    """
    own = chain(module.parameters(recurse=False), module.buffers(recurse=False))
    if (
        isinstance(module, GradientCheckpointingLayer | AdaptedLinear)
        or next(own, None) is not None
    ):
        yield module
        return
    for child in module.children():
        yield from _blocks(child)
