"""The turn at a GPU that an engine and a trainer share."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import ray

from raywarp.storage.locks import locked


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
