"""Tests of runs that are measured on held-out prompts while they train, with rules that end them.

Their policies are the same whether or not processes are killed, and whether or not they are
measured.
"""

import json
import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from killing import Command, adapters, kill, make_project, own_home, processes, set_pace, told

from raywarp.adapters.peft import load_peft
from raywarp.algorithm.deltas import AdapterDelta
from raywarp.algorithm.factors import dense
from raywarp.run.folder import Run

STEPS, EVERY = 12, 3
RULES = (
    "control={function: paced_reward:score}",
    "stop={max_kl: 20}",
    "warp.kl_target=0.3",
    f"front={{prompts: 4, etas: [0, 1], choose: {{eta: 1}}, samples: 1, every: {EVERY}}}",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    before = {name: os.environ.get(name) for name in ("RAY_TMPDIR", "HOME")}
    with tempfile.TemporaryDirectory(prefix="rw", ignore_cleanup_errors=True) as home:
        own_home(Path(home))
        yield make_project(
            tmp_path_factory.mktemp("trajectories"),
            warp={"steps": STEPS},
            optim={"lr": 0.03},
        )
    for name, value in before.items():
        os.environ.update({name: value}) if value is not None else os.environ.pop(name, None)


@pytest.fixture(scope="module")
def undisturbed(folder: Path) -> Run:
    set_pace(folder, 0)
    command = Command(folder, "undisturbed", *RULES)
    assert command.end() == 0, command.tail()
    return command.run


def rows(run: Run) -> list[dict[str, Any]]:
    """The trajectories without what differs from start to start, by policy and step."""
    found = [
        {name: value for name, value in row.items() if name != "spans"} for row in run.trajectory()
    ]
    return sorted(found, key=lambda row: (row["iteration"], row["policy"], row["step"]))


def test_policies_are_measured_every_few_steps_with_the_same_prompts(undisturbed: Run) -> None:
    found = rows(undisturbed)
    steps = {m: [row["step"] for row in found if row["policy"] == m] for m in (1, 2)}
    assert steps == {1: [0, 3, 6, 9, 12], 2: [0, 3, 6, 9]}
    first, second = (row for row in found if row["step"] == 0)
    assert first["kl"] == 0
    assert {**first, "policy": 2, "key": second["key"]} == second  # the same seeds
    assert all(row["control"] == row["reward"] for row in found)  # the same function
    assert all(row["reward_ci"] >= 0 and row["kl_ci"] >= 0 for row in found)


def test_a_rule_ends_a_policy_and_its_best_state_is_the_result(
    undisturbed: Run, folder: Path
) -> None:
    """Policy 2 exceeds 20 nats at step 9. Its result is the state of step 6, which is that of a
    policy of six steps that nothing measures.
    """
    ended = {row["policy"]: row for row in told(undisturbed, "ended")}
    assert (ended[1]["step"], ended[2]["step"]) == (12, 9)
    assert "is above stop.max_kl=20" in ended[2]["message"]
    assert len([row for row in undisturbed.metrics() if row["policy"] == 2]) == 9

    short = Command(folder, "short", "warp.steps=6", "warp.kl_target=0.3", "front.every=0")
    assert short.end() == 0, short.tail()
    assert not rows(short.run)
    first, second = zip(policies(undisturbed), policies(short.run), strict=True)
    assert not same(*first)  # the best of policy 1 is the state of step 9
    assert same(*second)


def test_killed_with_trajectories_and_a_rule_it_continues_to_the_same_bits(
    undisturbed: Run, folder: Path
) -> None:
    """First a policy actor is killed, then the driver; the same command continues."""
    set_pace(folder, 0.15)
    command = Command(folder, "killed", *RULES)
    command.wait_for_steps(8)
    seen = psutil.Process(command.process.pid)
    kill(processes("policy actor", seen)[0])
    command.wait_until(lambda: told(command.run, "recovered"))
    command.wait_until(lambda: len(rows(command.run)) >= 7)
    command.process.send_signal(signal.SIGKILL)
    command.process.wait()
    set_pace(folder, 0)
    again = Command(folder, "killed", *RULES)
    assert again.end() == 0, again.tail()
    assert adapters(again.run) == adapters(undisturbed)
    assert rows(again.run) == rows(undisturbed)
    assert [row["step"] for row in again.run.metrics() if row["policy"] == 2] == list(range(9))


def policies(run: Run) -> list[AdapterDelta]:
    listed = json.loads((run.folder / "iterations/1/policies.json").read_text())
    return [load_peft(run.folder / name) for name in listed]


def same(one: AdapterDelta, other: AdapterDelta) -> bool:
    return all(
        torch.equal(dense(factors), dense(other.factors[module]))
        for module, factors in one.factors.items()
    )
