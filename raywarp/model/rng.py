"""The global random number generators of torch, numpy and Python, as tensors for a checkpoint.

Nothing in raywarp draws from them while it trains. Adapters, batches and samples have seeds of
their own (identity.derive_seed), and dropout is off. A model's own code may draw from them. So each
policy has states of its own, independent of the other policies in its process.
"""

import math
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raywarp.config.schema import Config
from raywarp.identity import derive_seed


def capture(device: torch.device) -> dict[str, Tensor]:
    """Return the current states of the CPU's generators, and of the device's if it is a GPU."""
    _, words, gauss = random.getstate()
    legacy: Any = np.random.get_state(legacy=True)
    _, keys, position, has_gauss, cached = legacy
    states = {
        "torch": torch.get_rng_state(),
        "numpy": torch.tensor([*keys.tolist(), position, has_gauss]),
        "numpy_gauss": torch.tensor(cached, dtype=torch.float64),
        "python": torch.tensor(words),
        "python_gauss": torch.tensor(math.inf if gauss is None else gauss, dtype=torch.float64),
    }
    return states | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def restore(states: Mapping[str, Tensor], device: torch.device) -> None:
    """Set the generators to states that `capture` returned."""
    torch.set_rng_state(states["torch"])
    *keys, position, has_gauss = states["numpy"].tolist()
    np.random.set_state(
        ("MT19937", np.array(keys, np.uint32), position, has_gauss, float(states["numpy_gauss"]))
    )
    gauss = float(states["python_gauss"])
    random.setstate((3, tuple(states["python"].tolist()), gauss if math.isfinite(gauss) else None))
    if device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], device)


@contextmanager
def using(states: dict[str, Tensor], device: torch.device) -> Iterator[None]:
    """Draw from these states inside the context, and advance them.

    Outside it, the generators are unaffected.
    """
    before = capture(device)
    restore(states, device)
    try:
        yield
    finally:
        states.update(capture(device))
        restore(before, device)


def seeded(seed: int, device: torch.device) -> dict[str, Tensor]:
    """Return the states after seeding every generator. The generators themselves are unaffected."""
    states = capture(device)
    with using(states, device):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
    return states


def lora_seed(config: Config, iteration: int, index: int) -> int:
    """Return the seed of A: one per policy and iteration, one per iteration, or one per run.

    The last is for lora.init=frozen, where every merge stays at rank r.
    """
    if config.lora.init == "independent":
        return derive_seed(config.seed, "lora", iteration, index)
    if config.lora.init == "shared":
        return derive_seed(config.seed, "lora", iteration)
    return derive_seed(config.seed, "lora")
