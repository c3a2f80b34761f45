"""The measurement of a point: scores and KL as a run measures them, and beside them what shows
whether both are of one policy: the sampler's own log-ratios, and their slope on the trainer's.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import torch
from bench.evidence.curves import size
from bench.evidence.results import Measured, Numbers
from bench.evidence.settings import Settings

from raywarp.algorithm.deltas import AdapterDelta
from raywarp.config.schema import Config
from raywarp.data import embedded
from raywarp.data.text import Completion, Prompt
from raywarp.identity import derive_seed
from raywarp.model.adapted import INIT, AdaptedModel
from raywarp.rollout.effect import Effect, Probe, effect
from raywarp.rollout.effect_probe import score
from raywarp.rollout.protocol import SFT, Adapter, AdapterPart, Request, Scores, join
from raywarp.run.points import Scored, distinct_2
from raywarp.training.evaluation import PendingPoint
from raywarp.training.sampling import sample
from raywarp.training.session import Session
from raywarp.training.sft_rewards import rewards_of_sft


def two_of(scored: Scored) -> tuple[Sequence[float], Sequence[float]]:
    """Return the reward and the control score, or the two rewards where there are two."""
    if isinstance(scored.rewards, Scores) and len(scored.rewards.parts) == 2:
        first, second = scored.rewards.parts.values()
        return first, second
    return scored.rewards, scored.control or scored.rewards


@dataclass(frozen=True)
class Wanted:
    """A point to measure. delta: None for the SFT model. eta: see Measured."""

    name: str
    delta: AdapterDelta | None
    eta: float


class Point(PendingPoint):
    """A pending point of which the tokens are kept, too."""

    def measure(self, rollouts: list[Any]) -> None:
        super().measure(rollouts)
        self.rollouts = rollouts

    def completions(self) -> list[Completion]:
        return join(ray.get(self.rollouts), self.request.adapter)


class Measurer:
    """Measures points of one seed.

    Args:
        session: of the seed's task. model: its folder. prompts: held out.
    """

    def __init__(
        self,
        settings: Settings,
        session: Session,
        config: Config,
        model: str,
        prompts: Sequence[Prompt],
    ):
        self.settings, self.session, self.config = settings, session, config
        self.prompts = prompts[: settings.prompts]
        dtype = getattr(torch, session.plan.dtype)
        self.trainer = AdaptedModel(model, config.lora, dtype, torch.device("cpu"))

    def points(self, wanted: Sequence[Wanted]) -> Iterator[tuple[str, Measured, list[str]]]:
        """Yields name, numbers and texts of each. Their generations share the engine's calls."""
        for point, pending in zip(wanted, self._submit(wanted), strict=True):
            scored = pending.wait()
            completions = pending.completions()
            yield point.name, self._measured(point, scored, completions), scored.texts

    def ceiling(self) -> Numbers:
        """(P, n) rewards of SFT completions."""
        prompts = self.prompts[: self.settings.ceiling_prompts]
        count = self.settings.ceiling_completions
        return np.array(rewards_of_sft(self.session, prompts, count, lambda _: None))

    def _submit(self, wanted: Sequence[Wanted]) -> list[Point]:
        tokens = [prompt.token_ids for prompt in self.prompts]
        seeds = [derive_seed(self.config.seed, "evaluation", n) for n in range(len(tokens))]
        adapters = [
            Adapter(policy=AdapterPart.put(point.delta)) if point.delta else SFT for point in wanted
        ]
        requests = [Request(tokens, seeds, adapter) for adapter in adapters]
        pending = [Point(self.session, request, self.prompts, None) for request in requests]
        for point, rollouts in zip(pending, sample(self.session, requests), strict=True):
            point.measure(rollouts)
        return pending

    def _measured(
        self, point: Wanted, scored: Scored, completions: Sequence[Completion]
    ) -> Measured:
        without = self._without(completions[: self.settings.checked_prompts])
        found = self._effect(point, completions[: self.settings.sloped_prompts], without)
        ratios = [
            sum(completion.logprobs) - sum(own)
            for completion, own in zip(completions, without, strict=False)
        ]
        first, second = two_of(scored)
        columns = {
            "reward": first,
            "control": second,
            "vader": embedded.vader([prompt.text for prompt in self.prompts], scored.texts),
            "kl": scored.kl,
            "log_ratio": ratios,
            "length": scored.lengths,
            "finished": scored.finished,
        }
        return Measured(
            **{name: np.array(values, dtype=float) for name, values in columns.items()},
            distinct_2=distinct_2(scored.texts),
            eta=point.eta,
            norm=size(point.delta) if point.delta else 0.0,
            slope=found.slope,
            slope_error=found.error,
            gap=found.adapted_gap,
            rms=found.rms,
        )

    def _probe(self, completions: Sequence[Completion]) -> Probe:
        prompts = [prompt.token_ids for prompt in self.prompts[: len(completions)]]
        sequences = tuple(
            (*prompt, *completion.token_ids)
            for prompt, completion in zip(prompts, completions, strict=True)
        )
        return Probe(sequences, tuple(map(len, prompts)))

    def _without(self, completions: Sequence[Completion]) -> list[Sequence[float]]:
        """The sampler's log-probs of these tokens without any adapter."""
        probe = self._probe(completions)
        request = Request(probe.sequences, [0] * len(completions), SFT)
        (rows,) = self.session.persist(
            lambda: self.session.get(self.session.pool.logprobs.remote([request]))
        )
        return [row[head - 1 :] for row, head in zip(rows, probe.heads, strict=True)]

    def _effect(
        self,
        point: Wanted,
        completions: Sequence[Completion],
        without: Sequence[Sequence[float]],
    ) -> Effect:
        """How the sampler's log-ratios compare with the trainer's, on the point's own texts."""
        probe, budget = self._probe(completions), self.config.optim.max_tokens_per_microbatch
        base = adapted = score(self.trainer, probe, [], budget)
        if point.delta:
            self.trainer.set_init(point.delta)
            adapted = score(self.trainer, probe, [INIT], budget)
        sampled = [value for completion in completions for value in completion.logprobs]
        sampled_base = [value for row in without[: len(completions)] for value in row]
        return effect(base, adapted, sampled_base, sampled)
