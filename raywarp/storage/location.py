"""Where results are stored: a folder, or a prefix of a bucket (s3://, gs://), through pyarrow.fs.

A name such as `policies/<key>` is a folder of files. It counts as finished once its manifest is
there, which is written last. Readers verify sha256.

In a folder, files are written beside their place and then moved there. Object stores cannot move.
There the files lie under a prefix of their own (`policies/<key>/.<unique>/<file>`), and the
manifest says which one. Files that it does not name are ignored.

The first writer to finish a name wins; later ones discard their own files.
"""

import errno
import json
import os
import re
import shutil
import tempfile
import time
import urllib.parse
import uuid
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from datetime import UTC, datetime, timedelta
from functools import cached_property
from pathlib import Path
from typing import Any

from platformdirs import user_cache_dir

from raywarp import identity
from raywarp.config.schema import ConfigError
from raywarp.storage import sealed
from raywarp.storage.locks import locked
from raywarp.storage.sealed import MANIFEST, DamagedError

# A file or folder that is being written is called by its final name, with a dot before it and 8
# digits behind.
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}")
_CREDENTIALS = ("AWS_", "GOOGLE_APPLICATION_CREDENTIALS", "GOOGLE_CLOUD_PROJECT")


def is_uri(place: str) -> bool:
    """Return whether a place is an object store rather than a folder.

    The folder may be of this machine or of a shared file system.
    """
    return "://" in place and not place.startswith("file://")


class Storage:
    """A folder or an object store's prefix.

    It can be sent to other processes. It takes the driver's credentials along, in memory only.
    Nothing is opened before it is used; a place that cannot be opened raises a ConfigError then.

    Args:
        place: a folder, file:///…, s3://bucket/prefix?region=…&endpoint_override=… or
            gs://bucket/prefix. Credentials come from the environment.

    Attributes:
        uri: the place as given; a folder's absolute path.
        folder: the folder, or None for an object store.
    """

    def __init__(self, place: str | Path):
        local = urllib.parse.unquote(str(place).removeprefix("file://"))
        self.folder = None if is_uri(str(place)) else Path(local).absolute()
        self.uri = str(self.folder or place)

    def __reduce__(self) -> Any:
        own = {
            name: value
            for name, value in os.environ.items()
            if self.folder is None and name.startswith(_CREDENTIALS)
        }
        return _reopen, (self.uri, own)

    @property
    def cache(self) -> Path:
        """The folder of this machine that holds fetched files."""
        base = (
            Path(os.environ.get("RAYWARP_CACHE") or user_cache_dir("raywarp"))
            .expanduser()
            .absolute()
        )
        return self.folder or base / "stores" / identity.content_key(self.uri)

    def read(self, name: str) -> bytes | None:
        """Return the content of one file; None if there is none."""
        with self._explained("read"):
            try:
                if self.folder:
                    return (self.folder / name).read_bytes()
                with self._fs.open_input_stream(self._path(name)) as stream:
                    content: bytes = stream.read()
                    return content
            except FileNotFoundError:
                return None

    def write(self, name: str, data: bytes) -> None:
        """Replace one file atomically."""
        with self._explained("write"):
            if self.folder:
                return sealed.write_bytes(self.folder / name, data)
            with self._fs.open_output_stream(self._path(name)) as stream:
                stream.write(data)

    def names(self, name: str) -> list[str]:
        """Return the finished entries directly under a name, sorted.

        A dot in front marks an unfinished one.
        """
        with self._explained("read"):
            if self.folder:
                place = self.folder / name
                found = [path.name for path in place.iterdir()] if place.is_dir() else []
            else:
                found = [info.base_name for info in self._list(name, recursive=False)]
        return sorted(one for one in found if not one.startswith("."))

    def files(self, name: str = "") -> list[str]:
        """Return every file under a name, relative to the store."""
        with self._explained("read"):
            if self.folder:
                return sorted(
                    str(path.relative_to(self.folder))
                    for path in _below(self.folder / name)
                    if path.is_file()
                )
            return sorted(
                info.path[len(self._root) :].lstrip("/")
                for info in self._list(name, recursive=True)
                if info.is_file
            )

    def remove(self, name: str) -> None:
        """Delete a folder, its manifest first, so that a kill leaves no finished folder."""
        with self._explained("write"):
            if self.folder:
                return sealed.remove(self.folder / name)
            sealed.remove(self.cache / name)
            with suppress(FileNotFoundError):
                self._fs.delete_file(self._path(f"{name}/{MANIFEST}"))
            with suppress(FileNotFoundError):
                self._fs.delete_dir(self._path(name))

    def fetch(self, name: str) -> Path | None:
        """Return the verified folder of a finished name on this machine; None if nothing is there.

        Raises:
            DamagedError: something is there, but it is not exactly what was written.
            StoreError: it cannot be read.
        """
        if self.folder:
            folder = self.folder / name
            if not folder.is_dir() or not any(
                path.is_file() and not path.name.startswith(".") for path in folder.iterdir()
            ):
                return None
            sealed.check_sealed(folder)
            return folder
        data = self.read(f"{name}/{MANIFEST}")
        return self._download(name, data) if data is not None else None

    def has(self, name: str) -> bool:
        """Return whether a name is finished and undamaged."""
        try:
            return self.fetch(name) is not None
        except DamagedError:
            return False

    @contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """Yield a temporary folder to fill; if the body succeeds, its files become the name's.

        If another writer has finished the name before, the files are discarded.
        """
        with self._explained("write"):
            if self.folder:
                with self._writing_beside(self.folder / name) as folder:
                    yield folder
                return
            with tempfile.TemporaryDirectory(prefix="raywarp-") as temporary:
                folder = Path(temporary)
                yield folder
                self._upload(folder, name)

    def clean(self, name: str, age: float = sealed.DAY) -> None:
        """Remove what interrupted writers left under a name.

        Args:
            age: only files older than this many seconds. The default, a day, leaves room for clocks
                that differ.
        """
        with self._explained("write"):
            if self.folder:
                for path in [
                    one for one in _below(self.folder / name) if _TEMPORARY.fullmatch(one.name)
                ]:
                    with suppress(FileNotFoundError):  # its writer has finished with it
                        if not age or time.time() - path.stat().st_mtime > age:
                            (
                                shutil.rmtree(path, ignore_errors=True)
                                if path.is_dir()
                                else path.unlink()
                            )
                return
            self._clean_prefixes(name, datetime.now(UTC) - timedelta(seconds=age))

    @contextmanager
    def _writing_beside(self, target: Path) -> Iterator[Path]:
        new = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
        new.mkdir(parents=True)
        try:
            yield new
            sealed.seal(new)
            try:
                new.rename(target)
                return
            except OSError as error:
                if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                    raise
            # The folder exists: it holds checkpoints, or another writer has finished it.
            with locked(target):
                if not sealed.is_sealed(target):
                    sealed.move_into(target, new, MANIFEST)
        finally:
            shutil.rmtree(new, ignore_errors=True)

    def _upload(self, folder: Path, name: str) -> None:
        if self.has(name):
            return
        unique, manifest = f".{uuid.uuid4().hex}", sealed.manifest_of(folder)
        for file, entry in manifest.items():
            entry["path"] = f"{unique}/{file}"
            self.put(folder / file, f"{name}/{unique}/{file}")
        self.write(f"{name}/{MANIFEST}", json.dumps(manifest, indent=1).encode())

    def unlink(self, name: str) -> None:
        """Delete one file of an object store, if it is there."""
        with self._explained("write"), suppress(FileNotFoundError):
            self._fs.delete_file(self._path(name))

    def put(self, path: Path, name: str) -> None:
        """Copy one file of this machine into an object store."""
        with (
            path.open("rb") as source,
            self._explained("write"),
            self._fs.open_output_stream(self._path(name)) as stream,
        ):
            while block := source.read(1 << 22):
                stream.write(block)

    def get(self, name: str, path: Path) -> None:
        """Copy one file of an object store to this machine.

        A reader there sees the old file or the new one, never a part.

        Raises:
            FileNotFoundError: the store has no such file.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
        try:
            with (
                self._explained("read"),
                self._fs.open_input_stream(self._path(name)) as stream,
                temporary.open("wb") as target,
            ):
                while block := stream.read(1 << 22):
                    target.write(block)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    def _download(self, name: str, data: bytes) -> Path:
        folder, where = self.cache / name, f"{name}/{MANIFEST} in {self.uri}"
        for file, entry in sealed.parse_manifest(data, where).items():
            prefix, _, last = str(entry.get("path", "")).rpartition("/")
            if last != file or not prefix.startswith(".") or not prefix[1:].isalnum():
                raise DamagedError(f"{where} is no manifest")
            with suppress(DamagedError):
                sealed.check_file(folder / file, entry)
                continue
            try:
                self.get(f"{name}/{entry['path']}", folder / file)
            except FileNotFoundError:
                raise DamagedError(f"{name}/{file} is missing in {self.uri}") from None
            sealed.check_file(folder / file, entry)
        return folder

    def _clean_prefixes(self, name: str, before: datetime) -> None:
        """Delete old files under unique prefixes that no manifest names."""
        for info in self._list(name, recursive=True):
            parent, _, unique = info.path.rpartition("/")[0].rpartition("/")
            if not info.is_file or not unique.startswith(".") or info.mtime > before:
                continue
            manifest = self.read(f"{parent[len(self._root) :].lstrip('/')}/{MANIFEST}")
            if manifest is None or unique.encode() not in manifest:
                self._fs.delete_file(info.path)

    @cached_property
    def _opened(self) -> tuple[Any, str]:
        # Half a second and 30 MB, which a folder does not need.
        from pyarrow import ArrowInvalid, fs

        try:
            return fs.FileSystem.from_uri(self.uri)  # type: ignore[no-any-return]
        except (ArrowInvalid, NotImplementedError) as error:
            raise ConfigError(
                f"{self.uri} cannot be opened as a store: {str(error).splitlines()[0]}"
            ) from None

    @property
    def _fs(self) -> Any:
        return self._opened[0]

    @property
    def _root(self) -> str:
        return self._opened[1].rstrip("/")

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}".rstrip("/")

    def _list(self, name: str, recursive: bool) -> list[Any]:
        from pyarrow import fs

        listed: list[Any] = self._fs.get_file_info(
            fs.FileSelector(self._path(name), allow_not_found=True, recursive=recursive)
        )
        return listed

    def _explained(self, verb: str) -> AbstractContextManager[None]:
        return sealed.explained(verb, self.uri)


def _below(folder: Path) -> Iterator[Path]:
    """Yield all files and folders in a folder that other processes change meanwhile.

    pathlib's rglob fails when an entry vanishes (Python 3.11).
    """
    for parent, folders, names in os.walk(folder):
        yield from (Path(parent, name) for name in [*folders, *names])


def _reopen(uri: str, credentials: dict[str, str]) -> Storage:
    os.environ.update(credentials)
    return Storage(uri)
