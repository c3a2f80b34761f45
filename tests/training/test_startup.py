"""Tests of actors that fail while they start."""

import os
from pathlib import Path
from typing import Any

import pytest

from raywarp.cluster.faults import BrokenProcessError
from raywarp.config.load import parse_config
from raywarp.training.startup import Startup, request_start

pytestmark = pytest.mark.slow

GPU_ERRORS = [
    RuntimeError("CUDA error: an illegal memory access was encountered"),
    BrokenProcessError("the engine failed"),
]


class Recovering:
    """Raises in every call of its first process."""

    def __init__(self, folder: Path, error: Exception):
        self.folder, self.error = folder, error
        self.first = not (folder / "started").exists()
        (folder / "started").touch()

    def start(self) -> int:
        if self.first:
            raise self.error
        return os.getpid()


@pytest.mark.parametrize("error", GPU_ERRORS, ids=lambda error: type(error).__name__)
def test_an_actor_whose_process_is_broken_starts_in_a_new_one(
    ray_cluster: Any, tmp_path: Path, error: Exception
) -> None:
    """To ask the same process again would fail as often as it is tried."""
    kind = ray_cluster.remote(Recovering).options(num_cpus=0, max_restarts=-1)
    actor = kind.remote(tmp_path, error)
    startup = Startup(parse_config({}), lambda ref, check: ray_cluster.get(ref))
    (process,) = startup.results("a worker", [actor], request_start([actor]), [None])
    assert process > 0
    ray_cluster.kill(actor)
