"""Supervised actors: those that Ray restarts, and the slots of policy actors."""

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayError

from raywarp.cluster import faults, health, placement_groups
from raywarp.cluster.health import (
    DEATH_SECONDS,
    QUESTION_SECONDS,
    STACK_SECONDS,
    START_SECONDS,
    Process,
    Pulse,
    Report,
    cause_of_death,
    stack_of,
)
from raywarp.cluster.placement_groups import Bundle


@dataclass
class SupervisedActor:
    """An actor that Ray restarts: the pool or a reward worker. Its deaths and hangs are reported.

    Attributes:
        max_failures: deaths in a row that do not end the run. A finished call resets the count.
        bundles: of which at least one has to be on a node.
        longest_wait: seconds without a node after which the run ends.
        at_work: whether it worked at its last answer. Also true while it is away.
        down_since: when it died, on the monotonic clock. None while it is alive.
        ended: its process was killed by us. It does not count as recovered, even if it still
            answers.
        heard: when it answered last, on the monotonic clock.
    """

    name: str
    actor: Any
    hang_seconds: float
    report: Report
    max_failures: int = 3
    bundles: Sequence[Bundle | None] = ()
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
        """Return the answer to the last question, if there is a new one.

        Raises:
            FaultError: it died too often, or no node has had room for it for too long.
        """
        try:
            answer = self.pulse.poll()
        except RayError as error:
            if self.down_since is None:
                self._died(
                    cause_of_death(faults.kind_of(error), self.process),
                    faults.explain(error),
                    time.monotonic(),
                )
            self._check_room(self.name, time.monotonic() - (self.down_since or time.monotonic()))
            return None
        if answer is not None:
            self._answered(answer.process if hasattr(answer, "process") else answer)
        elif self.pulse.hangs(self.hang_seconds):
            self.report(
                "hang",
                what=self.name,
                cause=faults.HANG,
                message=f"no answer for {self.pulse.silent:.0f} s; started again",
            )
            restart(self.actor)
            self.pulse.forget(QUESTION_SECONDS)
            self.ended = True
            self._died(faults.HANG, "did not answer", time.monotonic())
        return answer

    def last_check(self, seconds: float) -> None:
        """Report what has happened since the last answer, within this many seconds."""
        deadline = time.monotonic() + seconds
        for _ in range(2):  # an open question may have been asked too early
            self.pulse.due = 0.0
            while self.check() is None and time.monotonic() < deadline:
                time.sleep(0.02)

    def _check_room(self, what: str, seconds: float) -> None:
        """Raise FaultError if it has been away for too long because no node has room for it."""
        if (
            self.bundles
            and not any(map(placement_groups.is_found, self.bundles))
            and seconds > self.longest_wait
        ):
            raise faults.FaultError(
                f"there has been no room for the {what} for {seconds:.0f} s after a loss:"
                f" {placement_groups.lack()}; add nodes, lower cluster.cpus_per_* or"
                " cluster.gpus_per_* of its kind, or raise cluster.timeout_seconds; the same"
                " command continues"
            )

    def _died(self, cause: str, message: str, since: float) -> None:
        self.down_since, self.at_work = since, True
        self.report("fault", what=self.name, cause=cause, message=message)
        if not self.failures.again():
            raise faults.FaultError(
                f"the {self.name} died {self.failures.count} times without finishing a call"
                f" ({cause}: {message}); cluster.max_failures={self.max_failures}; what was saved"
                " is kept, and the same command continues"
            )

    def _answered(self, process: Process) -> None:
        # It died between two questions.
        if self.down_since is None and process.follows(self.process):
            self._died(
                cause_of_death(faults.KILLED, self.process), "its process is a new one", self.heard
            )
        if self.down_since is not None and (
            not self.ended or self.process is None or process.follows(self.process)
        ):
            self._recovered()
        if self.down_since is None:
            if process.done:
                self.failures.progressed()
            self.at_work = process.busy or self.process is None or process.done != self.process.done
            self.process, self.heard = process, time.monotonic()

    def _recovered(self) -> None:
        seconds = time.monotonic() - (self.down_since or time.monotonic())
        self.report("recovered", what=self.name, seconds_lost=seconds)
        self.down_since, self.ended = None, False


@dataclass
class SupervisedPool(SupervisedActor):
    """The pool and its rollout workers, whose deaths and endless calls the pool knows.

    Attributes:
        workers: handles of the rollout workers.
        remind: tells a restarted pool what it has forgotten; it gets `processes`.
        processes: that of each worker, by index, as the pool knew it last.
        killed: when the worker of each index was killed because it hung, on the monotonic clock.
        down: seconds for which the worker of each index has been away.
    """

    workers: list[Any] = field(default_factory=list)
    remind: Callable[[dict[int, Process]], None] = lambda processes: None
    processes: dict[int, Process] = field(default_factory=dict)
    killed: dict[int, float] = field(default_factory=dict)
    down: dict[int, float] = field(default_factory=dict)

    def check(self) -> Any:
        health = super().check()
        if health is None:
            return None
        self.processes |= health.processes
        for event in health.events:
            if event["event"] == "fault":
                process, hung = event.pop("process"), event["what"] in map(_worker, self.killed)
                event["cause"] = faults.HANG if hung else cause_of_death(event["cause"], process)
            self.report(**event)
        now, self.down = time.monotonic(), health.down
        self.at_work |= bool(health.in_flight or health.down)
        self.killed = {
            index: since for index, since in self.killed.items() if now - since < DEATH_SECONDS
        }
        for index, seconds in health.in_flight.items():
            if (
                seconds > self.hang_seconds
                and index not in self.killed
                and not (seconds < START_SECONDS and loads(self.workers[index]))
            ):
                text = (
                    f"its call has not ended for {seconds:.0f} s; started again. It was"
                    f" at\n{stack_of(self.workers[index])}"
                )
                self.report("hang", what=_worker(index), cause=faults.HANG, message=text)
                restart(self.workers[index])
                self.killed[index] = now
        if len(self.down) == len(self.workers):
            self._check_room("rollout worker", min(self.down.values()))
        return health

    def _recovered(self) -> None:
        super()._recovered()
        self.remind(self.processes)


def _worker(index: int) -> str:
    return f"rollout worker {index + 1}"


def loads(worker: Any) -> bool:
    """Return whether a rollout worker is alive and loading its engine.

    A worker that replaced another loads it in its first call.
    """
    with contextlib.suppress(RayError):
        return bool(
            ray.get(worker.loads.options(max_task_retries=0).remote(), timeout=STACK_SECONDS)
        )
    return False


def restart(actor: Any) -> None:
    """Kill an actor, which Ray then restarts."""
    with contextlib.suppress(RayError):
        ray.kill(actor, no_restart=False)


@dataclass(eq=False)
class ActorSlot:
    """The slot of a policy actor: its bundle, and the actor that is in it now.

    Ray moves the bundle to another node when it loses one. Ray itself never restarts a policy
    actor, because a repeated call would return an untrained policy. `renew` does.

    Attributes:
        make: creates an actor in the bundle.
        hung: the actor was killed because it hung.
        gone: the slot was given up because no node has room for it.
        at_work: whether the actor worked at its last answer. True for a new one.
        process: its last answer.
    """

    name: str
    make: Callable[[], Any]
    bundle: Bundle | None
    actor: Any = None
    pulse: Pulse = field(init=False)
    hung: bool = False
    gone: bool = False
    at_work: bool = True
    process: Process | None = None

    def poll(self) -> Process | None:
        """Return the actor's new answer, if there is one. See Pulse.poll."""
        try:
            answer: Process | None = self.pulse.poll()
        except RayError:
            self.at_work = False
            raise
        if answer:
            self.process, self.at_work = answer, answer.busy
        return answer

    def give_up(self) -> None:
        """Kill a hung actor. Its pending calls then fail."""
        self.hung, self.at_work = True, False
        self.kill()
        self.pulse.forget(health.DEATH_SECONDS)

    def cause(self, death: RayError) -> str:
        """Return the cause of its actor's death."""
        return faults.HANG if self.hung else cause_of_death(faults.kind_of(death), self.process)

    def has_ground(self) -> bool:
        """Return False if Ray would place a new actor on a node that is gone unnoticed."""
        return not faults.unnoticed(self.bundle.node if self.bundle else "")

    def await_room(self, deadline: float) -> bool:
        """Wait for a living node until the deadline, and return whether there is one."""
        while not (found := placement_groups.has_node(self.bundle)) and time.monotonic() < deadline:
            time.sleep(0.5)
        return found

    def renew(self) -> None:
        """Create a new actor. Kill the one before, in any state."""
        self.kill()
        self.actor, self.hung, self.gone, self.process, self.at_work = (
            self.make(),
            False,
            False,
            None,
            True,
        )
        actor = self.actor
        self.pulse = Pulse(lambda: actor.pulse.remote())

    def leave(self) -> None:
        """Give up the slot, which no node has room for. Once its bundle has one, call `renew`."""
        self.gone = True
        self.kill()

    def no_room(self, seconds: float) -> faults.FaultError:
        """Return the error of a run that cannot continue without this slot."""
        return faults.FaultError(
            f"{self.name} has waited {seconds:.0f} s for"
            f" {self.bundle.resources if self.bundle else {}} after a loss:"
            f" {placement_groups.lack()}; add nodes, lower cluster.*_per_policy, or raise"
            " cluster.timeout_seconds; the same command continues"
        )

    def kill(self) -> None:
        if self.actor is not None:
            with contextlib.suppress(RayError, ValueError):
                ray.kill(self.actor)


def hang_of(slot: ActorSlot, hang_seconds: float) -> str:
    """Kill a policy actor that hangs, and return how it hangs, with its stack if it still answers.

    The result is "" where it does not hang.
    """
    try:
        process = slot.poll()
    except RayError:
        return ""  # it is dead, and its pending calls are about to fail
    if process is not None and process.hangs(hang_seconds):
        text = (
            f"at work for {process.working:.0f} s without an end, in process"
            f" {process.id}:\n{stack_of(slot.actor)}"
        )
    elif slot.pulse.hangs(hang_seconds):
        text = f"its process has not answered for {slot.pulse.silent:.0f} s, so there is no stack"
    else:
        return ""
    slot.give_up()
    return text
