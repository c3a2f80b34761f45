"""A process's own GPUs, and the turn at a GPU that an engine and a trainer share."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import ray

from raywarp.storage.locks import locked

# Where a user sets the first, Ray leaves the second, which says what GPUs a process sees, to it.
LEFT_TO_US = {
    "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "CUDA_VISIBLE_DEVICES",
    "RAY_EXPERIMENTAL_NOSET_HIP_VISIBLE_DEVICES": "HIP_VISIBLE_DEVICES",
}


def see_own_gpus() -> None:
    """Let this process see only the GPUs that Ray gave it, before anything uses a GPU."""
    for left, visible in LEFT_TO_US.items():
        if os.environ.get(left, "0").lower() in ("1", "true") and (gpus := ray.get_gpu_ids()):
            os.environ[visible] = ",".join(map(str, gpus))


def shared_cards() -> list[Path]:
    """Return a file for each GPU of this process, which all processes with that GPU lock.

    The files are in Ray's folder of this session, on this node.
    """
    node: Any = ray._private.worker.global_worker.node
    folder = Path(node.get_session_dir_path())
    cards = [folder / f"raywarp-gpu-{number}" for number in sorted(map(str, ray.get_gpu_ids()))]
    for card in cards:
        card.touch()
    return cards


@contextlib.contextmanager
def turn(cards: Sequence[Path]) -> Iterator[None]:
    """Let one process at a time work on the GPUs. The kernel ends the turn of a killed one."""
    with contextlib.ExitStack() as held:
        for card in cards:
            held.enter_context(locked(card))
        yield
