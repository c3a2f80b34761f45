"""Tests that a reward which takes too long is the user's error, wherever it is stuck.

Nothing hangs, and nothing is tried again.
"""

import os
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from raywarp.cluster.health import WATCH
from raywarp.config.rewards import RewardConfig
from raywarp.rewards.actor import RewardActor
from raywarp.rewards.reward import RewardError
from raywarp.rewards.time_limit import TimeLimit, TimeLimitError

SLOW = """
import ctypes, time
from pathlib import Path

def score(prompts, completions, **columns):
    with open(Path(__file__).with_suffix(".calls"), "a") as calls:
        calls.write("x")
    if completions[0] == "loop":
        while True:
            try:
                time.sleep(0.01)
            except Exception:
                pass
    if completions[0] == "stuck":
        ctypes.PyDLL(None).sleep(300)  # C code that keeps the interpreter to itself
    return [1.0] * len(completions)
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    name = f"slow_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(SLOW)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path / f"{name}.py"


def test_what_is_in_time_is_returned_and_what_it_raises_is_raised() -> None:
    limit = TimeLimit(5, "in-time")
    assert limit.call(lambda: 3) == 3
    with pytest.raises(KeyError):
        limit.call(lambda: {}["x"])
    assert TimeLimit(None, "none").call(lambda: 4) == 4
    assert not limit._stack.exists()


def test_python_code_is_interrupted_and_the_next_call_is_sound() -> None:
    limit, start = TimeLimit(0.3, "loop"), time.monotonic()

    def loop() -> None:
        while True:
            pass

    with pytest.raises(TimeLimitError, match=r"took longer than 0\.3 s"):
        limit.call(loop)
    assert time.monotonic() - start < 4
    assert [limit.call(lambda n=n: n) for n in range(200)] == list(range(200))


def test_a_thread_other_than_the_main_one_can_be_limited() -> None:
    found: list[str] = []

    def run() -> None:
        try:
            TimeLimit(0.3, "thread").call(lambda: [None for _ in iter(int, 1)])
        except TimeLimitError as error:
            found.append(str(error))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(10)
    assert found == ["took longer than 0.3 s"]


def test_files_of_killed_processes_are_taken_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    ours, theirs, old = TimeLimit(5, "ours"), tmp_path / "raywarp-stuck-killed", time.time() - 60

    def look() -> list[str]:
        theirs.touch()
        for path in tmp_path.iterdir():
            os.utime(path, (old, old))
        TimeLimit(5, "other")
        return [path.name for path in tmp_path.iterdir()]

    assert ours.call(look) == ["raywarp-stuck-ours"]  # that of a call under way stays
    assert list(tmp_path.iterdir()) == []


def test_what_the_process_before_died_of_is_told_for_every_call_and_its_file_taken_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "raywarp-stuck-actor").write_text("in score")
    limit = TimeLimit(5, "actor")
    for _ in range(2):
        with pytest.raises(
            TimeLimitError, match=r"could not be interrupted; its process was ended at\nin score"
        ):
            limit.call(lambda: 1)
    assert list(tmp_path.iterdir()) == []


def test_the_error_names_function_time_and_key(ray_cluster: Any, module: Path) -> None:
    actor = RewardActor(RewardConfig(function=f"{module.stem}:score", timeout_seconds=0.5))
    actor.start()
    assert actor.score(["p"], ["fine"]) == [1.0]
    with pytest.raises(
        RewardError,
        match=(
            rf"(?s){module.stem}:score took longer than 0\.5 s; .* in score.*, for 2"
            r" completions.*reward\.timeout_seconds"
        ),
    ):
        actor.score(["p", "p"], ["loop", "loop"])
    assert actor.score(["p"], ["fine"]) == [1.0]


def test_c_code_ends_its_process_and_is_not_called_again(ray_cluster: Any, module: Path) -> None:
    config = RewardConfig(function=f"{module.stem}:score", timeout_seconds=0.5)
    environment = {"env_vars": {"PYTHONPATH": ":".join([str(module.parent), *sys.path])}}
    remote: Any = ray_cluster.remote(concurrency_groups={WATCH: 1})(RewardActor)
    actor = remote.options(
        num_cpus=0, max_restarts=2, max_task_retries=2, runtime_env=environment
    ).remote(config)
    ray_cluster.get(actor.start.remote())
    with pytest.raises(
        RewardError, match=r"took longer than 0\.5 s; its process was ended at(?s:.*)in score"
    ):
        ray_cluster.get(actor.score.remote(["p"], ["stuck"]), timeout=60)
    assert module.with_suffix(".calls").read_text() == "x"
    ray_cluster.kill(actor)
