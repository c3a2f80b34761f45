"""Tests of a run's preference front: its merges, its choice, and other shares without training."""

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from conftest import assert_same_change
from tiny_run import Listener, tiny_config

from raywarp.adapters.peft import load_peft
from raywarp.algorithm.averaging import slerp
from raywarp.algorithm.deltas import scale
from raywarp.cli.commands import main
from raywarp.run.folder import Run
from raywarp.warp import train

LOGGED = '''
"""Two rewards, of which the first writes down how many completions each of its calls has."""
import pathlib

def good(prompts, completions, **columns):
    with (pathlib.Path(__file__).parent / "calls").open("a") as calls:
        calls.write(f"{len(completions)}\\n")
    return [float(text.split().count("good")) for text in completions]

def short(prompts, completions, **columns):
    return [-float(len(set(text.split()))) for text in completions]
'''
EACH = [{"rewards": {"short": 0}}, {"rewards": {"good": 0}, "rank": 3, "alpha": 3}]
FRONT = {"prompts": 6, "completions_per_prompt": 2, "ceiling_completions": 0}


def calls(project: Path) -> list[int]:
    """The completions of each call since the last time."""
    log = project / "calls"
    found = [int(line) for line in log.read_text().split()] if log.exists() else []
    log.write_text("")
    return found


@pytest.fixture(scope="module")
def soup(ray_cluster: Any, tiny_llama: Path, project: Path) -> tuple[Path, Callable[..., Run]]:
    (project / "two_rewards.py").write_text(LOGGED)

    def run(**changes: Any) -> Run:
        front = {**FRONT, **changes}
        config = tiny_config(
            project,
            tiny_llama,
            project / "soup",
            reward={"function": None},
            rewards=[
                {"name": name, "function": f"two_rewards:{name}"} for name in ("good", "short")
            ],
            warp={"iterations": 1, "steps": 8, "each": EACH},
            front=front,
        )
        return train(config, Listener())

    return project, run


def test_the_front_of_two_rewards(soup: tuple[Path, Callable[..., Run]]) -> None:
    project, run = soup
    found = run(choose={"max_kl": 0.05})
    front = found.front()
    points = {point["name"]: point for point in front["points"]}
    mixed = [point for point in front["points"] if "weights" in point]
    assert {tuple(point["weights"].values()) for point in mixed} == {
        *((1, 0), (0.75, 0.25), (0.5, 0.5), (0.25, 0.75), (0, 1))
    }
    best = [points[name] for name in front["preference_front"]]
    assert [point["weights"]["good"] for point in best] == [1, 0.75, 0.5, 0.25, 0]
    assert all(0.03 < point["kl"] <= 0.05 or point["liti"] == 1 for point in best)
    assert all(point["rewards"].keys() == {"good", "short"} for point in front["points"])

    # The corner is the policy: the same completions, hence the same numbers.
    for n, name in enumerate(("good", "short"), start=1):
        corner, policy = points[f"{name} 1"], points[f"policy {n}"]
        same = ("reward", "kl", "rewards", "length")
        assert [corner[key] for key in same] == [policy[key] for key in same]
    assert points["good 0.5 short 0.5"]["rewards"] == points["slerp"]["rewards"]

    # The union of rectangles above SFT, by inclusion of their corners.
    sft = points["sft"]["rewards"]
    gains = [[p["rewards"][name] - sft[name] for name in ("good", "short")] for p in best]
    assert front["hypervolume"] == pytest.approx(union(gains), abs=1e-9)
    assert (found.folder / "preferences.png").stat().st_size > 10_000

    # Another choice of the measured ones measures nothing again, and writes another adapter.
    calls(project)
    weights = {"good": 3, "short": 1}
    chosen = run(choose={"weights": weights, "max_kl": 0.05})
    assert calls(project) == []
    front = chosen.front()
    point = next(p for p in front["points"] if p["name"] == front["chosen"])
    assert point["weights"] == {"good": 0.75, "short": 0.25}
    names = json.loads((chosen.folder / "iterations/1/policies.json").read_text())
    policies = [load_peft(chosen.folder / name) for name in names]
    expected = scale(slerp(policies, [0.75, 0.25]), point["liti"])
    assert_same_change(load_peft(chosen.folder / "adapter"), expected, 1e-5)
    assert "average with the shares good 0.75, short 0.25" in " ".join(
        (chosen.folder / "adapter/README.md").read_text().split()
    )


def union(gains: list[list[float]]) -> float:
    """The area of the union of rectangles from the origin, column by column."""
    xs = sorted({0.0, *(max(x, 0.0) for x, _ in gains)})
    return sum(
        (right - left) * max([0.0, *(y for x, y in gains if x >= right)])
        for left, right in pairwise(xs)
    )


def test_other_shares_without_training(
    soup: tuple[Path, Callable[..., Run]], monkeypatch: pytest.MonkeyPatch
) -> None:
    project, run = soup
    run(choose={"max_kl": 0.05})
    monkeypatch.chdir(project)
    calls(project)
    command = ["front", "soup", "--out", "other", "store=soup"]
    assert main([*command, "--weights", "good=.9,short=.1"]) == 0
    scored = calls(project)
    assert 1 <= len(scored) <= 5
    assert {*scored} == {8}  # points, and no step
    front = json.loads((project / "other/front.json").read_text())
    point = next(p for p in front["points"] if p["name"] == front["chosen"])
    assert point["weights"] == {"good": 0.9, "short": 0.1}
    assert front["hypervolume"] >= 0
    assert main([*command, "--weights", ".9,.1"]) == 0
    assert calls(project) == []


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ("kind=1", "nothing has the name kind; there are good, short"),
        ("1,2,3", "give one share for each of good, short"),
        ("good=0,short=0", "all weights are 0"),
        ("good=-1,short=2", "-1 is no share"),
    ],
)
def test_shares_that_there_are_not_are_refused(
    soup: tuple[Path, Callable[..., Run]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    weights: str,
    message: str,
) -> None:
    project, run = soup
    run(choose={"max_kl": 0.05})
    monkeypatch.chdir(project)
    assert main(["front", "soup", "--out", "refused", "--weights", weights]) == 2
    assert message in capsys.readouterr().err
    assert not (project / "refused/front.json").exists()
