"""Completions of several adapters on the same prompts, by the session's pool."""

from collections.abc import Sequence
from typing import Any

from raywarp.rollout.protocol import Request, submit
from raywarp.training.session import Session


def sample(session: Session, requests: Sequence[Request]) -> list[list[Any]]:
    """Ask the pool for the completions of requests with equally many prompts, without waiting.

    If the engine can mix adapters, each of its calls has all adapters and a share of the prompts.
    Otherwise a call has one adapter.

    Returns:
        for each request, the refs of its Rollouts in the order of its prompts.
    """
    mixes = session.engine["adapter"] == "lora"
    chunk = session.chunk if mixes else session.config.rollout.chunk_size
    return submit(session.pool, requests, chunk, together=mixes)
