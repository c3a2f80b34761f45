"""What a policy actor measures between fine-tunings: KL, and what a model keeps."""

import contextlib
import functools
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
import torch

from raywarp.algorithm.deltas import add
from raywarp.cluster.card import turn
from raywarp.cluster.health import Work
from raywarp.config.schema import Config
from raywarp.model.batches import collate
from raywarp.rollout.protocol import SFT, Adapter, Scores, join

if TYPE_CHECKING:  # transformers and PEFT take seconds to import
    from raywarp.model.adapted import AdaptedModel


class Measuring:
    """The measuring part of an actor that holds the base model."""

    config: Config
    model: "AdaptedModel"
    work: Work
    cards: Sequence[Path]
    working_since: float | None

    def _load(self) -> None:
        """Load the base, unless it is there."""
        raise NotImplementedError

    def kl(
        self,
        adapter: Adapter,
        prompts: Sequence[Sequence[int]],
        *rollouts: Any,
        reference: Adapter = SFT,
    ) -> Scores:
        """Return the full-vocabulary KL(π ‖ π_ref) of each completion in nats.

        Args:
            adapter: π is the base with its parts.
            prompts: token ids of N prompts.
            rollouts: the workers' Rollouts for them, in order.
            reference: π_ref is the base with its parts; without any, the SFT model.
        """
        from raywarp.model.adapted import completion_kls

        start, completions = time.time(), join(rollouts, adapter)
        if adapter.versions == reference.versions:
            return Scores([0.0] * len(completions))
        with self._turn():
            names = self._hold(adapter), self._hold(reference, "reference")
            kls = completion_kls(self.model, collate(prompts, completions), self.config, *names)
            self.model.remove("reference")
        return self._scored(kls, start)

    def text_losses(self, adapter: Adapter, texts: Sequence[Sequence[int]]) -> Scores:
        """Return the cross-entropy of each text under base + adapter, in nats."""
        from raywarp.model.adapted import text_losses

        start = time.time()
        with self._turn():
            names, most = self._hold(adapter), self.config.optim.max_tokens_per_microbatch
            return self._scored(text_losses(self.model, texts, names, most), start)

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        """Work on the GPU, in turns with an engine that shares it. Waiting for it is no hang."""
        since, self.working_since = self.working_since, None
        with self.work, turn(self.cards):
            self.working_since = since and time.monotonic()
            yield
            if self.cards and torch.cuda.is_initialized():
                torch.cuda.empty_cache()

    def _hold(self, adapter: Adapter, name: str = "init") -> list[str]:
        """Hold an adapter on the base, as the sum of its parts. Return the names to activate."""
        self._load()
        if adapter.parts:
            self.model.set_init(add(*(part.fetch() for part in adapter.parts)), name)
        return [name] if adapter.parts else []

    def _scored(self, values: Sequence[float], start: float) -> Scores:
        """Return values with who computed them, and when."""
        scores = Scores(values)
        scores.span, scores.who = (start, time.time()), self.title
        return scores

    @functools.cached_property
    def title(self) -> str:
        """Return the actor's name in a run's time line."""
        number = re.match(
            r"raywarp-policy-(\d+)-", ray.get_runtime_context().get_actor_name() or ""
        )
        return f"policy actor {number[1] if number else 1}"
