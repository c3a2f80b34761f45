"""Seeds and content keys: the sources of all randomness and all names of a run.

Everything random derives from the run's seed and a name. Any piece of a run can therefore be made
again alone.
"""

import functools
import hashlib
import json
import random
from array import array
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def derive_seed(*parts: object) -> int:
    """Return a 31-bit seed from what it is for.

    For example: derive_seed(run_seed, "sampling", iteration, policy, step, index).
    """
    digest = hashlib.sha256("/".join(str(part) for part in parts).encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


def batch_indices(population: int, size: int, step: int, seed: int) -> list[int]:
    """Return the indices of the prompts of one optimiser step.

    Steps draw without replacement, in a new order each epoch.

    Args:
        population: number of prompts.
        size: prompts per step; may exceed the population.
        step: counted from 0.
        seed: of the order.
    """
    first = step * size
    return [
        _epoch_order(population, position // population, seed)[position % population]
        for position in range(first, first + size)
    ]


@functools.lru_cache(maxsize=16)
def _epoch_order(population: int, epoch: int, seed: int) -> "array[int]":
    order = array("q", range(population))
    random.Random(derive_seed(seed, "epoch", epoch)).shuffle(order)
    return order


def content_key(parts: Any) -> str:
    """Return a 16-digit key of anything that JSON can hold: equal content, equal key."""
    canonical = json.dumps(parts, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def folder_fingerprint(folder: Path, patterns: Iterable[str], without: str = "") -> str:
    """Return one hash of the names and contents of a folder's matching files.

    It does not depend on the folder's name.

    Args:
        patterns: globs of the files to hash.
        without: the name of a file to leave out.
    """
    files = sorted(
        {
            path
            for pattern in patterns
            for path in folder.glob(pattern)
            if path.is_file() and path.name != without
        }
    )
    return content_key([[path.name, file_sha256(path)] for path in files])
