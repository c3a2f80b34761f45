"""One frozen base model with any number of LoRA adapters on it.

All policies of an actor share the base and the init adapter. Each has a trainable adapter and an
EMA of it. Every forward pass names the adapters that take part, so no pass can run with adapters
that an earlier one left active.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from raywarp.adapters.peft_config import BASE_QUANTIZE
from raywarp.adapters.start import Start
from raywarp.algorithm.deltas import AdapterDelta
from raywarp.algorithm.factors import Factors
from raywarp.config.policies import LoraConfig
from raywarp.config.schema import Config
from raywarp.data.models import load_model
from raywarp.data.quantised_models import refuse_quantised_model
from raywarp.data.text import Completion
from raywarp.identity import derive_seed
from raywarp.model.backbone import (
    checkpoint_blocks,
    choose_and_set_attention,
    find_head,
    keep_layers_unscaled,
    last_states,
    pairs_per_token,
)
from raywarp.model.batches import Batch, MicroBatch, collate, micro_batches
from raywarp.model.float32_pass import in_float32, widened
from raywarp.model.head import chunked_kl, chunked_logprobs
from raywarp.model.lengths import Lengths
from raywarp.model.linear import AdaptedLinear
from raywarp.model.probe import check_range
from raywarp.model.quantised import NF4, Codes, check_device, hold_in_4_bits, stored_codes
from raywarp.model.targets import Targets, find_targets

INIT = "init"
START = "start"  # the SFT adapter, which takes part in every pass


class AdaptedModel:
    """The base and its adapters. Dropout is off, and base weights are never written.

    Args:
        source: hub id or folder of a causal language model.
        lora: rank, alpha and target modules of every policy.
        dtype: of the base and of all products. Adapters are float32.
        device: of the base and the adapters.
        trust_remote_code: whether the model's own code may run.
        gradient_checkpointing: whether a trained pass keeps only each block's input and recomputes
            the rest for its gradients.
        start: the SFT adapter, if the SFT model is not the base itself.
        quantize: nf4 holds the base's linear layers in 4 bits; see quantised.py.

    Attributes:
        targets: the adapted modules.
        pairs_per_token: for micro_batches; None where completions cannot share a row.
        start: the SFT adapter, or None.
    """

    def __init__(
        self,
        source: str,
        lora: LoraConfig,
        dtype: torch.dtype,
        device: torch.device,
        trust_remote_code: bool = False,
        gradient_checkpointing: bool = False,
        start: Start | None = None,
        quantize: str = "none",
    ):
        if quantize == NF4:
            check_device(device)
        load = partial(
            load_model,
            AutoModelForCausalLM,
            source,
            f"model={source}",
            trust_remote_code=trust_remote_code,
        )
        codes = stored_codes(load, dtype) if quantize == NF4 else {}
        base = load(dtype=dtype)
        refuse_quantised_model(source, f"model={source}")  # a hub id's files are known only now
        base.requires_grad_(False)
        self.device, self.dtype, self.lora, self.source = device, dtype, lora, source
        self.quantize = quantize
        self.targets, self._layers = replace_targets(base, lora, quantize, codes)
        self._base = base.to(device).eval()
        self._trained, self.start = set(self._layers), start
        if start:
            self._begin_from(start)
        self.set_init(self.zero_delta())
        keep_layers_unscaled(self._base)
        self._lengths = Lengths(self._base)
        self._head = find_head(self._base, self._lengths)
        choose_and_set_attention(self._base, source, self._head, self._lengths)
        self.pairs_per_token = pairs_per_token(self._base, self._head, self._lengths)
        if gradient_checkpointing:
            checkpoint_blocks(self._base)

    def zero_delta(self) -> AdapterDelta:
        """Return the change that changes nothing: every adapted weight at rank 0."""
        factors = {}
        for name, layer in self._layers.items():
            d_out, d_in = layer.shape
            factors[name] = Factors(torch.zeros(d_out, 0), torch.zeros(0, d_in))
        conv1d = any(layer.fan_in_fan_out for layer in self._layers.values())
        all_trained = len(self._trained) == len(self._layers)
        names = self.targets.names if all_trained else tuple(self._layers)
        held = {} if self.quantize == "none" else {BASE_QUANTIZE: self.quantize}
        return AdapterDelta(factors, names, self.source, fan_in_fan_out=conv1d, peft=held)

    def _begin_from(self, start: Start) -> None:
        """Add the SFT adapter, which then takes part in every pass.

        Policies have rank 0 in the modules that it alone changes.
        """
        for name in start.sizes.keys() - self._layers.keys():
            self._layers[name] = AdaptedLinear(self._base.get_submodule(name))
            self._base.set_submodule(name, self._layers[name])
        self.set_init(start.over(self.zero_delta()), START)
        for layer in self._layers.values():
            layer.always = (START,)

    def add_policy(self, name: str, seed: int, lora: LoraConfig | None = None) -> None:
        """Add a trainable adapter with ΔW = 0, as PEFT initialises it.

        A is Kaiming-uniform from the seed, and B is zero.

        Args:
            lora: has the adapter's rank and alpha; by default as the model's.
        """
        lora = lora or self.lora
        for module, layer in self._layers.items():
            rank = lora.rank if module in self._trained else 0
            A = layer.add(name, rank, lora.alpha / lora.rank).A.data
            generator = torch.Generator().manual_seed(derive_seed(seed, module))
            bound = A.shape[1] ** -0.5
            A.copy_(torch.empty(A.shape).uniform_(-bound, bound, generator=generator))

    def add_copy(self, name: str, of: str) -> None:
        """Add a frozen adapter with the same factors as another one."""
        for layer in self._layers.values():
            theirs = layer.adapters[of]
            ours = layer.add(name, theirs.rank, theirs.scale)
            ours.A.data.copy_(theirs.A.data)
            ours.B.data.copy_(theirs.B.data)

    def set_init(self, delta: AdapterDelta, name: str = INIT) -> None:
        """Make `init`, or another frozen adapter, exactly this change, at its own rank."""
        for module, layer in self._layers.items():
            f = delta.factors[module]
            adapter = layer.add(name, f.rank, 1.0)
            adapter.A.data.copy_(f.A)
            adapter.B.data.copy_(f.B)

    def remove(self, name: str) -> None:
        for layer in self._layers.values():
            layer.adapters.pop(name, None)
            layer.active = None

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Return the adapter's own parameters: `module.A` (r, d_in) and `module.B` (d_out, r)."""
        named: dict[str, Tensor] = {}
        for module, layer in self._layers.items():
            named[f"{module}.A"] = layer.adapters[name].A
            named[f"{module}.B"] = layer.adapters[name].B
        return named

    def trainable(self, name: str) -> list[Tensor]:
        """Return the adapter's parameters that training changes.

        They are A and B, or B alone with lora.init=frozen.
        """
        return [
            tensor
            for key, tensor in self.tensors(name).items()
            if tensor.numel() and (self.lora.init != "frozen" or key.endswith(".B"))
        ]

    def delta(self, name: str) -> AdapterDelta:
        """Return a copy of the adapter's change on the CPU, with its scaling folded into B."""
        factors = {}
        for module, layer in self._layers.items():
            adapter = layer.adapters[name]
            B = adapter.B.detach() * adapter.scale
            factors[module] = Factors(B.cpu(), adapter.A.detach().cpu().clone())
        return replace(self.zero_delta(), factors=factors)

    def base_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the frozen weights, so that a caller can check that they never change.

        Those in 4 bits are left out.
        """
        yield from self._base.named_parameters()

    def logits(self, batch: Batch, adapters: Sequence[str], train: str | None = None) -> Tensor:
        """Return the (N, T, V) logits that predict the response tokens, zero on padding.

        This is for tests and small inputs. The other methods never hold that many logits.

        Args:
            batch: N completions.
            adapters, train: see `states`.
        """
        (whole,) = micro_batches(batch)
        logits = self._head.logits(self.states(whole, adapters, train))
        padded = torch.stack([whole.padded(column) for column in logits.unbind(-1)], dim=-1)
        return padded[whole.completions.argsort()]

    def logprobs(self, part: MicroBatch, states: Tensor, temperature: float) -> Tensor:
        """Return the (C, T) log π of the response tokens, zero on padding.

        Args:
            part: C completions.
            states: (n, D), from `states`.
            temperature: of the sampling.
        """
        return part.padded(chunked_logprobs(states, self._head, part.tokens, temperature))

    def completion_kl(
        self, part: MicroBatch, states: Tensor, reference_states: Tensor, temperature: float
    ) -> Tensor:
        """Return the (C,) full-vocabulary KL of each completion, in nats.

        Args:
            part: C completions.
            states, reference_states: (n, D) each, from `states`.
            temperature: of the sampling.
        """
        return part.padded(chunked_kl(states, reference_states, self._head, temperature)).sum(-1)

    @torch.no_grad()
    def exact_logprobs(self, part: MicroBatch, adapters: Sequence[str]) -> Tensor:
        """Return the (C, T) log π at temperature 1 in float32, zero on padding.

        The result is float32 for a model of any precision.

        Args:
            part: completions that do not share rows.
            adapters: those that take part.
        """
        with in_float32(self._base, adapters):
            states = last_states(self._base, part, self._head, self._lengths)
        return part.padded(chunked_logprobs(states, widened(self._head), part.tokens, 1.0))

    def weight_norms(self) -> dict[str, float]:
        """Return adapted module → Frobenius norm ‖W‖."""
        return {name: float(layer.weight.float().norm()) for name, layer in self._layers.items()}

    @property
    def vocabulary(self) -> int:
        """The number of token ids."""
        size: int = self._base.config.get_text_config().vocab_size
        return size

    def states(self, part: MicroBatch, adapters: Sequence[str], train: str | None = None) -> Tensor:
        """Return the (n, D) last hidden states, from which the head predicts the response tokens.

        Args:
            part: n response tokens.
            adapters: those that take part, with their changes added. None of them gives the SFT
                model.
            train: the one of them whose tensors get gradients. No other parameter ever gets any.
        """
        for layer in self._layers.values():
            layer.activate(adapters, train)
        if train is not None:
            for tensor in self.trainable(train):
                tensor.requires_grad_()
        with torch.set_grad_enabled(train is not None):
            return last_states(self._base, part, self._head, self._lengths)


def replace_targets(
    base: Any, lora: LoraConfig, quantize: str = "none", codes: Mapping[str, Codes] | None = None
) -> tuple[Targets, dict[str, AdaptedLinear]]:
    """Replace each module that `lora.target_modules` means by an AdaptedLinear.

    Args:
        base: a causal language model of transformers.
        lora: rank and target modules.
        quantize: nf4 also replaces the linear layers by such in 4 bits.
        codes: those of the 4 bits; see quantised.stored_codes.

    Returns:
        the resolved targets, and module → its new layer.

    Raises:
        ConfigError: the targets do not fit the model.
    """
    targets = find_targets(base, lora)
    if quantize == NF4:
        hold_in_4_bits(base, codes)
    layers = {name: AdaptedLinear(base.get_submodule(name)) for name in targets.modules}
    for name, layer in layers.items():
        base.set_submodule(name, layer)
    return targets, layers


def completion_kls(
    model: AdaptedModel,
    batch: Batch,
    config: Config,
    adapters: Sequence[str],
    reference: Sequence[str] = (),
) -> list[float]:
    """Return the full-vocabulary KL(π ‖ π_ref) of each completion, in nats.

    Args:
        batch: N completions, sampled from π.
        config: its sampling temperature and size of micro-batches are used.
        adapters: the base with these adapters is π.
        reference: the base with these adapters is π_ref; none of them is the SFT model.

    Raises:
        ConfigError: float16 is too narrow for the model.
    """
    batch = batch.to(model.device)
    kl = torch.zeros(len(batch), device=model.device)
    most = config.optim.max_tokens_per_microbatch
    for part in micro_batches(batch, most, model.pairs_per_token):
        policy, other = model.states(part, list(adapters)), model.states(part, list(reference))
        kl[part.completions] = model.completion_kl(part, policy, other, config.rollout.temperature)
    check_range(model.source, model.dtype, kl)
    values: list[float] = kl.tolist()
    return values


def text_losses(
    model: AdaptedModel, texts: Sequence[Sequence[int]], adapters: Sequence[str], max_tokens: int
) -> list[float]:
    """Return the cross-entropy of each text in nats, summed over its tokens after the first.

    It is that of the plain softmax, at temperature 1, whatever the temperature of the sampling.

    Args:
        texts: token ids, at least two of each.
        adapters: those that take part; none of them gives the SFT model.
        max_tokens: the most tokens of a forward pass, padding included.
    """
    batch = _as_completions(texts).to(model.device)
    losses = torch.zeros(len(batch), dtype=torch.float64)
    for part in micro_batches(batch, max_tokens):
        logprobs = model.logprobs(part, model.states(part, adapters), temperature=1.0)
        losses[part.completions.cpu()] = -logprobs.double().sum(-1).cpu()
    return losses.tolist()


def _as_completions(texts: Sequence[Sequence[int]]) -> Batch:
    """Return texts as completions of their own first token."""
    rest = [tuple(text[1:]) for text in texts]
    completions = [Completion(tokens, (0.0,) * len(tokens), "", True) for tokens in rest]
    return collate([text[:1] for text in texts], completions)
