"""One policy's fine-tuning (stage 1 of WARP), one optimiser step at a time.

A policy is an adapter. The anchor of its KL is its EMA, the iteration's init, or the SFT model.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from raywarp.algorithm import finite, losses
from raywarp.algorithm.advantages import advantages, flat_groups
from raywarp.algorithm.averaging import ema_update, mean
from raywarp.algorithm.deltas import AdapterDelta
from raywarp.algorithm.loss_scale import LossScale
from raywarp.algorithm.schedule import adapted, rate_factor
from raywarp.config.schema import Config
from raywarp.data.text import Completion
from raywarp.identity import derive_seed
from raywarp.model import rng
from raywarp.model.adapted import INIT, AdaptedModel
from raywarp.model.batches import Batch, MicroBatch, is_whole, micro_batches

BEST = "best"  # the state of the best measurement, where there is a stop rule


class Policy:
    """θ_m and θ_ema_m on the actor's shared base, both starting from the iteration's init.

    Args:
        model: the base. Its `init` adapter is already this iteration's.
        config: of the policy; see Config.of_policy.
        iteration: i, counted from 1.
        index: m, counted from 1.

    Attributes:
        anchor: names of the adapters that make the anchor; none of them is the SFT model.
        kl_coef: β, which moves with warp.kl_target alone.
        loss_scale: of a float16 model's backward passes; None for other precisions.
        kept: earlier states of the two adapters, by name: the best, and the most recent ones.
    """

    def __init__(self, model: AdaptedModel, config: Config, iteration: int, index: int):
        self.model, self.config = model, config
        self.kl_coef = config.warp.kl_coef
        self.loss_scale = LossScale() if model.dtype == torch.float16 else None
        self.kept: dict[str, Mapping[str, Tensor]] = {}
        self.name, self.ema_name = f"policy_{index}", f"ema_{index}"
        self.anchor = _anchor(config, iteration, self.ema_name)
        model.add_policy(self.name, rng.lora_seed(config, iteration, index), config.lora)
        model.add_copy(self.ema_name, of=self.name)
        self.trained = model.trainable(self.name)
        self.optimiser = torch.optim.AdamW(self.trained, fused=True, **config.optim.adamw)
        self.rng = rng.seeded(derive_seed(config.seed, "rng", iteration, index), model.device)
        self.step = 0

    def task_vector(self) -> AdapterDelta:
        """Return θ_m − θ_init."""
        return self.model.delta(self.name)

    def ema(self) -> AdapterDelta:
        """Return θ_ema_m − θ_init."""
        return self.model.delta(self.ema_name)

    def snapshot(self) -> dict[str, Tensor]:
        """Return copies of both adapters' tensors on the CPU."""
        return {
            f"{kind}/{name}": tensor.detach().cpu().clone()
            for kind, adapter in (("policy", self.name), ("ema", self.ema_name))
            for name, tensor in self.model.tensors(adapter).items()
        }

    def restore(self, saved: Mapping[str, Tensor]) -> None:
        """Set both adapters to a snapshot."""
        for kind, adapter in (("policy", self.name), ("ema", self.ema_name)):
            for name, tensor in self.model.tensors(adapter).items():
                tensor.data.copy_(saved[f"{kind}/{name}"])

    def result(self) -> AdapterDelta:
        """Return the task vector to keep once training is over.

        It is the last one, the best one (with a stop rule), or the mean of the last
        warp.average_last checkpoints.
        """
        if self.config.stop.is_set:
            self.restore(self.kept[BEST])
        if self.config.warp.average_last == 1:
            return self.task_vector()
        vectors = []
        for name in self.kept_after(self.step):
            self.restore(self.kept[name])
            vectors.append(self.task_vector())
        return mean(vectors, one_A=self.config.lora.init == "frozen")

    def update(
        self, batch: Batch, rewards: Tensor, completions: Sequence[Completion], with_sft_kl: bool
    ) -> dict[str, float]:
        """Take one optimiser step on fresh completions, then one step of the EMA.

        A step whose float16 gradients overflow is calculated again with half the loss scale.

        Args:
            batch: N completions, those of a prompt next to each other.
            rewards: (N,) r(x, y), already standardised. NaN: the completion has none.
            completions: the N completions as the sampler returned them.
            with_sft_kl: whether to measure KL(π_θ ‖ π_sft) too, which takes one more pass.

        Returns:
            metrics of the policy before the step. KL is in nats per completion, entropy and gap are
            in nats per token.

        Raises:
            NotFiniteError: before the step, which is not taken.
        """
        while True:
            states = dict(self.rng)
            with rng.using(states, self.model.device):
                metrics = self._update(batch, rewards, completions, with_sft_kl)
            if metrics is not None:
                self.rng = states
                return metrics

    def _update(
        self, batch: Batch, rewards: Tensor, completions: Sequence[Completion], with_sft_kl: bool
    ) -> dict[str, float] | None:
        """Take the step and return its metrics. Return None after an overflow of a gradient."""
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
            regularised = penalised[chosen] - self.kl_coef * log_ratios(chosen)
            return advantages(
                regularised, settings.warp.advantage, settings.rollout.completions_per_prompt
            )

        def backward(part: MicroBatch, logprobs: Tensor, advantage: Tensor) -> None:
            chosen = part.completions
            loss = losses.policy_gradient_loss(
                logprobs,
                batch.sampler_logprobs[chosen],
                advantage,
                batch.mask[chosen],
                len(batch),
                settings.optim.importance_cap,
            )
            (loss * self.loss_scale.value if self.loss_scale else loss).backward()

        # An advantage needs the other completions of its baseline. With all of them in one
        # micro-batch, one pass gives log-probs and gradient.
        at_once = all(is_whole(part.completions, self._baseline_size(len(batch))) for part in parts)
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
        finite.check_completions(
            penalised, sampled, anchor, batch.sampler_logprobs, batch.mask, self.model.dtype
        )
        if self._overflows():
            return None
        kl_anchor = losses.sequence_log_ratio(sampled, anchor, batch.mask).mean()
        coefficient = {"kl_coef": self.kl_coef} if settings.warp.kl_target else {}
        scale = {"loss_scale": self.loss_scale.value} if self.loss_scale else {}
        gradient_norm = self._optimise()
        self.kl_coef = adapted(self.kl_coef, float(kl_anchor), settings.warp.kl_target)
        self._keep_recent()

        scored = rewards[~rewards.isnan()]
        metrics: dict[str, Tensor | float] = {
            "reward": scored.mean(),
            "reward_std": scored.std(unbiased=False),
            "flat_groups": flat_groups(rewards, settings.rollout.completions_per_prompt),
            "kl_anchor": kl_anchor,
            **coefficient,
            "entropy": -losses.masked_mean(sampled, batch.mask),
            "length": batch.mask.sum(-1).mean(),
            "eos_rate": finished.mean(),
            "grad_norm": gradient_norm,
            **scale,
            "sampler_gap": losses.sampler_gap(sampled, batch.sampler_logprobs, batch.mask),
            **({"kl_sft": kl_sft.mean()} if with_sft_kl else {}),
        }
        return {name: float(value) for name, value in metrics.items()}

    def close(self) -> None:
        """Remove both adapters from the base."""
        self.model.remove(self.name)
        self.model.remove(self.ema_name)

    def _overflows(self) -> bool:
        """Undo the loss scale. After an overflow of a gradient, halve the scale and drop them all.

        At the smallest scale the gradients stay, and are found not to be finite.
        """
        if self.loss_scale is None:
            return False
        gradients = [tensor.grad for tensor in self.trained if tensor.grad is not None]
        torch._foreach_mul_(gradients, 1 / self.loss_scale.value)
        if torch.nn.utils.get_total_norm(gradients).isfinite() or not self.loss_scale.halve():
            return False
        self.optimiser.zero_grad(set_to_none=True)
        return True

    def _optimise(self) -> Tensor:
        """Clip, step AdamW at the schedule's rate, then move the EMA.

        This happens once per optimiser step, for any number of micro-batches.
        """
        optim = self.config.optim
        factor = rate_factor(optim.schedule, optim.warmup_steps, self.step, self.config.warp.steps)
        for group in self.optimiser.param_groups:
            group["lr"] = optim.lr * factor
        norm = torch.nn.utils.clip_grad_norm_(self.trained, optim.grad_clip)
        finite.check_gradient(norm, self.model.dtype)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        policy, ema = self.model.tensors(self.name), self.model.tensors(self.ema_name)
        ema_update(
            [t.data for t in ema.values()],
            [t.data for t in policy.values()],
            self.config.warp.ema_rate or 0.0,
        )
        self.step += 1
        if self.loss_scale:
            self.loss_scale.fits()
        return norm

    def _keep_recent(self) -> None:
        """Keep the state of a checkpoint, of which the last warp.average_last are averaged."""
        wanted = self.kept_after(self.step)
        if wanted and wanted[-1] == _recent(self.step):
            self.kept[wanted[-1]] = self.snapshot()
        self.kept = {name: state for name, state in self.kept.items() if name in wanted}

    def kept_after(self, step: int) -> list[str]:
        """Return the names of the states that are kept after so many steps, the newest last."""
        warp, every = self.config.warp, self.config.checkpoint_every
        best = [BEST] if self.config.stop.is_set else []
        if warp.average_last == 1:
            return best
        steps = [*range(every, step + 1, every), *([step] if step == warp.steps else [])]
        return [*best, *(_recent(one) for one in sorted({*steps})[-warp.average_last :])]

    def _measure(
        self, part: MicroBatch, train: bool, with_sft_kl: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return (C, T) log-probs of policy and anchor, and the (C,) KL to SFT.

        The KL is zero unless asked for. The trained pass comes last, so that it is alone in memory.
        """
        sft = self.model.states(part, []) if with_sft_kl or not self.anchor else None
        anchor = None
        if sft is not None and not self.anchor:
            anchor = self.model.logprobs(part, sft, self._temperature)
        elif self.step > 0:  # before the first step the policy is the init, and so is its EMA
            states = self.model.states(part, self.anchor)
            anchor = self.model.logprobs(part, states, self._temperature)
        states = self.model.states(part, [INIT, self.name], self.name if train else None)
        logprobs = self.model.logprobs(part, states, self._temperature)
        kl = torch.zeros(part.shape[0], device=logprobs.device)
        if sft is not None and with_sft_kl:
            kl = self.model.completion_kl(part, states.detach(), sft, self._temperature)
        return logprobs, logprobs.detach() if anchor is None else anchor, kl

    def _logprobs(self, part: MicroBatch, adapter: str, train: bool = False) -> Tensor:
        states = self.model.states(part, [INIT, adapter], adapter if train else None)
        return self.model.logprobs(part, states, self._temperature)

    def _baseline_size(self, completions: int) -> int:
        """Return how many successive completions an advantage depends on."""
        group = self.config.rollout.completions_per_prompt
        sizes = {"rloo": group, "grpo": group, "none": 1}
        return sizes.get(self.config.warp.advantage, completions)

    @property
    def _temperature(self) -> float:
        return self.config.rollout.temperature


def _anchor(config: Config, iteration: int, ema: str) -> list[str]:
    """Return the names of the adapters that make the anchor; none of them is the SFT model.

    Where nothing else needs the EMA, its rate is 0 with another anchor: it stays at the init, which
    is the SFT model in the first iteration.
    """
    warp = config.warp
    if warp.anchor == "sft" and (iteration > 1 or warp.elastic_reset):
        return []
    return [INIT] if warp.anchor == "init" and warp.elastic_reset else [INIT, ema]


def _recent(step: int) -> str:
    """Return the name under which the state after a step is kept for the mean."""
    return f"recent/{step:09d}"
