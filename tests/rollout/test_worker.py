"""Tests of a rollout worker whose engine does not start."""

from typing import Any

import pytest

from raywarp.cluster.faults import GPU_ERROR, BrokenProcessError
from raywarp.config.load import parse_config
from raywarp.rollout.engine import Engine, EngineSettings
from raywarp.rollout.worker import RolloutWorker

ILLEGAL = "CUDA error: an illegal memory access was encountered\nCompile with TORCH_USE_CUDA_DSA"


class Failing(RolloutWorker):
    """Its engines raise `error`."""

    error: Exception
    attempts = 0

    def _start_engine(self) -> Engine:
        self.attempts += 1
        raise self.error


def failing(error: Exception) -> Failing:
    settings = EngineSettings("none", "float32", 16, 8, parse_config({}).rollout, gpu=False)
    worker = Failing(settings)
    worker.error = error
    return worker


@pytest.mark.parametrize("call", ["start", "generate"])
def test_a_gpu_error_at_an_engines_start_breaks_the_process(call: str) -> None:
    """Every later call to the GPU would fail too, so no engine is started there again."""
    worker = failing(RuntimeError(ILLEGAL))
    arguments: list[Any] = [] if call == "start" else [[]]
    for _ in range(2):
        with pytest.raises(BrokenProcessError) as failure:
            getattr(worker, call)(*arguments)
        assert failure.value.kind == GPU_ERROR
        assert str(failure.value) == (
            "the engine of rollout worker 1 failed with RuntimeError: CUDA error: an illegal memory"
            " access was encountered"
        )
    assert worker.attempts == 1


def test_an_engine_that_cannot_be_started_says_why_itself() -> None:
    """A new process would fail with the same error."""
    worker = failing(ValueError("no engine"))
    with pytest.raises(ValueError, match="no engine"):
        worker.start()
