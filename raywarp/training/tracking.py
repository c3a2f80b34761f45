"""A policy's trajectory: its measurements on held-out prompts while it trains, and stop rules.

Every measurement samples the same prompts with the same seeds, so that the measurements of a
policy, and those of different policies, are paired.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayActorError

from raywarp.cluster.faults import FaultError, explain
from raywarp.config.policies import StopConfig
from raywarp.config.schema import Config
from raywarp.data.text import Prompt
from raywarp.identity import derive_seed
from raywarp.rewards.actor import Scorer
from raywarp.rewards.reward import RewardError
from raywarp.rewards.totals import means
from raywarp.rollout.protocol import Adapter, Request, Rollout, Scores, submit
from raywarp.run.points import mean_interval

Row = dict[str, Any]


@dataclass(frozen=True)
class HeldOut:
    """What a policy is measured on while it trains.

    Attributes:
        prompts: policy's index → the tracked prompts; none where nothing is measured.
        control: scores the completions too; None without a control score.
    """

    prompts: Mapping[int, Sequence[Prompt]]
    control: Scorer | None = None


@dataclass(frozen=True)
class Measurement:
    """The pending measurement of one state of a policy.

    Attributes:
        rollouts, scores: refs of the completions, and of their rewards and control scores.
    """

    adapter: Adapter
    prompts: Sequence[Prompt]
    rollouts: list[Any]
    scores: list[Any]

    @classmethod
    def request(
        cls,
        config: Config,
        prompts: Sequence[Prompt],
        adapter: Adapter,
        pool: Any,
        scorers: Sequence[Scorer],
    ) -> "Measurement":
        """Ask for the completions and scores of a policy, without waiting for them."""
        seeds = [derive_seed(config.seed, "tracked", n) for n in range(len(prompts))]
        request = Request([prompt.token_ids for prompt in prompts], seeds, adapter)
        (rollouts,) = submit(pool, [request])
        scores = [scorer.submit(prompts, rollouts) for scorer in scorers]
        return cls(adapter, prompts, rollouts, scores)

    def wait(self) -> tuple[list[Rollout], list[Scores]]:
        """Return the rollouts, and the rewards with the control scores, if there are any."""
        return ray.get(self.rollouts), [fetch(ref) for ref in self.scores]


def measured(scores: Sequence[Scores], kl: Sequence[float]) -> Row:
    """Return the means and the half-widths of their 95 % intervals over prompts.

    Args:
        scores: the rewards, and the control scores if there are any.
        kl: KL to SFT of each completion, in nats.

    Raises:
        RewardError: no completion has a reward.
    """
    values = {"reward": scores[0], "kl": kl}
    if len(scores) > 1:
        values["control"] = scores[1]
    row: Row = {}
    for name, own in values.items():
        row[name], row[f"{name}_ci"] = mean_interval(own)
    if not all(map(math.isfinite, kl)):
        row["kl"] = math.nan
    if math.isnan(row["reward"]):
        raise RewardError("the reward applies to no completion of the tracked prompts")
    return {**row, **means(scores[0].parts)}


def fetch(ref: Any) -> Scores:
    """Return the scores that a ref stands for.

    Raises:
        FaultError: the reward worker died again and again.
    """
    try:
        scores: Scores = ray.get(ref)
    except RayActorError as error:  # Ray has spent all retries of the call
        raise FaultError(
            f"the reward worker died again and again at one batch: {explain(error)}"
        ) from None
    return scores


def is_due(config: Config, step: int, rows: Sequence[Row]) -> bool:
    """Return whether a policy is to be measured after so many steps.

    That is every front.every steps, from 0 on, and after the last step.

    Args:
        rows: its trajectory so far.
    """
    every = config.front.every
    wanted = every > 0 and (step % every == 0 or step == config.warp.steps)
    return wanted and all(row["step"] != step for row in rows)


def best(rows: Sequence[Row], rule: StopConfig) -> Row:
    """Return the best measurement of a trajectory, the earliest of equal ones.

    Of those whose KL is within stop.max_kl it is the one of the highest reward, or of the highest
    control score with stop.control_falls. If none is within, it is the one of the smallest KL.
    """
    within = [row for row in rows if rule.max_kl is None or row["kl"] <= rule.max_kl]
    if not within:
        return min(rows, key=lambda row: float(row["kl"]))
    by = "reward" if rule.control_falls is None else "control"
    return max(within, key=lambda row: float(row[by]))


def reason_to_stop(rows: Sequence[Row], rule: StopConfig) -> str | None:
    """Return which rule ends the training after the last measurement, or None."""
    last = rows[-1]
    if rule.max_kl is not None and last["kl"] > rule.max_kl:
        return f"KL {last['kl']:.2f} is above stop.max_kl={rule.max_kl:g}"
    if rule.control_falls is not None:
        highest = max(row["control"] for row in rows)
        if highest - last["control"] > rule.control_falls:
            return (
                f"control {last['control']:.2f} is more than stop.control_falls="
                f"{rule.control_falls:g} below its best, {highest:.2f}"
            )
    if rule.plateau is not None:
        rewards = [row["reward"] for row in rows]
        if len(rows) - 1 - rewards.index(max(rewards)) >= rule.plateau:
            return (
                f"reward has not risen above {max(rewards):.2f} for stop.plateau={rule.plateau}"
                " measurements"
            )
    return None
