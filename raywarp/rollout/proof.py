"""The engines' side of the proof by effect: what a rollout worker is asked, and what its answer is
compared with.

The probe is scored without an adapter, with both halves of the synthetic one, with its policy
alone, and without one again. So an engine that drops, halves or mixes up an init or a policy, keeps
an old one, or spoils its weights in a swap, is found before the first step.
"""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from raywarp.rollout.effect import Effect, Probe, Sampler, Trainer, distance, effect
from raywarp.rollout.protocol import SFT, Adapter, AdapterPart, Request

if TYPE_CHECKING:  # the pool judges, too, and has no torch
    from raywarp.rollout.effect_probe import Reference

TokenScores = Sequence[
    Sequence[Sequence[float]]
]  # for each request and each of its prompts, the log-prob of every token but the first

TOKENS = (256, 1024, 4096)  # scored tokens, one after another until the slope is precise
PROOF_STEPS = 25  # optimiser steps of a policy from one proof of its own adapter to the next


@dataclass(frozen=True)
class Proof:
    """Sent to the pool and to the policy actors.

    adapters: both halves, the policy alone. none, trained: the trainer's log-probs without an
    adapter, and with each of these.
    found: what the worker that is furthest from the trainer did at the start; None until that is
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

    def examine(self, answers: TokenScores, worker: int) -> Effect:
        """What the synthetic adapter does in a worker's engine: of both cases the less precise one,
        or that further from the trainer.

        Args:
            answers: to `requests`. worker: counted from 1.

        Raises:
            EffectError: it is not what it does in the trainer.
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
        effects = [
            replace(one, engine_gap=gap, least=0.0) for one in effects
        ]  # a synthetic adapter is as large as it can be
        for found in effects:
            if fault := found.fault():
                raise self.sampler.refusal(f"rollout worker {worker}", fault)
        return max(effects, key=Effect.doubt)


def requests(probe: Probe, adapters: Sequence[Adapter]) -> list[Request]:
    """The probe's sequences with each adapter, for an engine's `logprobs`; their seeds mean nothing
    there.
    """
    return [Request(probe.sequences, [0] * len(probe.sequences), adapter) for adapter in adapters]


def prove(
    sampler: Sampler,
    reference: Callable[[int], "Reference"],
    score: Callable[[Sequence[Request]], Sequence[TokenScores]],
) -> Proof:
    """Compare each worker's engine with the trainer, on more and more text until the effect is
    known precisely.

    Args:
        reference: asks a policy actor for a probe of so many scored tokens and the trainer's
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
