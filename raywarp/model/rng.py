"""The global random number generators (torch's, numpy's, Python's) as tensors: what a checkpoint
keeps of them.

Nothing in raywarp draws from them while it trains: adapters, batches and samples have seeds of
their own (seeding.py), and dropout is off. A model's own code may. So each policy has states of its
own, whichever other policies share its process.
"""

import math
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor


def capture(device: torch.device) -> dict[str, Tensor]:
    """The states as they are: of the CPU's generators, and of the device's if it is a GPU."""
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
    """Make the generators go on from what `capture` returned."""
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
    """Draw from these states inside the block, which go on with it; outside everything is as it
    was.
    """
    before = capture(device)
    restore(states, device)
    try:
        yield
    finally:
        states.update(capture(device))
        restore(before, device)


def seeded(seed: int, device: torch.device) -> dict[str, Tensor]:
    """The states after seeding every generator with it; the generators themselves stay as they
    are.
    """
    states = capture(device)
    with using(states, device):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
    return states
