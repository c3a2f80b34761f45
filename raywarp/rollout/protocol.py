"""What the rollout pool, R engines that all policies and the evaluation share, is asked and
answers.

A request names the version of the adapter that it wants sampled; a worker answers with the digests
of the tensors that its engine took, and whoever asked compares them with its own (see `join`), so a
stale or mixed-up adapter cannot go unnoticed.

**Calls and workers.** A batch is one call to one engine, that of the next idle worker, and not
spread over all of them: what an engine computes depends in its last bits on which sequences it
computes together, so a batch that is cut by the number of workers would give another policy for
every R. It also costs one swap of adapters, not R, and with at least two policies per worker nobody
idles. Fewer policies than workers want `rollout.chunk_size`, by which a batch is cut in the same
places whatever R is.
"""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import ray

from raywarp.data.text import Completion

# torch is imported where an adapter is put or fetched: the pool, which does neither, saves its
# seconds and megabytes
if TYPE_CHECKING:
    from raywarp.algorithm.deltas import AdapterDelta
    from raywarp.rollout.transport import PackedAdapter

_HASHER = ThreadPoolExecutor(1, thread_name_prefix="hash")


class RolloutError(RuntimeError):
    """A worker did not do what it was asked; the message names worker and adapter."""


@dataclass(frozen=True)
class AdapterPart:
    """One summand of an adapter on its way to the workers.

    version: another one for each put. rank: of the content. ref: to it. hashed: its digest to be;
    stays with whoever put it.
    """

    version: str
    rank: int
    # ray.ObjectRef[PackedAdapter]; inside a dataclass, so that Ray does not fetch it before it is
    # wanted
    ref: Any
    hashed: "Future[str] | None" = field(default=None, compare=False)

    @classmethod
    def put(cls, delta: "AdapterDelta") -> "AdapterPart":
        from raywarp.rollout.transport import PackedAdapter

        packed = PackedAdapter.pack(delta)
        hashed = _HASHER.submit(
            packed.digest
        )  # 10 ms for 20 MB, in which the adapter is on its way
        ref = ray.put(packed)
        return cls(ref.hex(), delta.rank, ref, hashed)

    def __reduce__(self) -> tuple[Any, ...]:
        return AdapterPart, (self.version, self.rank, self.ref)

    @property
    def digest(self) -> str:
        """Of the content as it was put; somebody to whom this was sent has to look at the content
        itself.
        """
        from raywarp.rollout.transport import digest

        return self.hashed.result() if self.hashed else digest(self.fetch())

    def fetch(self) -> "AdapterDelta":
        """The adapter, its tensors read-only: they lie in the object store."""
        packed: PackedAdapter = ray.get(self.ref)
        return packed.unpack()


@dataclass(frozen=True)
class Adapter:
    """What to sample from: base + init + policy; neither gives the SFT model.

    init: an iteration's θ_init. policy: the change on top of it. Engines hold both beside the
    weights, each at its own rank.
    """

    init: AdapterPart | None = None
    policy: AdapterPart | None = None

    @property
    def parts(self) -> tuple[AdapterPart, ...]:
        return tuple(part for part in (self.init, self.policy) if part is not None)

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

    prompts: token ids of each prompt.
    seeds: of each prompt's sampling; the same call gives the same completions again.
    """

    prompts: Sequence[Sequence[int]]
    seeds: Sequence[int]
    adapter: Adapter = SFT

    def cut(self, size: int) -> list["Request"]:
        """Requests of at most `size` prompts, in order."""
        starts = range(0, len(self.prompts), size)
        return [
            Request(self.prompts[n : n + size], self.seeds[n : n + size], self.adapter)
            for n in starts
        ]


@dataclass(frozen=True)
class Rollout:
    """A worker's answer to one request.

    completions: in the order of the prompts.
    digests: of the adapter's parts as the engine took them.
    worker: counted from 1.
    seconds: that the worker spent on it, of which swap_seconds on loading the adapter.
    pool_busy: share of all workers' time that was work, in this iteration so far.
    ended: when the worker had it, in Unix seconds.
    """

    completions: list[Completion]
    digests: tuple[str, ...]
    worker: int = 1
    seconds: float = 0.0
    swap_seconds: float = 0.0
    pool_busy: float = 0.0
    ended: float = 0.0


class Scores(list[float]):
    """One number per completion. span: when a process was at it, start and end in Unix seconds.
    who: its name in a time line.
    """

    span: tuple[float, float] | None = None
    who: str = ""


def work_of(
    rollouts: Sequence[Rollout], scores: Sequence[Scores]
) -> list[tuple[str, float, float]]:
    """Who worked on these, from when to when in Unix seconds."""
    pieces = [
        (f"rollout worker {rollout.worker}", rollout.ended - rollout.seconds, rollout.ended)
        for rollout in rollouts
    ]
    return pieces + [(one.who, *one.span) for one in scores if one.span]


def spans_of(pieces: Sequence[tuple[str, float, float]]) -> dict[str, list[list[float]]]:
    """By who it was; to a millisecond."""
    spans: dict[str, list[list[float]]] = {}
    for who, start, end in pieces:
        spans.setdefault(who, []).append([round(start, 3), round(end, 3)])
    return spans


def submit(
    pool: Any, requests: Sequence[Request], chunk: int | None = None, together: bool = False
) -> list[list[Any]]:
    """Ask for the requests' completions; nothing is waited for.

    Args:
        chunk: prompts per call at most; None leaves each request whole.
        together: the requests (of the same number of prompts) share their calls, where the engine
            can mix adapters.

    Returns:
        for each request the refs of its Rollouts, which one after another are in the order of its
        prompts.
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
    """All completions of a request, after checking that every worker sampled from the adapter that
    was meant.

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
