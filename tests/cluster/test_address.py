"""Tests of joining a Ray cluster: which address it is, and what is said if it lets nobody in."""

import contextlib
import http.server
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from raywarp.cluster import address, runtime
from raywarp.config.schema import ConfigError

TOKEN = "a" * 64
# Joins, then prints where it is, or the error that the command line would print.
DRIVER = """
from raywarp.cluster import runtime
from raywarp.config.schema import ConfigError
try:
    runtime.start_ray()
    print(runtime.where())
except ConfigError as error:
    print("ConfigError:", error)
"""
# On a loaded machine, the process that Ray starts for a client may never answer; another one does.
CONNECT = """
import ray
for _ in range(3):
    try:
        ray.init("{address}")
        break
    except ConnectionError as error:
        print(error)
"""


@pytest.fixture(autouse=True)
def no_token_is_kept() -> Iterator[None]:
    """Later tests start a Ray with another HOME, whose token is another one.

    Where a Ray runs already, its token is kept: HOME may have changed since, and Ray (2.60) ends a
    process that its control server refuses.
    """
    yield
    import ray
    from ray._raylet import AuthenticationTokenLoader

    if not ray.is_initialized():
        AuthenticationTokenLoader.instance().reset_cache()


def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


@contextlib.contextmanager
def web_server() -> Iterator[int]:
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("ray://head:10001", "is Ray Client's, which runs no raywarp: submit the run as a job"),
        ("http://head:8265", "is that of a job server. To run there, submit the run as a job"),
        ("anyscale://x", "is not HOST:PORT"),
        ("10.0.0.1", "is not HOST:PORT; .*its port is 6379 by default"),
        ("::1", "is not HOST:PORT"),
        ("head:port", "is not HOST:PORT"),
        ("head:70000", "is not HOST:PORT"),
        ("head:0", "is not HOST:PORT"),
        ("a head:6379", "is not HOST:PORT"),
    ],
)
def test_an_address_of_another_form_is_refused(
    monkeypatch: pytest.MonkeyPatch, given: str, message: str
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", given)
    with pytest.raises(ConfigError, match=f"^RAY_ADDRESS={re.escape(given)} {message}"):
        address.named_address()


@pytest.mark.parametrize("given", ["", " ", "local", " local\n"])
def test_no_cluster_is_named(monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    monkeypatch.setenv("RAY_ADDRESS", given)
    assert address.named_address() is None


@pytest.mark.parametrize("given", ["head:6379", " head:6379 ", "[2001:db8::1]:6379"])
def test_an_address_is_taken_without_blanks(monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    monkeypatch.setenv("RAY_ADDRESS", given)
    assert address.named_address() == given.strip()
    assert os.environ["RAY_ADDRESS"] == given.strip()


def test_a_cluster_that_is_not_there_is_refused_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    given = f"127.0.0.1:{closed_port()}"
    monkeypatch.setenv("RAY_ADDRESS", given)
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    start = time.monotonic()
    with pytest.raises(ConfigError, match=r"nothing listens at .* \(connection refused\)") as error:
        runtime.start_ray()
    assert str(error.value).startswith(f"RAY_ADDRESS={given}: ")
    assert str(error.value).endswith(address.OWN)
    assert time.monotonic() - start < address.ANSWER_SECONDS


def test_other_reasons_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="here: the host of nowhere.invalid:6379 is not known"):
        address.check_cluster("nowhere.invalid:6379", "here")
    with web_server() as port, pytest.raises(ConfigError, match="is no control server of Ray"):
        address.check_cluster(f"127.0.0.1:{port}", "here")
    monkeypatch.setattr(address, "ANSWER_SECONDS", 1.0)
    with (
        socket.create_server(("127.0.0.1", 0)) as silent,
        pytest.raises(ConfigError, match="has not answered within 1 s"),
    ):
        address.check_cluster(f"127.0.0.1:{silent.getsockname()[1]}", "here")


def test_a_cluster_is_gone_only_if_no_node_of_it_runs_here() -> None:
    found = f"127.0.0.1:{closed_port()}"
    assert address.is_gone(found)
    # Ray tells a node by these words of its command.
    node = subprocess.Popen(
        ["raylet", "-c", "read line", f"--gcs-address={found}"],
        executable="/bin/sh",
        stdin=subprocess.PIPE,
    )
    try:
        from ray._private import services

        services.find_gcs_addresses.cache_clear()
        assert not address.is_gone(found)
    finally:
        node.communicate(b"\n")
        services.find_gcs_addresses.cache_clear()


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({}, "none is sent without RAY_AUTH_MODE=token"),
        ({"RAY_AUTH_MODE": "token"}, "there is none: put the cluster's token in RAY_AUTH_TOKEN"),
        (
            {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "x", "RAY_AUTH_TOKEN_PATH": "/x"},
            "refuses the token in RAY_AUTH_TOKEN:",
        ),
        (
            {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": __file__},
            f"refuses the token in RAY_AUTH_TOKEN_PATH={__file__}:",
        ),
        ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": "/no"}, "there is none"),
    ],
)
def test_a_refused_token_is_named_by_its_place(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    environment: dict[str, str],
    message: str,
) -> None:
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {**environment, "HOME": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    assert message in address.token_problem()


@dataclass(frozen=True)
class Head:
    """A head that asks for a token."""

    port: int
    client_port: int
    environment: dict[str, str]

    def join(self, script: str = DRIVER, **environment: str) -> str:
        """What a driver prints that RAY_ADDRESS sends there."""
        found = subprocess.run(
            [sys.executable, "-c", script],
            env={**self.environment, "RAY_ADDRESS": f"127.0.0.1:{self.port}", **environment},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert found.returncode == 0, found.stderr
        return found.stdout


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    port, client_port, agent_port = closed_port(), closed_port(), closed_port()
    inherited = {name: value for name, value in os.environ.items() if name[:4] != "RAY_"}
    with tempfile.TemporaryDirectory(prefix="rwa", ignore_cleanup_errors=True) as folder:
        environment = {
            **inherited,
            "HOME": str(tmp_path_factory.mktemp("home")),
            "RAY_TMPDIR": folder,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": TOKEN,
            # seconds in which the process of a client has to start, also on a loaded machine
            "RAY_CLIENT_SERVER_CHECK_CHANNEL_TIMEOUT_S": "90",
        }
        ray = Path(sys.executable).with_name("ray")
        with (Path(folder) / "log").open("w") as log:
            process = subprocess.Popen(
                [
                    *(ray, "start", "--head", "--block", "--num-cpus=3", f"--port={port}"),
                    *(f"--ray-client-server-port={client_port}", "--include-dashboard=false"),
                    *(f"--dashboard-agent-listen-port={agent_port}", "--disable-usage-stats"),
                    *("--min-worker-port=0", "--max-worker-port=0"),
                ],
                env=environment,
                stdout=log,
                stderr=log,
            )
        try:
            deadline = time.monotonic() + 200
            while "Ray runtime started" not in (text := (Path(folder) / "log").read_text()):
                assert process.poll() is None, text
                assert time.monotonic() < deadline, text
                time.sleep(0.2)
            yield Head(port, client_port, environment)
        finally:
            process.terminate()
            process.wait(60)


@pytest.mark.slow
def test_the_first_line_says_which_cluster_was_joined(head: Head) -> None:
    job = {"metadata": {"job_submission_id": "raysubmit_7"}}
    printed = head.join(RAY_JOB_CONFIG_JSON_ENV_VAR=json.dumps(job))
    assert re.fullmatch(
        rf"on the cluster at [\d.]+:{head.port} \(job raysubmit_7\): 3 CPUs\n", printed
    )


@pytest.mark.slow
def test_a_cluster_that_wants_another_token_is_refused(head: Head) -> None:
    wrong = head.join(RAY_AUTH_TOKEN="0" * 64)
    assert wrong.startswith(f"ConfigError: RAY_ADDRESS=127.0.0.1:{head.port}: the cluster refuses")
    assert "none is sent without RAY_AUTH_MODE=token" in head.join(RAY_AUTH_MODE="disabled")
    assert "asks for a token, and there is none" in head.join(RAY_AUTH_TOKEN="")


@pytest.mark.slow
def test_a_driver_of_another_python_is_refused(head: Head) -> None:
    """The driver calls itself 3.11.99: Ray compares the patch versions too."""
    other = (
        "import ray._private.utils as utils\n"
        "utils.compute_version_info = lambda: ('2.60.0', '3.11.99')\n"
    )
    printed = head.join(other + DRIVER)
    own = ".".join(map(str, sys.version_info[:3]))
    assert re.match(
        rf"ConfigError: the cluster at .* has Ray \S+ and Python {own}, and this process has Ray"
        r" 2\.60\.0 and Python 3\.11\.99\.",
        printed,
    )


@pytest.mark.slow
def test_ray_client_is_refused(head: Head) -> None:
    connect = CONNECT.format(address=f"ray://127.0.0.1:{head.client_port}")
    printed = head.join(connect + DRIVER, RAY_ADDRESS="")
    assert "ConfigError: this process has called ray.init('ray://…')" in printed
    assert "submit the run as a job" in printed
