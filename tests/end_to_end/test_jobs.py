"""Tests of WARP runs as Ray jobs on a cluster with token authentication, by the real commands.

cluster/local.sh starts the cluster.
"""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import socket
import socketserver
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from conftest import installed_in, write_prompts
from ray.job_submission import JobSubmissionClient
from tiny_models import save_tiny_llama

from raywarp.adapters.peft import load_peft
from raywarp.config.load import load_config
from raywarp.config.schema import ConfigError
from raywarp.planning.jobs import absolute_paths, check_paths
from raywarp.rollout.transport import digest
from raywarp.run.prometheus import GAUGES

REPOSITORY = Path(__file__).parents[2]
TRAIN = ("--working-dir", ".", "--", "raywarp", "train", "warp.yaml")  # of `ray job submit`
REWARD = '''
"""Counts good words; takes two minutes from its fifth call on while there is a file `slow`."""
import pathlib, time

CALLS = []

def score(prompts, completions, **columns):
    CALLS.append(len(completions))
    if len(CALLS) > 4 and pathlib.Path(__file__).with_name("slow").exists():
        time.sleep(120)
    return [float(text.split().count("good")) for text in completions]
'''


@dataclass(frozen=True)
class Cluster:
    """A project folder, and the environment that reaches the cluster from there."""

    local_sh: Path
    project: Path
    environment: dict[str, str]

    def run(self, *command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command,
            cwd=self.project,
            env=self.environment | environment,
            capture_output=True,
            text=True,
            timeout=300,
            stdin=subprocess.DEVNULL,
        )

    @property
    def submit_py(self) -> Path:
        return self.local_sh.with_name("submit.py")

    def client(self) -> JobSubmissionClient:
        token = (Path(self.environment["HOME"]) / ".ray" / "auth_token").read_text()
        return JobSubmissionClient(
            self.environment["RAY_API_SERVER_ADDRESS"], headers={"Authorization": f"Bearer {token}"}
        )

    def start(self, *command: str | Path) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            command,
            cwd=self.project,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            stdin=subprocess.DEVNULL,
            # ignored, where the tests run in the background
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def names(self, what: str) -> set[str]:
        """Of all "actors" or "tasks" so far, as the dashboard lists them, without what makes them
        unique.
        """
        address, token = (
            self.environment["RAY_API_SERVER_ADDRESS"],
            (Path(self.environment["HOME"]) / ".ray" / "auth_token").read_text(),
        )
        request = urllib.request.Request(
            f"{address}/api/v0/{what}?limit=10000", headers={"Authorization": f"Bearer {token}"}
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            rows = json.load(answer)["data"]["result"]["result"]
        return {re.sub("-[0-9a-f]{8}$", "", row["name"]) for row in rows}

    def metrics(self) -> str:
        """What the head's Prometheus endpoint says now; nothing before it is there."""
        port = next(
            (Path(self.environment["RAYWARP_CLUSTER"]) / "ray" / "session_latest").glob(
                "metrics_export_port_*"
            ),
            None,
        )
        if port is None:
            return ""
        with urllib.request.urlopen(
            f"http://127.0.0.1:{port.read_text()}/metrics", timeout=30
        ) as answer:
            return str(answer.read(), "utf-8")


def installed_repository(root: Path) -> Path:
    """A copy of cluster/ beside this environment as its .venv, which local.sh takes for its own
    finished installation.
    """
    shutil.copytree(REPOSITORY / "cluster", root / "cluster")
    shutil.copy(REPOSITORY / "pyproject.toml", root)
    venv = root / ".venv"
    venv.mkdir()
    for path in Path(sys.prefix).iterdir():
        if path.name != "raywarp-install":
            (venv / path.name).symlink_to(path)
    (venv / "raywarp-install").write_text(installed_in(root))
    return root


def free_port() -> int:
    """Of those from 10002 to 19999, which Ray keeps for its workers unless it is told otherwise."""
    while True:
        with (
            contextlib.suppress(OSError),
            socket.create_server(("127.0.0.1", random.randint(10002, 19999))) as server,
        ):
            port: int = server.getsockname()[1]
            return port


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    root = installed_repository(tmp_path_factory.mktemp("repository"))
    project = tmp_path_factory.mktemp("project")
    home = tmp_path_factory.mktemp("home")
    save_tiny_llama(project / "llama")
    (project / "count_good.py").write_text(REWARD)
    write_prompts(project / "prompts.jsonl")
    (project / "warp.yaml").write_text(yaml.safe_dump(SETTINGS))
    with tempfile.TemporaryDirectory(
        prefix="rwj", ignore_cleanup_errors=True
    ) as folder:  # short: it becomes a socket's path
        inherited = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("RAY_", "RAYWARP_"))
        }
        environment = inherited | {
            "HOME": str(home),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHON": sys.executable,
            "RAYWARP_EXTRA": "cpu",
            "RAYWARP_CLUSTER": f"{folder}/c",
            "RAYWARP_PORT": str(free_port()),
            "RAYWARP_CACHE": os.environ["RAYWARP_CACHE"],
            "RAY_AUTH_MODE": "token",
            "RAY_metrics_report_interval_ms": "500",
            "COLUMNS": "80",  # as some shells export it; ps cuts what it prints to that
        }
        there = Cluster(root / "cluster" / "local.sh", project, environment)
        try:
            started = there.run(there.local_sh, "start", "--num-cpus=4", PATH="/usr/bin:/bin")
            assert started.returncode == 0, started.stdout + started.stderr
            environment["RAY_API_SERVER_ADDRESS"] = (
                f"http://127.0.0.1:{environment['RAYWARP_PORT']}"
            )
            yield there
        finally:
            stopped = there.run(there.local_sh, "stop")
        assert "stopped the cluster" in stopped.stdout
        left = [
            process.info["cmdline"]
            for process in psutil.process_iter(["cmdline"])
            if f"{folder}/c" in " ".join(process.info["cmdline"] or [])
        ]
        assert not left
        assert "no cluster" in there.run(there.local_sh, "stop").stdout


SETTINGS = {
    "model": "llama",
    "dtype": "float32",
    "out": "run",
    "prompts": {"dataset": "prompts.jsonl"},
    "reward": {"function": "count_good:score"},
    "lora": {"rank": 2, "alpha": 4},
    "warp": {"iterations": 2, "policies": 2, "steps": 6, "ema_rate": 0.2, "liti_rate": 0.5},
    "optim": {"lr": 0.03, "batch_size": 8, "warmup_steps": 1},
    "rollout": {
        "engine": "transformers",
        "completions_per_prompt": 4,
        "max_new_tokens": 4,
        "temperature": 1.0,
    },
    "cluster": {"policy_actors": 1, "threads": 1},
    "front": {"prompts": 2, "etas": [0, 1], "choose": {"eta": 1}, "samples": 1, "every": 0},
    "checkpoint_every": 2,
}


def adapters(run: Path) -> dict[str, str]:
    """Folder → hash, of every adapter that the run left: policies (under their keys), inits,
    merges, and the chosen one.
    """
    return {
        str(path.parent.relative_to(run)): digest(load_peft(path.parent))
        for path in sorted(run.rglob("adapter_model.safetensors"))
    }


def job_of(text: str) -> str:
    match = re.search(r"raysubmit_\w+", text)
    assert match, text
    return match[0]


def wait_for(condition: Callable[[], object], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.fixture(scope="module")
def uninterrupted(cluster: Cluster) -> tuple[Path, str, set[str]]:
    """The run by local.sh: its folder, all that was printed, and the metrics of it that were seen
    meanwhile.
    """
    submission, metrics = cluster.start(cluster.local_sh, "submit", "warp.yaml"), set[str]()
    printed: list[str] = []
    assert submission.stdout
    reader = threading.Thread(
        target=lambda stream: printed.extend(stream), args=[submission.stdout]
    )
    reader.start()
    while submission.poll() is None:
        metrics |= {
            line for line in cluster.metrics().splitlines() if line.startswith("ray_raywarp_")
        }
        time.sleep(0.3)
    reader.join()
    assert submission.returncode == 0, "".join(printed)
    return cluster.project / "run", "".join(printed), metrics


def test_submit_follows_the_log_without_duplicates(
    uninterrupted: tuple[Path, str, set[str]],
) -> None:
    run, printed, _ = uninterrupted
    # `out` was made absolute: it is here, not in the job's temporary folder
    assert len(adapters(run)) == 4 + 2 * 2 + 1
    lines = [
        line
        for line in printed.splitlines()
        if re.search(r"iteration \d policy \d step \d/6", line)
    ]
    assert len(lines) == len(set(lines)) == 2 * 2 * 3  # steps 1, 5 and 6
    assert "succeeded" in printed
    assert re.search(r"on the cluster at [\d.]+:\d+ \(job raysubmit_\w+\): 4 CPUs\n", printed)
    assert "\x1b" not in printed


def test_metrics_are_on_rays_endpoint(uninterrupted: tuple[Path, str, set[str]]) -> None:
    run, _, lines = uninterrupted
    assert {line.partition("{")[0] for line in lines} >= {
        *(f"ray_{name}" for name in GAUGES if name != "raywarp_kl_sft_nats"),
        *(
            "ray_raywarp_step_seconds",
            "ray_raywarp_tokens_per_second",
            "ray_raywarp_steps_total",
            "ray_raywarp_tokens_total",
        ),
    }
    rewards = [
        line
        for line in lines
        if line.startswith("ray_raywarp_reward{")
        and 'iteration="1"' in line
        and 'policy="2"' in line
    ]
    seen = {float(line.rpartition(" ")[2]) for line in rewards}
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    logged = {row["reward"] for row in rows if (row["iteration"], row["policy"]) == (1, 2)}
    assert seen
    assert all(min(abs(value - reward) for reward in logged) < 1e-9 for value in seen)
    assert all('run="run"' in line for line in lines)


def test_the_dashboard_names_actors_and_what_they_work_on(
    cluster: Cluster, uninterrupted: tuple[Path, str, set[str]]
) -> None:
    assert {"raywarp-policy-1", "raywarp-rollout-1", "raywarp-reward-1"} <= cluster.names("actors")
    assert {f"PolicyActor.fine_tune iteration {i} policies 1, 2" for i in (1, 2)} <= cluster.names(
        "tasks"
    )


def test_a_stopped_job_continues_to_the_same_bits(
    cluster: Cluster, uninterrupted: tuple[Path, str, set[str]]
) -> None:
    again, slow = cluster.project / "again", cluster.project / "slow"
    command = (
        *("ray", "job", "submit"),
        *TRAIN,
        f"out={again}",
    )
    slow.touch()
    submission = cluster.start(*command)
    wait_for(lambda: list(again.glob("policies/*/checkpoint-*/manifest.json")))
    (job,) = [job.submission_id for job in cluster.client().list_jobs() if job.status == "RUNNING"]
    assert job
    stopped = cluster.run(sys.executable, cluster.submit_py, "--stop", job)
    assert stopped.returncode == 0, stopped.stdout + stopped.stderr
    assert "was stopped; the same submission continues it" in stopped.stderr
    assert "stopped by SIGTERM; iteration 1 policy 1 is saved at step 2" in stopped.stdout
    assert not any(again.glob("policies/*/adapter_model.safetensors"))
    events = [json.loads(line) for line in (again / "events.jsonl").read_text().splitlines()]
    # the last before Ray kills it, after 3 s
    assert [row["event"] for row in events] == [
        "started",
        "saved",
        "saved",
        "stopped",
    ]
    assert "was stopped" in submission.communicate(timeout=60)[0]

    slow.unlink()
    continued = cluster.run(*command)
    assert continued.returncode == 0, continued.stdout + continued.stderr
    assert "continues at step" in continued.stdout
    assert adapters(again) == adapters(uninterrupted[0])


def test_a_relative_out_is_refused_in_a_job_and_following_exits_as_it_did(cluster: Cluster) -> None:
    refused = cluster.run(
        *("ray", "job", "submit", "--no-wait"),
        *TRAIN,
    )
    # A company's proxy is not asked for this machine.
    proxies = dict.fromkeys(("http_proxy", "HTTP_PROXY", "ALL_PROXY"), "http://127.0.0.1:9")
    following = cluster.run(
        *(sys.executable, cluster.submit_py, "--follow", job_of(refused.stdout)),
        **proxies,
        no_proxy="",
    )
    assert following.returncode == 2, following.stderr
    assert "out=run is relative: in a Ray job it would lie in a temporary copy" in following.stdout
    assert "Traceback" not in following.stdout


def test_rayjob_sh_ends_a_job_with_wrong_input_as_stopped(cluster: Cluster) -> None:
    """KubeRay repeats what failed, and not what was stopped. It follows with `ray job logs`."""
    client, here = cluster.client(), cluster.environment
    (cluster.project / "bin").mkdir()
    (cluster.project / "bin" / "raywarp").write_text("#!/bin/sh\nexit 1\n")
    (cluster.project / "bin" / "raywarp").chmod(0o755)
    script = cluster.local_sh.with_name("rayjob.sh")
    for job, path in {"wrong": here["PATH"], "failed": f"{cluster.project}/bin:/bin"}.items():
        variables = {"RAY_API_SERVER_ADDRESS": here["RAY_API_SERVER_ADDRESS"], "PATH": path}
        client.submit_job(
            entrypoint=f"{script} train {cluster.project / 'warp.yaml'}",
            submission_id=job,
            runtime_env={"env_vars": variables},
        )
    following = cluster.run("ray", "job", "logs", "--follow", "wrong")
    assert following.returncode == 0, following.stdout + following.stderr
    assert "out=run is relative: in a Ray job it would lie in a temporary copy" in following.stdout
    assert client.get_job_status("wrong") == "STOPPED"
    assert client.get_job_status("failed") == "FAILED"
    assert client.get_job_info("failed").driver_exit_code == 1


def test_ctrl_c_leaves_the_job(cluster: Cluster, uninterrupted: tuple[Path, str, set[str]]) -> None:
    following = cluster.start(sys.executable, cluster.submit_py, "warp.yaml")
    assert following.stdout
    job = job_of(following.stdout.readline())
    following.send_signal(signal.SIGINT)
    assert (
        f"job {job} goes on; follow it with --follow {job}" in following.communicate(timeout=60)[0]
    )
    assert following.returncode == 130
    assert not cluster.client().get_job_status(job).is_terminal()
    assert cluster.run(sys.executable, cluster.submit_py, "--stop", job).returncode == 0


class Line(socketserver.ThreadingTCPServer):
    """A line to a local port that can be cut: the connections that there are end, new ones are
    served.
    """

    daemon_threads = True

    def __init__(self, port: int):
        super().__init__(("127.0.0.1", 0), socketserver.BaseRequestHandler)
        self.port, self.open = port, list[socket.socket]()

    def finish_request(self, request: Any, client_address: Any) -> None:
        with socket.create_connection(("127.0.0.1", self.port)) as server:
            self.open += [request, server]
            back = threading.Thread(target=self.pump, args=[server, request], daemon=True)
            back.start()
            self.pump(request, server)
            back.join()

    def pump(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)

    def cut(self) -> None:
        for connection in self.open:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self.open.clear()


def test_following_survives_a_lost_connection(cluster: Cluster) -> None:
    """Each line is printed once, in order, although every connection gets the log from its
    beginning.
    """
    script = "import time\nfor n in range(15): print('line', n, flush=True); time.sleep(0.2)"
    job = job_of(
        cluster.run("ray", "job", "submit", "--no-wait", "--", sys.executable, "-c", script).stdout
    )
    with Line(int(cluster.environment["RAYWARP_PORT"])) as line:
        threading.Thread(target=line.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{line.server_address[1]}"
        following = cluster.start(
            sys.executable, cluster.submit_py, "--follow", job, "--address", address
        )
        assert following.stdout
        printed, cut = [], []
        for text in following.stdout:
            printed.append(text.strip())
            if text.strip() in ("line 3", "line 9"):
                cut.append(len(line.open))
                line.cut()
        line.shutdown()
    assert len(cut) == 2
    assert all(cut), "--address was not used"
    assert following.wait(timeout=60) == 0, printed
    assert [text for text in printed if text.startswith("line ")] == [
        f"line {n}" for n in range(15)
    ]


def test_without_the_token_nothing_is_told_or_done(cluster: Cluster, tmp_path: Path) -> None:
    """Another user of this machine: no token, or another one."""
    before = len(cluster.client().list_jobs())
    elsewhere = {"HOME": str(tmp_path)}
    submission = (
        *("ray", "job", "submit"),
        *TRAIN,
    )
    address = f"http://127.0.0.1:{cluster.environment['RAYWARP_PORT']}"
    none, wrong = {"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_TOKEN": "0" * 64}
    follower = (sys.executable, cluster.submit_py, "warp.yaml")
    attempts = [
        (submission, none),
        (submission, wrong),
        (("ray", "job", "list"), none),
        (follower, wrong),
    ]
    with ThreadPoolExecutor(2) as two:
        results = list(
            two.map(lambda attempt: cluster.run(*attempt[0], **elsewhere, **attempt[1]), attempts)
        )
    for result in results:
        assert result.returncode != 0
    for result in results[:-1]:
        assert re.search("[Aa]uthentication", result.stdout + result.stderr), (
            result.stdout + result.stderr
        )
    assert results[-1].returncode == 2
    assert "the cluster refuses the token in RAY_AUTH_TOKEN" in results[-1].stderr
    assert "Traceback" not in results[-1].stdout + results[-1].stderr
    for path in ("/api/jobs/", "/api/version", "/logs", "/nodes?view=summary"):
        with pytest.raises(urllib.error.HTTPError) as refusal:
            urllib.request.urlopen(address + path, timeout=10)
        assert refusal.value.code in (401, 403)
    gcs = (Path(cluster.environment["RAYWARP_CLUSTER"]) / "ray" / "ray_current_cluster").read_text()
    joined = cluster.run(
        sys.executable,
        "-c",
        "import ray; ray.init()",
        RAY_ADDRESS=gcs,
        RAY_AUTH_TOKEN="0" * 64,
        **elsewhere,
    )
    assert joined.returncode != 0
    assert "AuthenticationError" in joined.stderr
    assert len(cluster.client().list_jobs()) == before


def test_paths_of_a_submission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "reward").mkdir()
    config = load_config(
        {
            "model": "org/model",
            "reward": {"model": "reward"},
            "control": {"model": "runs/control"},
            "out": "runs/x",
        }
    )
    assert absolute_paths(config) == [f"{key}={tmp_path}/{path}" for key, path in PATHS]
    check_paths(config)  # not in a job
    monkeypatch.setenv(
        "RAY_JOB_CONFIG_JSON_ENV_VAR",
        json.dumps({"metadata": {"job_submission_id": "raysubmit_1"}}),
    )
    for key, path in PATHS:
        with pytest.raises(ConfigError, match=f"^{key}={path} is relative: in a Ray job"):
            check_paths(config)
        config = load_config(config.model_dump(), [f"{key}={tmp_path}/{path}"])
    check_paths(config)
    check_paths(load_config({"out": "s3://bucket/run", "reward": {"model": "org/reward"}}))


PATHS = (("out", "runs/x"), ("reward.model", "reward"), ("control.model", "runs/control"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["warp.yaml", "warp.stepz=1"], "unknown key 'warp.stepz'; did you mean 'warp.steps'?"),
        (["../elsewhere.yaml"], "../elsewhere.yaml is not in"),
        (
            ["warp.yaml", "--tunnel"],
            "and the cluster is elsewhere: give a path or URI that all its nodes see",
        ),
        (["--follow", "raysubmit_no"], "raysubmit_no does not exist"),
        (
            ["warp.yaml", "--address", "http://127.0.0.1:9"],
            "no job server answers at http://127.0.0.1:9 ([Errno 111] Connection refused)",
        ),
        (["warp.yaml", "--address", "ray://127.0.0.1:10001"], "is not the address of a job server"),
        (
            ["warp.yaml", "--runtime-env", "no.yaml"],
            "--runtime-env no.yaml: [Errno 2] No such",
        ),
    ],
)
def test_wrong_submissions(cluster: Cluster, arguments: list[str], message: str) -> None:
    (cluster.project.parent / "elsewhere.yaml").write_text("seed: 0\n")
    result = cluster.run(sys.executable, cluster.submit_py, *arguments)
    assert result.returncode in (1, 2)
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_a_directory_that_is_too_large_is_not_sent(cluster: Cluster) -> None:
    large = cluster.project / "größe.bin"
    with large.open("wb") as file:
        file.truncate(100 * 2**20)  # Ray's limit
    try:
        result = cluster.run(sys.executable, cluster.submit_py, "warp.yaml", "--no-wait")
    finally:
        large.unlink()
    assert result.returncode == 2, result.stderr
    assert "is too large to be sent with the job: 10" in result.stderr
    assert "The largest: größe.bin (100.0 MiB), " in result.stderr
    assert "in a .gitignore or .rayignore file, or under `excludes` in" in result.stderr
    assert len(result.stderr.splitlines()) == 1
