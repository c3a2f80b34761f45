"""What becomes of a Ray that a driver started for itself when that driver is killed: nothing of it is left some seconds later.

Most of Ray's processes end with the driver, but two of its agents try for a minute to tell the control server, which is gone, that the
raylet is gone (Ray 2.60). A process that the driver starts waits for its end and then ends what has not ended by itself. It is this file,
run by itself: it uses nothing but the standard library.
"""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

GRACE = 5.0  # seconds in which they may end by themselves


def watch() -> None:
    """Start that process, if this one has started a Ray (and not joined one), for the processes that this Ray has now."""
    import psutil  # comes with Ray

    ours = psutil.Process().children(recursive=True)
    with suppress(psutil.Error):
        if any(process.name() == "raylet" for process in ours):
            started = [f"{process.pid}:{_started(process.pid)}" for process in ours]
            command = [sys.executable, "-I", "-S", __file__, *started]
            output = subprocess.DEVNULL
            _watchers.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=output, stderr=output, start_new_session=True))


_watchers: list["subprocess.Popen[bytes]"] = []  # kept: this process's end is the end of their input


def _started(pid: int) -> str:
    """When a process started, in ticks since the machine did: its id may be another's one day. Empty where there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""


def _end(known: dict[int, str]) -> None:
    deadline = time.monotonic() + GRACE
    while (left := [pid for pid, started in known.items() if started and _started(pid) == started]) and time.monotonic() < deadline:
        time.sleep(0.2)
    for pid in left:
        with suppress(OSError):
            os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    sys.stdin.read()
    _end({int(pid): started for pid, _, started in (argument.partition(":") for argument in sys.argv[1:])})
