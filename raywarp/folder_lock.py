"""Folders that a process has locked, at the longest for as long as it lives: the kernel takes a dead one's lock back."""

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from raywarp import store
from raywarp.config import ConfigError

ENDING_SECONDS = 30.0  # in which a command that was told to stop saves what it has
POLL_SECONDS = 0.1


def lock(path: Path) -> int:
    """A descriptor that holds the lock until it is closed. Raises BlockingIOError where another one does, and another OSError where the
    file system cannot lock it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process at a time, where the file system can lock it (NFS cannot: then two may be in the body)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def alone(folder: Path, say: Callable[[str], None]) -> Iterator[bool]:
    """In the body no other command of this machine is at work in the folder, which is made if need be, and goes again if nothing was
    written; yields whether one was just before. Where a file system cannot lock folders (NFS), nobody is kept out.

    Raises:
        ConfigError: one is, and does not end within ENDING_SECONDS.
        StoreError: the folder cannot be made.
    """
    with store.explained("write", folder):
        folder.mkdir(parents=True, exist_ok=True)
    deadline, descriptor = None, None
    while descriptor is None:
        try:
            descriptor = lock(folder)
        except BlockingIOError:
            if deadline is None:
                say(f"another command is at work in {folder}; waiting {ENDING_SECONDS:g} s for its end")
                deadline = time.monotonic() + ENDING_SECONDS
            if time.monotonic() > deadline:
                raise ConfigError(f"another command is at work in {folder}; stop it or wait for its end, or choose another out") from None
            time.sleep(POLL_SECONDS)
        except OSError:
            break
    try:
        yield deadline is not None
    finally:
        with suppress(OSError):
            folder.rmdir()
        if descriptor is not None:
            os.close(descriptor)
