"""The rollout protocol: what the pool of R engines is asked, and what it answers.

All policies and the evaluation share the pool. A request names the version of the adapter to
sample from. A worker answers with the digests of the tensors that its engine took, and the caller
compares them with its own (see `join`). So a stale or mixed-up adapter cannot go unnoticed.

**Calls and workers.** A batch is one call to one engine, that of the next idle worker. It is not
spread over all engines, for two reasons:

- The last bits of an engine's results depend on which sequences it computes together. A batch cut
  by the number of workers would give a different policy for every R.
- One call costs one swap of adapters instead of R.

With at least two policies per worker, no worker idles. With fewer policies than workers, set
`rollout.chunk_size`, which cuts a batch in the same places for every R.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import ray

from raywarp.data.text import Completion

# torch is imported only where an adapter is put or fetched. The pool does neither, and so saves
# the import's time and memory.
if TYPE_CHECKING:
    import torch

    from raywarp.algorithm.deltas import AdapterDelta
    from raywarp.rollout.transport import PackedAdapter

_HASHER = ThreadPoolExecutor(1, thread_name_prefix="hash")


class RolloutError(RuntimeError):
    """A worker did not do what it was asked; the message names worker and adapter."""


@dataclass(frozen=True)
class AdapterPart:
    """One summand of an adapter on its way to the workers.

    Attributes:
        version: a new one for each put.
        rank: of the content.
        ref: the content in the object store.
        hashed: the future digest; it stays with the process that put the part.
    """

    version: str
    rank: int
    # ray.ObjectRef[PackedAdapter]. Inside a dataclass, Ray does not fetch it before it is needed.
    ref: Any
    hashed: "Future[str] | None" = field(default=None, compare=False)

    @classmethod
    def put(cls, delta: "AdapterDelta", dtype: "torch.dtype | None" = None) -> "AdapterPart":
        """Put an adapter into the object store.

        Args:
            dtype: of its numbers there, by default the adapter's own. An engine rounds an adapter
                to its own dtype anyway.
        """
        from raywarp.rollout.transport import PackedAdapter

        packed = PackedAdapter.pack(delta, dtype)
        # Takes 10 ms for 20 MB, during which the adapter is already on its way.
        hashed = _HASHER.submit(packed.digest)
        ref = ray.put(packed)
        return cls(ref.hex(), delta.rank, ref, hashed)

    def __reduce__(self) -> tuple[Any, ...]:
        return AdapterPart, (self.version, self.rank, self.ref)

    @property
    def digest(self) -> str:
        """The digest of the content as it was put.

        A process that received this part has no such digest, and computes it from the content.
        """
        from raywarp.rollout.transport import digest

        return self.hashed.result() if self.hashed else digest(self.fetch())

    def fetch(self) -> "AdapterDelta":
        """Return the adapter. Its tensors are read-only, since they lie in the object store."""
        packed: PackedAdapter = ray.get(self.ref)
        return packed.unpack()


@dataclass(frozen=True)
class Adapter:
    """What to sample from: SFT model + init + policy.

    Engines hold all parts beside the weights, each at its own rank.

    Attributes:
        init: the iteration's θ_init.
        policy: the change on top of it.
        start: the SFT adapter, which a worker with one puts before both.
    """

    init: AdapterPart | None = None
    policy: AdapterPart | None = None
    start: AdapterPart | None = None

    @property
    def parts(self) -> tuple[AdapterPart, ...]:
        return tuple(part for part in (self.start, self.init, self.policy) if part)

    @property
    def versions(self) -> tuple[str, ...]:
        return tuple(part.version for part in self.parts)

    @property
    def digests(self) -> tuple[str, ...]:
        return tuple(part.digest for part in self.parts)


SFT = Adapter()


@dataclass(frozen=True)
class Request:
    """One completion per prompt from one adapter.

    Attributes:
        prompts: token ids of each prompt.
        seeds: one for each prompt's sampling. Repeating a call gives the same completions.
        adapter: what to sample from.
    """

    prompts: Sequence[Sequence[int]]
    seeds: Sequence[int]
    adapter: Adapter = SFT

    def cut(self, size: int) -> list["Request"]:
        """Return requests of at most `size` prompts, in order."""
        starts = range(0, len(self.prompts), size)
        return [
            Request(self.prompts[n : n + size], self.seeds[n : n + size], self.adapter)
            for n in starts
        ]


@dataclass(frozen=True)
class Rollout:
    """A worker's answer to one request.

    Attributes:
        completions: in the order of the prompts.
        digests: of the adapter's parts as the engine took them.
        worker: its number, counted from 1.
        seconds: that the worker spent on the request.
        swap_seconds: the part of them spent on loading the adapter.
        pool_busy: share of all workers' time that was work, in this iteration so far.
        ended: when the worker finished, in Unix seconds.
    """

    completions: list[Completion]
    digests: tuple[str, ...]
    worker: int = 1
    seconds: float = 0.0
    swap_seconds: float = 0.0
    pool_busy: float = 0.0
    ended: float = 0.0


class Scores(list[float]):
    """One number per completion.

    Attributes:
        span: when a process computed them: start and end in Unix seconds.
        who: the process's name in a timeline.
        parts: of a total, the scores that it is made of, by name. NaN: there is no score.
    """

    span: tuple[float, float] | None = None
    who: str = ""
    parts: "Mapping[str, Scores]" = MappingProxyType({})


def submit(
    pool: Any, requests: Sequence[Request], chunk: int | None = None, together: bool = False
) -> list[list[Any]]:
    """Request completions without waiting for them.

    Args:
        pool: handle of the RolloutPool.
        requests: what to sample.
        chunk: the largest number of prompts per call; None leaves each request whole.
        together: whether the requests share their calls, where the engine can mix adapters. They
            must have the same number of prompts.

    Returns:
        for each request, the refs of its Rollouts in the order of its prompts.
    """
    cut = [request.cut(chunk or max(len(request.prompts), 1)) for request in requests]
    if not together:
        return [[pool.generate.remote([part]) for part in parts] for parts in cut]
    calls = [
        pool.generate.options(num_returns=len(call)).remote(call) for call in zip(*cut, strict=True)
    ]
    refs = calls if len(requests) > 1 else [[call] for call in calls]
    return [list(of_request) for of_request in zip(*refs, strict=True)]


def join(rollouts: Sequence[Rollout], adapter: Adapter) -> list[Completion]:
    """Return all completions of a request, after checking which adapter every worker sampled from.

    Raises:
        RolloutError: a worker's engine held another version.
    """
    digests = adapter.digests
    for rollout in rollouts:
        if rollout.digests != digests:
            held, meant = _short_digests(rollout.digests), _short_digests(digests)
            raise RolloutError(
                f"rollout worker {rollout.worker} sampled from adapter version {held} instead of"
                f" {meant}"
            )
    return [completion for rollout in rollouts for completion in rollout.completions]


def _short_digests(digests: Sequence[str]) -> str:
    return "+".join(d[:8] for d in digests) or "none"
