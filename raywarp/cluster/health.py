"""Which processes of a run are there, and which do not answer or do not get on.

An actor is asked for its pulse by a method of the concurrency group "watch", so that it answers
while it works. Waiting is no hang: an actor hangs when it does not answer, or works at one thing
for `cluster.hang_seconds`; so does a run in which everybody waits for so long.
"""

import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError

from raywarp.cluster import faults, out_of_memory

GROUP = "watch"
START_SECONDS = 300.0  # in which a process that is new may be silent: it imports, and loads a model
QUESTION_SECONDS = 1.0  # seconds from an answer to the next question
STACK_SECONDS = 5.0  # in which a process that still runs Python tells its stack
DEATH_SECONDS = 30.0  # in which Ray notices that it has killed a process that does not react
Report = Callable[..., None]


@dataclass(frozen=True)
class Process:
    """Where an actor lives: its process and node.

    working: seconds that it has been at one piece of work, 0 while it waits for others. done: calls
    that this process has finished.
    busy: whether it is at work, also at what may take as long as it likes. kernel_kills: on its
    machine, for want of memory.
    """

    id: int
    node: str
    working: float = 0.0
    done: int = 0
    busy: bool = False
    kernel_kills: int = 0

    @classmethod
    def here(
        cls, working_since: float | None = None, done: int = 0, busy: bool = False
    ) -> "Process":
        working = max(0.0, time.monotonic() - working_since) if working_since is not None else 0.0
        busy = busy or working_since is not None
        return cls(
            os.getpid(),
            ray.get_runtime_context().get_node_id(),
            working,
            done,
            busy,
            out_of_memory.kernel_kills(),
        )

    def follows(self, other: "Process | None") -> bool:
        """Whether it is there in another one's place. The same number on another node is another
        process: each container has its own.
        """
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
    killed = kind == faults.KILLED and out_of_memory.explains(
        process.id, process.node, process.kernel_kills
    )
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
        """An answer that has come since, else None. Raises RayError where the actor is dead or
        being started again.
        """
        now = time.monotonic()
        self.silent += min(
            now - self.polled, QUESTION_SECONDS
        )  # if this process was stopped meanwhile, the other one may have been, too
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
        """Whether it has been silent for so long; a process that has not answered yet may take its
        time.
        """
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
        self.seconds = (
            0.0 if at_work else self.seconds + min(now - self.seen, QUESTION_SECONDS)
        )  # see Pulse.poll
        self.seen = now
        return self.seconds > seconds


def stack_of(actor: Any) -> str:
    """Where an actor is that has a method `stack` in the group "watch"; or why it does not say
    so.
    """
    try:
        stack: str = ray.get(
            actor.stack.options(max_task_retries=0).remote(), timeout=STACK_SECONDS
        )
    except GetTimeoutError:
        return "an unknown place: its process does not answer"
    except RayError as error:
        return f"an unknown place: {faults.explain(error)}"
    return stack


def stack_here(thread: int) -> str:
    """Where a thread of this process is."""
    frame = sys._current_frames().get(thread)
    return "".join(traceback.format_stack(frame)) if frame else "no work"
