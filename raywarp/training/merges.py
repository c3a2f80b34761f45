"""The measurement of a merge: how alike its policies are, and what averaging them can save."""

from collections.abc import Sequence
from typing import Any

from raywarp.algorithm.averaging import lerp
from raywarp.algorithm.deltas import AdapterDelta
from raywarp.algorithm.geometry import kl_summary
from raywarp.algorithm.truncation import compress
from raywarp.cluster.claims import NO_CLAIMS, Claims
from raywarp.config.schema import Config
from raywarp.data.text import Prompt
from raywarp.identity import derive_seed
from raywarp.rollout.protocol import Adapter, AdapterPart, Request
from raywarp.run.folder import Run
from raywarp.run.keys import merge_key
from raywarp.training.sampling import sample
from raywarp.training.session import Session


def measure_merge(
    session: Session,
    config: Config,
    run: Run,
    keys: Sequence[str],
    init: AdapterDelta,
    policies: Sequence[AdapterDelta],
    prompts: Sequence[Prompt],
    claims: Claims = NO_CLAIMS,
) -> dict[str, Any] | None:
    """Return how alike an iteration's policies are, in terms of the KL; None for one policy.

    Each policy and their plain mean (LERP) write one completion of each prompt, with the same
    seeds. Actors start unless the run's store already has the result.

    Args:
        keys: keys of the policies.
        init: θ_init − θ_sft.
        policies: θ_m − θ_init.
        prompts: held-out prompts.
        claims: what this run may do, where runs share a store.

    Returns:
        kl_cosine and its kl_cosine_ci (None if the policies have not moved), kl_gain (the share of
        √KL that averaging can save), kl_policies and kl_lerp (KL to θ_init in nats per completion),
        and the number of prompts.
    """
    if len(policies) < 2:
        return None
    name = f"merges/{merge_key(keys, prompts)}"

    def measure() -> dict[str, Any]:
        # Compressed, since with one frozen A the mean has the policies' rank, as engines expect.
        vectors = [*policies, compress(lerp(policies))]
        *own, mean = kls_to_init(session, config, init, vectors, prompts)
        measured = kl_summary(own, mean)
        run.save_measured(name, measured)
        return measured

    return claims.once(name, lambda: run.find_measured(name), session.start, measure)


def kls_to_init(
    session: Session,
    config: Config,
    init: AdapterDelta,
    vectors: Sequence[AdapterDelta],
    prompts: Sequence[Prompt],
) -> list[list[float]]:
    """Return KL(θ_init + δ ‖ θ_init) of one completion per prompt, for each task vector δ."""
    start = AdapterPart.put(init)
    seeds = [derive_seed(config.seed, "merge", n) for n in range(len(prompts))]
    requests = [
        Request([p.token_ids for p in prompts], seeds, Adapter(start, AdapterPart.put(vector)))
        for vector in vectors
    ]

    def measure() -> list[list[float]]:
        refs = []
        for request, rollouts in zip(requests, sample(session, requests), strict=True):
            actor = session.next_policy().actor
            refs.append(
                actor.kl.remote(
                    request.adapter, request.prompts, *rollouts, reference=Adapter(start)
                )
            )
        kls: list[list[float]] = session.get(refs)
        return kls

    kls: list[list[float]] = session.persist(measure)
    return kls
