"""The report page on 127.0.0.1, made anew when it is asked for, for as long as somebody wants to
watch a run.
"""

import json
import threading
import time
from collections.abc import Callable, Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from raywarp.config.schema import ConfigError
from raywarp.report.page import read, render
from raywarp.storage.sealed import StoreError

HOST = "127.0.0.1"
# seconds for which what was read is good enough, and at least this many times what the reading
# takes:
FRESH = 2.0
FACTOR = 5.0


class Watched:
    """The runs' data, read again when it is asked for and not fresh any more."""

    def __init__(self, runs: Sequence[str]):
        self.runs = runs
        self._lock = threading.Lock()
        self._next = 0.0
        self._data: dict[str, Any] = {}

    def data(self) -> dict[str, Any]:
        """Raises what reading raises; what was read before then stays."""
        with self._lock:
            if time.monotonic() >= self._next:
                start = time.monotonic()
                self._data = read(self.runs, live=True)
                self._next = time.monotonic() + max(FRESH, FACTOR * (time.monotonic() - start))
            return self._data


class _Handler(BaseHTTPRequestHandler):
    server: "ReportServer"

    def do_GET(self) -> None:
        host = (self.headers.get("Host") or "").rpartition(":")[0]
        if host not in (
            HOST,
            "localhost",
        ):  # another site's name that leads here: its scripts could read what we answer
            return self._answer(
                HTTPStatus.FORBIDDEN,
                "text/plain; charset=utf-8",
                b"only as 127.0.0.1 or localhost\n",
            )
        try:
            if self.path == "/":
                self._answer(
                    HTTPStatus.OK, "text/html; charset=utf-8", render(self.server.watched.data())
                )
            elif self.path == "/data.json":
                self._answer_data(self.server.watched.data())
            else:
                self._answer(
                    HTTPStatus.NOT_FOUND, "text/plain; charset=utf-8", b"there is only /\n"
                )
        except (ConfigError, StoreError) as error:
            self._answer(
                HTTPStatus.SERVICE_UNAVAILABLE, "text/plain; charset=utf-8", f"{error}\n".encode()
            )

    def _answer_data(self, data: dict[str, Any]) -> None:
        if self.headers.get("If-None-Match") == data["tag"]:
            return self._answer(HTTPStatus.NOT_MODIFIED, "application/json", b"")
        self._answer(HTTPStatus.OK, "application/json", json.dumps(data).encode())

    def _answer(self, status: HTTPStatus, kind: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Nothing: a line per look of the page would hide what a terminal shows."""


class ReportServer(ThreadingHTTPServer):
    """Serves one page.

    Args:
        port: 0 takes any free one; `address` says which.

    Raises:
        ConfigError: there is no run, or the port is taken.
    """

    daemon_threads = True

    def __init__(self, runs: Sequence[str], port: int = 0):
        self.watched = Watched(runs)
        self.watched.data()
        try:
            super().__init__((HOST, port), _Handler)
        except (OSError, OverflowError) as error:
            raise ConfigError(
                f"--port={port} cannot be used: {getattr(error, 'strerror', None) or error}"
            ) from None

    @property
    def address(self) -> str:
        return f"http://{HOST}:{self.server_address[1]}/"


def serve(runs: Sequence[str], port: int, say: Callable[[str], None]) -> None:
    """Serve until Ctrl-C."""
    with ReportServer(runs, port) as server:
        say(f"{server.address} follows the run; Ctrl-C ends it")
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            say("")
