"""Tests of how a session goes on after a fault of its policy actors."""

from pathlib import Path
from typing import Any

import pytest

from raywarp.cluster.faults import GPU_ERROR
from raywarp.cluster.health import Process
from raywarp.cluster.supervisor import ActorSlot
from raywarp.config.load import parse_config
from raywarp.training.session import Session

pytestmark = pytest.mark.slow


class Ailing:
    """Its first process lives, and cannot use its GPU any more."""

    def __init__(self, folder: Path):
        self.fails = not (folder / "started").exists()
        (folder / "started").touch()

    def pulse(self) -> Process:
        return Process.here()

    def kl(self) -> float:
        if self.fails:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return 0.5


def test_a_policy_actor_whose_gpu_fails_is_renewed(ray_cluster: Any, tmp_path: Path) -> None:
    """It answers, so it does not look dead, and would fail at every later call too."""
    kind = ray_cluster.remote(Ailing).options(num_cpus=0)
    events: list[dict[str, Any]] = []
    session = Session(
        parse_config({}),
        "none",
        3,
        report=lambda event, **details: events.append({"event": event, **details}),
    )
    slot = ActorSlot("policy actor 1", lambda: kind.remote(tmp_path), None)
    slot.renew()
    session.policies = [slot]
    assert session.persist(lambda: session.get(slot.actor.kl.remote())) == 0.5
    assert [(row["event"], row["what"], row["cause"]) for row in events] == [
        ("fault", "policy actor 1", GPU_ERROR)
    ]
    assert "an illegal memory access" in events[0]["message"]
    slot.kill()
