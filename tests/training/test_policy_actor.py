"""Test of how policies share an actor; engine and update are waits, everything else is real."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from bench.scaling import config_for, waiting_kinds

from raywarp.data.text import Prompt
from raywarp.run.policy_files import Job
from raywarp.storage.location import Storage
from raywarp.training.session import Session

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
