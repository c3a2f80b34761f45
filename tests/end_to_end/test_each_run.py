"""Tests of runs whose policies differ (warp.each): their bits, their keys and their merge."""

import json
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from conftest import assert_same_change
from killing import Command, adapters, kill, make_project, processes, set_pace, told
from tiny_models import WORDS
from tiny_run import Listener, tiny_config

from raywarp.adapters.peft import load_peft
from raywarp.algorithm.averaging import slerp
from raywarp.algorithm.deltas import AdapterDelta
from raywarp.report.data import report_data
from raywarp.run.folder import Run
from raywarp.warp import train

LOGGED = '''
"""Two rewards, of which the first writes down how many completions each of its calls has."""
import pathlib
import time

HERE = pathlib.Path(__file__).parent

def good(prompts, completions, **columns):
    pace = HERE / "pace"
    time.sleep(float(pace.read_text()) if pace.exists() else 0)
    with (HERE / "calls").open("a") as calls:
        calls.write(f"{len(completions)}\\n")
    return [float(text.split().count("good")) for text in completions]

def short(prompts, completions, **columns):
    return [-float(len(set(text.split()))) for text in completions]
'''
REWARDS = [
    {"name": "good", "function": "two_rewards:good"},
    {"name": "short", "function": "two_rewards:short"},
]
EACH = [
    {"lr": 0.02, "rewards": {"short": 0}},
    {
        "rank": 3,
        "alpha": 3,
        "steps": 12,
        "seed": 5,
        "rewards": {"good": 0},
        "prompts": {"where": {"id": [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]}},
    },
]


def policies_of(run: Run, iteration: int = 1) -> list[AdapterDelta]:
    names = json.loads((run.folder / f"iterations/{iteration}/policies.json").read_text())
    return [load_peft(run.folder / name) for name in names]


def zip_words() -> list[str]:
    return [f"{a} {b} {c}" for a, b, c in zip(WORDS, WORDS[3:], WORDS[7:], strict=False)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    project = make_project(tmp_path / "project", warp={"iterations": 2, "steps": 8})
    (project / "two_rewards.py").write_text(LOGGED)
    rows = [{"text": text, "id": n} for n, text in enumerate(zip_words())]
    (project / "prompts.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    tree = yaml.safe_load((project / "config.yaml").read_text())
    del tree["reward"]
    tree |= {"rewards": REWARDS, "checkpoint_every": 3}
    tree["warp"]["each"] = EACH
    (project / "config.yaml").write_text(yaml.safe_dump(tree))
    return project


def test_killed_it_continues_to_the_same_bits(folder: Path) -> None:
    """Unequal ranks, rates, lengths, seeds, prompts and rewards; a policy actor is killed, then the
    driver.
    """
    whole = Command(folder, "whole")
    assert whole.end() == 0, whole.tail()
    set_pace(folder, 0.2)
    killed = Command(folder, "killed")
    killed.wait_for_steps(8)
    kill(processes("policy actor", psutil.Process(killed.process.pid))[0])
    killed.wait_until(lambda: told(killed.run, "recovered"))
    killed.process.send_signal(signal.SIGKILL)
    killed.process.wait()
    set_pace(folder, 0)
    again = Command(folder, "killed")
    assert again.end() == 0, again.tail()
    assert adapters(again.run) == adapters(whole.run)
    steps = {
        (i, m): len(
            {
                row["step"]
                for row in again.run.metrics()
                if (row["iteration"], row["policy"]) == (i, m)
            }
        )
        for i in (1, 2)
        for m in (1, 2)
    }
    assert steps == {(1, 1): 8, (1, 2): 12, (2, 1): 8, (2, 2): 12}
    assert [policy.rank for policy in policies_of(again.run)] == [2, 3]
    assert [policy.rank for policy in policies_of(again.run, 2)] == [2 + 5, 3 + 5]
    page = report_data(str(again.run.folder))
    assert page["missing"] == []
    assert page["planned"]["policy_steps"] == [8, 12]
    by_policy = {m: [row for row in again.run.metrics() if row["policy"] == m] for m in (1, 2)}
    for m, name in ((1, "good"), (2, "short")):
        assert all(row["reward"] == row[f"reward/{name}"] for row in by_policy[m])


def test_an_alike_policy_is_not_trained_again(
    ray_cluster: Any, tiny_llama: Path, project: Path
) -> None:
    """A run without `each` has trained it into the common store."""
    (project / "two_rewards.py").write_text(LOGGED)

    def run(out: str, **warp: Any) -> tuple[Run, int]:
        """The run, and how many of its batches were scored for training."""
        (project / "calls").write_text("")
        config = tiny_config(
            project,
            tiny_llama,
            project / out,
            reward={"function": "two_rewards:good"},
            warp={"iterations": 1, **warp},
            front={"ceiling_completions": 0},
            store=str(project / "store"),
        )
        found = train(config, Listener())
        return found, (project / "calls").read_text().split().count("8")

    plain, trained = run("plain")
    assert trained == 12
    mixed, trained = run("mixed", each=[{}, {"lr": 0.01}], merge_weights=[3, 1])
    assert trained == 6
    ours, theirs = policies_of(mixed), policies_of(plain)
    assert same(ours[0], theirs[0])
    assert not same(ours[1], theirs[1])
    merged = load_peft(mixed.folder / "iterations/1/merged")
    assert_same_change(merged, slerp(ours, [3, 1]), 1e-5)
    _, trained = run("again", each=[{"lr": 0.03}, {"optim": {"lr": 0.01}}])
    assert trained == 0


def same(one: AdapterDelta, other: AdapterDelta) -> bool:
    return all(
        torch.equal(own.B, other.factors[module].B) and torch.equal(own.A, other.factors[module].A)
        for module, own in one.factors.items()
    )
