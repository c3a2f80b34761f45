"""What went wrong with an actor, in a user's words: its cause, whether to try again, after how
long, and when to give up.
"""

import socket
from typing import Any

import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayError, RayTaskError

OUT_OF_MEMORY, KILLED, NODE_LOST, HANG, EXCEPTION = (
    "out of memory",
    "killed",
    "node lost",
    "hang",
    "exception",
)
LONGEST_PAUSE = 30.0  # seconds between two attempts
_MEMORY_TEXTS = ("can't allocate memory", "CUDA out of memory", "low on memory", "memory pressure")
_NODE_TEXTS = ("its node has died", "node was terminated", "node died", "node is dead")


class FaultError(RuntimeError):
    """A piece of the run failed again and again, or there was no place for it any more; what was
    saved is kept.
    """


def cause_of(error: BaseException) -> BaseException:
    """What an actor raised, without Ray's wrapping."""
    while isinstance(error, RayTaskError) and isinstance(error.cause, BaseException):
        error = error.cause
    return error


def kind_of(error: BaseException) -> str:
    """Out of memory, node lost, killed, or exception, as far as the error says it; see
    watch.cause_of_death.
    """
    cause, text = cause_of(error), str(error)
    if type(cause).__module__.startswith(
        "raywarp."
    ):  # it says what was wrong elsewhere, and may quote anything
        return EXCEPTION
    # By name, torch's as well as Ray's, since the pool has no torch.
    if (
        type(cause).__name__ == "OutOfMemoryError"
        or isinstance(cause, MemoryError)
        or any(part in text for part in _MEMORY_TEXTS)
    ):
        return OUT_OF_MEMORY
    if any(part in text for part in _NODE_TEXTS):
        return NODE_LOST
    return KILLED if isinstance(cause, ActorDiedError | ActorUnavailableError) else EXCEPTION


def is_survivable(error: BaseException) -> bool:
    """Whether the same work may succeed in a new process: a death or a lack of memory, but no
    exception of ours or of the user's code.
    """
    cause = cause_of(error)
    return (isinstance(cause, RayError) and not isinstance(cause, RayTaskError)) or kind_of(
        error
    ) == OUT_OF_MEMORY


def is_restarting(error: BaseException) -> bool:
    """Whether the actor was only not there yet: Ray is starting it again, or looks for room (text
    of Ray 2.60).
    """
    return isinstance(cause_of(error), ActorUnavailableError) and "is restarting" in str(error)


def explain(error: BaseException) -> str:
    """What Ray says about a death comes to one line."""
    lines = [line.strip() for line in str(cause_of(error)).splitlines() if line.strip()]
    told = [
        line for line in lines if line.startswith(("The actor is dead", "The actor died because"))
    ]
    line = (told or lines or [type(error).__name__])[0]
    return line.partition(" Some common causes include")[0]


def node_lost(node: str) -> bool:
    """Whether a node is gone: Ray says so, or (Ray waits for missed heartbeats) its raylet's port
    refuses.
    """
    known = _known(node)
    return known is None or not known["Alive"] or not _answers(known)


def unnoticed(node: str) -> bool:
    """Whether a node is gone and Ray still counts on it: an actor that is made now may go there,
    and die once more.
    """
    known = _known(node)
    return known is not None and known["Alive"] and not _answers(known)


def _known(node: str) -> dict[str, Any] | None:
    """What Ray knows of a node."""
    return next((known for known in ray.nodes() if known["NodeID"] == node), None)


def _answers(known: dict[str, Any]) -> bool:
    try:
        socket.create_connection(
            (known["NodeManagerAddress"], known["NodeManagerPort"]), timeout=1
        ).close()
    except OSError:
        return False
    return True


class Failures:
    """How often one piece of a run has failed since it last got on.

    Args:
        most: failures in a row after each of which it is tried again.
    """

    def __init__(self, most: int):
        self.most, self.count = most, 0

    def again(self) -> bool:
        """One more failure; whether to try again."""
        self.count += 1
        return self.count <= self.most

    def pause(self) -> float:
        """Seconds to wait before that: 0.5, 1, 2, …"""
        return min(0.5 * 2 ** (self.count - 1), LONGEST_PAUSE) if self.count else 0.0

    def progressed(self) -> None:
        self.count = 0
