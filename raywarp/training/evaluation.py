"""A point of the front while it is measured, and its completions and scores afterwards."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from raywarp.data.prompts import Prompt
from raywarp.rollout.protocol import Request, join, submit, work_of

if TYPE_CHECKING:
    from raywarp.training.session import Session


@dataclass(frozen=True)
class Scored:
    """One adapter's completions of N prompts, with what was asked of them: each list has N entries.

    work: who was at it from when to when, in Unix seconds.
    """

    texts: list[str]
    lengths: list[int]
    finished: list[bool]
    rewards: list[float]
    control: list[float] | None
    kl: list[float]
    work: list[tuple[str, float, float]] = field(default_factory=list, compare=False)


class PendingPoint:
    """One adapter's completions of the prompts, under way; asked for again if whoever worked on it dies."""

    def __init__(self, session: "Session", request: Request, prompts: Sequence[Prompt]):
        self.session, self.request, self.prompts = session, request, prompts
        self.refs: list[Any] = []

    def measure(self, rollouts: list[Any]) -> None:
        """Ask for everything that follows from the rollouts."""
        session, place = self.session, self.session.next_policy()
        kl = place.actor.kl_to_sft.remote(self.request.adapter, self.request.prompts, *rollouts)
        scorers = [session.reward, *([session.control] if session.control else [])]
        self.refs = [kl, *(scorer.submit(self.prompts, rollouts) for scorer in scorers), *rollouts]

    def wait(self) -> Scored:
        scored: Scored = self.session.persist(self._wait)
        return scored

    def _wait(self) -> Scored:
        if not self.refs:
            (rollouts,) = submit(self.session.pool, [self.request], self.session.config.rollout.chunk_size)
            self.measure(rollouts)
        refs, self.refs = self.refs, []
        kl, rewards, *rest = self.session.get(refs)
        control = rest.pop(0) if self.session.control else None
        completions = join(rest, self.request.adapter)
        return Scored(
            texts=[c.text for c in completions],
            lengths=[len(c.token_ids) for c in completions],
            finished=[c.finished for c in completions],
            rewards=rewards,
            control=control,
            kl=kl,
            work=work_of(rest, [kl, rewards, *([control] if control else [])]),
        )
