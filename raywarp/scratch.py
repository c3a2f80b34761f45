"""A temporary folder for as long as its process lives: what a killed one leaves is taken away by the next that needs such a folder."""

import fcntl
import os
import shutil
import tempfile
import time
from pathlib import Path

PREFIX = "raywarp-adapters-"
YOUNG = 5.0  # seconds in which a folder may exist without its lock
_held: dict[Path, int] = {}


def claim() -> Path:
    """A new folder, locked by this process; and an end to those that no process of this machine has locked."""
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        _remove_if_left(folder)
    new = Path(tempfile.mkdtemp(prefix=PREFIX))
    _held[new] = _lock(new)
    return new


def release(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    if folder in _held:
        os.close(_held.pop(folder))


def _remove_if_left(folder: Path) -> None:
    try:
        if time.time() - folder.stat().st_mtime < YOUNG:
            return
        lock = _lock(folder)
    except OSError:  # it is gone, somebody else's, or in use
        return
    shutil.rmtree(folder, ignore_errors=True)
    os.close(lock)


def _lock(folder: Path) -> int:
    """A descriptor that holds the folder's lock until it is closed; raises OSError where another one does."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor
