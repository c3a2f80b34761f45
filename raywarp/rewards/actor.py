"""The Ray actor that scores completions. It is wrapped by ray.remote where it is placed."""

import functools
import logging
import math
import os
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import ray

from raywarp.cluster import faults
from raywarp.cluster.card import see_own_gpus
from raywarp.cluster.health import WATCH, Process
from raywarp.config.rewards import NamedRewardConfig, RewardConfig
from raywarp.data.text import Prompt
from raywarp.rewards.process import FunctionProcesses, Source
from raywarp.rewards.reward import Batch, Raw, Reward, RewardError, standardised, too_slow
from raywarp.rewards.score import load_reward
from raywarp.rewards.time_limit import TimeLimit, TimeLimitError
from raywarp.rewards.totals import total
from raywarp.rollout.protocol import Rollout, Scores


@dataclass(frozen=True)
class Scorer:
    """A reward worker with the statistics that standardise its scores.

    They are sent with every call, since a worker that dies forgets them.

    Attributes:
        actor: handle of a RewardActor.
        statistics: mean and standard deviation of the raw score, or None.
        name, weight: of one of several rewards.
        others: the other rewards of the total.
    """

    actor: Any
    statistics: tuple[float, float] | None = None
    name: str = ""
    weight: float = 1.0
    others: tuple["Scorer", ...] = ()

    @classmethod
    def of(
        cls,
        actors: Sequence[Any],
        sources: Mapping[str, RewardConfig],
        statistics: Mapping[str, tuple[float, float]],
    ) -> "Scorer":
        """Return what scores by all rewards.

        Args:
            actors: of the rewards, in their order.
            sources: the rewards by their keys.
            statistics: mean and standard deviation by the same keys.
        """
        parts = [
            cls(actor, statistics.get(key), *_term(source))
            for actor, (key, source) in zip(actors, sources.items(), strict=True)
        ]
        return replace(parts[0], others=tuple(parts[1:]))

    def weighted(self, sources: Mapping[str, RewardConfig]) -> "Scorer":
        """Return what scores by the same rewards with the weights that `sources` has."""
        weights = dict(map(_term, sources.values()))
        parts = [replace(part, weight=weights[part.name], others=()) for part in self.parts]
        return replace(parts[0], others=tuple(parts[1:]))

    @property
    def parts(self) -> tuple["Scorer", ...]:
        """All rewards of the total, this one first."""
        return (self, *self.others)

    def submit(self, prompts: Sequence[Prompt], rollouts: Sequence[Any]) -> Any:
        """Ask for the scores of the rollouts behind these refs. Return the ref of Scores."""
        texts, columns = [prompt.text for prompt in prompts], [prompt.columns for prompt in prompts]
        messages = [prompt.messages for prompt in prompts]
        scores = [
            part.actor.score_rollouts.remote(
                part.statistics, texts, columns, *rollouts, messages=messages
            )
            for part in self.parts
        ]
        terms = [(part.name, part.weight) for part in self.parts]
        return self.actor.total.remote(terms, *scores) if self.name else scores[0]


def _term(source: RewardConfig) -> tuple[str, float]:
    """Return a reward's name and weight in the total."""
    return (source.name, source.weight) if isinstance(source, NamedRewardConfig) else ("", 1.0)


class RewardActor:
    """Holds one reward for as long as a run lasts.

    Ray may restart the actor and repeat a call, so a call depends only on its arguments.

    Args:
        threads: CPU threads of torch. None leaves Ray's choice.
        title: name of the actor in a run's time line.
    """

    def __init__(
        self,
        config: RewardConfig,
        trust_remote_code: bool = False,
        threads: int | None = None,
        title: str = "reward worker",
        source: Source | None = None,
    ):
        self.config, self.trust_remote_code, self.threads, self.title = (
            config,
            trust_remote_code,
            threads,
            title,
        )
        self.source = source or Source.here(config)
        self.seconds, self.done = 0.0, 0
        self._lock, self._busy = threading.Lock(), 0
        # The actor's id stays the same after a restart.
        own = ray.get_runtime_context().get_actor_id() if ray.is_initialized() else None
        self.limit = TimeLimit(config.timeout_seconds, own or str(os.getpid()))

    def start(self) -> None:
        """Load the reward.

        A constructor could not hand on the exceptions of load_reward, so this is a call of its own.

        Raises:
            ConfigError: see load_reward.
        """
        _ = self.processes if self.config.function else self.reward

    @ray.method(concurrency_group=WATCH)
    def pulse(self) -> Process:
        """Return what this process does. It answers while a score is computed."""
        return Process.here(done=self.done, busy=self._busy > 0)

    @functools.cached_property
    def reward(self) -> Reward:
        """Load the model when it is first used, also after a death of this process."""
        return load_reward(self.config, self.trust_remote_code, self._device())

    @functools.cached_property
    def processes(self) -> FunctionProcesses:
        """Start the function's processes when they are first used."""
        # A function may use this Ray; without its address it would start another one.
        context = ray.get_runtime_context() if ray.is_initialized() else None
        return FunctionProcesses(
            replace(self.source, paths=[*self.source.paths, *filter(None, sys.path)]),
            {"RAY_ADDRESS": context.gcs_address} if context else {},
        )

    def score(
        self,
        prompts: Sequence[str],
        completions: Sequence[str],
        columns: Mapping[str, Sequence[Any]] | None = None,
    ) -> list[Raw]:
        """Return one score per completion. See Reward.score for the arguments.

        Raises:
            RewardError: the reward failed, or took longer than its timeout_seconds.
        """
        return self._score(Batch(prompts, completions, columns or {}), None)

    def _score(self, batch: Batch, statistics: tuple[float, float] | None) -> list[Raw]:
        with self._lock:
            self._busy += 1
        start = time.perf_counter()
        try:
            if self.config.function:
                return standardised(self.processes.score(batch), *(statistics or (0.0, 1.0)))
            return self._score_by_model(batch, statistics)
        finally:
            with self._lock:
                self._busy -= 1
                self.seconds += time.perf_counter() - start
                self.done += 1

    def _score_by_model(self, batch: Batch, statistics: tuple[float, float] | None) -> list[Raw]:
        try:
            if statistics:
                self.reward.mean, self.reward.std = statistics
            return self.limit.call(lambda: self.reward.standardised(self.reward.raw(batch)))
        except TimeLimitError as error:
            raise too_slow(self.config.model, error, len(batch.completions)) from None
        except Exception as error:
            # A RewardError has the model's own error as its context.
            cause = error.__context__ if isinstance(error, RewardError) else error
            if cause is not None and faults.kind_of(cause) == faults.GPU_ERROR:
                self._end(cause)
            raise

    def _end(self, error: BaseException) -> None:
        """End this process, which can use its GPU no more. Ray restarts it and repeats the call."""
        what = f"reward {self.config.model}: {type(error).__name__}: {error}"
        logging.getLogger(__name__).error(f"{what}; its process ends, and a new one scores again")
        os._exit(1)

    def seconds_of_work(self) -> float:
        """Return the seconds that this process has spent on scores so far."""
        return self.seconds

    def score_rollouts(
        self,
        statistics: tuple[float, float] | None,
        prompts: Sequence[str],
        columns: Sequence[Mapping[str, Any]],
        *rollouts: Rollout,
        messages: Sequence[Any] = (),
    ) -> Scores:
        """Return the scores of the rollout workers' completions, in order.

        NaN stands for a completion that the reward does not apply to.

        Args:
            statistics: mean and standard deviation that standardise the scores. None takes those
                that are stored with the reward.
            prompts: N texts.
            columns: N rows with the other columns of each prompt.
            rollouts: as the workers returned them. Ray fetches them here, so the caller need not
                wait.
            messages: N prompts as lists of messages. None: the prompt's text is a user's message.
        """
        start = time.time()
        completions = [one for rollout in rollouts for one in rollout.completions]
        names = columns[0] if columns else {}
        batch = Batch(
            prompts,
            [completion.text for completion in completions],
            {name: [row[name] for row in columns] for name in names},
            [list(completion.token_ids) for completion in completions],
            list(messages) or None,
        )
        scores = Scores(math.nan if one is None else one for one in self._score(batch, statistics))
        scores.span, scores.who = (start, time.time()), self.title
        return scores

    @ray.method(concurrency_group=WATCH)
    def total(self, terms: Sequence[tuple[str, float]], *parts: Scores) -> Scores:
        """Return the weighted sum of several rewards' scores; see totals.total.

        Args:
            terms: name and weight of each.
            parts: the scores of each. Ray fetches them here, so the caller need not wait.
        """
        scores = Scores(total([weight for _, weight in terms], parts))
        scores.parts = {name: part for (name, _), part in zip(terms, parts, strict=True)}
        return scores

    def _device(self) -> str:
        if not self.config.model:
            return "cpu"
        import torch  # a reward function may not need it

        if self.threads:
            torch.set_num_threads(self.threads)
        see_own_gpus()
        return "cuda" if ray.get_gpu_ids() and torch.cuda.is_available() else "cpu"
