"""Tests of how policies share an actor, and of its waits. Engine and update are waits."""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from bench.scaling import NoModel, WaitingPolicy, config_for, waiting_kinds
from conftest import random_delta

from raywarp.algorithm.deltas import AdapterDelta
from raywarp.data.text import Prompt
from raywarp.rewards.actor import Scorer
from raywarp.rollout.protocol import AdapterPart, Scores
from raywarp.run.policy_files import Job
from raywarp.storage.location import Storage
from raywarp.training.policy_actor import PolicyActor
from raywarp.training.progress import Progress
from raywarp.training.session import Session
from raywarp.training.tracking import HeldOut

pytestmark = pytest.mark.slow

POLICIES, STEPS = 3, 6


def test_policies_of_an_actor_advance_alike(ray_cluster: Any, tmp_path: Path) -> None:
    """Whichever policy is updated, the rollouts of the others are ready before the end of it. A
    policy that was left behind would end alone, with an idle trainer.
    """
    prompts = [Prompt(f"prompt {n}", (3, 4, n), {}) for n in range(40)]
    jobs = [Job(1, m, f"policy-{m}", Storage(tmp_path)) for m in range(1, POLICIES + 1)]
    config = config_for(POLICIES, 1, 1, STEPS, concurrency=POLICIES)
    kinds = waiting_kinds(generate=0.01, update=0.3)
    done = Counter(dict.fromkeys(range(1, POLICIES + 1), 0))
    with Session(config, "none", 3, kinds=kinds, proves=False) as session:
        for event in session.fine_tune(jobs, session.zero, prompts):
            if event["event"] == "step":
                done[event["policy"]] += 1
                assert max(done.values()) - min(done.values()) <= 1, dict(done)
    assert set(done.values()) == {STEPS}


class Probing(PolicyActor):
    """Has its scores at once, and its probe when `probe` is there."""

    probe: Any
    scores: Any

    def start(self) -> AdapterDelta:
        self.model: Any = NoModel()
        return random_delta(0)

    def _new_policy(self, job: Job) -> Any:
        return WaitingPolicy(0.0, random_delta(1), self.config)

    def _request(
        self, progress: Progress, prompts: Sequence[Prompt], pool: Any, reward: Scorer
    ) -> Any:
        progress.probed = self.probe
        return self.scores

    def _step(self, *_: Any) -> dict[str, Any]:
        raise AssertionError("the probe is not there")

    def _checkpoint(self, progress: Progress) -> None:
        pass


def test_a_wait_for_the_probe_is_no_work_and_ends_at_a_stop(
    ray_cluster: Any, tmp_path: Path
) -> None:
    """The worker that has the probe may be started again meanwhile, which takes long."""
    actor = Probing(config_for(1, 1, 1, STEPS), "none", "float32", None)
    actor.probe = ray_cluster.remote(lambda: time.sleep(10**6)).options(num_cpus=0).remote()
    actor.scores = ray_cluster.put(Scores([0.0]))
    init = AdapterPart.put(random_delta(0))
    prompts: Mapping[int, Sequence[Prompt]] = {1: [Prompt("a prompt", (3, 4), {})]}
    jobs = [Job(1, 1, "policy-1", Storage(tmp_path))]

    def events() -> list[str]:
        work = actor.fine_tune(jobs, init, prompts, None, Scorer(None), HeldOut({}))
        return [event["event"] for event in work]

    with ThreadPoolExecutor(1) as thread:
        found = thread.submit(events)
        try:
            time.sleep(3.0)
            assert actor.working_since is None
            actor.stopping.set()
            assert found.result(timeout=30.0) == ["resumed", "stopped"]
        finally:
            ray_cluster.cancel(actor.probe, force=True)
