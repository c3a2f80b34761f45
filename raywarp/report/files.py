"""The files of a run, for whoever only looks at it: a folder or an object store, finished or not,
whole or not. Nothing is written.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from raywarp.config.schema import ConfigError
from raywarp.run.config_file import CONFIG_FILE, read_saved_config
from raywarp.run.folder import EVENTS_FILE, FRONT_FILE, METRICS_FILE, TIMING_FILE
from raywarp.storage import sealed
from raywarp.storage.location import Storage
from raywarp.storage.sealed import MANIFEST, DamagedError

Value = TypeVar("Value")
_MALFORMED = (KeyError, TypeError, ValueError, AttributeError, IndexError)


@dataclass
class RunFiles:
    """Reads a run's files. What is absent or cannot be read is None or empty, and `missing` says so
    in a sentence.

    storage: where the run is.
    """

    storage: Storage
    missing: list[str] = field(default_factory=list)

    def check(self) -> None:
        """Raises ConfigError where no run of raywarp is."""
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
        """What `build` makes of the files; where they are not as they were written, a sentence
        about `what` and `otherwise`.
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
        """A JSON file's content; None where there is none. Raises DamagedError where it cannot be
        read.

        Args:
            entry: what a manifest says of it. A file that is another one is shown, but the page
                says so.
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
        """A JSON object with its own sha256; None where there is none. Raises DamagedError."""
        data = self.storage.read(name)
        return None if data is None else sealed.parse_record(data, name)

    def rows(self, name: str) -> list[dict[str, Any]]:
        """A JSONL file's rows, without what cannot be read."""
        data = self.storage.read(name)
        if data is None:
            return []
        rows = sealed.parse_jsonl(data)
        if lost := sealed.lost_rows(data, rows):
            self.missing.append(f"{name}: {lost} of {lost + len(rows)} lines cannot be read.")
        return rows

    def config(self) -> dict[str, Any] | None:
        """The resolved configuration as plain values; None where there is none. Raises
        DamagedError.
        """
        data = self.storage.read(CONFIG_FILE)
        if data is None:
            return None
        tree = read_saved_config(data)
        if tree is None:
            raise DamagedError(f"{CONFIG_FILE} is not what was written")
        return tree

    def policy_samples(self, key: str, place: str | None) -> list[dict[str, Any]]:
        """The texts that a policy kept while it trained, a row per step: of its result, or of its
        newest checkpoint.

        Args:
            place: the store of the run's policies, where that is not the run itself.
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
        """Whether config.yaml is one of ours: other tools' files have that name, too."""
        try:
            tree = self.config() or {}
        except DamagedError:
            return True
        return "warp" in tree and "lora" in tree
