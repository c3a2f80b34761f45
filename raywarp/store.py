"""A run's folder: what is finished is listed in a manifest with sizes and sha256, written last; what is not listed does not count.

Policies lie under a key, the hash of everything that determines them. Resuming is looking the key up.
"""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"


def content_key(parts: Any) -> str:
    """A 16-digit key of anything that JSON can hold: equal content, equal key."""
    canonical = json.dumps(parts, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def folder_fingerprint(folder: Path, patterns: Iterable[str], without: str = "") -> str:
    """One hash of the names and contents of the files that match, but for `without`; whatever the folder is called."""
    files = sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file() and path.name != without})
    return content_key([[path.name, file_sha256(path)] for path in files])


def write_text(path: Path, text: str) -> None:
    """Replace a file at once: a reader sees the old text or the new, never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1) + "\n")


def write_jsonl(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The file's rows; none if there is no file, and a line that a kill cut off is not a row."""
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def append_jsonl(path: Path, row: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


def seal(folder: Path) -> None:
    """Declare a folder finished: write the manifest of the files it directly holds."""
    files = [path for path in sorted(folder.iterdir()) if path.is_file() and path.name != MANIFEST and not path.name.startswith(".")]
    write_json(folder / MANIFEST, {path.name: {"size": path.stat().st_size, "sha256": file_sha256(path)} for path in files})


def is_sealed(folder: Path) -> bool:
    """Whether the folder is finished and every file is still what the manifest says."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        return bool(manifest) and all(
            (folder / name).stat().st_size == entry["size"] and file_sha256(folder / name) == entry["sha256"]
            for name, entry in manifest.items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


@contextmanager
def new_files(folder: Path, last: str) -> Iterator[Path]:
    """A temporary folder, whose files take their places in `folder` if the body succeeds; if it fails, `folder` is as it was.

    Args:
        last: the file without which the others do not count. Where there is one already it goes first and comes back last, so that an
            interruption leaves nothing that looks whole. Other files in `folder` stay.

    Raises:
        OSError: it cannot be written.
    """
    new = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}")
    made = [parent for parent in folder.parents if not parent.exists()]
    try:
        new.mkdir(parents=True)
        yield new
        if not folder.exists():
            new.rename(folder)
            return
        (folder / last).unlink(missing_ok=True)
        for path in sorted(new.iterdir(), key=lambda path: path.name == last):
            path.replace(folder / path.name)
        new.rmdir()
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        for parent in made:
            with suppress(OSError):
                parent.rmdir()
        raise


def remove(folder: Path) -> None:
    """Delete a folder, its manifest first, so that a kill in between leaves nothing that looks finished."""
    (folder / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
