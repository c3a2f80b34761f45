"""Sealed folders and records: files that count only when they are whole.

A folder's manifest lists sizes and sha256, and is written last. A record holds its own sha256.

Policies lie under a key, the hash of everything that determines them. Resuming means looking the
key up.
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
    """A file cannot be read or written: no room, no access, no network.

    Finished files are intact, and the same command continues from them.
    """


class DamagedError(ValueError):
    """A file or folder is not exactly what was written; the message says which and why."""


@contextmanager
def explained(verb: str, place: object) -> Iterator[None]:
    """Turn an OSError of the body into a StoreError that says what to do.

    A missing file stays a FileNotFoundError.
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
    """Replace a file atomically: a reader sees the old content or the new, never a part.

    A write that fails leaves the old file.

    Raises:
        StoreError: the file cannot be written.
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
    """Return the file's rows; an empty list if there is no file.

    A line that a kill cut off or that damage made unreadable is not a row.
    """
    return parse_jsonl(path.read_bytes()) if path.is_file() else []


def parse_jsonl(data: bytes) -> list[dict[str, Any]]:
    """Return the rows of a file's content; see `read_jsonl`."""
    rows = []
    for line in data.split(b"\n"):
        with suppress(ValueError):
            row = json.loads(line)
            rows += [row] if isinstance(row, dict) else []
    return rows


def lost_rows(data: bytes, rows: Sequence[dict[str, Any]]) -> int:
    """Return the number of lines that `parse_jsonl` could not read.

    Args:
        data: the file's content.
        rows: the rows that `parse_jsonl` made of it.
    """
    return sum(1 for line in data.split(b"\n") if line.strip()) - len(rows)


def append_jsonl(path: Path, row: dict[str, Any]) -> None:
    """Append a row on a line of its own, even where a kill cut the last line off."""
    with explained("write", path), path.open("ab+") as file:
        cut_off = file.tell() and os.pread(file.fileno(), 1, file.tell() - 1) != b"\n"
        file.write(b"\n" * bool(cut_off) + json.dumps(row).encode() + b"\n")


def write_record(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object with its own sha256, so that `read_record` notices any damage."""
    write_bytes(path, record_bytes(value))


def record_bytes(value: Mapping[str, Any]) -> bytes:
    """Return the content of a record; see `parse_record`."""
    return _json_text({**value, "sha256": _record_sha256(value)}).encode()


def read_record(path: Path) -> dict[str, Any] | None:
    """Return what `write_record` wrote; None if there is no such file.

    Raises:
        DamagedError: the file is not what was written.
    """
    try:
        return parse_record(path.read_bytes(), path)
    except FileNotFoundError:
        return None
    except OSError:
        raise DamagedError(f"{path} cannot be read") from None


def parse_record(data: bytes, where: object) -> dict[str, Any]:
    """Return the record in a file's content; see `read_record`.

    Args:
        where: names the file in messages.

    Raises:
        DamagedError: the content is not what was written.
    """
    try:
        value = json.loads(data)
        # A different last digit may be the same float
        is_whole = data == _json_text(value).encode()
        stored = value.pop("sha256")
    except (ValueError, KeyError, TypeError, AttributeError):
        raise DamagedError(f"{where} cannot be read") from None
    if not is_whole or stored != _record_sha256(value):
        raise DamagedError(f"{where} is not what was written (sha256)")
    return dict(value)


def _record_sha256(value: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def manifest_of(folder: Path) -> dict[str, dict[str, Any]]:
    """Return name → size and sha256 of the files that a folder directly holds."""
    files = [
        path
        for path in sorted(folder.iterdir())
        if path.is_file() and path.name != MANIFEST and not path.name.startswith(".")
    ]
    return {path.name: file_entry(path) for path in files}


def file_entry(path: Path) -> dict[str, Any]:
    """Return a file's entry in a manifest: its size and sha256."""
    return {"size": path.stat().st_size, "sha256": file_sha256(path)}


def seal(folder: Path) -> None:
    """Mark a folder as finished: write the manifest of the files that it directly holds."""
    write_json(folder / MANIFEST, manifest_of(folder))


def parse_manifest(data: bytes, where: object) -> dict[str, dict[str, Any]]:
    """Return name → entry with size, sha256 and possibly path.

    Raises:
        DamagedError: the data is no manifest, or a name in it leads out of the folder.
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
    """Raise DamagedError unless a file is what its manifest entry says."""
    size = path.stat().st_size if path.is_file() else None
    if size is None:
        raise DamagedError(f"{path} is missing")
    if size != entry["size"]:
        raise DamagedError(f"{path} has {size} of {entry['size']} bytes")
    if file_sha256(path) != entry["sha256"]:
        raise DamagedError(f"{path} is not what was written (sha256)")


def check_sealed(folder: Path) -> None:
    """Raise DamagedError unless a folder is finished and as it was written.

    The message names the first fault.
    """
    try:
        data = (folder / MANIFEST).read_bytes()
    except OSError:
        raise DamagedError(f"{folder} has no manifest: it was not finished, or lost it") from None
    for name, entry in parse_manifest(data, folder / MANIFEST).items():
        check_file(folder / name, entry)


def is_sealed(folder: Path) -> bool:
    """Return whether the folder is finished and every file is as the manifest says."""
    try:
        check_sealed(folder)
    except DamagedError:
        return False
    return True


def move_into(folder: Path, new: Path, last: str) -> None:
    """Move the files of `new` into `folder`.

    Args:
        last: the file without which the others do not count. It is removed first and moved last.
    """
    (folder / last).unlink(missing_ok=True)
    for path in sorted(new.iterdir(), key=lambda path: path.name == last):
        path.replace(folder / path.name)


def why_in_use(folder: Path) -> str:
    """Return why nothing new can be made at a place; "" for a new or an empty folder."""
    if folder.exists() and not folder.is_dir():
        return f"{folder} is a file; name a folder"
    if folder.exists() and any(folder.iterdir()):
        return f"{folder} is not empty; choose another folder"
    return ""


@contextmanager
def new_files(folder: Path, last: str) -> Iterator[Path]:
    """Yield a temporary folder whose files are moved into `folder` if the body succeeds.

    If the body fails, `folder` stays as it was. Other files in `folder` stay, too.

    Args:
        last: the file without which the others do not count. An existing one is removed first and
            comes back last, so that an interruption leaves nothing that looks whole.

    Raises:
        OSError: the folder cannot be written.
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
    """Delete a folder, its manifest first, so that a kill leaves no finished folder."""
    (folder / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
