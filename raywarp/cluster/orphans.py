"""The end of a Ray that a driver started, when that driver is killed: no process of it stays.

Most of Ray's processes end with the driver. But two of its agents try for a minute to report the
raylet's end to the control server, which is gone too (Ray 2.60). So the driver starts one more
process before its Ray. That process waits for the driver's end, and some seconds later ends what is
left.

The process runs this file as a script. The file uses only the standard library and Linux's /proc.
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

GRACE = 5.0  # seconds that the processes have to end by themselves
LOOK = 0.2  # seconds between two looks at the processes
RAY = ("raylet", "gcs_server")
MARK = "RAYWARP_ORPHANS"  # environment variable of the processes that start in the block


@contextmanager
def watched() -> Iterator[None]:
    """Wrap the start of Ray: what starts in the block ends soon after this process ends.

    Nothing is ended if this process joins a cluster instead.
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


# Kept so that the watchers' input ends only when this process ends.
_watchers: list["subprocess.Popen[bytes]"] = []


def _processes() -> dict[int, tuple[int, str, str]]:
    """Return each process's parent, name and start, in ticks since the machine started.

    The start tells a process from a later one with the same id.
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
    """Add the descendants of the roots to `known`. Return whether a Ray is among all of them."""
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
    """Return the processes with the mark in their environment, and when they started.

    Ray's agents have it until they write their title over it.
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
        return  # the driver has joined a cluster
    sys.stdin.read()  # returns when the driver ends
    # The mark also finds what a raylet had only just started when it died with the driver.
    _end(known | _marked(mark))


if __name__ == "__main__":
    _watch(int(sys.argv[1]), sys.argv[2])
