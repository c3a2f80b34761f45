"""One policy's fine-tuning (stage 1 of WARP), one optimiser step at a time.

A policy is an adapter. Its EMA is the anchor of the KL.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from raywarp.algorithm import losses
from raywarp.algorithm.advantages import advantages
from raywarp.algorithm.averaging import ema_update
from raywarp.algorithm.deltas import AdapterDelta
from raywarp.config.schema import Config
from raywarp.data.text import Completion
from raywarp.identity import derive_seed
from raywarp.model import rng
from raywarp.model.adapted import INIT, AdaptedModel
from raywarp.model.batches import Batch, MicroBatch, micro_batches


class Policy:
    """θ_m and θ_ema_m on the actor's shared base, both starting from the iteration's init.

    Args:
        model: the base. Its `init` adapter is already this iteration's.
        config: of the run.
        iteration: i, counted from 1.
        index: m, counted from 1.
    """

    def __init__(self, model: AdaptedModel, config: Config, iteration: int, index: int):
        self.model, self.config = model, config
        self.name, self.ema_name = f"policy_{index}", f"ema_{index}"
        model.add_policy(self.name, _init_seed(config, iteration, index))
        model.add_copy(self.ema_name, of=self.name)
        self.trained = model.trainable(self.name)
        self.optimiser = torch.optim.AdamW(
            self.trained, lr=config.optim.lr, weight_decay=0.0, fused=True
        )
        self.rng = rng.seeded(derive_seed(config.seed, "rng", iteration, index), model.device)
        self.step = 0

    def task_vector(self) -> AdapterDelta:
        """Return θ_m − θ_init."""
        return self.model.delta(self.name)

    def update(
        self, batch: Batch, rewards: Tensor, completions: Sequence[Completion], with_sft_kl: bool
    ) -> dict[str, float]:
        """Take one optimiser step on fresh completions, then one step of the EMA.

        Args:
            batch: N completions, those of a prompt next to each other.
            rewards: (N,) r(x, y), already standardised.
            completions: the N completions as the sampler returned them.
            with_sft_kl: whether to measure KL(π_θ ‖ π_sft) too, which takes one more pass.

        Returns:
            metrics of the policy before the step. KL is in nats per completion, entropy and gap are
            in nats per token.
        """
        with rng.using(self.rng, self.model.device):
            return self._update(batch, rewards, completions, with_sft_kl)

    def _update(
        self, batch: Batch, rewards: Tensor, completions: Sequence[Completion], with_sft_kl: bool
    ) -> dict[str, float]:
        settings, batch = self.config, batch.to(self.model.device)
        finished = torch.tensor([c.finished for c in completions], dtype=torch.float32)
        penalised = (rewards - settings.rollout.missing_eos_penalty * (1 - finished)).to(
            self.model.device
        )
        parts = micro_batches(
            batch, settings.optim.max_tokens_per_microbatch, self.model.pairs_per_token
        )
        sampled, anchor, kl_sft = (
            torch.zeros_like(batch.mask),
            torch.zeros_like(batch.mask),
            torch.zeros_like(penalised),
        )

        def log_ratios(chosen: Tensor) -> Tensor:
            return losses.sequence_log_ratio(sampled[chosen], anchor[chosen], batch.mask[chosen])

        def gains(chosen: Tensor) -> Tensor:
            regularised = penalised[chosen] - settings.warp.kl_coef * log_ratios(chosen)
            return advantages(
                regularised, settings.warp.advantage, settings.rollout.completions_per_prompt
            )

        def backward(part: MicroBatch, logprobs: Tensor, advantage: Tensor) -> None:
            chosen = part.completions
            loss = losses.policy_gradient_loss(
                logprobs, batch.sampler_logprobs[chosen], advantage, batch.mask[chosen], len(batch)
            )
            loss.backward()

        # An advantage needs the other completions of its baseline. With all of them in one
        # micro-batch, one pass gives log-probs and gradient.
        at_once = all(
            _is_whole(part.completions, self._baseline_size(len(batch))) for part in parts
        )
        for part in parts:
            logprobs, anchor[part.completions], kl_sft[part.completions] = self._measure(
                part, at_once, with_sft_kl
            )
            sampled[part.completions] = logprobs.detach()
            if at_once:
                backward(part, logprobs, gains(part.completions))
        if not at_once:
            advantage = gains(torch.arange(len(batch), device=self.model.device))
            for part in parts:
                backward(
                    part, self._logprobs(part, self.name, train=True), advantage[part.completions]
                )
        gradient_norm = self._optimise()

        metrics = {
            "reward": rewards.mean(),
            "reward_std": rewards.std(unbiased=False),
            "kl_anchor": losses.sequence_log_ratio(sampled, anchor, batch.mask).mean(),
            "entropy": -losses.masked_mean(sampled, batch.mask),
            "length": batch.mask.sum(-1).mean(),
            "eos_rate": finished.mean(),
            "grad_norm": gradient_norm,
            "sampler_gap": losses.sampler_gap(sampled, batch.sampler_logprobs, batch.mask),
            **({"kl_sft": kl_sft.mean()} if with_sft_kl else {}),
        }
        return {name: float(value) for name, value in metrics.items()}

    def close(self) -> None:
        """Remove both adapters from the base."""
        self.model.remove(self.name)
        self.model.remove(self.ema_name)

    def _optimise(self) -> Tensor:
        """Clip, step AdamW with linear warm-up, then move the EMA.

        This happens once per optimiser step, for any number of micro-batches.
        """
        optim = self.config.optim
        for group in self.optimiser.param_groups:
            group["lr"] = optim.lr * min(1.0, (self.step + 1) / max(optim.warmup_steps, 1))
        norm = torch.nn.utils.clip_grad_norm_(self.trained, optim.grad_clip)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        policy, ema = self.model.tensors(self.name), self.model.tensors(self.ema_name)
        ema_update(
            [t.data for t in ema.values()],
            [t.data for t in policy.values()],
            self.config.warp.ema_rate or 0.0,
        )
        self.step += 1
        return norm

    def _measure(
        self, part: MicroBatch, train: bool, with_sft_kl: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return (C, T) log-probs of policy and anchor, and the (C,) KL to SFT.

        The KL is zero unless asked for. The trained pass comes last, so that it is alone in memory.
        """
        started = self.step > 0  # before the first step the anchor is the policy
        anchor = self._logprobs(part, self.ema_name) if started else None
        sft = self.model.states(part, []) if with_sft_kl else None
        states = self.model.states(part, [INIT, self.name], self.name if train else None)
        logprobs = self.model.logprobs(part, states, self._temperature)
        kl = torch.zeros(part.shape[0], device=logprobs.device)
        if sft is not None:
            kl = self.model.completion_kl(part, states.detach(), sft, self._temperature)
        return logprobs, logprobs.detach() if anchor is None else anchor, kl

    def _logprobs(self, part: MicroBatch, adapter: str, train: bool = False) -> Tensor:
        states = self.model.states(part, [INIT, adapter], adapter if train else None)
        return self.model.logprobs(part, states, self._temperature)

    def _baseline_size(self, completions: int) -> int:
        """Return how many successive completions an advantage depends on."""
        return {"rloo": self.config.rollout.completions_per_prompt, "none": 1}.get(
            self.config.warp.advantage, completions
        )

    @property
    def _temperature(self) -> float:
        return self.config.rollout.temperature


def _is_whole(completions: Tensor, size: int) -> bool:
    """Return whether these indices are groups of `size`, each complete and in order."""
    if len(completions) % size:
        return False
    groups = completions.view(-1, size)
    wanted = groups[:, :1] + torch.arange(size, device=groups.device)
    return bool((groups == wanted).all() and (groups[:, 0] % size == 0).all())


def _init_seed(config: Config, iteration: int, index: int) -> int:
    """Return the seed of A: one per policy and iteration, one per iteration, or one per run.

    The last is for lora.init=frozen, where every merge stays at rank r.
    """
    if config.lora.init == "independent":
        return derive_seed(config.seed, "lora", iteration, index)
    if config.lora.init == "shared":
        return derive_seed(config.seed, "lora", iteration)
    return derive_seed(config.seed, "lora")
