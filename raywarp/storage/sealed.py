"""Files that count only when they are whole: a folder's manifest lists sizes and sha256, and is
written last; a record has its own sha256.

Policies lie under a key, the hash of everything that determines them. Resuming is looking the key
up.
"""

import errno
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from raywarp.identity import file_sha256

MANIFEST = "manifest.json"
DAY = 86400.0  # seconds


class StoreError(RuntimeError):
    """Something cannot be read or written: no room, no access, no network. What was finished is
    intact, and the same command continues.
    """


class DamagedError(ValueError):
    """A file or folder is not, or not wholly, what was once written; the message says which and
    why.
    """


@contextmanager
def explained(verb: str, place: object) -> Iterator[None]:
    """Turns an OSError of the body (but for a missing file) into a StoreError that says what to
    do.
    """
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        reason = error.strerror or (str(error).strip() or type(error).__name__).splitlines()[0]
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        advice = "; make room, and the same command continues from what is there" if full else ""
        raise StoreError(f"cannot {verb} {place}: {reason}{advice}") from None


def write_bytes(path: Path, data: bytes) -> None:
    """Replace a file at once: a reader sees the old content or the new, never half of it. A write
    that fails leaves the old one.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    with explained("write", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    write_text(path, _json_text(value))


def _json_text(value: Any) -> str:
    return json.dumps(value, indent=1) + "\n"


def write_jsonl(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The file's rows; none if there is no file, and a line that a kill cut off or damage made
    unreadable is not a row.
    """
    return parse_jsonl(path.read_bytes()) if path.is_file() else []


def parse_jsonl(data: bytes) -> list[dict[str, Any]]:
    """What `read_jsonl` makes of a file's content."""
    rows = []
    for line in data.split(b"\n"):
        with suppress(ValueError):
            row = json.loads(line)
            rows += [row] if isinstance(row, dict) else []
    return rows


def lost_rows(data: bytes, rows: Sequence[dict[str, Any]]) -> int:
    """Lines of which `parse_jsonl`, whose rows these are, has made none."""
    return sum(1 for line in data.split(b"\n") if line.strip()) - len(rows)


def append_jsonl(path: Path, row: dict[str, Any]) -> None:
    """Add a row, on a line of its own even where a kill cut the last one off."""
    with explained("write", path), path.open("ab+") as file:
        cut_off = file.tell() and os.pread(file.fileno(), 1, file.tell() - 1) != b"\n"
        file.write(b"\n" * bool(cut_off) + json.dumps(row).encode() + b"\n")


def write_record(path: Path, value: Mapping[str, Any]) -> None:
    """A JSON object with its own sha256, so that `read_record` notices any damage."""
    write_json(path, {**value, "sha256": _record_sha256(value)})


def read_record(path: Path) -> dict[str, Any] | None:
    """What `write_record` wrote; None if there is no such file.

    Raises:
        DamagedError: it is not what was written.
    """
    try:
        return parse_record(path.read_bytes(), path)
    except FileNotFoundError:
        return None
    except OSError:
        raise DamagedError(f"{path} cannot be read") from None


def parse_record(data: bytes, where: object) -> dict[str, Any]:
    """What `read_record` makes of a file's content. Raises DamagedError."""
    try:
        value = json.loads(data)
        is_whole = data == _json_text(value).encode()  # another last digit may be the same float
        stored = value.pop("sha256")
    except (ValueError, KeyError, TypeError, AttributeError):
        raise DamagedError(f"{where} cannot be read") from None
    if not is_whole or stored != _record_sha256(value):
        raise DamagedError(f"{where} is not what was written (sha256)")
    return dict(value)


def _record_sha256(value: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def manifest_of(folder: Path) -> dict[str, dict[str, Any]]:
    """Name → size and sha256 of the files that a folder directly holds."""
    files = [
        path
        for path in sorted(folder.iterdir())
        if path.is_file() and path.name != MANIFEST and not path.name.startswith(".")
    ]
    return {path.name: file_entry(path) for path in files}


def file_entry(path: Path) -> dict[str, Any]:
    """What a manifest says of a file."""
    return {"size": path.stat().st_size, "sha256": file_sha256(path)}


def seal(folder: Path) -> None:
    """Declare a folder finished: write the manifest of the files it directly holds."""
    write_json(folder / MANIFEST, manifest_of(folder))


def parse_manifest(data: bytes, where: object) -> dict[str, dict[str, Any]]:
    """Name → entry with size, sha256 and perhaps path. Raises DamagedError for anything else, names
    that leave the folder included.
    """
    try:
        manifest: dict[str, dict[str, Any]] = json.loads(data)
        whole = bool(manifest) and all(
            Path(name).name == name
            and type(entry["size"]) is int
            and isinstance(entry["sha256"], str)
            for name, entry in manifest.items()
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        whole = False
    if not whole:
        raise DamagedError(f"{where} is no manifest")
    return manifest


def check_file(path: Path, entry: Mapping[str, Any]) -> None:
    """Raises DamagedError where a file is not what the manifest says."""
    size = path.stat().st_size if path.is_file() else None
    if size is None:
        raise DamagedError(f"{path} is missing")
    if size != entry["size"]:
        raise DamagedError(f"{path} has {size} of {entry['size']} bytes")
    if file_sha256(path) != entry["sha256"]:
        raise DamagedError(f"{path} is not what was written (sha256)")


def check_sealed(folder: Path) -> None:
    """Raises DamagedError that says what keeps a folder from being finished and as it was
    written.
    """
    try:
        data = (folder / MANIFEST).read_bytes()
    except OSError:
        raise DamagedError(f"{folder} has no manifest: it was not finished, or lost it") from None
    for name, entry in parse_manifest(data, folder / MANIFEST).items():
        check_file(folder / name, entry)


def is_sealed(folder: Path) -> bool:
    """Whether the folder is finished and every file is still what the manifest says."""
    try:
        check_sealed(folder)
    except DamagedError:
        return False
    return True


def move_into(folder: Path, new: Path, last: str) -> None:
    """Let the files of `new` take their places in `folder`; that without which the others do not
    count goes first and comes back last.
    """
    (folder / last).unlink(missing_ok=True)
    for path in sorted(new.iterdir(), key=lambda path: path.name == last):
        path.replace(folder / path.name)


@contextmanager
def new_files(folder: Path, last: str) -> Iterator[Path]:
    """A temporary folder, whose files take their places in `folder` if the body succeeds; if it
    fails, `folder` is as it was.

    Args:
        last: the file without which the others do not count. Where there is one already it goes
            first and comes back last, so that an interruption leaves nothing that looks whole.
            Other files in `folder` stay.

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
        move_into(folder, new, last)
        new.rmdir()
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        for parent in made:
            with suppress(OSError):
                parent.rmdir()
        raise


def remove(folder: Path) -> None:
    """Delete a folder, its manifest first, so that a kill in between leaves nothing that looks
    finished.
    """
    (folder / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
