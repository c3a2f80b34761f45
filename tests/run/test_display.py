"""Tests of what a terminal, a job's log and a quiet command are told of the same run."""

import io
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from raywarp.config.load import parse_config
from raywarp.config.search import search_space
from raywarp.run.display import Display
from raywarp.run.folder import Run
from raywarp.run.policy_files import Job
from raywarp.sweep.listeners import SweepProgress, callback
from raywarp.sweep.trial import SweepPlan


def replayed(run: Run, terminal: bool = False, quiet: bool = False) -> str:
    """The display of a run's first iteration and its end."""
    console = Console(file=io.StringIO(), width=200, force_terminal=terminal)
    display = Display(console, quiet)
    rows = [row for row in run.metrics() if row["iteration"] == 1]
    keys = list(dict.fromkeys(row["key"] for row in rows))
    jobs = [Job(1, m, key, run.store) for m, key in enumerate(keys, 1)]
    with display.iteration(1, jobs, jobs, {job.key: 6 for job in jobs}) as bars:
        for row in rows:
            bars.update({"event": "step", **row})
    display.event({"event": "fault", "what": "rollout worker 1", "cause": "killed"})
    display.front(run)
    display.timing(run)
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def test_a_log_gets_plain_lines_with_reward_kl_speed_and_time_left(tiny_finished: Run) -> None:
    said = replayed(tiny_finished)
    row = next(
        row
        for row in tiny_finished.metrics()
        if (row["iteration"], row["policy"], row["step"]) == (1, 2, 4)
    )
    (line,) = [line for line in said.splitlines() if "iteration 1 policy 2 step 5/6" in line]
    speed = row["tokens"] / (row["wait_seconds"] + row["request_seconds"] + row["update_seconds"])
    assert (
        f"reward {row['reward']:+.2f}  KL to anchor {row['kl_anchor']:.2f}  {speed:.0f} tokens/s"
        in line
    )
    assert line.endswith("left")
    assert "\x1b" not in said
    for end in ("raywarp report", str(tiny_finished.folder / "adapter"), "iteration 1: 12 steps"):
        assert end in said


def test_a_terminal_gets_a_bar_per_policy(tiny_finished: Run) -> None:
    said = replayed(tiny_finished, terminal=True)
    assert "step 5/6" not in said
    for policy in (1, 2):
        assert f"iteration 1 policy {policy}" in said
    assert "6/6" in said


def test_quiet_is_faults_and_results(tiny_finished: Run) -> None:
    said = replayed(tiny_finished, quiet=True)
    assert "rollout worker 1, killed" in said
    assert "SLERP" in said or "slerp" in said
    assert str(tiny_finished.folder / "adapter") in said
    for progress in ("policies to train", "step 5/6", "before and after", "steps/s"):
        assert progress not in said


@pytest.mark.parametrize("terminal", [True, False])
def test_a_sweep_shows_its_trials(terminal: bool) -> None:
    console = Console(file=io.StringIO(), width=200, force_terminal=terminal)
    config = parse_config(
        {"tune": {"space": {"warp.ema_rate": {"grid": [0.1, 0.2]}}}, "warp": {"iterations": 2}}
    )
    watched = SweepProgress(SweepPlan(search_space(config), "id", "."), Display(console))
    told, trials = (
        callback(watched),
        [trial(f"t{n}", {"point": {"warp.ema_rate": rate}}) for n, rate in enumerate((0.1, 0.2))],
    )
    measured = {"reward": 1.25, "kl": 2.5, "hypervolume": 3.75}
    with watched:
        for one in trials:
            told.on_trial_start(0, trials, one)
        told.on_trial_result(0, trials, trials[0], {**measured, "iteration": 1})
        told.on_trial_complete(0, trials, trials[0])
        told.on_trial_result(0, trials, trials[1], {"failed": "no room\nat all"})
        told.on_trial_error(0, trials, trials[1])
        assert watched.bars.tasks[0].completed == 2
        assert not watched.under_way
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert "ema_rate=0.1: iteration 1: reward +1.25 at KL 2.50, hypervolume 3.75" in said
    assert "ema_rate=0.2: failed: no room" in said
    assert "ema_rate=0.2: its process died again and again" in said
    assert ("trials" in said) is terminal


def trial(name: str, config: dict[str, Any]) -> Any:
    return SimpleNamespace(trial_id=name, config=config)
