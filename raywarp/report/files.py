"""Read-only access to a run's files for the report; nothing is written.

The run lies in a folder or an object store. It may be unfinished or damaged.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from raywarp.config.schema import ConfigError
from raywarp.run.config_file import CONFIG_FILE, read_saved_config
from raywarp.run.folder import FRONT_FILE
from raywarp.run.history import EVENTS_FILE, METRICS_FILE, TIMING_FILE
from raywarp.storage import sealed
from raywarp.storage.location import Storage
from raywarp.storage.sealed import MANIFEST, DamagedError

Value = TypeVar("Value")
_MALFORMED = (KeyError, TypeError, ValueError, AttributeError, IndexError)


@dataclass
class RunFiles:
    """A reader of a run's files.

    What is absent or cannot be read becomes None or empty, and `missing` gets a sentence about it.

    Attributes:
        storage: where the run is.
        missing: sentences about what is absent or damaged.
    """

    storage: Storage
    missing: list[str] = field(default_factory=list)

    def check(self) -> None:
        """Raise ConfigError if there is no run of raywarp."""
        if self.storage.folder and not self.storage.folder.is_dir():
            raise ConfigError(
                f"{self.storage.uri} does not exist; the argument is a run's folder, or"
                " s3://bucket/prefix"
            )
        names = self.storage.names("")
        if (
            not {METRICS_FILE, EVENTS_FILE, TIMING_FILE, FRONT_FILE, "iterations"} & set(names)
            and not self._is_config()
        ):
            raise ConfigError(
                f"{self.storage.uri} holds no run of raywarp (neither {CONFIG_FILE} nor"
                f" {METRICS_FILE})"
            )

    def section(self, what: str, build: Callable[[], Value], otherwise: Value) -> Value:
        """Return what `build` makes of the files.

        If a file is not as it was written, add a sentence to `missing` and return `otherwise`.

        Args:
            what: name of the section, with which the sentence begins.
            build: reads the files.
            otherwise: result for damaged files.
        """
        try:
            return build()
        except DamagedError as error:
            self.missing.append(f"{error}.")
        except _MALFORMED as error:
            self.missing.append(
                f"{what} cannot be shown: its file is not as raywarp writes it"
                f" ({type(error).__name__})."
            )
        return otherwise

    def json(self, name: str, entry: Mapping[str, Any] | None = None) -> Any:
        """Return a JSON file's content, or None if there is no file.

        Args:
            name: the file.
            entry: its entry in a manifest. A file that does not match it is shown, but the page
                says so.

        Raises:
            DamagedError: the file cannot be read.
        """
        data = self.storage.read(name)
        if data is None:
            if entry:
                self.missing.append(f"{name} is missing.")
            return None
        if entry and hashlib.sha256(data).hexdigest() != entry.get("sha256"):
            self.missing.append(f"{name} is not what was written (sha256).")
        try:
            return json.loads(data)
        except ValueError:
            raise DamagedError(f"{name} cannot be read: it is cut off or damaged") from None

    def record(self, name: str) -> dict[str, Any] | None:
        """Return a JSON object that holds its own sha256, or None if there is no file.

        Raises:
            DamagedError: the file is not what was written.
        """
        data = self.storage.read(name)
        return None if data is None else sealed.parse_record(data, name)

    def rows(self, name: str) -> list[dict[str, Any]]:
        """Return the rows of a JSONL file, without those that cannot be read."""
        data = self.storage.read(name)
        if data is None:
            return []
        rows = sealed.parse_jsonl(data)
        if lost := sealed.lost_rows(data, rows):
            self.missing.append(f"{name}: {lost} of {lost + len(rows)} lines cannot be read.")
        return rows

    def config(self) -> dict[str, Any] | None:
        """Return the resolved configuration as plain values, or None if there is no file.

        Raises:
            DamagedError: the file is not what was written.
        """
        data = self.storage.read(CONFIG_FILE)
        if data is None:
            return None
        tree = read_saved_config(data)
        if tree is None:
            raise DamagedError(f"{CONFIG_FILE} is not what was written")
        return tree

    def policy_samples(self, key: str, place: str | None) -> list[dict[str, Any]]:
        """Return the texts that a policy kept while it trained, one row per step.

        They come from its result, or else from its newest checkpoint.

        Args:
            key: the policy's key.
            place: the store of the run's policies, if it is not the run itself.
        """
        storage, name = Storage(place) if place else self.storage, f"policies/{key}"
        checkpoints = [
            f"{name}/{one}" for one in storage.names(name) if one.startswith("checkpoint-")
        ]
        for folder in [name, *reversed(checkpoints)]:
            manifest = storage.read(f"{folder}/{MANIFEST}")
            if manifest is None:
                continue
            path = sealed.parse_manifest(manifest, f"{folder}/{MANIFEST}")["samples.jsonl"].get(
                "path", "samples.jsonl"
            )
            data = storage.read(f"{folder}/{path}")
            if data is not None:
                return sealed.parse_jsonl(data)
        return []

    def _is_config(self) -> bool:
        """Return whether config.yaml is raywarp's, since other tools use that name, too."""
        try:
            tree = self.config() or {}
        except DamagedError:
            return True
        return "warp" in tree and "lora" in tree
