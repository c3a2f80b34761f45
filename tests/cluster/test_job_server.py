"""Tests of a job server's address, and of the size of what is sent to it."""

import http.server
import os
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray._private import ray_constants
from ray._private.runtime_env import packaging

from raywarp.cluster import job_server
from raywarp.config.schema import ConfigError


@pytest.fixture
def web_server() -> Iterator[str]:
    """A web server without Ray, on 127.0.0.1."""
    handler = http.server.BaseHTTPRequestHandler  # knows no GET: it answers 501
    with http.server.HTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


@pytest.mark.parametrize(
    ("given", "address", "is_here"),
    [
        ("http://127.0.0.1:8265", "http://127.0.0.1:8265", True),
        (" http://127.0.0.1:8265/ ", "http://127.0.0.1:8265", True),
        ("127.0.0.1:8265", "http://127.0.0.1:8265", True),
        ("localhost:8265", "http://localhost:8265", True),
        ("http://[::1]:8265", "http://[::1]:8265", True),
        ("127.1.2.3:8265", "http://127.1.2.3:8265", True),
        ("https://ray.example.org", "https://ray.example.org", False),
        ("head:8265", "http://head:8265", False),
    ],
)
def test_addresses(given: str, address: str, is_here: bool) -> None:
    assert job_server.server_address(given) == address
    assert job_server.is_here(address) == is_here


@pytest.mark.parametrize("given", ["", "ray://head:10001", "http://", "head:port", "http://[::1"])
def test_what_is_no_address(given: str) -> None:
    with pytest.raises(ConfigError, match="is not the address of a job server"):
        job_server.server_address(given)


def test_another_web_server_is_refused(web_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://elsewhere:8265")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with pytest.raises(ConfigError, match=f"what answers at {web_server} is no job server of Ray"):
        job_server.use(web_server)
    assert os.environ["RAY_API_SERVER_ADDRESS"] == web_server
    assert "http_proxy" not in os.environ


def test_a_proxy_is_named_where_it_was_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with pytest.raises(ConfigError, match=r"a proxy was asked \(http=http://127.0.0.1:9"):
        job_server.use("http://head.invalid:8265")


def test_the_size_is_that_of_what_ray_sends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two files of the four are excluded. The limit is the size of Ray's own zip file of the rest,
    without the 22 bytes at its end.
    """
    folder = tmp_path / "project"
    (folder / "daten").mkdir(parents=True)
    for name in ("a.bin", "daten/größe.txt", "left.out", "ignored.txt"):
        (folder / name).write_bytes(b"x" * 1000)
    (folder / "daten" / "größe.txt").write_bytes(b"x" * 3000)
    (folder / ".rayignore").write_text("ignored.txt\n")
    packaging.create_package(str(folder), tmp_path / "sent.zip", True, excludes=["left.out"])
    with zipfile.ZipFile(tmp_path / "sent.zip") as sent:
        assert sorted(sent.namelist()) == [".rayignore", "a.bin", "daten/größe.txt"]
    limit = (tmp_path / "sent.zip").stat().st_size - 22
    monkeypatch.setattr(ray_constants, "DASHBOARD_CLIENT_MAX_SIZE", limit + 1)
    job_server.check_size(folder, ["left.out"], "env.yaml")
    monkeypatch.setattr(ray_constants, "DASHBOARD_CLIENT_MAX_SIZE", limit)
    with pytest.raises(ConfigError, match=r"in 3 files, .*: daten/größe.txt \(.*in env.yaml$"):
        job_server.check_size(folder, ["left.out"], "env.yaml")
