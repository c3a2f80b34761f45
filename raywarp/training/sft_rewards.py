"""Rewards of many SFT completions of each prompt, from which the ceiling of a front follows."""

from collections.abc import Callable, Sequence
from typing import Any

from raywarp.data.text import Prompt
from raywarp.identity import derive_seed
from raywarp.rewards.reward import RewardError
from raywarp.rewards.totals import present
from raywarp.rollout.protocol import SFT, Request, join, submit
from raywarp.run.ceiling import CALL
from raywarp.training.session import Session

AHEAD = 2  # calls under way for each worker, so that none waits and few texts are held


def rewards_of_sft(
    session: Session, prompts: Sequence[Prompt], completions: int, done: Callable[[int], None]
) -> list[list[float]]:
    """Return the rewards of n SFT completions of each of P prompts, as P lists of n.

    Prompts with a completion that has no reward are left out.

    Args:
        session: its reward is standardised as the front's.
        prompts: P held-out prompts.
        completions: n.
        done: is called with the number of completions that were just scored.
    """
    session.start()
    seed = session.config.seed
    rows = [
        (prompt, derive_seed(seed, "ceiling", p, n))
        for p, prompt in enumerate(prompts)
        for n in range(completions)
    ]
    size = session.config.rollout.chunk_size or CALL
    parts = [_Part(session, rows[n : n + size]) for n in range(0, len(rows), size)]
    rewards = list[float]()
    for n, part in enumerate(parts):
        for soon in parts[n : n + AHEAD * len(session.workers)]:
            soon.submit()
        rewards += part.wait()
        done(len(part.prompts))
    found = [rewards[n : n + completions] for n in range(0, len(rewards), completions)]
    whole = [own for own in found if len(present(own)) == completions]
    if not whole:
        raise RewardError("the reward applies to all completions of no held-out prompt")
    return whole


class _Part:
    """Completions of one call, and their rewards. They are requested again if an actor dies.

    Args:
        rows: prompts and seeds.
    """

    def __init__(self, session: Session, rows: Sequence[tuple[Prompt, int]]):
        self.session, self.prompts = session, [prompt for prompt, _ in rows]
        self.request = Request([p.token_ids for p in self.prompts], [seed for _, seed in rows], SFT)
        self.refs: list[Any] = []

    def submit(self) -> None:
        """Ask for them, unless they are asked for."""
        if not self.refs:
            (rollouts,) = submit(self.session.pool, [self.request])
            self.refs = [self.session.reward.submit(self.prompts, rollouts), *rollouts]

    def wait(self) -> list[float]:
        rewards: list[float] = self.session.persist(self._wait)
        return rewards

    def _wait(self) -> list[float]:
        self.submit()
        refs, self.refs = self.refs, []
        rewards, *rollouts = self.session.get(refs)
        join(rollouts, SFT)
        return list(rewards)
