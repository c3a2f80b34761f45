"""One frozen base model with any number of LoRA adapters on it.

All policies of an actor share the base; each has a trainable adapter and an EMA of it, and all share the init adapter. Which
adapters take part is said anew for every forward pass, so that no pass can run with the wrong ones left active.
"""

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from raywarp.adapters import AdapterDelta, Factors
from raywarp.batch import Batch
from raywarp.config import ConfigError, LoraConfig
from raywarp.seeding import derive_seed

INIT = "init"


class AdaptedModel:
    """The base and its adapters. Dropout is off; base weights are never written.

    Args:
        source: hub id or folder of a causal language model.
        lora: rank, alpha and target modules of every policy.
        dtype: of the base; adapters are float32 and computed in the base's precision under autocast.
    """

    def __init__(self, source: str, lora: LoraConfig, dtype: torch.dtype, device: torch.device, trust_remote_code: bool = False):
        base = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, trust_remote_code=trust_remote_code)
        base.requires_grad_(False)
        self.device, self.dtype, self.lora, self.source = device, dtype, lora, source
        self._passes_positions = "position_ids" in inspect.signature(base.forward).parameters
        self._peft = self._wrap(base).to(device).eval()
        self._layers: dict[str, Any] = {
            name.removeprefix("base_model.model."): layer for name, layer in self._peft.named_modules() if isinstance(layer, LoraLayer)
        }
        self._activate([])

    def _wrap(self, base: torch.nn.Module) -> PeftModel:
        wanted = self.lora.target_modules
        self.target_modules = (wanted,) if isinstance(wanted, str) else tuple(wanted)
        try:
            model = get_peft_model(base, self._adapter_config(self.lora.rank, self.lora.alpha), adapter_name=INIT)
        except ValueError as error:
            raise ConfigError(f"lora.target_modules={self.lora.target_modules!r} does not fit the model: {error}") from None
        resolved = model.peft_config[INIT].target_modules  # type: ignore[attr-defined]
        self.target_modules = tuple(sorted(resolved)) if isinstance(resolved, set | list) else (str(resolved),)
        return model

    def _adapter_config(self, rank: int, alpha: float) -> PeftLoraConfig:
        targets = self.target_modules[0] if self.target_modules == ("all-linear",) else list(self.target_modules)
        return PeftLoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, lora_dropout=0.0, task_type="CAUSAL_LM")  # type: ignore[arg-type]

    def zero_delta(self) -> AdapterDelta:
        """The change that changes nothing: every adapted weight at rank 0."""
        factors = {}
        for name, layer in self._layers.items():
            d_in, d_out = layer.in_features, layer.out_features
            factors[name] = Factors(torch.zeros(d_out, 0), torch.zeros(0, d_in))
        conv1d = any(isinstance(layer.get_base_layer(), Conv1D) for layer in self._layers.values())
        return AdapterDelta(factors, self.target_modules, self.source, fan_in_fan_out=conv1d)

    def add_policy(self, name: str, seed: int) -> None:
        """A new trainable adapter: A Kaiming-uniform from the seed, B zero, as PEFT starts them; ΔW = 0."""
        self.remove(name)
        self._peft.add_adapter(name, self._adapter_config(self.lora.rank, self.lora.alpha))
        for module, layer in self._layers.items():
            generator = torch.Generator().manual_seed(derive_seed(seed, module))
            A = layer.lora_A[name].weight.data
            bound = A.shape[1] ** -0.5
            A.copy_(torch.empty(A.shape).uniform_(-bound, bound, generator=generator))
            layer.lora_B[name].weight.data.zero_()
        self._activate([])

    def add_copy(self, name: str, of: str) -> None:
        """A frozen adapter with the same factors as another one."""
        self.remove(name)
        self._peft.add_adapter(name, self._adapter_config(self.lora.rank, self.lora.alpha))
        for ours, theirs in zip(self.tensors(name).values(), self.tensors(of).values(), strict=True):
            ours.data.copy_(theirs.data)
        self._activate([])

    def set_init(self, delta: AdapterDelta) -> None:
        """Make `init` this change exactly, whatever its rank."""
        self.remove(INIT)
        rank = max(delta.rank, 1)
        self._peft.add_adapter(INIT, self._adapter_config(rank, float(rank)))
        for module, layer in self._layers.items():
            f = delta.factors[module]
            for weight, value in ((layer.lora_A[INIT].weight.data, f.A), (layer.lora_B[INIT].weight.data, f.B)):
                weight.zero_()
                weight[: value.shape[0], : value.shape[1]].copy_(value)
        self._activate([])

    def remove(self, name: str) -> None:
        if name in self._peft.peft_config:
            self._peft.delete_adapter(name)

    def tensors(self, name: str) -> dict[str, Tensor]:
        """`module.A` and `module.B` → the adapter's own parameters, (r, d_in) and (d_out, r)."""
        named = {}
        for module, layer in self._layers.items():
            named[f"{module}.A"] = layer.lora_A[name].weight
            named[f"{module}.B"] = layer.lora_B[name].weight
        return named

    def trainable(self, name: str) -> list[Tensor]:
        """Those of an adapter's parameters that training changes: A and B, or B alone with lora.init=frozen."""
        return [tensor for key, tensor in self.tensors(name).items() if self.lora.init != "frozen" or key.endswith(".B")]

    def delta(self, name: str) -> AdapterDelta:
        """A copy of the adapter's change, on the CPU, with its scaling folded into B."""
        factors = {}
        for module, layer in self._layers.items():
            B = layer.lora_B[name].weight.detach() * layer.scaling[name]
            factors[module] = Factors(B.float().cpu(), layer.lora_A[name].weight.detach().float().cpu().clone())
        zero = self.zero_delta()
        return AdapterDelta(factors, zero.target_modules, zero.base_model, zero.fan_in_fan_out)

    def base_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """The frozen weights, for whoever wants to see that they stay what they were."""
        for name, parameter in self._peft.named_parameters():
            if ".lora_" not in name:
                yield name, parameter

    def logits(self, batch: Batch, adapters: Sequence[str], train: str | None = None) -> Tensor:
        """(N, T, V) logits that predict the response tokens.

        Args:
            adapters: those that take part, their changes added; none gives the SFT model.
            train: the adapter whose tensors get gradients. No other parameter ever does.
        """
        self._activate(adapters, train)
        positions = {"position_ids": batch.position_ids} if self._passes_positions else {}
        width, length = batch.input_ids.shape[1], batch.responses.shape[1]
        # Indices rather than a count: the columns are then copied together, and the vocabulary's product is one large, fast one.
        columns = torch.arange(width - length - 1, width - 1, device=batch.input_ids.device)
        with torch.set_grad_enabled(train is not None), self._autocast():
            output = self._peft(
                input_ids=batch.input_ids,
                attention_mask=batch.attention_mask,
                logits_to_keep=columns,
                use_cache=False,
                **positions,
            )
        logits: Tensor = output.logits
        return logits

    def _autocast(self) -> contextlib.AbstractContextManager[object]:
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def _activate(self, adapters: Sequence[str], train: str | None = None) -> None:
        """PEFT's own set_adapter turns gradients on for what it activates, init and EMA too; so they are set here."""
        for layer in self._layers.values():
            layer.set_adapter(list(adapters), inference_mode=True)
        if train is not None:
            for tensor in self.trainable(train):
                tensor.requires_grad_()
