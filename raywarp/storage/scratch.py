"""Scratch folders: temporary folders that their process holds locked while it lives.

Other processes remove the folders of a killed one.
"""

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from raywarp.storage.locks import lock

PREFIX, NEW = "raywarp-scratch-", "raywarp-new-"
YOUNG = 5.0  # seconds in which something may exist before it is locked
_held: dict[Path, int] = {}


def claim() -> Path:
    """Return a new folder, which this process locks before it gets its name.

    Also remove the scratch folders that no process of this machine has locked.
    """
    _take_away()
    unnamed = Path(tempfile.mkdtemp(prefix=NEW))
    held = lock(unnamed)
    folder = unnamed.rename(unnamed.with_name(PREFIX + unnamed.name.removeprefix(NEW)))
    _held[folder] = held
    return folder


def discard(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    if folder in _held:
        os.close(_held.pop(folder))
    _take_away()


def _take_away() -> None:
    for prefix, young in ((PREFIX, 0.0), (NEW, YOUNG)):
        for folder in left(prefix, young):
            shutil.rmtree(folder, ignore_errors=True)


def left(prefix: str, young: float = YOUNG) -> Iterator[Path]:
    """Yield the temporary entries with this prefix that no process holds.

    Each is locked until the next is asked for.

    Args:
        young: entries younger than this many seconds are left out.
    """
    for path in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
        try:
            if time.time() - path.stat().st_mtime < young:
                continue
            held = lock(path)
        except OSError:  # it is gone, another user's, or in use
            continue
        try:
            yield path
        finally:
            os.close(held)
