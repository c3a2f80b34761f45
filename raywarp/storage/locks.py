"""Locks on the folders that a process writes, released by the kernel when the process dies."""

import errno
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from raywarp.config.schema import ConfigError

ENDING_SECONDS = 30.0  # the time in which a command that was told to stop saves its state
LOCK_POLL_SECONDS = 0.1


def lock(path: Path) -> int:
    """Return a descriptor that holds the lock until it is closed.

    Raises:
        BlockingIOError: another process holds the lock.
        FileNotFoundError: the path does not exist, or was deleted meanwhile.
        OSError: the file system cannot lock the path.
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
    """Let one process at a time into the body.

    Where the file system cannot lock (NFS), two processes may be in the body.
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
    """Make the folder for the body; afterwards remove those of the new folders that are empty.

    Args:
        key: the key of the configuration that names the folder.
        place: the key's value.
        folder: the folder to make.

    Raises:
        ConfigError: the folder cannot be made.
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
    """Turn an OSError of the body into a ConfigError that says which key to change."""
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"{key}={place} cannot be written: {error.strerror or error}; choose another folder"
        ) from None


@contextmanager
def exclusive(out: str, folder: Path, say: Callable[[str], None]) -> Iterator[bool]:
    """Let no other command of this machine write into the folder of `out` during the body.

    The folder is `made`. Where a file system cannot lock folders (NFS), no command is kept out.

    Args:
        out: the configuration's value of that key.
        folder: the folder of `out`.
        say: prints a message for the user.

    Yields:
        Whether another command had to be waited for.

    Raises:
        ConfigError: another command does not end within ENDING_SECONDS, or the folder cannot be
            made.
    """
    descriptor = None
    try:
        with made("out", out, folder):
            descriptor, waited = _lock_in_time(folder, say)
            yield waited
    finally:
        if descriptor is not None:
            # Release the lock after `made` has removed the folder. Otherwise another command could
            # lock it before its removal.
            os.close(descriptor)


def _lock_in_time(folder: Path, say: Callable[[str], None]) -> tuple[int | None, bool]:
    deadline = None
    while True:
        try:
            return lock(folder), deadline is not None
        except FileNotFoundError:  # the other command removed its empty folder
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
