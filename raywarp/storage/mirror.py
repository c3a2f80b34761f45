"""The run's folder where `out` is an object store: the driver works in a local copy, and what
changes in it is put there.
"""

import shutil
import time
from pathlib import Path

from raywarp.storage.location import Storage
from raywarp.storage.sealed import MANIFEST

LOOK_SECONDS = 5.0  # seconds between looks at files that grow
SHARE = 0.05  # of the driver's time at most goes into that


class Mirror:
    """A local copy of everything under `out` but its policies, which go there by themselves (see
    policy_files.py).

    An object store cannot append, so a file that grows (metrics.jsonl, events.jsonl) is put as a
    whole now and then. What a death in between loses of metrics.jsonl is in the policies' folders,
    from which the next invocation makes it anew.
    """

    def __init__(self, storage: Storage):
        self.storage, self.folder = storage, storage.cache
        self._known: dict[Path, tuple[int, int]] = {}
        self._next = 0.0

    def pull(self) -> None:
        """Make the copy equal to the store."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in self.folder.iterdir():
            if path.name != "policies":
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        for name in self.storage.files():
            if not _is_policys(Path(name)):
                self.storage.get(name, self.folder / name)
        self._known = self._versions()

    def push(self) -> None:
        """Put what is new or changed, manifests last."""
        start, versions = time.monotonic(), self._versions()
        changed = [path for path, version in versions.items() if self._known.get(path) != version]
        for path in sorted(changed, key=lambda path: (path.name == MANIFEST, path)):
            self.storage.put(path, path.relative_to(self.folder).as_posix())
            self._known[path] = versions[path]
        self._next = time.monotonic() + max(LOOK_SECONDS, (time.monotonic() - start) / SHARE)

    def push_now_and_then(self) -> None:
        """`push`, unless the last one was a moment ago."""
        if time.monotonic() >= self._next:
            self.push()

    def _versions(self) -> dict[Path, tuple[int, int]]:
        paths = [
            path
            for path in self.folder.rglob("*")
            if path.is_file() and not _is_policys(path.relative_to(self.folder))
        ]
        return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in paths}


def _is_policys(path: Path) -> bool:
    """Whether it belongs to a policy, or is under way."""
    return path.parts[0] == "policies" or any(part.startswith(".") for part in path.parts)
