"""Folders that a process writes, and has locked, at the longest for as long as it lives: the kernel
takes a dead one's lock back.
"""

import errno
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from raywarp.config.schema import ConfigError

ENDING_SECONDS = 30.0  # in which a command that was told to stop saves what it has
LOCK_POLL_SECONDS = 0.1


def lock(path: Path) -> int:
    """A descriptor that holds the lock until it is closed. Raises BlockingIOError where another one
    does, FileNotFoundError where somebody took it away meanwhile, too, and another OSError where
    the file system cannot lock it.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.fstat(descriptor).st_nlink:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process at a time, where the file system can lock it (NFS cannot: then two may be in the
    body).
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def made(key: str, place: str, folder: Path) -> Iterator[None]:
    """In the body the folder is there; of what was made for that, what is empty then goes again.

    Raises:
        ConfigError: it cannot be made; place is what the configuration's key calls it.
    """
    new: list[Path] = []
    try:
        with writable(key, place):
            new += [path for path in (folder, *folder.parents) if not path.exists()]
            folder.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        with suppress(OSError):
            for path in new:
                path.rmdir()


@contextmanager
def writable(key: str, place: str) -> Iterator[None]:
    """Turns an OSError of the body into a ConfigError that says which key to change."""
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"{key}={place} cannot be written: {error.strerror or error}; choose another folder"
        ) from None


@contextmanager
def exclusive(out: str, folder: Path, say: Callable[[str], None]) -> Iterator[bool]:
    """In the body no other command of this machine is at work in the folder of `out`, which is
    `made`; yields whether one was just before. Where a file system cannot lock folders (NFS),
    nobody is kept out.

    Raises:
        ConfigError: one is, and does not end within ENDING_SECONDS; or the folder cannot be made.
    """
    descriptor = None
    try:
        with made("out", out, folder):
            descriptor, waited = _lock_in_time(folder, say)
            yield waited
    finally:
        if descriptor is not None:
            os.close(
                descriptor
            )  # after the folder, where that goes: else another command finds it before


def _lock_in_time(folder: Path, say: Callable[[str], None]) -> tuple[int | None, bool]:
    deadline = None
    while True:
        try:
            return lock(folder), deadline is not None
        except FileNotFoundError:  # the other one took its empty folder away
            folder.mkdir(parents=True, exist_ok=True)
        except BlockingIOError:
            if deadline is None:
                say(
                    f"another command is at work in {folder}; waiting {ENDING_SECONDS:g} s for"
                    " its end"
                )
                deadline = time.monotonic() + ENDING_SECONDS
            if time.monotonic() > deadline:
                raise ConfigError(
                    f"another command is at work in {folder}; stop it or wait for its end, or"
                    " choose another out"
                ) from None
            time.sleep(LOCK_POLL_SECONDS)
        except OSError:
            return None, deadline is not None
