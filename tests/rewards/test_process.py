"""Tests of the processes that call reward functions: signals, pools, event loops and deaths."""

import os
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from raywarp.cluster.health import WATCH
from raywarp.config.rewards import RewardConfig
from raywarp.rewards.actor import RewardActor
from raywarp.rewards.process import FunctionProcesses, Source
from raywarp.rewards.reward import Batch, RewardError

CODE = """
import asyncio, concurrent.futures, multiprocessing, os, signal, threading, time
import numpy as np

def length(text): return float(len(text))

def alarm(prompts, completions, **c):
    signal.signal(signal.SIGALRM, lambda *_: None); signal.alarm(1); signal.alarm(0)
    return [length(t) for t in completions]

def main_thread(prompts, completions, **c):
    here = threading.current_thread() is threading.main_thread()
    return [length(t) * here for t in completions]

def pool(prompts, completions, **c):
    with multiprocessing.Pool(2) as p: return p.map(length, completions)

def executor(prompts, completions, **c):
    with concurrent.futures.ProcessPoolExecutor(2) as p: return list(p.map(length, completions))

def loop(prompts, completions, **c):
    async def one(t): await asyncio.sleep(0.01); return length(t)
    async def all_(): return await asyncio.gather(*map(one, completions))
    return asyncio.run(all_())

def awaitable(prompts, completions, **c):
    async def all_(): return [length(t) for t in completions]
    return all_()

def array(prompts, completions, **c):
    return np.array([[length(t)] for t in completions], dtype=np.float32)

def scalars(prompts, completions, **c): return [np.array([length(t)]) for t in completions]

async def sleeps(prompts, completions, **c):
    await asyncio.sleep(2.0)
    return [length(t) for t in completions]

class Judge:
    async def __call__(self, prompts, completions, **c): return [length(t) for t in completions]
judge = Judge()

def process(prompts, completions, **c):
    time.sleep(0.5)
    return [os.getpid()] * len(completions)

def dies(prompts, completions, **c): os.kill(os.getpid(), signal.SIGKILL)

def dies_once(prompts, completions, **c):
    if not os.path.exists("died"):
        open("died", "w").close(); os._exit(3)
    return [length(t) for t in completions]

def fails(prompts, completions, **c):
    with open("tries", "a") as file: file.write("x")
    if os.path.getsize("tries") < 3: raise ConnectionError("busy")
    return [length(t) for t in completions]

def square(prompts, completions, **c): return np.ones((len(completions), 2))
"""
Make = Callable[..., FunctionProcesses]
BATCH = Batch(["p"] * 3, ["a", "bb", "ccc"])


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    """Make a function's processes, in a folder that has the module."""
    (tmp_path / "many_kinds.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    running: list[FunctionProcesses] = []

    def make(name: str, **settings: Any) -> FunctionProcesses:
        settings = {"timeout_seconds": 60, **settings}
        source = Source.here(RewardConfig(function=f"many_kinds:{name}", **settings))
        running.append(FunctionProcesses(source))
        return running[-1]

    yield make
    for processes in running:
        processes.close()


KINDS = [
    *("alarm", "main_thread", "pool", "executor", "loop", "awaitable", "array", "scalars", "judge"),
]


def test_a_killed_process_leaves_no_file(
    made: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    processes = made("array")
    assert processes.score(BATCH) == [1.0, 2.0, 3.0]
    assert not list((tmp_path / "temporary").iterdir())


@pytest.mark.parametrize("name", KINDS)
def test_a_function_may_use_what_a_program_may(made: Make, name: str) -> None:
    assert made(name).score(BATCH) == [1.0, 2.0, 3.0]


def together(processes: FunctionProcesses, calls: int) -> tuple[list[Any], float]:
    """Return the scores of so many calls at once, and the seconds that they took."""
    found: list[Any] = []
    threads = [
        threading.Thread(target=lambda: found.append(processes.score(Batch(["p"], ["abc"]))))
        for _ in range(calls)
    ]
    start = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found, time.monotonic() - start


def test_nothing_reads_from_a_connection_that_is_closed(made: Make) -> None:
    """Its descriptor's number is the next process's, whose answers an old reader would take."""
    processes = made("alarm")
    first = processes._all[0]
    connection, poll = first._connection, first._connection.poll

    def slowly(seconds: float) -> bool:
        found = poll(seconds)
        if first.process.poll() is not None:
            time.sleep(0.5)
        return found

    connection.poll = slowly  # type: ignore[method-assign,assignment]
    time.sleep(1.5)  # until the reader has come to it
    first.close()
    assert connection.closed
    assert not first._reader.is_alive()


def test_concurrency_is_the_number_of_processes(made: Make) -> None:
    found, _ = together(made("process", concurrency=2), 4)
    assert len({score for (score,) in found}) == 2


def test_an_asynchronous_function_waits_for_all_batches_in_one_loop(made: Make) -> None:
    found, seconds = together(made("sleeps"), 8)
    assert found == [[3.0]] * 8
    assert seconds < 10  # one after another they take 16


def test_an_asynchronous_function_has_its_time_limit(made: Make) -> None:
    with pytest.raises(RewardError, match=r"many_kinds:sleeps took longer than 0\.2 s"):
        made("sleeps", timeout_seconds=0.2).score(BATCH)


def test_a_batch_is_asked_again_after_a_death_and_not_for_ever(made: Make) -> None:
    assert made("dies_once").score(BATCH) == [1.0, 2.0, 3.0]
    with pytest.raises(RewardError, match="its process died 3 times .signal SIGKILL. at one batch"):
        made("dies").score(BATCH)


def test_declared_exceptions_are_tried_again_and_others_are_not(made: Make, tmp_path: Path) -> None:
    settings = {"retry_on": ["ConnectionError"], "retries": 2}
    with pytest.raises(RewardError, match="raised ConnectionError: busy"):
        made("fails").score(BATCH)
    (tmp_path / "tries").unlink()
    assert made("fails", **settings).score(BATCH) == [1.0, 2.0, 3.0]
    assert (tmp_path / "tries").read_text() == "xxx"


def test_a_result_of_another_shape_is_refused(made: Make) -> None:
    with pytest.raises(RewardError, match=r"an array of shape \(3, 2\) for 3 completions"):
        made("square").score(BATCH)


def test_a_process_ends_with_the_one_that_started_it(made: Make, tmp_path: Path) -> None:
    code = """
        import os, threading
        from raywarp.config.rewards import RewardConfig
        from raywarp.rewards.process import FunctionProcesses, Source
        from raywarp.rewards.reward import Batch
        source = Source.here(RewardConfig(function="many_kinds:process"))
        processes = FunctionProcesses(source)
        print(processes.score(Batch(["p"], ["c"]))[0], flush=True)
        os.kill(os.getpid(), 9)
    """
    made("process").close()
    run = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(run, capture_output=True, text=True, cwd=tmp_path)
    child = int(float(done.stdout))
    deadline = time.monotonic() + 10
    while psutil.pid_exists(child) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not psutil.pid_exists(child), os.getpid()


def test_a_function_of_a_script_reaches_the_process(tmp_path: Path) -> None:
    """It is in no module that another process could import; so is what it refers to."""
    (tmp_path / "script.py").write_text(
        textwrap.dedent(
            """
            from raywarp.config.load import load_config
            from raywarp.rewards.process import FunctionProcesses, Source
            from raywarp.rewards.reward import Batch

            BONUS = 10

            class Judge:
                def __init__(self, bonus): self.bonus = bonus
                def __call__(self, prompts, completions):
                    return [len(c) + self.bonus for c in completions]

            def score(prompts, completions):
                return [len(c) + BONUS for c in completions]

            if __name__ == "__main__":
                five = lambda prompts, completions: [5]
                for function in ("__main__:score", score, Judge(20), five):
                    config = load_config({"reward": {"function": function}}).reward
                    processes = FunctionProcesses(Source.here(config))
                    print(config.function.partition("@")[0], processes.score(Batch(["p"], ["abc"])))
                    processes.close()
            """
        )
    )
    run = [sys.executable, "script.py"]
    done = subprocess.run(run, capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.splitlines() == [
        "__main__:score [13.0]",
        "__main__:score [13.0]",
        "python:Judge [23.0]",
        "python:lambda [5.0]",
    ], done.stderr


def test_a_second_run_of_a_session_is_scored_by_its_own_folder(
    ray_cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray starts its workers with the folders of the driver that began the session."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    remote: Any = ray_cluster.remote(concurrency_groups={WATCH: 1})(RewardActor)
    for name, value in (("one", 1.0), ("two", 2.0)):
        (tmp_path / name).mkdir()
        code = f"def score(prompts, completions):\n    return [{value}]\n"
        (tmp_path / name / "same_name.py").write_text(code)
        monkeypatch.chdir(tmp_path / name)
        config = RewardConfig(function="same_name:score")
        actor = remote.options(num_cpus=0).remote(config, source=Source.here(config))
        assert ray_cluster.get(actor.score.remote(["p"], ["c"]), timeout=60) == [value]
        ray_cluster.kill(actor)
