"""Which processes of a run are there, and which do not answer or do not get on.

An actor is asked for its pulse by a method of the concurrency group "watch", so that it answers while it works. Waiting is no hang: an
actor hangs when it does not answer, or works at one thing for `cluster.hang_seconds`; so does a run in which everybody waits for so long.
"""

import contextlib
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.placement_group import PlacementGroup

from raywarp.cluster import faults, out_of_memory, placement_groups

GROUP = "watch"
START_SECONDS = 300.0  # in which a process that is new may be silent: it imports, and loads a model
QUESTION_SECONDS = 1.0  # seconds from an answer to the next question
STACK_SECONDS = 5.0  # in which a process that still runs Python tells its stack
DEATH_SECONDS = 30.0  # in which Ray notices that it has killed a process that does not react
Report = Callable[..., None]


@dataclass(frozen=True)
class Process:
    """Where an actor lives: its process and node.

    working: seconds that it has been at one piece of work, 0 while it waits for others. done: calls that this process has finished.
    busy: whether it is at work, also at what may take as long as it likes. kernel_kills: on its machine, for want of memory.
    """

    id: int
    node: str
    working: float = 0.0
    done: int = 0
    busy: bool = False
    kernel_kills: int = 0

    @classmethod
    def here(cls, working_since: float | None = None, done: int = 0, busy: bool = False) -> "Process":
        working = max(0.0, time.monotonic() - working_since) if working_since is not None else 0.0
        busy = busy or working_since is not None
        return cls(os.getpid(), ray.get_runtime_context().get_node_id(), working, done, busy, out_of_memory.kernel_kills())

    def follows(self, other: "Process | None") -> bool:
        """Whether it is there in another one's place. The same number on another node is another process: each container has its own."""
        return other is not None and (self.id, self.node) != (other.id, other.node)


def cause_of_death(kind: str, process: Process | None) -> str:
    """A closer word for what an error says (faults.kind_of), from what else is known.

    Args:
        process: what it last told of itself, if it has.
    """
    if kind == faults.OUT_OF_MEMORY or process is None:
        return kind
    if faults.node_lost(process.node):
        return faults.NODE_LOST
    killed = kind == faults.KILLED and out_of_memory.explains(process.id, process.node, process.kernel_kills)
    return faults.OUT_OF_MEMORY if killed else kind


class Work:
    """What an actor is at: used as `with self.work:`; `busy` meanwhile."""

    def __init__(self) -> None:
        self.busy = False

    def __enter__(self) -> None:
        self.busy = True

    def __exit__(self, *_: object) -> None:
        self.busy = False


class Pulse:
    """Asks one actor, again and again, and never waits for the answer.

    Args:
        ask: sends the question; the ref of the answer.

    silent: seconds for which the question has had no answer.
    """

    def __init__(self, ask: Callable[[], Any]):
        self.ask, self.ref, self.due = ask, None, 0.0
        self.silent, self.polled = 0.0, 0.0
        self.answered = False

    def poll(self) -> Any:
        """An answer that has come since, else None. Raises RayError where the actor is dead or being started again."""
        now = time.monotonic()
        self.silent += min(now - self.polled, QUESTION_SECONDS)  # if this process was stopped meanwhile, the other one may have been, too
        self.polled = now
        if self.ref is None:
            if now >= self.due:
                self.ref, self.silent = self.ask(), 0.0
            return None
        if not ray.wait([self.ref], timeout=0)[0]:
            return None
        ref, self.ref, self.due, self.silent = self.ref, None, now + QUESTION_SECONDS, 0.0
        self.answered = False
        answer = ray.get(ref)
        self.answered = True
        return answer

    def hangs(self, seconds: float) -> bool:
        """Whether it has been silent for so long; a process that has not answered yet may take its time."""
        return self.silent > (seconds if self.answered else max(seconds, START_SECONDS))

    def forget(self, pause: float = 0.0) -> None:
        """Drop the question; the next one is asked after the pause."""
        self.ref, self.due, self.silent, self.answered = None, time.monotonic() + pause, 0.0, False


class Standstill:
    """Everybody waits, and nobody works: Ray may lose a call while an actor is started again.

    seconds: for which that has been seen.
    """

    def __init__(self) -> None:
        self.over()

    def over(self) -> None:
        """Something has happened."""
        self.seconds, self.seen = 0.0, time.monotonic()

    def lasts(self, at_work: bool, seconds: float) -> bool:
        """Whether it has lasted for so long, after another look."""
        now = time.monotonic()
        self.seconds = 0.0 if at_work else self.seconds + min(now - self.seen, QUESTION_SECONDS)  # see Pulse.poll
        self.seen = now
        return self.seconds > seconds


@dataclass
class SupervisedActor:
    """An actor that Ray itself starts again: the pool, or a reward worker. Its deaths and its silence are noticed and reported.

    max_failures: deaths in a row, without a finished call in between, that do not end the run.
    groups: placement groups of which at least one has to be on a node. longest_wait: seconds without, after which the run ends.
    at_work: whether it was, when it was last heard; also while it is away. ended: its process has been killed by us, and does not count
    as back, whatever it still answers.
    """

    name: str
    actor: Any
    hang_seconds: float
    report: Report
    max_failures: int = 3
    groups: Sequence[PlacementGroup | None] = ()
    longest_wait: float = 120.0
    at_work: bool = True
    process: Process | None = None
    down_since: float | None = None
    ended: bool = False
    heard: float = 0.0
    pulse: Pulse = field(init=False)
    failures: faults.Failures = field(init=False)

    def __post_init__(self) -> None:
        self.failures = faults.Failures(self.max_failures)
        self.pulse = Pulse(lambda: self.actor.pulse.options(max_task_retries=0).remote())

    def check(self) -> Any:
        """The answer to the last question, if there is a new one."""
        try:
            answer = self.pulse.poll()
        except RayError as error:
            if self.down_since is None:
                self._died(cause_of_death(faults.kind_of(error), self.process), faults.explain(error), time.monotonic())
            self._check_room(self.name, time.monotonic() - (self.down_since or time.monotonic()))
            return None
        if answer is not None:
            self._answered(answer.process if hasattr(answer, "process") else answer)
        elif self.pulse.hangs(self.hang_seconds):
            self.report("hang", what=self.name, cause=faults.HANG, message=f"no answer for {self.pulse.silent:.0f} s; started again")
            restart(self.actor)
            self.pulse.forget(QUESTION_SECONDS)
            self.ended = True
            self._died(faults.HANG, "did not answer", time.monotonic())
        return answer

    def last_check(self, seconds: float) -> None:
        """Have told what has happened since the last answer, within that time."""
        deadline = time.monotonic() + seconds
        for _ in range(2):  # a question may be under way that was asked too early
            self.pulse.due = 0.0
            while self.check() is None and time.monotonic() < deadline:
                time.sleep(0.02)

    def _check_room(self, what: str, seconds: float) -> None:
        """Raises FaultError where it has been away for too long because no node has room for it."""
        if self.groups and not any(map(placement_groups.is_found, self.groups)) and seconds > self.longest_wait:
            raise faults.FaultError(
                f"there has been no room for the {what} for {seconds:.0f} s after a loss: {placement_groups.lack()}; add nodes, lower "
                "cluster.cpus_per_* or cluster.gpus_per_* of its kind, or raise cluster.timeout_seconds; the same command continues"
            )

    def _died(self, cause: str, message: str, since: float) -> None:
        self.down_since, self.at_work = since, True
        self.report("fault", what=self.name, cause=cause, message=message)
        if not self.failures.again():
            raise faults.FaultError(
                f"the {self.name} died {self.failures.count} times without finishing a call ({cause}: {message}); "
                f"cluster.max_failures={self.max_failures}; what was saved is kept, and the same command continues"
            )

    def _answered(self, process: Process) -> None:
        if self.down_since is None and process.follows(self.process):  # it died between two questions
            self._died(cause_of_death(faults.KILLED, self.process), "its process is a new one", self.heard)
        if self.down_since is not None and (not self.ended or self.process is None or process.follows(self.process)):
            self.report("recovered", what=self.name, seconds_lost=time.monotonic() - self.down_since)
            self.down_since, self.ended = None, False
        if self.down_since is None:
            if process.done:
                self.failures.progressed()
            self.at_work = process.busy or self.process is None or process.done != self.process.done
            self.process, self.heard = process, time.monotonic()


@dataclass
class SupervisedPool(SupervisedActor):
    """The pool, and through it the rollout workers: what it tells of their deaths, and which of their calls do not end.

    again: another worker in the place of one that has been without room for longest_wait.
    """

    workers: list[Any] = field(default_factory=list)
    again: Callable[[int], Any] = lambda index: None
    killed: dict[int, float] = field(default_factory=dict)
    down: dict[int, float] = field(default_factory=dict)

    def check(self) -> Any:
        health = super().check()
        if health is None:
            return None
        for event in health.events:
            if event["event"] == "fault":
                process, hung = event.pop("process"), event["what"] in map(_worker, self.killed)
                event["cause"] = faults.HANG if hung else cause_of_death(event["cause"], process)
            self.report(**event)
        now, self.down = time.monotonic(), health.down
        self.at_work |= bool(health.in_flight or health.down)
        self.killed = {index: since for index, since in self.killed.items() if now - since < DEATH_SECONDS}
        for index, seconds in health.in_flight.items():
            if seconds > self.hang_seconds and index not in self.killed and not (seconds < START_SECONDS and loads(self.workers[index])):
                text = f"its call has not ended for {seconds:.0f} s; started again. It was at\n{stack_of(self.workers[index])}"
                self.report("hang", what=_worker(index), cause=faults.HANG, message=text)
                restart(self.workers[index])
                self.killed[index] = now
        if len(self.down) == len(self.workers):
            self._check_room("rollout worker", min(self.down.values()))
        for index, seconds in self.down.items():
            if (
                not placement_groups.is_found(self.groups[index])
                and seconds > self.longest_wait
                and placement_groups.lost_node(self.groups[index])
            ):
                self.workers[index] = self.again(index)
        return health


def _worker(index: int) -> str:
    return f"rollout worker {index + 1}"


def loads(worker: Any) -> bool:
    """Whether a rollout worker is alive and starts its engine: in a call, if it took another's place before that."""
    with contextlib.suppress(RayError):
        return bool(ray.get(worker.loads.options(max_task_retries=0).remote(), timeout=STACK_SECONDS))
    return False


def stack_of(actor: Any) -> str:
    """Where an actor is that has a method `stack` in the group "watch"; or why it does not say so."""
    try:
        stack: str = ray.get(actor.stack.options(max_task_retries=0).remote(), timeout=STACK_SECONDS)
    except GetTimeoutError:
        return "an unknown place: its process does not answer"
    except RayError as error:
        return f"an unknown place: {faults.explain(error)}"
    return stack


def stack_here(thread: int) -> str:
    """Where a thread of this process is."""
    frame = sys._current_frames().get(thread)
    return "".join(traceback.format_stack(frame)) if frame else "no work"


def restart(actor: Any) -> None:
    """Kill an actor that Ray then starts again."""
    with contextlib.suppress(RayError):
        ray.kill(actor, no_restart=False)
