"""The local mirror of a run's folder, for an `out` in an object store.

The driver works in a local copy. The mirror uploads what changes in it.
"""

import shutil
import time
from pathlib import Path

from raywarp.storage.location import Storage
from raywarp.storage.sealed import MANIFEST

LOOK_SECONDS = 5.0  # seconds between checks of growing files
KEYED = ("policies", "ceilings")  # folders of what is stored under keys
SHARE = 0.05  # the largest share of the driver's time that uploads take


class Mirror:
    """A local copy of everything under `out` except what is stored under keys.

    Policies and ceilings are uploaded separately; see run/policy_files.py and run/ceiling.py.

    An object store cannot append. A file that grows (metrics.jsonl, events.jsonl) is therefore
    uploaded as a whole from time to time. A death in between loses rows of metrics.jsonl. The next
    invocation restores them from the policies' folders.
    """

    def __init__(self, storage: Storage):
        self.storage, self.folder = storage, storage.cache
        self._known: dict[Path, tuple[int, int]] = {}
        self._next = 0.0

    def pull(self) -> None:
        """Make the copy equal to the store."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in self.folder.iterdir():
            if path.name not in KEYED:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        for name in self.storage.files():
            if not _is_apart(Path(name)):
                self.storage.get(name, self.folder / name)
        self._known = self._versions()

    def push(self) -> None:
        """Upload new and changed files, manifests last."""
        start, versions = time.monotonic(), self._versions()
        changed = [path for path, version in versions.items() if self._known.get(path) != version]
        for path in sorted(changed, key=lambda path: (path.name == MANIFEST, path)):
            self.storage.put(path, path.relative_to(self.folder).as_posix())
            self._known[path] = versions[path]
        self._next = time.monotonic() + max(LOOK_SECONDS, (time.monotonic() - start) / SHARE)

    def push_now_and_then(self) -> None:
        """Call `push`, unless the last one was a moment ago."""
        if time.monotonic() >= self._next:
            self.push()

    def _versions(self) -> dict[Path, tuple[int, int]]:
        paths = [
            path
            for path in self.folder.rglob("*")
            if path.is_file() and not _is_apart(path.relative_to(self.folder))
        ]
        return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in paths}


def _is_apart(path: Path) -> bool:
    """Return whether a file is stored under a key, or is still being written."""
    return path.parts[0] in KEYED or any(part.startswith(".") for part in path.parts)
