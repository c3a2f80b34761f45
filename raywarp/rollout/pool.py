"""The Ray actor that shares R rollout workers among all policies and the evaluation."""

import asyncio
import contextlib
import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, NamedTuple, TypeVar

import ray
from ray.exceptions import RayActorError

from raywarp.cluster import faults
from raywarp.cluster.health import Process
from raywarp.rollout.proof import Proof
from raywarp.rollout.protocol import Request, RolloutError

T = TypeVar("T")


@dataclass(frozen=True)
class Answer(Generic[T]):
    """A worker's answer to one call.

    Attributes:
        process: the worker's.
        seconds: that its engine has worked since its last answer, on any call.
        found: what was asked for.
    """

    process: Process
    seconds: float
    found: T


class Seat(NamedTuple):
    """The right to one call at a worker.

    Attributes:
        worker: its index; NOBODY where all workers are lost for good.
        life: the worker's deaths so far. Seats of an earlier life are void.
    """

    worker: int
    life: int


NOBODY = -1


@dataclass(frozen=True)
class PoolReport:
    """What the workers have done since the last reset.

    Attributes:
        workers: how many there are.
        busy: share of the workers' time that was work.
        restarts: how often a worker died and was started again, since the pool started.
    """

    workers: int
    busy: float
    restarts: int


@dataclass(frozen=True)
class PoolHealth:
    """How the workers are.

    Attributes:
        process: the pool's own.
        in_flight: worker's index → seconds that its oldest call has taken.
        down: worker's index → seconds since it died.
        processes: worker's index → its process at its last answer.
        events: since the last answer.
    """

    process: Process
    in_flight: dict[int, float]
    down: dict[int, float]
    processes: dict[int, Process]
    events: list[dict[str, Any]]


class RolloutPool:
    """An asynchronous actor that hands each call to the next free worker, first come, first served.

    When a worker dies, Ray restarts it once there is room. It becomes free when its engine is
    loaded. The calls that failed go to the next free worker, since a call depends on nothing
    outside itself. The pool holds only counters, so Ray may restart the pool too.

    Args:
        workers: handles or names of the actors. Ray complains about handles where the pool itself
            may be restarted.
        max_failures: deaths allowed in one call, and attempts to restart a worker's engine.
        concurrency: calls that a worker works on at once.
    """

    def __init__(self, workers: Sequence[Any], max_failures: int = 3, concurrency: int = 1):
        self.names = [worker if isinstance(worker, str) else "" for worker in workers]
        self.workers = [
            ray.get_actor(worker) if isinstance(worker, str) else worker for worker in workers
        ]
        self.max_failures, self.concurrency = max_failures, concurrency
        self.lives = [0] * len(workers)
        self.free: asyncio.Queue[Seat] = asyncio.Queue()
        for _ in range(concurrency):
            for index in range(len(workers)):
                self.free.put_nowait(Seat(index, 0))
        self.busy_seconds, self.start = 0.0, time.monotonic()
        self.restarts, self.done = 0, 0
        self.processes: dict[int, Process] = {}
        self.checks = [asyncio.Lock() for _ in workers]
        self.numbers = itertools.count()
        self.in_flight: dict[int, tuple[int, float]] = {}  # call → its worker and its start
        self.down: dict[int, float] = {}
        self.gone: dict[int, str] = {}
        self.events: list[dict[str, Any]] = []
        self.revivals: set[asyncio.Task[None]] = set()
        self.proof: Proof | None = None

    async def generate(self, requests: Sequence[Request]) -> Any:
        """Return the Rollouts of one call: a list, or the Rollout itself where num_returns is 1.

        Raises:
            RolloutError: workers died repeatedly in this call, or none is left.
            EffectError: the worker was restarted and does not run the trainer's policies.
        """
        rollouts = [
            replace(rollout, pool_busy=self._busy())
            for rollout in await self._call("generate", requests)
        ]
        return rollouts if len(requests) > 1 else rollouts[0]

    async def logprobs(self, requests: Sequence[Request]) -> list[list[tuple[float, ...]]]:
        """Return what Engine.logprobs of the next free worker returns.

        Raises as `generate` does.
        """
        scores: list[list[tuple[float, ...]]] = await self._call("logprobs", requests)
        return scores

    async def _call(self, method: str, requests: Sequence[Request]) -> Any:
        failures = faults.Failures(self.max_failures)
        while True:
            seat = await self._next_seat()
            call, start = next(self.numbers), time.monotonic()
            self.in_flight[call] = seat.worker, start
            try:
                answer = await getattr(self.workers[seat.worker], method).remote(requests)
                await self._check(seat.worker, answer, start)
                break
            except (RayActorError, faults.BrokenProcessError) as error:
                self._lost(seat, error)
                if not failures.again():
                    raise RolloutError(_died_again(seat.worker, failures.count, error)) from None
                await asyncio.sleep(failures.pause())
            except BaseException:
                self.free.put_nowait(seat)
                raise
            finally:
                del self.in_flight[call]
        self.free.put_nowait(seat)
        self.done += 1
        self.busy_seconds += answer.seconds
        return answer.found

    async def _check(self, index: int, answer: Answer[Any], start: float) -> None:
        """Prove a worker that died between two calls, if this call has loaded its engine."""
        async with self.checks[index]:
            known = self.processes.get(index)
            if answer.process.follows(known):
                await self._prove(index)
                self._tell(
                    "fault",
                    index,
                    cause=faults.KILLED,
                    message="its process is a new one",
                    process=known,
                )
                self._recovered(index, time.monotonic() - start - answer.seconds)
            self.processes[index] = answer.process

    async def know(self, processes: Mapping[int, Process]) -> None:
        """Record the workers' processes, so that a death before the next call is noticed."""
        self.processes = {**processes, **self.processes}

    async def prove_with(self, proof: Proof) -> None:
        """Set the proof that a restarted worker has to pass.

        From now on it passes the proof before it gets work, or before its results are handed on.
        """
        self.proof = proof

    async def reset(self) -> None:
        """Reset the counters."""
        self.busy_seconds, self.start = 0.0, time.monotonic()

    async def report(self) -> PoolReport:
        return PoolReport(len(self.workers), self._busy(), self.restarts)

    async def pulse(self) -> PoolHealth:
        """Return how the workers are. Each event is reported once."""
        now, events, self.events = time.monotonic(), self.events, []
        in_flight = {index: now - since for index, since in reversed(self.in_flight.values())}
        down = {index: now - since for index, since in self.down.items()}
        return PoolHealth(Process.here(done=self.done), in_flight, down, self.processes, events)

    async def _next_seat(self) -> Seat:
        while True:
            seat = await self.free.get()
            if seat.worker == NOBODY:
                self.free.put_nowait(seat)  # for the other calls that wait
                raise RolloutError("; ".join(self.gone.values()))
            if seat.life == self.lives[seat.worker]:
                return seat

    def _lost(self, seat: Seat, error: Exception) -> None:
        """Renew a worker, unless another of its calls has seen this death."""
        index = seat.worker
        if seat.life != self.lives[index]:
            return
        self.lives[index] += 1
        known = self.processes.pop(index, None)
        self._tell(
            "fault",
            index,
            cause=faults.kind_of(error),
            message=faults.explain(error),
            process=known,
        )
        self.down[index] = time.monotonic()
        task = asyncio.get_running_loop().create_task(self._revive(index, error))
        self.revivals.add(task)
        task.add_done_callback(self.revivals.discard)

    async def _revive(self, index: int, error: Exception) -> None:
        """Wait until Ray has restarted the worker and its engine is loaded.

        This includes the time until there is room for it.
        """
        failures = faults.Failures(self.max_failures)
        while True:
            if isinstance(error, faults.BrokenProcessError):
                await self._end(index)
            try:
                started = await self.workers[index].start.remote()
                await self._prove(index)
                break
            except Exception as problem:
                error = problem
            if not faults.is_restarting(error) and not (
                faults.is_survivable(error) and failures.again()
            ):
                return self._give_up(index, error)
            await asyncio.sleep(failures.pause() or 0.5)
            if self.names[index]:
                # While a new actor takes its place, no actor has that name for a moment.
                with contextlib.suppress(ValueError):
                    self.workers[index] = ray.get_actor(self.names[index])
        self.processes[index] = started["process"]
        self._recovered(index, time.monotonic() - self.down.pop(index))
        for _ in range(self.concurrency):
            self.free.put_nowait(Seat(index, self.lives[index]))

    async def _end(self, index: int) -> None:
        """End a worker's process, which Ray then restarts."""
        with contextlib.suppress(RayActorError):
            await self.workers[index].end.remote()

    async def _prove(self, index: int) -> None:
        if self.proof:
            answer = await self.workers[index].logprobs.remote(self.proof.requests())
            self.proof.examine(answer.found, index + 1)

    def _give_up(self, index: int, error: Exception) -> None:
        del self.down[index]  # the pool no longer waits for it
        self.gone[index] = (
            f"rollout worker {index + 1} cannot be started again: {faults.explain(error)}"
        )
        self._tell("lost", index, cause=faults.kind_of(error), message=faults.explain(error))
        if len(self.gone) == len(self.workers):
            self.free.put_nowait(Seat(NOBODY, 0))

    def _recovered(self, index: int, seconds: float) -> None:
        self.restarts += 1
        self._tell("recovered", index, seconds_lost=seconds)

    def _tell(self, event: str, index: int, **details: Any) -> None:
        self.events.append({"event": event, "what": f"rollout worker {index + 1}", **details})

    def _busy(self) -> float:
        return self.busy_seconds / (len(self.workers) * max(time.monotonic() - self.start, 1e-9))


def _died_again(index: int, deaths: int, error: Exception) -> str:
    return (
        f"rollout worker {index + 1} died again and again ({deaths} deaths in one call); is there"
        " too little memory for it (rollout.kv_cache_gib, rollout.gpu_memory_utilization)?"
        f" {faults.explain(error)}"
    )
