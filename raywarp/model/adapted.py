"""One frozen base model with any number of LoRA adapters on it.

All policies of an actor share the base; each has a trainable adapter and an EMA of it, and all
share the init adapter. Which adapters take part is said anew for every forward pass, so that no
pass can run with the wrong ones left active.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from raywarp.algorithm.deltas import AdapterDelta, Factors
from raywarp.config.schema import LoraConfig
from raywarp.data.models import load_model
from raywarp.identity import derive_seed
from raywarp.model.backbone import (
    checkpoint_blocks,
    choose_and_set_attention,
    find_head,
    keep_layers_unscaled,
    last_states,
    pairs_per_token,
)
from raywarp.model.batches import Batch, MicroBatch, micro_batches
from raywarp.model.float32_pass import in_float32, widened
from raywarp.model.head import chunked_kl, chunked_logprobs
from raywarp.model.lengths import Lengths
from raywarp.model.linear import AdaptedLinear
from raywarp.model.targets import Targets, find_targets

INIT = "init"


class AdaptedModel:
    """The base and its adapters. Dropout is off; base weights are never written.

    Args:
        source: hub id or folder of a causal language model.
        lora: rank, alpha and target modules of every policy.
        dtype: of the base, and of all products; adapters are float32.
        gradient_checkpointing: a trained pass keeps each block's input only, and computes the rest
            again for its gradients.
    """

    def __init__(
        self,
        source: str,
        lora: LoraConfig,
        dtype: torch.dtype,
        device: torch.device,
        trust_remote_code: bool = False,
        gradient_checkpointing: bool = False,
    ):
        base = load_model(
            AutoModelForCausalLM,
            source,
            f"model={source}",
            dtype=dtype,
            trust_remote_code=trust_remote_code,
        )
        base.requires_grad_(False)
        self.device, self.dtype, self.lora, self.source = device, dtype, lora, source
        self._base = base.to(device).eval()
        self.targets, self._layers = replace_targets(self._base, lora)
        self.set_init(self.zero_delta())
        keep_layers_unscaled(self._base)
        self._lengths = Lengths(self._base)
        self._head = find_head(self._base, self._lengths)
        choose_and_set_attention(self._base, source, self._head, self._lengths)
        self.pairs_per_token = pairs_per_token(self._base, self._head, self._lengths)
        if gradient_checkpointing:
            checkpoint_blocks(self._base)

    def zero_delta(self) -> AdapterDelta:
        """The change that changes nothing: every adapted weight at rank 0."""
        factors = {}
        for name, layer in self._layers.items():
            d_out, d_in = layer.weight.shape
            factors[name] = Factors(torch.zeros(d_out, 0), torch.zeros(0, d_in))
        conv1d = any(isinstance(layer.base, Conv1D) for layer in self._layers.values())
        return AdapterDelta(factors, self.targets.names, self.source, fan_in_fan_out=conv1d)

    def add_policy(self, name: str, seed: int) -> None:
        """A new trainable adapter: A Kaiming-uniform from the seed, B zero, as PEFT starts them; ΔW
        = 0.
        """
        for module, layer in self._layers.items():
            A = layer.add(name, self.lora.rank, self.lora.alpha / self.lora.rank).A.data
            generator = torch.Generator().manual_seed(derive_seed(seed, module))
            bound = A.shape[1] ** -0.5
            A.copy_(torch.empty(A.shape).uniform_(-bound, bound, generator=generator))

    def add_copy(self, name: str, of: str) -> None:
        """A frozen adapter with the same factors as another one."""
        for layer in self._layers.values():
            theirs = layer.adapters[of]
            ours = layer.add(name, theirs.rank, theirs.scale)
            ours.A.data.copy_(theirs.A.data)
            ours.B.data.copy_(theirs.B.data)

    def set_init(self, delta: AdapterDelta) -> None:
        """Make `init` this change exactly, whatever its rank."""
        for module, layer in self._layers.items():
            f = delta.factors[module]
            adapter = layer.add(INIT, f.rank, 1.0)
            adapter.A.data.copy_(f.A)
            adapter.B.data.copy_(f.B)

    def remove(self, name: str) -> None:
        for layer in self._layers.values():
            layer.adapters.pop(name, None)
            layer.active = None

    def tensors(self, name: str) -> dict[str, Tensor]:
        """`module.A` and `module.B` → the adapter's own parameters, (r, d_in) and (d_out, r)."""
        named: dict[str, Tensor] = {}
        for module, layer in self._layers.items():
            named[f"{module}.A"] = layer.adapters[name].A
            named[f"{module}.B"] = layer.adapters[name].B
        return named

    def trainable(self, name: str) -> list[Tensor]:
        """Those of an adapter's parameters that training changes: A and B, or B alone with
        lora.init=frozen.
        """
        return [
            tensor
            for key, tensor in self.tensors(name).items()
            if self.lora.init != "frozen" or key.endswith(".B")
        ]

    def delta(self, name: str) -> AdapterDelta:
        """A copy of the adapter's change, on the CPU, with its scaling folded into B."""
        factors = {}
        for module, layer in self._layers.items():
            adapter = layer.adapters[name]
            B = adapter.B.detach() * adapter.scale
            factors[module] = Factors(B.cpu(), adapter.A.detach().cpu().clone())
        zero = self.zero_delta()
        return AdapterDelta(factors, zero.target_modules, zero.base_model, zero.fan_in_fan_out)

    def base_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """The frozen weights, for whoever wants to see that they stay what they were."""
        yield from self._base.named_parameters()

    def logits(self, batch: Batch, adapters: Sequence[str], train: str | None = None) -> Tensor:
        """(N, T, V) logits that predict the response tokens, zero on padding: for tests and small
        uses; the others never hold so many.

        Args:
            adapters, train: see `states`.
        """
        (whole,) = micro_batches(batch)
        logits = self._head.logits(self.states(whole, adapters, train))
        padded = torch.stack([whole.padded(column) for column in logits.unbind(-1)], dim=-1)
        return padded[whole.completions.argsort()]

    def logprobs(self, part: MicroBatch, states: Tensor, temperature: float) -> Tensor:
        """(C, T) log π of the response tokens at the sampling temperature, zero on padding, from
        (n, D) `states`.
        """
        return part.padded(chunked_logprobs(states, self._head, part.tokens, temperature))

    def completion_kl(
        self, part: MicroBatch, states: Tensor, reference_states: Tensor, temperature: float
    ) -> Tensor:
        """(C,) full-vocabulary KL in nats per completion, from two (n, D) `states`."""
        return part.padded(chunked_kl(states, reference_states, self._head, temperature)).sum(-1)

    @torch.no_grad()
    def exact_logprobs(self, part: MicroBatch, adapters: Sequence[str]) -> Tensor:
        """(C, T) log π at temperature 1 in float32, whatever the model's own precision, zero on
        padding. Not for shared rows.
        """
        with in_float32(self._base, adapters):
            states = last_states(self._base, part, self._head, self._lengths)
        return part.padded(chunked_logprobs(states, widened(self._head), part.tokens, 1.0))

    def weight_norms(self) -> dict[str, float]:
        """Adapted module → ‖W‖, Frobenius."""
        return {name: float(layer.weight.float().norm()) for name, layer in self._layers.items()}

    @property
    def vocabulary(self) -> int:
        """How many token ids there are."""
        size: int = self._base.config.get_text_config().vocab_size
        return size

    def states(self, part: MicroBatch, adapters: Sequence[str], train: str | None = None) -> Tensor:
        """(n, D) last hidden states, from which the head predicts the response tokens.

        Args:
            adapters: those that take part, their changes added; none gives the SFT model.
            train: the one of them whose tensors get gradients. No other parameter ever does.
        """
        for layer in self._layers.values():
            layer.activate(adapters, train)
        if train is not None:
            for tensor in self.trainable(train):
                tensor.requires_grad_()
        with torch.set_grad_enabled(train is not None):
            return last_states(self._base, part, self._head, self._lengths)


def replace_targets(base: Any, lora: LoraConfig) -> tuple[Targets, dict[str, AdaptedLinear]]:
    """Put our layer in the place of each module that `lora.target_modules` means.

    Returns:
        what that is, and module → the layer that now stands there.

    Raises:
        ConfigError: they do not fit the model.
    """
    targets = find_targets(base, lora)
    layers = {name: AdaptedLinear(base.get_submodule(name)) for name in targets.modules}
    for name, layer in layers.items():
        base.set_submodule(name, layer)
    return targets, layers
