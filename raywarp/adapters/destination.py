"""The place of a merged adapter: a new or empty folder, or a new prefix of an object store.

The files appear there only when all are whole, adapter_config.json last. A failure or an interrupt
leaves nothing.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from raywarp.adapters.peft_config import ADAPTER_CONFIG_FILE
from raywarp.algorithm.factors import AdapterError
from raywarp.config.secrets import redact
from raywarp.storage import scratch, sealed
from raywarp.storage.location import Storage

_SCHEMES = ("s3", "s3a", "s3n", "gs", "gcs", "hf", "http", "https", "abfs", "abfss", "az", "hdfs")
_PROBE = ".raywarp-probe"


@contextmanager
def new_adapter(out: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """Yield a folder whose files become the adapter in `out` if the body succeeds.

    Args:
        out: a folder, file:///…, or an object store's prefix (s3://, gs://).
        overwrite: replace the adapter in `out`; other files there stay.

    Raises:
        AdapterError: `out` is in use, cannot be written, or is neither a folder nor an address.
    """
    place = _place(str(out))
    if isinstance(place, Path):
        opened = _in_folder(place, overwrite)
    else:
        opened = _in_store(place, overwrite)
    with opened as folder:
        yield folder


def _place(out: str) -> Path | Storage:
    """Return the Path or the Storage that is meant."""
    scheme, colon, rest = out.partition(":")
    if not colon or (scheme.lower() not in (*_SCHEMES, "file") and not rest.startswith("//")):
        return Path(out).expanduser()
    if scheme == "file" and re.match("///[^/]", rest):
        return Path(Storage(out).uri)
    if scheme.lower() == "file":
        raise AdapterError(f"{out} is no address of a folder; write file:///folder, or the folder")
    if scheme != scheme.lower() or not re.match("//[^/?]", rest):
        right = f"{scheme.lower()}://{rest.lstrip('/') or 'bucket/prefix'}"
        raise AdapterError(
            f"{out} is no address of an object store; write {right} (as a str: a Path drops a"
            f" slash), or ./{out} for a folder of that name"
        )
    if redact(out) != out:
        raise AdapterError(
            f"{redact(out)} holds credentials: take them out, and set"
            " the environment variables that the store reads (AWS_ACCESS_KEY_ID and"
            " AWS_SECRET_ACCESS_KEY, GOOGLE_APPLICATION_CREDENTIALS)"
        )
    return Storage(out)


@contextmanager
def _in_folder(out: Path, overwrite: bool) -> Iterator[Path]:
    out = out.resolve()
    if (reason := sealed.why_in_use(out)) and not (overwrite and out.is_dir()):
        raise AdapterError(reason + (", or give --overwrite" if out.is_dir() else ""))
    try:
        with sealed.new_files(out, last=ADAPTER_CONFIG_FILE) as folder:
            yield folder
    except OSError as error:
        raise AdapterError(f"cannot write {out}: {error.strerror or error}") from None


@contextmanager
def _in_store(store: Storage, overwrite: bool) -> Iterator[Path]:
    """See new_adapter; the files are made in a scratch folder and uploaded at the end."""
    with _refusals(store):
        present = store.names("")
        if present and not overwrite:
            raise AdapterError(
                f"{store.uri} is not empty ({present[0]}); choose another prefix, or give"
                " --overwrite"
            )
        store.write(_PROBE, b"")  # before any work: a bucket that is not there, or not ours
        store.unlink(_PROBE)
    folder = scratch.claim()
    try:
        yield folder
        with _refusals(store):
            _upload(folder, store)
    finally:
        scratch.discard(folder)


def _upload(folder: Path, store: Storage) -> None:
    """Put the files of a folder into a store, the configuration last; take them back on failure."""
    files = sorted(folder.iterdir(), key=lambda path: path.name == ADAPTER_CONFIG_FILE)
    store.unlink(ADAPTER_CONFIG_FILE)
    tried: list[str] = []
    try:
        for path in files:
            tried.append(path.name)
            store.put(path, path.name)
    except BaseException:
        for name in tried:
            with suppress(Exception):
                store.unlink(name)
        raise


@contextmanager
def _refusals(store: Storage) -> Iterator[None]:
    """Turn what a store answers into an AdapterError."""
    try:
        yield
    except (sealed.StoreError, FileNotFoundError) as error:
        reason = str(error).removeprefix(f"cannot write {store.uri}: ")
        raise AdapterError(f"cannot write {store.uri}: {reason}") from None
