"""The engines' side of the proof by effect: requests to rollout workers and their judgement.

The probe is scored four times: without an adapter, with both halves of the synthetic adapter, with
its policy alone, and without one again. This finds, before the first step, an engine that

- drops, halves or confuses an init or a policy,
- keeps an old one, or
- corrupts its weights in a swap.
"""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from raywarp.rollout.effect import Effect, Probe, Sampler, Trainer, distance, effect
from raywarp.rollout.protocol import SFT, Adapter, AdapterPart, Request

if TYPE_CHECKING:  # the pool imports this module, and must not load torch
    from raywarp.rollout.effect_probe import Reference

# For each request and each of its prompts: the log-prob of every token but the first.
TokenScores = Sequence[Sequence[Sequence[float]]]

TOKENS = (256, 512, 1024, 4096)  # scored tokens, increased until the slope is precise
PROOF_STEPS = 25  # optimiser steps between two proofs of a policy's own adapter


@dataclass(frozen=True)
class Proof:
    """What the pool and the policy actors need to judge an engine.

    Attributes:
        probe: the scored sequences.
        sampler: the sampler under examination, for messages.
        adapters: both halves, and the policy alone.
        none: the trainer's log-probs without an adapter.
        trained: the trainer's log-probs with each of the adapters.
        found: the effect in the worker furthest from the trainer at the start; None until it is
            known.
    """

    probe: Probe
    sampler: Sampler
    adapters: tuple[Adapter, Adapter]
    none: Trainer
    trained: tuple[Trainer, Trainer]
    found: Effect | None = None

    def requests(self) -> list[Request]:
        return requests(self.probe, [SFT, *self.adapters, SFT])

    def judge(self, answers: TokenScores, ours: Trainer, where: str) -> Effect:
        """Return what a policy's own adapter does in the engine.

        Args:
            answers: of the engine, without an adapter and with the policy's.
            ours: the trainer's log-probs with the policy's adapter.
            where: names the policy and its step.

        Raises:
            EffectError: the engine does not run the policy as the trainer does.
        """
        before, adapted = map(self.probe.scored, answers)
        found = effect(self.none, ours, before, adapted)
        if fault := found.fault():
            raise self.sampler.refusal(where, fault)
        return found

    def examine(self, answers: TokenScores, worker: int) -> Effect:
        """Return what the synthetic adapter does in a worker's engine.

        Of the two adapters, the one returned cannot be judged, or is further from the trainer.

        Args:
            answers: to `requests`.
            worker: its number, counted from 1.

        Raises:
            EffectError: the effect differs from that in the trainer.
        """
        before, *adapted, after = map(self.probe.scored, answers)
        effects = [
            effect(self.none, ours, before, theirs)
            for ours, theirs in zip(self.trained, adapted, strict=True)
        ]
        gap = max(
            (distance(scores, self.none.own) for scores in (before, after)),
            key=lambda found: (math.isnan(found), found),
        )
        # A synthetic adapter is already as large as it can be, so it is judged at any RMS.
        effects = [replace(one, engine_gap=gap, least=0.0) for one in effects]
        for found in effects:
            if fault := found.fault():
                raise self.sampler.refusal(f"rollout worker {worker}", fault)
        return max(effects, key=Effect.doubt)


def requests(probe: Probe, adapters: Sequence[Adapter]) -> list[Request]:
    """Return the probe's sequences with each adapter, for an engine's `logprobs`.

    The seeds have no meaning there.
    """
    return [Request(probe.sequences, [0] * len(probe.sequences), adapter) for adapter in adapters]


def prove(
    sampler: Sampler,
    reference: Callable[[int], "Reference"],
    score: Callable[[Sequence[Request]], Sequence[TokenScores]],
) -> Proof:
    """Compare each worker's engine with the trainer.

    The text grows until the effect is known precisely.

    Args:
        sampler: the sampler under examination.
        reference: asks a policy actor for a probe with that many scored tokens and the trainer's
            log-probs.
        score: asks every worker.

    Raises:
        EffectError: an engine does not run the trainer's policies.
    """
    for tokens in TOKENS:
        found = reference(tokens)
        init, policy = AdapterPart.put(found.init), AdapterPart.put(found.policy)
        adapters = (Adapter(init, policy), Adapter(policy=policy))
        proof = Proof(found.probe, sampler, adapters, found.none, (found.both, found.alone))
        effects = [
            proof.examine(answers, number)
            for number, answers in enumerate(score(proof.requests()), 1)
        ]
        proof = replace(proof, found=(worst := max(effects, key=Effect.doubt)))
        if worst.is_judged:
            return proof
    logging.getLogger(__name__).warning(
        f"whether adapters act in the sampler could not be told precisely: {worst.described()}"
    )
    return proof
