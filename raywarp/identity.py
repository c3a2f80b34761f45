"""Everything random derives from the run's seed and a name, so that any piece of a run can be made again alone."""

import functools
import hashlib
import random


def derive_seed(*parts: object) -> int:
    """A 31-bit seed from what it is for, for example derive_seed(run_seed, "sampling", iteration, policy, step, index)."""
    digest = hashlib.sha256("/".join(str(part) for part in parts).encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


def batch_indices(population: int, size: int, step: int, seed: int) -> list[int]:
    """The prompts of one optimiser step: step after step without replacement, in a new order each epoch.

    Args:
        population: number of prompts.
        size: prompts per step; may exceed the population.
        step: counted from 0.
    """
    first = step * size
    return [_epoch_order(population, position // population, seed)[position % population] for position in range(first, first + size)]


@functools.lru_cache(maxsize=16)
def _epoch_order(population: int, epoch: int, seed: int) -> tuple[int, ...]:
    order = list(range(population))
    random.Random(derive_seed(seed, "epoch", epoch)).shuffle(order)
    return tuple(order)
