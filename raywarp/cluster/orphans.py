"""What becomes of a Ray that a driver started for itself when that driver is killed: nothing of it
is left some seconds later.

Most of Ray's processes end with the driver, but two of its agents try for a minute to tell the
control server, which is gone, that the raylet is gone (Ray 2.60). A process that the driver starts
before its Ray waits for the driver's end, and then ends what has not ended by itself. It is this
file, run by itself: it uses nothing but the standard library, and Linux's /proc.
"""

import os
import select
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

GRACE = 5.0  # seconds in which they may end by themselves
LOOK = 0.2  # seconds between two looks while Ray starts
RAY = ("raylet", "gcs_server")
MARK = "RAYWARP_ORPHANS"  # in the environment of what is started meanwhile


@contextmanager
def watched() -> Iterator[None]:
    """Around the start of Ray: what the body makes this process start is ended after this process.
    Nothing is, if it joins a cluster.
    """
    mark = uuid.uuid4().hex
    command = [sys.executable, "-I", "-S", __file__, str(os.getpid()), mark]
    output = subprocess.DEVNULL
    watcher = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=output, stderr=output, start_new_session=True
    )
    _watchers.append(watcher)
    os.environ[MARK] = mark
    try:
        yield
    finally:
        del os.environ[MARK]
        if watcher.stdin is not None:
            with suppress(OSError):
                os.write(watcher.stdin.fileno(), b"started\n")


_watchers: list[
    "subprocess.Popen[bytes]"
] = []  # kept: this process's end is the end of their input


def _processes() -> dict[int, tuple[int, str, str]]:
    """Process → parent, name, and when it started in ticks since the machine did: its id may be
    another's one day.
    """
    found = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with suppress(OSError, IndexError):
                head, _, rest = (folder / "stat").read_text().rpartition(")")
                fields = rest.split()
                found[int(folder.name)] = (int(fields[1]), head.partition("(")[2], fields[19])
    return found


def _descendants(roots: set[int], known: dict[int, str]) -> bool:
    """Add the descendants of some processes to those that are known; whether a Ray is among all of
    them.
    """
    there, ray = _processes(), False
    for pid in there:
        ancestor = pid
        while ancestor in there and ancestor not in roots:
            ancestor = there[ancestor][0]
        if ancestor in roots and pid not in roots and pid != os.getpid():
            known[pid] = there[pid][2]
            ray |= there[pid][1] in RAY
    return ray


def _marked(mark: str) -> dict[int, str]:
    """Processes that have the mark in their environment, as agents do until they write their title
    over it.
    """
    found = {}
    for pid, (_, _, started) in _processes().items():
        with suppress(OSError):
            if f"{MARK}={mark}".encode() in Path(f"/proc/{pid}/environ").read_bytes():
                found[pid] = started
    return found


def _end(known: dict[int, str]) -> None:
    deadline = time.monotonic() + GRACE
    left = known
    while left and time.monotonic() < deadline:
        there = _processes()
        left = {
            pid: started
            for pid, started in left.items()
            if pid in there and there[pid][2] == started
        }
        time.sleep(LOOK)
    for pid in left:
        with suppress(OSError):
            os.kill(pid, signal.SIGKILL)


def _watch(driver: int, mark: str) -> None:
    known, own = dict[int, str](), False
    while not select.select([sys.stdin], [], [], LOOK)[0]:
        own |= _descendants({driver}, known)
    sys.stdin.readline()
    if not (own or _descendants({driver}, known)):
        return  # it has joined a cluster
    sys.stdin.read()  # to the driver's end
    _end(
        known | _marked(mark)
    )  # among them what a raylet had only just started when it died with the driver


if __name__ == "__main__":
    _watch(int(sys.argv[1]), sys.argv[2])
