"""The Ray actor that scores completions; wrapped by ray.remote where it is placed."""

import os
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import ray
import torch

from raywarp.config import RewardConfig
from raywarp.rewards import RewardError, load_reward
from raywarp.time_limit import TimeLimit, TimeLimitError

if TYPE_CHECKING:
    from raywarp.rollout import Rollout


class RewardActor:
    """Holds one reward for as long as a run lasts.

    Args:
        threads: of the CPU; None leaves Ray's choice.
    """

    def __init__(self, config: RewardConfig, trust_remote_code: bool = False, threads: int | None = None):
        self.config, self.trust_remote_code = config, trust_remote_code
        self.seconds = 0.0
        own = ray.get_runtime_context().get_actor_id() if ray.is_initialized() else None  # the same after a restart
        self.limit = TimeLimit(config.timeout_seconds, own or str(os.getpid()))
        if threads:
            torch.set_num_threads(threads)

    def start(self) -> None:
        """Load the reward. Raises what load_reward raises, which a constructor could not hand on."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.reward = load_reward(self.config, self.trust_remote_code, device)

    def set_statistics(self, mean: float, deviation: float) -> None:
        """From now on a score is (raw − mean) / deviation."""
        self.reward.mean, self.reward.std = mean, deviation

    def score(self, prompts: Sequence[str], completions: Sequence[str], columns: Mapping[str, Sequence[Any]] | None = None) -> list[float]:
        """One score per completion; see Reward.score for the arguments and the RewardError it raises."""
        start = time.perf_counter()
        try:
            scores = self.limit.call(lambda: self.reward.score(prompts, completions, columns))
        except TimeLimitError as error:
            source = self.config.function or self.config.model
            raise RewardError(
                f"reward {source} {error}, for {len(completions)} completions: make it faster, or raise reward.timeout_seconds "
                "(of a control: control.timeout_seconds)"
            ) from None
        self.seconds += time.perf_counter() - start
        return scores

    def seconds_of_work(self) -> float:
        """Seconds spent on scores so far."""
        return self.seconds

    def score_rollouts(self, prompts: Sequence[str], columns: Sequence[Mapping[str, Any]], *rollouts: "Rollout") -> list[float]:
        """Scores of the rollout workers' completions, in order.

        Args:
            prompts: N texts.
            columns: N rows with the other columns of each prompt.
            rollouts: as the workers returned them; Ray fetches them here, so that the caller need not wait.
        """
        completions = [completion.text for rollout in rollouts for completion in rollout.completions]
        names = columns[0] if columns else {}
        return self.score(prompts, completions, {name: [row[name] for row in columns] for name in names})
