"""Temporary files and folders for as long as their process lives, which has them locked: what a
killed one leaves, others take away.
"""

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from raywarp.storage.locks import lock

PREFIX, NEW = "raywarp-scratch-", "raywarp-new-"
YOUNG = 5.0  # seconds in which something may exist without its lock
_held: dict[Path, int] = {}


def claim() -> Path:
    """A new folder, locked by this process before it has its name; and an end to those that no
    process of this machine has locked.
    """
    _take_away()
    unnamed = Path(tempfile.mkdtemp(prefix=NEW))
    held = lock(unnamed)
    folder = unnamed.rename(unnamed.with_name(PREFIX + unnamed.name.removeprefix(NEW)))
    _held[folder] = held
    return folder


def remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    if folder in _held:
        os.close(_held.pop(folder))
    _take_away()


def _take_away() -> None:
    for prefix, young in ((PREFIX, 0.0), (NEW, YOUNG)):
        for folder in left(prefix, young):
            shutil.rmtree(folder, ignore_errors=True)


def left(prefix: str, young: float = YOUNG) -> Iterator[Path]:
    """What lies in the temporary folder under such a name and belongs to nobody any more; each is
    locked until the next is asked for.
    """
    for path in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
        try:
            if time.time() - path.stat().st_mtime < young:
                continue
            held = lock(path)
        except OSError:  # it is gone, somebody else's, or in use
            continue
        try:
            yield path
        finally:
            os.close(held)
