"""Health of a run's processes: which are alive, which do not answer, and which make no progress.

An actor answers `pulse` in the concurrency group "watch", so it answers while it works. Waiting is
not a hang. An actor hangs when it does not answer, or when it works at one thing for
`cluster.hang_seconds`. A run hangs when every actor waits for that long.
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

WATCH = "watch"
START_SECONDS = 300.0  # a new process may be silent this long: it imports and loads a model
QUESTION_SECONDS = 1.0  # time from an answer to the next question
STACK_SECONDS = 5.0  # a process that still runs Python returns its stack within this time
DEATH_SECONDS = 30.0  # Ray notices within this time that it killed a process that does not react
Report = Callable[..., None]


@dataclass(frozen=True)
class Process:
    """An actor's process and node, and what the process does.

    Attributes:
        id: process id.
        node: Ray's id of the node.
        working: seconds that it has spent on its present piece of work. 0 while it waits for
            others.
        done: calls that this process has finished.
        busy: whether it works, also on something that may take any time.
        kernel_kills: processes that its machine's kernel has killed for lack of memory.
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

    def hangs(self, seconds: float) -> bool:
        """Return whether it has spent more than this many seconds on one piece of work."""
        return self.working > seconds

    def follows(self, other: "Process | None") -> bool:
        """Return whether this process has taken the place of another one.

        An equal process id on another node is another process, because each container counts its
        own.
        """
        return other is not None and (self.id, self.node) != (other.id, other.node)


def cause_of_death(kind: str, process: Process | None) -> str:
    """Return a closer cause than the error gives (faults.kind_of), from what else is known.

    Args:
        kind: what faults.kind_of returned.
        process: the actor's last answer, if it gave one.
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
    """A context manager whose `busy` says whether its block is running."""

    def __init__(self) -> None:
        self.busy = False

    def __enter__(self) -> None:
        self.busy = True

    def __exit__(self, *_: object) -> None:
        self.busy = False


class Pulse:
    """Asks one actor for its pulse again and again, without waiting for the answer.

    Args:
        ask: sends the question, and returns the ref of the answer.

    Attributes:
        silent: seconds for which the question has had no answer.
    """

    def __init__(self, ask: Callable[[], Any]):
        self.ask, self.ref, self.due = ask, None, 0.0
        self.silent, self.polled = 0.0, 0.0
        self.answered = False

    def poll(self) -> Any:
        """Return an answer that has arrived since the last call, else None.

        Raises:
            RayError: the actor is dead, or Ray is restarting it.
        """
        now = time.monotonic()
        # Count little if this process was stopped meanwhile: the other may have been stopped too.
        self.silent += min(now - self.polled, QUESTION_SECONDS)
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
        """Return whether the actor has been silent for longer than this many seconds.

        A process that has never answered gets at least START_SECONDS.
        """
        return self.silent > (seconds if self.answered else max(seconds, START_SECONDS))

    def forget(self, pause: float = 0.0) -> None:
        """Drop the open question. Ask the next one after the pause, in seconds."""
        self.ref, self.due, self.silent, self.answered = None, time.monotonic() + pause, 0.0, False


class Standstill:
    """A state in which every actor waits and none works.

    It occurs because Ray may lose a call while it restarts an actor.

    Attributes:
        seconds: how long it has been observed.
    """

    def __init__(self) -> None:
        self.over()

    def over(self) -> None:
        """Note that something has happened."""
        self.seconds, self.seen = 0.0, time.monotonic()

    def lasts(self, at_work: bool, seconds: float) -> bool:
        """Look again, and return whether the standstill has lasted for longer than `seconds`."""
        now = time.monotonic()
        # The limit has the reason that Pulse.poll gives.
        self.seconds = 0.0 if at_work else self.seconds + min(now - self.seen, QUESTION_SECONDS)
        self.seen = now
        return self.seconds > seconds


def stack_of(actor: Any) -> str:
    """Return an actor's stack, or why it does not give one.

    The actor needs a method `stack` in the concurrency group "watch".
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
    """Return the stack of a thread of this process."""
    frame = sys._current_frames().get(thread)
    return "".join(traceback.format_stack(frame)) if frame else "no work"
