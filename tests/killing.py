"""A user's project on the tiny model, run by the real command, and ways to kill its processes.

The command runs in a process of its own.
"""

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import psutil
import yaml
from conftest import write_prompts
from tiny_models import save_tiny_llama

from raywarp.adapters.peft import load_peft
from raywarp.rollout.transport import digest
from raywarp.run.folder import Run
from raywarp.storage import scratch

REWARD = '''
"""Counts good words; takes as many seconds per call as the file `pace` says."""
import pathlib
import time

PACE = pathlib.Path(__file__).parent / "pace"

def score(prompts, completions, **columns):
    time.sleep(float(PACE.read_text()) if PACE.exists() else 0)
    return [text.split().count("good") + 0.1 * len(text.split()) for text in completions]
'''
KINDS = {
    "policy actor": "ray::PolicyActor",
    "rollout worker": "ray::RolloutWorker",
    "reward worker": "ray::RewardActor",
    "pool": "ray::RolloutPool",
}
OURS = ("ray::", *KINDS.values())
SETTINGS: dict[str, Any] = {
    "dtype": "float32",
    "reward": {"function": "paced_reward:score"},
    "lora": {"rank": 2, "alpha": 4},
    "warp": {
        "iterations": 1,
        "policies": 2,
        "steps": 24,
        "ema_rate": 0.1,
        "liti_rate": 0.5,
        "kl_coef": 0.02,
    },
    "optim": {"lr": 0.01, "batch_size": 8, "warmup_steps": 1},
    "rollout": {
        "engine": "transformers",
        "completions_per_prompt": 4,
        "max_new_tokens": 6,
        "temperature": 1.0,
    },
    "cluster": {
        "policy_actors": 2,
        "threads": 1,
        "cpus_per_policy": 0.5,
        "cpus_per_rollout_worker": 0.5,
    },
    "front": {"prompts": 4, "etas": [0, 1], "choose": {"eta": 1}, "samples": 1, "every": 0},
    "checkpoint_every": 5,
}


def make_project(folder: Path, **changes: Any) -> Path:
    """A folder with model, prompts, reward and config.yaml. changes: of SETTINGS, section by
    section.
    """
    folder.mkdir(parents=True, exist_ok=True)
    save_tiny_llama(folder / "model")
    (folder / "paced_reward.py").write_text(REWARD)
    write_prompts(folder / "prompts.jsonl")
    tree = {
        **SETTINGS,
        "model": str(folder / "model"),
        "prompts": {"dataset": str(folder / "prompts.jsonl")},
    }
    for section, values in changes.items():
        tree[section] = {**tree[section], **values} if isinstance(values, dict) else values
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    return folder


def own_home(folder: Path) -> None:
    """Ray's files, its token among them, go there: for every process from now on. The path has to
    be short, as it becomes a socket's.
    """
    os.environ.update(
        RAY_TMPDIR=str(folder), HOME=str(folder), RAY_USAGE_STATS_ENABLED="0", RAY_AUTH_MODE="token"
    )
    (folder / ".ray").mkdir()
    (folder / ".ray" / "auth_token").write_text(
        secrets.token_hex(32)
    )  # ray.init makes one, Cluster does not (Ray 2.60)


def set_pace(project: Path, seconds: float) -> None:
    """Of the reward, per batch, from the next one on: at once, since it may just be reading."""
    new = project / "pace.new"
    new.write_text(str(seconds))
    new.replace(project / "pace")


class Patience:
    """A time-out by a clock that stands still while this process does: a busy machine may hold up
    everybody.
    """

    def __init__(self, seconds: float):
        self.left, self.last = seconds, time.monotonic()

    def lasts(self) -> bool:
        """Sleeps a moment; False when the time is up."""
        time.sleep(0.05)
        now = time.monotonic()
        self.left -= min(now - self.last, 0.5)
        self.last = now
        return self.left > 0


class Command:
    """`raywarp train` (or another command) in a project's folder, as a process with a log."""

    def __init__(
        self, project: Path, out: str, *overrides: str, address: str = "local", verb: str = "train"
    ):
        self.run, self.log = Run(project / out), project / f"{out}.log"
        environment = {**os.environ, "RAY_ADDRESS": address}
        code = (
            "import faulthandler, signal, sys; faulthandler.register(signal.SIGUSR1); from"
            " raywarp.cli.commands import main; sys.exit(main())"
        )
        command = [
            sys.executable,
            "-c",
            code,
            verb,
            "config.yaml",
            f"out={project / out}",
            *overrides,
        ]
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                command,
                cwd=project,
                env=environment,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
            )

    def steps(self) -> int:
        return len(self.run.metrics())

    def wait_until(self, condition: Callable[[], Any], seconds: float = 240) -> Any:
        """The condition's value, once it is true.

        Raises:
            AssertionError: the command ended or time went by before; with the end of its log.
        """
        patience = Patience(seconds)
        while not (value := condition()):
            assert self.process.poll() is None, (
                f"ended with {self.process.returncode}:\n{self.tail()}"
            )
            assert patience.lasts(), f"nothing for {seconds} s:\n{self.tail()}"
        return value

    def wait_for_steps(self, count: int) -> None:
        self.wait_until(lambda: self.steps() >= count)

    def end(self, seconds: float = 300) -> int:
        """Its exit code."""
        patience = Patience(seconds)
        while (code := self.process.poll()) is None:
            assert patience.lasts(), f"not at its end after {seconds} s:\n{self.tail()}"
        return code

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    def tail(self) -> str:
        return self.log.read_text()[-4000:]


def processes(kind: str, below: psutil.Process) -> list[psutil.Process]:
    """The living processes of one of KINDS, among the descendants of a process."""
    found = []
    for process in below.children(recursive=True):
        with contextlib.suppress(psutil.Error):
            title = process.cmdline()
            if (
                title
                and title[0].startswith(KINDS[kind])
                and process.status() != psutil.STATUS_ZOMBIE
            ):
                found.append(process)
    return sorted(found, key=lambda process: process.pid)


def descendants(command: Command) -> list[int]:
    """The processes below a command."""
    return [process.pid for process in psutil.Process(command.process.pid).children(recursive=True)]


def kill(process: psutil.Process, number: int = signal.SIGKILL) -> None:
    with contextlib.suppress(psutil.Error):
        process.send_signal(number)


def survivors(pids: Iterable[int], seconds: float = 30) -> dict[int, str]:
    """Those that are still there after that time."""
    patience, left = Patience(seconds), set(pids)
    while (left := {pid for pid in left if _lives(pid)}) and patience.lasts():
        pass
    return {pid: _title(pid) for pid in left}


def _title(pid: int) -> str:
    try:
        return " ".join(psutil.Process(pid).cmdline())[:100]
    except psutil.NoSuchProcess:
        return "gone now"


def _lives(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def adapter_folders() -> set[str]:
    return {path.name for path in Path(tempfile.gettempdir()).glob(f"{scratch.PREFIX}*")}


def adapters(run: Run) -> dict[str, str]:
    """What a finished run ends with: a digest of each policy, of the last merge and of the chosen
    adapter.
    """
    folders = [*run.folder.glob("iterations/*/merged"), run.folder / "adapter"]
    for listed in run.folder.glob("iterations/*/policies.json"):
        folders += [run.folder / name for name in json.loads(listed.read_text())]
    return {str(folder.relative_to(run.folder)): digest(load_peft(folder)) for folder in folders}


def missing_lines(run: Run, iterations: int, policies: int, steps: int) -> int:
    """Steps that are not in metrics.jsonl exactly once."""
    rows = [(row["iteration"], row["policy"], row["step"]) for row in run.metrics()]
    wanted = [
        (i, m, t)
        for i in range(1, iterations + 1)
        for m in range(1, policies + 1)
        for t in range(steps)
    ]
    return sum(rows.count(step) != 1 for step in wanted)


def told(run: Run, event: str) -> list[dict[str, Any]]:
    """The run's events of one kind."""
    return [row for row in run.events() if row["event"] == event]
