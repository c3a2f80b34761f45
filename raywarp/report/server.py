"""A server of the report page on 127.0.0.1, for people who watch a run.

The page is made again when it is requested.
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
# Data stays fresh for FRESH seconds, or FACTOR times the seconds that reading it took, if longer.
FRESH = 2.0
FACTOR = 5.0


class Watched:
    """The data of the runs, read again when it is requested and not fresh any more."""

    def __init__(self, runs: Sequence[str]):
        self.runs = runs
        self._lock = threading.Lock()
        self._next = 0.0
        self._data: dict[str, Any] = {}

    def data(self) -> dict[str, Any]:
        """Return the page's data.

        An error of reading is raised, and the data that was read before stays.
        """
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
        # Another site's name may lead here. The scripts of that site could read our answers.
        if host not in (HOST, "localhost"):
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
        """Log nothing: a line per request would hide what a terminal shows."""


class ReportServer(ThreadingHTTPServer):
    """A server of one page.

    Args:
        runs: places of runs or sweeps.
        port: 0 takes any free one; `address` names it.

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
    """Serve the page until Ctrl-C.

    Args:
        runs: places of runs or sweeps.
        port: see ReportServer.
        say: gets a line with the address.
    """
    with ReportServer(runs, port) as server:
        say(f"{server.address} follows the run; Ctrl-C ends it")
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            say("")
