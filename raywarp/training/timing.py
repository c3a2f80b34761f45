"""The timing of an iteration's fine-tuning: seconds per phase, busy shares, and what to add."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from raywarp.rollout.pool import PoolReport
from raywarp.rollout.protocol import Rollout, Scores

PHASES = ("rollout_seconds", "swap_seconds", "wait_seconds", "request_seconds", "update_seconds")
SATURATED = 0.85  # busy share above which more actors of the same kind help


@dataclass(frozen=True)
class Timing:
    """The timing of one iteration's fine-tuning.

    Attributes:
        seconds: from the first request to the last step.
        steps: steps of all policies.
        trainers: policy actors that had a policy.
        workers: rollout workers.
        trainer_busy: share of the time that the trainers had work.
        pool_busy: share of the time that the rollout workers had work.
        reward_busy: share of the time that the reward worker had work.
        phases: mean seconds of each phase of a policy's step. Swap is part of rollout.
        restarts: rollout workers that died and were restarted.
    """

    seconds: float
    steps: int
    trainers: int
    workers: int
    trainer_busy: float
    pool_busy: float
    reward_busy: float
    phases: dict[str, float]
    restarts: int

    @property
    def steps_per_second(self) -> float:
        return self.steps / self.seconds if self.seconds else 0.0

    def bound(self) -> str:
        """Return what limits the speed, and what would raise it."""
        shares = {
            "rollouts": self.pool_busy,
            "updates": self.trainer_busy,
            "rewards": self.reward_busy,
        }
        most = max(shares, key=lambda name: shares[name])
        if shares[most] < SATURATED:
            return (
                "neither rollouts nor updates bound: a policy waits for its own rollouts; let"
                f" trainers share policies (cluster.policy_actors below {self.trainers})"
                if self.trainers > 1
                else (
                    "neither rollouts nor updates bound: a policy waits for its own rollouts; more"
                    " policies would use the gaps"
                )
            )
        remedy = {
            "rollouts": "add rollout workers (rollout.workers)",
            "updates": "add policy actors (cluster.policy_actors, or GPUs)",
            "rewards": "a faster reward",
        }
        return f"{most} bound: {remedy[most]}"

    def row(self) -> dict[str, Any]:
        return {**asdict(self), "steps_per_second": self.steps_per_second, "bound": self.bound()}


def measure(
    rows: Sequence[Mapping[str, Any]],
    seconds: float,
    trainers: int,
    pool: PoolReport,
    reward_seconds: float,
) -> Timing:
    """Return the timing that follows from the steps' metrics, the pool's report and the wall clock.

    Args:
        rows: one per step.
        seconds: wall-clock time.
        trainers: policy actors that had a policy.
        reward_seconds: time that the reward worker has worked.
    """
    busy = sum(row["update_seconds"] + row["request_seconds"] for row in rows)
    return Timing(
        seconds=seconds,
        steps=len(rows),
        trainers=trainers,
        workers=pool.workers,
        trainer_busy=busy / (seconds * trainers) if trainers else 0.0,
        pool_busy=pool.busy,
        reward_busy=reward_seconds / seconds,
        phases={
            name: sum(row[name] for row in rows) / len(rows) if rows else 0.0 for name in PHASES
        },
        restarts=pool.restarts,
    )


def work_of(
    rollouts: Sequence[Rollout], scores: Sequence[Scores]
) -> list[tuple[str, float, float]]:
    """Return who worked on these, with start and end in Unix seconds."""
    pieces = [
        (f"rollout worker {rollout.worker}", rollout.ended - rollout.seconds, rollout.ended)
        for rollout in rollouts
    ]
    own = [part for one in scores for part in (one, *one.parts.values())]
    return pieces + [(one.who, *one.span) for one in own if one.span]


def spans_of(pieces: Sequence[tuple[str, float, float]]) -> dict[str, list[list[float]]]:
    """Return the pieces of work by who did them, rounded to a millisecond."""
    spans: dict[str, list[list[float]]] = {}
    for who, start, end in pieces:
        spans.setdefault(who, []).append([round(start, 3), round(end, 3)])
    return spans
