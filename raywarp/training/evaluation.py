"""The measurement of a point of the front: its completions, rewards, control scores and KL."""

from collections.abc import Callable, Sequence
from typing import Any

import ray

from raywarp.algorithm.deltas import AdapterDelta
from raywarp.config.schema import Config
from raywarp.data.text import Prompt
from raywarp.identity import derive_seed
from raywarp.rollout.protocol import (
    SFT,
    Adapter,
    AdapterPart,
    Request,
    Scores,
    join,
    submit,
)
from raywarp.run.points import Candidate, Point, Scored, summarise
from raywarp.training.kept_points import KeptPoints
from raywarp.training.sampling import sample
from raywarp.training.session import Session
from raywarp.training.timing import work_of


class PendingPoint:
    """The pending completions of one adapter. They are requested again if an actor dies."""

    def __init__(self, session: Session, request: Request, prompts: Sequence[Prompt], texts: Any):
        self.session, self.request, self.prompts, self.texts = session, request, prompts, texts
        self.refs: list[Any] = []

    def measure(self, rollouts: list[Any]) -> None:
        """Ask for everything that follows from the rollouts."""
        session, actor = self.session, self.session.next_policy().actor
        refs = [actor.kl.remote(self.request.adapter, self.request.prompts, *rollouts)]
        if self.texts is not None:
            refs.append(actor.text_losses.remote(self.request.adapter, self.texts))
        scorers = [session.reward, *([session.control] if session.control else [])]
        refs += [scorer.submit(self.prompts, rollouts) for scorer in scorers]
        self.refs = [*refs, *rollouts]

    def wait(self) -> Scored:
        scored: Scored = self.session.persist(self._wait)
        return scored

    def _wait(self) -> Scored:
        if not self.refs:
            (rollouts,) = submit(
                self.session.pool, [self.request], self.session.config.rollout.chunk_size
            )
            self.measure(rollouts)
        refs, self.refs = self.refs, []
        kl, *rest = self.session.get(refs)
        text_losses = rest.pop(0) if self.texts is not None else Scores()
        rewards = rest.pop(0)
        control = rest.pop(0) if self.session.control else None
        completions = join(rest, self.request.adapter)
        return Scored(
            texts=[c.text for c in completions],
            lengths=[len(c.token_ids) for c in completions],
            finished=[c.finished for c in completions],
            rewards=rewards,
            control=control,
            kl=kl,
            work=work_of(rest, [s for s in (kl, text_losses, rewards, control) if s]),
            text_losses=text_losses,
        )


def sft_scores(session: Session, prompts: Sequence[Prompt]) -> Scores:
    """Return the reward of one SFT completion per prompt."""
    session.start()
    seeds = [derive_seed(session.config.seed, "standardise", n) for n in range(len(prompts))]
    request = Request([prompt.token_ids for prompt in prompts], seeds, SFT)

    def score() -> Scores:
        (rollouts,) = submit(session.pool, [request], session.chunk)
        scores: Scores = session.get(session.reward.submit(prompts, rollouts))
        return scores

    scores: Scores = session.persist(score)
    return scores


def submit_points(
    session: Session,
    deltas: Sequence[AdapterDelta | None],
    prompts: Sequence[Prompt],
    seeds: Sequence[int],
    texts: Sequence[Sequence[int]] = (),
) -> list[PendingPoint]:
    """Ask for completions, rewards, control scores, KL and text losses, without waiting.

    Args:
        deltas: task vectors of the points. None or rank 0 stands for the SFT model.
        prompts: N prompts.
        seeds: N sampling seeds, one per prompt.
        texts: token ids of the texts that show what is kept.
    """
    session.start()
    adapters = [
        Adapter(policy=AdapterPart.put(delta)) if delta is not None and delta.rank else SFT
        for delta in deltas
    ]
    requests = [
        Request([prompt.token_ids for prompt in prompts], seeds, adapter) for adapter in adapters
    ]
    answers = sample(session, requests)
    kept = ray.put(list(texts)) if texts else None
    pending = [PendingPoint(session, request, prompts, kept) for request in requests]
    for point, rollouts in zip(pending, answers, strict=True):
        point.measure(rollouts)
    return pending


def evaluate(
    session: Session,
    config: Config,
    points: Sequence[Candidate],
    held_out: Sequence[Prompt],
    done: Callable[[Point], None],
    texts: Sequence[Sequence[int]] = (),
    kept: KeptPoints | None = None,
    sft: Scored | None = None,
) -> list[tuple[Point, Scored]]:
    """Measure all points. Generation, scores and KL passes of different points overlap.

    Actors start only if there is a point that was not measured before.

    Args:
        points: the first of them is SFT, unless `sft` is given.
        held_out: prompts, of which the first config.front.prompts are used.
        done: is called with each point once it is measured.
        texts: see submit_points.
        kept: what was measured before, and where each point is kept once it is measured.
        sft: the SFT model's completions.
    """
    chosen = held_out[: config.front.prompts]
    prompts = [prompt for prompt in chosen for _ in range(config.front.completions_per_prompt)]
    seeds = [derive_seed(config.seed, "evaluation", n) for n in range(len(prompts))]
    found = [kept.find(point.delta) if kept else None for point in points]
    missing = [point.delta for point, own in zip(points, found, strict=True) if own is None]
    pending = iter(submit_points(session, missing, prompts, seeds, texts) if missing else ())
    results = list[tuple[Point, Scored]]()
    for candidate, own in zip(points, found, strict=True):
        scored = own or next(pending).wait()
        if kept and not own:
            kept.save(candidate.delta, scored)
        sft = sft or scored
        point = summarise(
            candidate,
            scored,
            config.front.completions_per_prompt,
            sft,
            [len(text) - 1 for text in texts],
        )
        results.append((point, scored))
        done(point)
    return results
