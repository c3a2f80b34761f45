"""The Ray actor that shares R rollout workers among all policies and the evaluation."""

import asyncio
import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.exceptions import RayActorError

from raywarp.cluster import faults
from raywarp.cluster.health import Process
from raywarp.rollout.proof import Proof
from raywarp.rollout.protocol import Request, RolloutError

NOBODY = -1  # stands in the queue of idle workers when all of them are lost for good


@dataclass(frozen=True)
class PoolReport:
    """What the workers have done since the last reset.

    busy: share of the workers' time that was work. restarts: how often one had died and was started
    again (ever).
    """

    workers: int
    busy: float
    restarts: int


@dataclass(frozen=True)
class PoolHealth:
    """in_flight: seconds that a worker's present call has taken. down: seconds since a worker died.
    events: since the last answer.
    """

    process: Process
    in_flight: dict[int, float]
    down: dict[int, float]
    events: list[dict[str, Any]]


class RolloutPool:
    """An asynchronous actor that hands each call to the next idle worker, first come, first served.

    A worker that dies is started again by Ray, where there is room, and idle again when its engine
    is; the call that it died of goes to whichever worker is idle next, since a call depends on
    nothing but itself. The pool holds only counters: Ray may start it again, too.

    Args:
        workers: handles, or the actors' names (Ray complains of handles where the pool itself may
            be started again).
        max_failures: deaths that one call may cost, and attempts to start a worker's engine again.
    """

    def __init__(self, workers: Sequence[Any], max_failures: int = 3):
        self.names = [worker if isinstance(worker, str) else "" for worker in workers]
        self.workers = [
            ray.get_actor(worker) if isinstance(worker, str) else worker for worker in workers
        ]
        self.max_failures = max_failures
        self.idle: asyncio.Queue[int] = asyncio.Queue()
        for index in range(len(workers)):
            self.idle.put_nowait(index)
        self.busy_seconds, self.start = 0.0, time.monotonic()
        self.restarts, self.done = 0, 0
        self.processes: dict[int, Process] = {}
        self.in_flight: dict[int, float] = {}
        self.down: dict[int, float] = {}
        self.gone: dict[int, str] = {}
        self.events: list[dict[str, Any]] = []
        self.revivals: set[asyncio.Task[None]] = set()
        self.proof: Proof | None = None

    async def generate(self, requests: Sequence[Request]) -> Any:
        """The Rollouts of one call, a list (or, where num_returns is 1, the Rollout itself).

        Raises:
            RolloutError: workers died of this call again and again, or none is left.
            EffectError: the worker had been started again, and does not run the trainer's policies.
        """
        rollouts = [
            replace(rollout, pool_busy=self._busy())
            for rollout in await self._call("generate", requests)
        ]
        return rollouts if len(requests) > 1 else rollouts[0]

    async def logprobs(self, requests: Sequence[Request]) -> list[list[tuple[float, ...]]]:
        """What Engine.logprobs of the next idle worker says. Raises as `generate` does."""
        scores: list[list[tuple[float, ...]]] = await self._call("logprobs", requests)
        return scores

    async def _call(self, method: str, requests: Sequence[Request]) -> Any:
        failures = faults.Failures(self.max_failures)
        while True:
            index = await self._next_worker()
            self.in_flight[index] = start = time.monotonic()
            try:
                process, answer = await getattr(self.workers[index], method).remote(requests)
                seconds = (
                    time.monotonic() - start
                    if method == "logprobs"
                    else sum(rollout.seconds for rollout in answer)
                )
                if process.follows(self.processes.get(index)):
                    await self._prove(index)
                break
            except RayActorError as error:
                self._lost(index, error)
                if not failures.again():
                    raise RolloutError(_died_again(index, failures.count, error)) from None
                await asyncio.sleep(failures.pause())
            except BaseException:
                self.idle.put_nowait(index)
                raise
            finally:
                del self.in_flight[index]
        self.idle.put_nowait(index)
        self.done += 1
        self.busy_seconds += seconds
        if process.follows(
            known := self.processes.get(index)
        ):  # it died between two calls; this one loaded its engine
            self._tell(
                "fault",
                index,
                cause=faults.KILLED,
                message="its process is a new one",
                process=known,
            )
            self._recovered(index, time.monotonic() - start - seconds)
        self.processes[index] = process
        return answer

    async def know(self, processes: Sequence[Process]) -> None:
        """The workers' first processes, so that a death before the first call is seen, too."""
        for index, process in enumerate(processes):
            self.processes.setdefault(index, process)

    async def prove_with(self, proof: Proof) -> None:
        """From now on a worker that was started again has to pass this before it gets work, or what
        it has done is handed on.
        """
        self.proof = proof

    async def reset(self) -> None:
        """Start counting anew."""
        self.busy_seconds, self.start = 0.0, time.monotonic()

    async def report(self) -> PoolReport:
        return PoolReport(len(self.workers), self._busy(), self.restarts)

    async def pulse(self) -> PoolHealth:
        """How the workers are; what happened to them is told once."""
        now, events, self.events = time.monotonic(), self.events, []
        in_flight, down = (
            {index: now - since for index, since in times.items()}
            for times in (self.in_flight, self.down)
        )
        return PoolHealth(Process.here(done=self.done), in_flight, down, events)

    async def _next_worker(self) -> int:
        index = await self.idle.get()
        if index == NOBODY:
            self.idle.put_nowait(NOBODY)  # for whoever else waits
            raise RolloutError("; ".join(self.gone.values()))
        return index

    def _lost(self, index: int, error: RayActorError) -> None:
        known = self.processes.pop(index, None)
        self._tell(
            "fault",
            index,
            cause=faults.kind_of(error),
            message=faults.explain(error),
            process=known,
        )
        self.down[index] = time.monotonic()
        task = asyncio.get_running_loop().create_task(self._revive(index))
        self.revivals.add(task)
        task.add_done_callback(self.revivals.discard)

    async def _revive(self, index: int) -> None:
        """Wait until Ray has started the worker again and its engine is loaded: for as long as
        there is no room, too.
        """
        failures = faults.Failures(self.max_failures)
        while True:
            try:
                started = await self.workers[index].start.remote()
                await self._prove(index)
                break
            except Exception as error:
                if not faults.is_restarting(error) and not (
                    faults.is_survivable(error) and failures.again()
                ):
                    return self._give_up(index, error)
                await asyncio.sleep(failures.pause() or 0.5)
                if self.names[index]:
                    with contextlib.suppress(
                        ValueError
                    ):  # there is none of that name for a moment, where another one takes its place
                        self.workers[index] = ray.get_actor(self.names[index])
        self.processes[index] = started["process"]
        self._recovered(index, time.monotonic() - self.down.pop(index))
        self.idle.put_nowait(index)

    async def _prove(self, index: int) -> None:
        if self.proof:
            _, answers = await self.workers[index].logprobs.remote(self.proof.requests())
            self.proof.examine(answers, index + 1)

    def _give_up(self, index: int, error: Exception) -> None:
        del self.down[index]  # it is waited for no more
        self.gone[index] = (
            f"rollout worker {index + 1} cannot be started again: {faults.explain(error)}"
        )
        self._tell("lost", index, cause=faults.kind_of(error), message=faults.explain(error))
        if len(self.gone) == len(self.workers):
            self.idle.put_nowait(NOBODY)

    def _recovered(self, index: int, seconds: float) -> None:
        self.restarts += 1
        self._tell("recovered", index, seconds_lost=seconds)

    def _tell(self, event: str, index: int, **details: Any) -> None:
        self.events.append({"event": event, "what": f"rollout worker {index + 1}", **details})

    def _busy(self) -> float:
        return self.busy_seconds / (len(self.workers) * max(time.monotonic() - self.start, 1e-9))


def _died_again(index: int, deaths: int, error: RayActorError) -> str:
    return (
        f"rollout worker {index + 1} died again and again ({deaths} deaths in one call); is there"
        " too little memory for it (rollout.kv_cache_gib, rollout.gpu_memory_utilization)?"
        f" {faults.explain(error)}"
    )
