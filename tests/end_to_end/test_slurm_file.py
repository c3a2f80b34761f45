"""Tests of cluster/slurm.sbatch: the real script, with stand-ins for Slurm and for symmetric-run.

The last one interrupts a real run, as Slurm does at the time limit, and continues it.
"""

import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from killing import Patience, adapters, make_project, missing_lines, set_pace, told
from ray.scripts.symmetric_run import curate_and_validate_ray_start_args

import raywarp.cli.commands
from raywarp.run.folder import Run

SCRIPT = Path(__file__).parents[2] / "cluster" / "slurm.sbatch"
STAND_INS = {
    "scontrol": '[ "$1" = requeue ] && echo "$@" >>requeued || printf "node-1\\nnode-2\\n"',
    # Runs its command here, once; `hostname` prints what the test says.
    "srun": """
for word; do
  case $word in
    --ip-address) echo "$NAMED"; exit ;;
    --all-ip-addresses) echo "$LISTED"; exit ;;
  esac
done
while [ "$1" != ray ]; do shift; done
exec "$@"
""",
    # `ray symmetric-run` on the head node: it runs the command, and ends with its return code.
    "ray": """
printf '%s\\n' "$@" >ray-words
while [ "$1" != -- ]; do shift; done
shift
exec python3 -c 'import subprocess, sys; sys.exit(subprocess.run(sys.argv[1:]).returncode)' "$@"
""",
    "raywarp": """
printf '%s\\n' "$RAY_AUTH_MODE" "${#RAY_AUTH_TOKEN}" "$RAY_ADDRESS" "$@" >raywarp-words
if [ -e endless ]; then trap 'exit 143' TERM; touch started; while :; do sleep 0.05; done; fi
exit "$(cat code)"
""",
}


def write_stand_ins(folder: Path, **others: str) -> None:
    for name, script in {**STAND_INS, **others}.items():
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)


class Job:
    """slurm.sbatch as the batch script of a job on two nodes, in a folder."""

    def __init__(self, folder: Path, *words: str, named: str = "10.0.0.1", listed: str = ""):
        self.folder, self.log = folder, folder / "job.log"
        path = f"{folder / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
        slurm = {
            "SLURM_JOB_ID": "1234567",
            "SLURM_JOB_NODELIST": "node-[1-2]",
            "SLURM_JOB_NUM_NODES": "2",
        }
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                ["bash", SCRIPT, *words],
                cwd=folder,
                env={**os.environ, **slurm, "PATH": path, "NAMED": named, "LISTED": listed},
                stdout=log,
                stderr=log,
            )

    def end(self, seconds: float = 60) -> int:
        return self.process.wait(seconds)

    def stop(self) -> None:
        """Stop raywarp and then the script, if the test has not seen their end."""
        if self.process.poll() is None:
            self.process.terminate()
            self.process.wait(60)

    def near_the_time_limit(self) -> None:
        """Send what `#SBATCH --signal=B:USR1@300` asks for: to the script and to nothing else."""
        self.process.send_signal(signal.SIGUSR1)

    def requeued(self) -> list[str]:
        path = self.folder / "requeued"
        return path.read_text().splitlines() if path.exists() else []

    def words_of(self, program: str) -> list[str]:
        return (self.folder / f"{program}-words").read_text().splitlines()


Start = Callable[..., Job]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder whose `raywarp` ends with exit code 0."""
    folder = tmp_path / "größe 長い"
    (folder / "bin").mkdir(parents=True)
    write_stand_ins(folder / "bin")
    (folder / "code").write_text("0")
    return folder


@pytest.fixture
def start(folder: Path) -> Iterator[Start]:
    """Return what starts a job in that folder."""
    jobs: list[Job] = []

    def start(*words: str, **addresses: str) -> Job:
        jobs.append(Job(folder, *words, **addresses))
        return jobs[-1]

    yield start
    for job in jobs:
        job.stop()


def wait_for(path: Path) -> None:
    patience = Patience(60)
    while not path.exists():
        assert patience.lasts(), f"no {path}"


def test_the_command_and_its_cluster(folder: Path, start: Start) -> None:
    job = start("größe/my.yaml", "warp.steps=5", "out=/shared/a b")
    assert job.end() == 0, job.log.read_text()
    words = job.words_of("ray")
    split = words.index("--")
    assert words[:5] == ["symmetric-run", "--address", "10.0.0.1:24567", "--min-nodes", "2"]
    assert curate_and_validate_ray_start_args(words[1:split]) == ["--dashboard-host=127.0.0.1"]
    mode, token_length, address, *command = job.words_of("raywarp")
    assert (mode, token_length, address) == ("token", "64", "10.0.0.1:24567")
    assert command == ["train", "größe/my.yaml", "warp.steps=5", "out=/shared/a b"]
    raywarp.cli.commands._parser().parse_args(command)
    assert not job.requeued()


def test_what_it_asks_of_slurm() -> None:
    """Slurm reads these lines up to the first command."""
    before, _, after = SCRIPT.read_text().partition("\nset -euo pipefail\n")
    asked = dict(re.findall(r"^#SBATCH --([a-z-]+)(?:=(\S+))?$", before, re.MULTILINE))
    assert "#SBATCH" not in after
    assert len(asked) == before.count("\n#SBATCH ")
    assert (asked["nodes"], asked["ntasks-per-node"], asked["mem"]) == ("2", "1", "0")
    assert {"exclusive", "requeue"} <= set(asked)
    assert asked["open-mode"] == "append"  # what is queued again has the same log
    assert asked["signal"] == "B:USR1@300"
    assert re.search(r"^trap '.*' USR1$", after, re.MULTILINE)


def test_without_a_config_it_says_how_it_is_used(folder: Path, start: Start) -> None:
    job = start()
    assert job.end() == 2
    assert job.log.read_text() == "usage: sbatch cluster/slurm.sbatch CONFIG [KEY=VALUE ...]\n"


@pytest.mark.parametrize(
    ("named", "listed", "address"),
    [
        ("10.0.0.1", "172.17.0.1", "10.0.0.1"),
        ("fd00::12 10.0.0.1", "", "10.0.0.1"),
        ("127.0.1.1", "10.0.0.7 172.17.0.1 fd00::12", "10.0.0.7"),
        ("127.0.0.1 ::1 10.0.0.9", "10.0.0.7", "10.0.0.9"),
        ("", "169.254.0.2 10.0.0.7", "10.0.0.7"),
    ],
)
def test_the_head_has_an_address_that_others_reach(
    folder: Path, start: Start, named: str, listed: str, address: str
) -> None:
    job = start("my.yaml", named=named, listed=listed)
    assert job.end() == 0, job.log.read_text()
    assert job.words_of("ray")[2] == f"{address}:24567"


def test_a_head_without_such_an_address_is_refused(folder: Path, start: Start) -> None:
    job = start("my.yaml", named="127.0.1.1", listed="127.0.1.1 fd00::12")
    assert job.end() == 1
    assert "node-1 has no IPv4 address that other nodes can reach" in job.log.read_text()
    assert not (folder / "ray-words").exists()


@pytest.mark.parametrize("code", [0, 1, 2])
def test_a_run_that_ended_by_itself_is_not_queued_again(
    folder: Path, start: Start, code: int
) -> None:
    (folder / "code").write_text(str(code))
    job = start("my.yaml")
    assert job.end() == code
    assert not job.requeued()


def test_wrong_input_just_before_the_time_limit_is_not_queued_again(
    folder: Path, start: Start
) -> None:
    write_stand_ins(folder / "bin", raywarp=STAND_INS["raywarp"].replace("143", "2"))
    (folder / "endless").touch()
    job = start("my.yaml")
    wait_for(folder / "started")
    job.near_the_time_limit()
    assert job.end() == 2
    assert not job.requeued()


def test_the_time_limit_stops_raywarp_and_queues_the_job_again_once(
    folder: Path, start: Start
) -> None:
    (folder / "endless").touch()
    job = start("my.yaml")
    wait_for(folder / "started")
    job.near_the_time_limit()
    assert job.end() == 143
    assert job.requeued() == ["requeue 1234567"]


@pytest.mark.parametrize(
    ("early", "code"),
    [
        ({"raywarp": "touch started; exec sleep 60"}, 241),  # has not set its handler yet
        ({"ray": "touch started; exec sleep 60"}, 143),  # has not been started yet
    ],
)
def test_the_time_limit_may_come_before_raywarp_listens(
    folder: Path, start: Start, early: dict[str, str], code: int
) -> None:
    write_stand_ins(folder / "bin", **early)
    job = start("my.yaml")
    wait_for(folder / "started")
    job.near_the_time_limit()
    assert job.end() == code
    assert job.requeued() == ["requeue 1234567"]


def test_scancel_stops_raywarp_and_does_not_queue_the_job_again(folder: Path, start: Start) -> None:
    (folder / "endless").touch()
    job = start("my.yaml")
    wait_for(folder / "started")
    job.process.send_signal(signal.SIGTERM)
    assert job.end() == 143
    assert not job.requeued()


def test_a_real_run_continues_after_the_time_limit(
    folder: Path, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A requeued job is the same script with the same words."""
    make_project(
        folder,
        warp={"steps": 6},
        cluster={"policy_actors": 1},
        front={"prompts": 2, "ceiling_completions": 4},
    )
    own_ray = f'RAY_ADDRESS=local exec "{sys.executable}" -m raywarp.cli "$@"'
    write_stand_ins(folder / "bin", raywarp=own_ray)
    set_pace(folder, 0.3)
    with tempfile.TemporaryDirectory(prefix="rw", ignore_cleanup_errors=True) as home:
        monkeypatch.setenv("HOME", home)
        monkeypatch.setenv("RAY_TMPDIR", home)  # its path becomes a socket's, so it is short
        job, run = start("config.yaml", "out=run"), Run(folder / "run")
        patience = Patience(240)
        while len(run.metrics()) < 3:
            assert job.process.poll() is None, job.log.read_text()
            assert patience.lasts(), job.log.read_text()
        job.near_the_time_limit()
        assert job.end(240) == 143, job.log.read_text()
        assert "stopped by SIGTERM; iteration 1 policy 1 is saved" in job.log.read_text()
        assert job.requeued() == ["requeue 1234567"]
        saved = {row["policy"]: row["step"] for row in told(run, "saved")}

        set_pace(folder, 0)
        job = start("config.yaml", "out=run")
        assert job.end(240) == 0, job.log.read_text()
    assert {row["policy"]: row["step"] for row in told(run, "resumed")} == saved
    assert missing_lines(run, 1, 2, 6) == 0
    assert adapters(run)["adapter"]
    assert len(job.requeued()) == 1
