"""What a Ray of this process's own finds on the machine: a temporary folder and shared memory."""

import os

from raywarp.config.schema import ConfigError

SOCKET_BYTES = 107  # of a Unix socket's path, on Linux
# What Ray 2.60 puts behind its temporary folder, with a process id of seven digits.
LONGEST_SOCKET = "/session_2026-01-01_00-00-00_000000_1000000/sockets/plasma_store"
SHORT_FOLDER = "/tmp/ray"  # Ray's own default
SHARED_MEMORY = "/dev/shm"


def short_folder() -> str | None:
    """Return a folder for Ray's files if its own is too long for the paths of its sockets.

    Raises:
        ConfigError: it is too long, and no shorter one can be written.
    """
    most = SOCKET_BYTES - len(LONGEST_SOCKET)
    if len(os.fsencode(default_folder())) <= most:
        return None
    parent = os.path.dirname(SHORT_FOLDER)
    if not os.access(parent, os.W_OK):
        raise ConfigError(
            f"{default_folder()} is too long for the paths of Ray's sockets, and {parent} cannot be"
            f" written: set RAY_TMPDIR to a folder of at most {most - len('/ray')} bytes"
        )
    return SHORT_FOLDER


def default_folder() -> str:
    """Return the folder for Ray's files if nobody names one: of RAY_TMPDIR, TMPDIR or /tmp."""
    from ray._common.utils import get_default_ray_temp_dir

    return os.path.abspath(str(get_default_ray_temp_dir()))


def folder_note() -> str:
    """Return a note that Ray's files are in the short folder."""
    return (
        f"Ray keeps its files in {SHORT_FOLDER}: {default_folder()} is too long for the paths of"
        " its sockets; RAY_TMPDIR names another folder"
    )


def free_shared_memory() -> int:
    """Return the free bytes in /dev/shm; 0 where there is none."""
    try:
        found = os.statvfs(SHARED_MEMORY)
    except OSError:
        return 0
    return found.f_bavail * found.f_frsize


def shared_memory_note(store: float, free: int) -> str | None:
    """Return a note if Ray keeps its objects on a disk since /dev/shm is too small, else None.

    Args:
        store: size of Ray's object store, in bytes.
        free: bytes in /dev/shm that were free before Ray started.
    """
    if free >= store:  # Ray 2.60's own rule
        return None
    return (
        f"{SHARED_MEMORY} has {_size(free)} free, too little for Ray's object store of"
        f" {_size(store)}: objects are kept in files in Ray's temporary folder, which is"
        f" slower. Start a container with --shm-size={store / 2**30 + 1:.0f}g"
    )


def _size(count: float) -> str:
    return f"{count / 2**30:.1f} GB" if count >= 2**30 else f"{count / 2**20:.0f} MB"
