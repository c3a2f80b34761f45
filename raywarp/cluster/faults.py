"""Faults of actors in a user's words: the cause, whether and when to retry, when to give up."""

import socket
from typing import Any

import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayError, RayTaskError

OUT_OF_MEMORY, GPU_ERROR, KILLED, NODE_LOST, HANG, EXCEPTION = (
    "out of memory",
    "GPU error",
    "killed",
    "node lost",
    "hang",
    "exception",
)
LONGEST_PAUSE = 30.0  # seconds between two attempts
_MEMORY_TEXTS = (
    *("can't allocate memory", "CUDA out of memory", "HIP out of memory"),
    *("low on memory", "memory pressure"),
)
# Of torch 2.13 and Triton. After such an error, every later call to the GPU fails in this
# process.
_GPU_TEXTS = (
    *("CUDA error", "CUDA driver error", "CUDA unknown error", "HIP error"),
    *("CUBLAS_STATUS_", "CUDNN_STATUS_", "CUSOLVER_STATUS_", "CUSPARSE_STATUS_"),
    *("NCCL error", "NCCL Error", "Triton Error [CUDA]", "Triton Error [HIP]"),
)
_NODE_TEXTS = ("its node has died", "node was terminated", "node died", "node is dead")


class FaultError(RuntimeError):
    """A part of the run failed too often, or no node has room for it. What was saved is kept."""


class BrokenProcessError(RuntimeError):
    """An actor's process cannot continue after an error. A new one may do the same work.

    Attributes:
        kind: of the fault, such as OUT_OF_MEMORY.
    """

    def __init__(self, message: str, kind: str = EXCEPTION):
        super().__init__(message)
        self.kind = kind

    @classmethod
    def after(cls, what: str, error: Exception) -> "BrokenProcessError":
        """Return the error of a part that raised `error`, in one line."""
        lines = str(error).strip().splitlines() or [""]
        return cls(f"{what} failed with {type(error).__name__}: {lines[0][:300]}", kind_of(error))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self), self.kind)


def cause_of(error: BaseException) -> BaseException:
    """Return what an actor raised, without Ray's wrapping."""
    while isinstance(error, RayTaskError) and isinstance(error.cause, BaseException):
        error = error.cause
    return error


def kind_of(error: BaseException) -> str:
    """Return the kind of fault that the error itself shows, such as OUT_OF_MEMORY or NODE_LOST.

    health.cause_of_death refines it from what else is known.
    """
    cause, text = cause_of(error), str(error)
    if isinstance(cause, BrokenProcessError):
        return cause.kind
    # An error of raywarp's own may quote any text, so its text is not searched.
    if is_own(cause):
        return EXCEPTION
    # Compare the name, which is the same for torch and Ray: the pool does not import torch.
    if (
        type(cause).__name__ == "OutOfMemoryError"
        or isinstance(cause, MemoryError)
        or any(part in text for part in _MEMORY_TEXTS)
    ):
        return OUT_OF_MEMORY
    if type(cause).__name__ == "AcceleratorError" or any(part in text for part in _GPU_TEXTS):
        return GPU_ERROR
    if any(part in text for part in _NODE_TEXTS):
        return NODE_LOST
    return KILLED if isinstance(cause, ActorDiedError | ActorUnavailableError) else EXCEPTION


def is_own(error: BaseException) -> bool:
    """Return whether raywarp itself raises errors of this class."""
    return type(error).__module__.startswith("raywarp.")


def is_survivable(error: BaseException) -> bool:
    """Return whether the same work may succeed in a new process.

    It may after a death, a lack of memory or an error of the GPU, but not after an exception of our
    code or the user's.
    """
    return _is_death(cause_of(error)) or breaks_process(error)


def breaks_process(error: BaseException) -> bool:
    """Return whether a living process raised this error, and has to end before the work goes on."""
    cause = cause_of(error)
    if isinstance(cause, BrokenProcessError):
        return True
    return not _is_death(cause) and kind_of(error) in (OUT_OF_MEMORY, GPU_ERROR)


def _is_death(cause: BaseException) -> bool:
    return isinstance(cause, RayError) and not isinstance(cause, RayTaskError)


def is_restarting(error: BaseException) -> bool:
    """Return whether the actor was only not there yet.

    Ray is then restarting it or looking for a node. This is known from the text of Ray 2.60.
    """
    return isinstance(cause_of(error), ActorUnavailableError) and "is restarting" in str(error)


def explain(error: BaseException) -> str:
    """Return in one line what Ray says about a death."""
    lines = [line.strip() for line in str(cause_of(error)).splitlines() if line.strip()]
    told = [
        line for line in lines if line.startswith(("The actor is dead", "The actor died because"))
    ]
    line = (told or lines or [type(error).__name__])[0]
    return line.partition(" Some common causes include")[0]


def node_lost(node: str) -> bool:
    """Return whether a node is gone.

    Ray says so only after missed heartbeats. A raylet whose port refuses shows it sooner.
    """
    known = _known(node)
    return known is None or not known["Alive"] or not _answers(known)


def unnoticed(node: str) -> bool:
    """Return whether a node is gone while Ray still counts on it.

    An actor that is created now may be placed there, and would die again.
    """
    known = _known(node)
    return known is not None and known["Alive"] and not _answers(known)


def _known(node: str) -> dict[str, Any] | None:
    """Return what Ray knows of a node."""
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
    """A count of how often one part of a run has failed since its last progress.

    Args:
        most: failures in a row after each of which it is tried again.
    """

    def __init__(self, most: int):
        self.most, self.count = most, 0

    def again(self) -> bool:
        """Count one more failure. Return whether to try again."""
        self.count += 1
        return self.count <= self.most

    def pause(self) -> float:
        """Return the seconds to wait before the next attempt: 0.5, 1, 2, … up to LONGEST_PAUSE."""
        return min(0.5 * 2 ** (self.count - 1), LONGEST_PAUSE) if self.count else 0.0

    def progressed(self) -> None:
        self.count = 0
