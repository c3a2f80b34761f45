"""Submit many runs at once to a cluster that has room for a few, and show when each had its turn.

    .venv/bin/python tests/bench/waiting_runs.py [--runs 8] [--room 2]

The cluster is of this machine alone, the runs are tiny ones of two policies, submitted as jobs. The
last line is JSON: how many finished, the most that ran at one time, and when the actors of each run
started, in seconds and in the order of submission.
"""

import argparse
import json
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).parents[1]))

from killing import make_project

from raywarp.run.folder import Run

ENDED = ("SUCCEEDED", "FAILED", "STOPPED")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=8)
    parser.add_argument("--room", type=int, default=2, help="runs that fit at one time")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="rw", ignore_cleanup_errors=True) as folder:
        project = make_project(Path(folder) / "project", warp={"steps": 6})
        os.environ.update(
            HOME=folder,
            RAY_TMPDIR=folder,
            RAY_AUTH_MODE="token",
            RAY_AUTH_TOKEN=secrets.token_hex(32),
            RAY_USAGE_STATS_ENABLED="0",
        )
        with cluster(1.5 * options.room) as address:
            print(json.dumps(measure(address, project, options.runs)), flush=True)


@contextmanager
def cluster(cpus: float) -> Iterator[str]:
    """The address of the job server of a Ray with so many CPUs, ended by pid."""
    ports = dict(zip(("port", "dashboard-port"), map(str, free_ports(2)), strict=True))
    words = [f"--{name}={value}" for name, value in ports.items()]
    more = ["--num-cpus", f"{cpus:g}", "--min-worker-port=0", "--max-worker-port=0"]
    head = subprocess.Popen(
        [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", *words, *more],
        stdout=subprocess.DEVNULL,
    )
    try:
        yield f"http://127.0.0.1:{ports['dashboard-port']}"
    finally:
        ours = psutil.Process(head.pid).children(recursive=True)
        head.terminate()
        head.wait(60)
        for process in ours:
            if process.is_running():
                process.kill()


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def measure(address: str, project: Path, count: int) -> dict[str, Any]:
    client, start = client_of(address), time.monotonic()
    outs = [project / f"run-{n}" for n in range(count)]
    begin = time.time()
    jobs = [
        client.submit_job(
            entrypoint=f"{sys.executable} -m raywarp.cli train {project}/config.yaml out={out}",
            runtime_env={"env_vars": {"PYTHONPATH": os.pathsep.join([str(project), os.getcwd()])}},
        )
        for out in outs
    ]
    most, states = 0, [""] * count
    while any(state not in ENDED for state in states):
        time.sleep(1)
        states = [str(client.get_job_status(job)).rpartition(".")[2] for job in jobs]
        running = [out for out, state in zip(outs, states, strict=True) if state == "RUNNING"]
        most = max(most, sum(bool(Run(out).events()) for out in running))
    for job, state in zip(jobs, states, strict=True):
        if state != "SUCCEEDED":
            print(client.get_job_logs(job)[-2000:], flush=True)
    spans = [span(out, begin) for out in outs]
    return {
        "finished": states.count("SUCCEEDED"),
        "most_at_one_time": most,
        "seconds": round(time.monotonic() - start, 1),
        "started_and_ended": spans,
    }


def span(out: Path, begin: float) -> Sequence[float]:
    """When a run had its actors, and when it ended, in seconds after the submission."""
    from datetime import datetime

    times = {row["event"]: row["time"] for row in Run(out).events()}
    return [
        round(datetime.fromisoformat(times[event]).timestamp() - begin, 1)
        for event in ("started", "finished")
        if event in times
    ]


def client_of(address: str) -> Any:
    from ray.job_submission import JobSubmissionClient

    deadline = time.monotonic() + 60
    while True:
        try:
            return JobSubmissionClient(address)
        except Exception:
            if time.monotonic() > deadline:
                raise
            time.sleep(1)


if __name__ == "__main__":
    main()
