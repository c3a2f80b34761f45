"""One policy's fine-tuning (stage 1 of WARP): an adapter, its EMA as the anchor of the KL, and one optimiser step at a time."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from raywarp import losses
from raywarp.adapted_model import INIT, AdaptedModel
from raywarp.adapters import AdapterDelta
from raywarp.advantages import advantages
from raywarp.averaging import ema_update
from raywarp.batch import Batch, Completion
from raywarp.config import Config
from raywarp.seeding import derive_seed


class Policy:
    """θ_m and θ_ema_m on the actor's shared base, both starting from the iteration's init.

    Args:
        model: the base; its `init` adapter is already this iteration's.
        iteration, index: i and m, both counted from 1.
    """

    def __init__(self, model: AdaptedModel, config: Config, iteration: int, index: int):
        self.model, self.config = model, config
        self.name, self.ema_name = f"policy_{index}", f"ema_{index}"
        model.add_policy(self.name, _init_seed(config, iteration, index))
        model.add_copy(self.ema_name, of=self.name)
        self.trained = model.trainable(self.name)
        self.optimiser = torch.optim.AdamW(self.trained, lr=config.optim.lr, weight_decay=0.0, fused=True)
        self.step = 0

    def task_vector(self) -> AdapterDelta:
        """θ_m − θ_init."""
        return self.model.delta(self.name)

    def update(self, batch: Batch, rewards: Tensor, completions: Sequence[Completion], with_sft_kl: bool) -> dict[str, float]:
        """One optimiser step on fresh completions, then one step of the EMA.

        Args:
            batch: N completions, those of a prompt next to each other.
            rewards: (N,) r(x, y), already standardised.
            with_sft_kl: also measure KL(π_θ ‖ π_sft), one more pass.

        Returns:
            metrics of the policy before the step: KL in nats per completion, entropy and gap in nats per token.
        """
        settings, size = self.config, self.config.optim.microbatch_size or len(batch)
        finished = torch.tensor([c.finished for c in completions], dtype=torch.float32)
        parts = batch.to(self.model.device).split(size)
        # Advantages need every completion's log-ratio first: one micro-batch takes it from its own forward pass, several from an extra one.
        only = self.name if len(parts) == 1 else None
        measured = [self._measure(part, only, with_sft_kl) for part in parts]
        logprobs, anchor, kl_sft = zip(*measured, strict=True)
        sampled, mask = torch.cat(logprobs).detach(), torch.cat([part.mask for part in parts])
        gap = losses.sampler_gap(sampled, torch.cat([part.sampler_logprobs for part in parts]), mask)

        log_ratio = losses.sequence_log_ratio(sampled, torch.cat(anchor), mask)
        penalty = settings.rollout.missing_eos_penalty * (1 - finished)
        regularised = (rewards - penalty).to(self.model.device) - settings.warp.kl_coef * log_ratio
        gains = advantages(regularised, settings.warp.advantage, settings.rollout.completions_per_prompt)
        for part, gain, own in zip(parts, gains.split(size), logprobs, strict=True):
            differentiable = own if only else self._logprobs(part, self.name, train=self.name)
            losses.policy_gradient_loss(differentiable, part.sampler_logprobs, gain, part.mask, len(batch)).backward()
        gradient_norm = self._optimise()

        metrics = {
            "reward": rewards.mean(),
            "reward_std": rewards.std(unbiased=False),
            "kl_anchor": log_ratio.mean(),
            "entropy": -losses.masked_mean(sampled, mask),
            "length": mask.sum(-1).mean(),
            "eos_rate": finished.mean(),
            "grad_norm": gradient_norm,
            "sampler_gap": gap,
            **({"kl_sft": torch.cat(kl_sft).mean()} if with_sft_kl else {}),
        }
        return {name: float(value) for name, value in metrics.items()}

    def state(self) -> dict[str, Tensor]:
        """Everything that the next steps depend on: adapter, EMA, optimiser moments and step."""
        saved: dict[str, Tensor] = {"step": torch.tensor(self.step)}
        for kind, adapter in (("policy", self.name), ("ema", self.ema_name)):
            saved |= {f"{kind}/{name}": tensor.detach().cpu().clone() for name, tensor in self.model.tensors(adapter).items()}
        for index, parameter in enumerate(self.trained):
            for name, value in self.optimiser.state[parameter].items():
                saved[f"adamw/{index}/{name}"] = value.detach().cpu().clone()
        return saved

    def load_state(self, saved: Mapping[str, Tensor]) -> None:
        """Continue from `state()` as if nothing had happened in between."""
        for kind, adapter in (("policy", self.name), ("ema", self.ema_name)):
            for name, tensor in self.model.tensors(adapter).items():
                tensor.data.copy_(saved[f"{kind}/{name}"])
        for index, parameter in enumerate(self.trained):
            names = [key.rsplit("/", 1)[1] for key in saved if key.startswith(f"adamw/{index}/")]
            moments: dict[str, Any] = {name: saved[f"adamw/{index}/{name}"].to(parameter.device) for name in names}
            self.optimiser.state[parameter] = moments
        self.step = int(saved["step"])

    def close(self) -> None:
        """Take both adapters off the base."""
        self.model.remove(self.name)
        self.model.remove(self.ema_name)

    def _optimise(self) -> Tensor:
        """Clip, step AdamW with linear warm-up, then move the EMA: once per optimiser step, whatever the micro-batches."""
        optim = self.config.optim
        for group in self.optimiser.param_groups:
            group["lr"] = optim.lr * min(1.0, (self.step + 1) / max(optim.warmup_steps, 1))
        norm = torch.nn.utils.clip_grad_norm_(self.trained, optim.grad_clip)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        policy, ema = self.model.tensors(self.name), self.model.tensors(self.ema_name)
        ema_update([t.data for t in ema.values()], [t.data for t in policy.values()], self.config.warp.ema_rate)
        self.step += 1
        return norm

    def _measure(self, part: Batch, train: str | None, with_sft_kl: bool) -> tuple[Tensor, Tensor, Tensor]:
        """(n, T) log-probs of policy and anchor, and (n,) KL to SFT (NaN unless asked). Reference passes come first: they end gradients."""
        anchor = self._logprobs(part, self.ema_name)
        sft_logits = self.model.logits(part, []) if with_sft_kl else None
        logits = self.model.logits(part, [INIT, self.name], train)
        kl_sft = torch.full((len(part),), torch.nan)
        if sft_logits is not None:
            kl_sft = losses.completion_kl(logits.detach(), sft_logits, part.mask, self._temperature)
        return self._token_logprobs(logits, part), anchor, kl_sft

    def _logprobs(self, batch: Batch, adapter: str, train: str | None = None) -> Tensor:
        return self._token_logprobs(self.model.logits(batch, [INIT, adapter], train), batch)

    def _token_logprobs(self, logits: Tensor, batch: Batch) -> Tensor:
        return losses.token_logprobs(logits, batch.responses, self._temperature)

    @property
    def _temperature(self) -> float:
        return self.config.rollout.temperature


def _init_seed(config: Config, iteration: int, index: int) -> int:
    """The seed of A: one per policy and iteration, one per iteration, or one for the run (frozen: then every merge stays at rank r)."""
    if config.lora.init == "independent":
        return derive_seed(config.seed, "lora", iteration, index)
    if config.lora.init == "shared":
        return derive_seed(config.seed, "lora", iteration)
    return derive_seed(config.seed, "lora")
