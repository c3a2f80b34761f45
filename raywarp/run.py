"""What a run's folder holds, and where: config, metrics, policies under their keys, iterations, front, and the chosen adapter."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from raywarp import store
from raywarp.adapters import AdapterDelta
from raywarp.averaging import geometry
from raywarp.config import Config, ConfigError, to_yaml
from raywarp.mirror import Mirror
from raywarp.peft_files import save_peft
from raywarp.storage import Storage

CONFIG_FILE = "config.yaml"
TIMING_FILE = "timing.json"
EVENTS_FILE = "events.jsonl"
# Keys that change how a run is carried out or looked at, but not what it trains.
_FREE_KEYS = {
    *("out", "store", "cluster", "front", "control", "preferences", "reward_training", "checkpoint_every", "kl_to_sft_every", "loggers")
}


@dataclass(frozen=True)
class Run:
    """A run's folder. `train` returns it; its files are all plain.

    folder: on this machine; where `out` is an object store, a copy of what is there.
    place: the store of its policies, where that is not the folder itself. mirror: what keeps an object store equal to the folder.
    """

    folder: Path
    place: Storage | None = None
    mirror: Mirror | None = None

    @property
    def store(self) -> Storage:
        """Where its policies are."""
        return self.place or Storage(self.folder)

    @classmethod
    def open(cls, config: Config) -> "Run":
        """The place `out`, new or with this same run in it.

        Raises:
            ConfigError: it holds a different run (the keys that differ are named), or files that no run wrote.
            StoreError: an object store cannot be reached.
        """
        out = Storage(config.out)
        place = Storage(config.store) if config.store else None
        if out.folder is None:
            mirror = Mirror(out)
            mirror.pull()
            run = cls(mirror.folder, place or out, mirror)
        else:
            run = cls(out.folder, place)
        run.check(config)
        return run

    def check(self, config: Config) -> None:
        """Raises ConfigError where the folder holds another run, or files that no run wrote."""
        folder = self.folder
        saved = folder / CONFIG_FILE
        if saved.is_file():
            if differing := _differing_keys(saved, config):
                raise ConfigError(
                    f"out={config.out} holds a different run ({', '.join(differing)}); choose another out, or delete the folder"
                )
        elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ConfigError(f"out={config.out} exists and holds no run of raywarp; choose another out, or empty it")

    def save_config(self, config: Config) -> None:
        store.write_text(self.folder / CONFIG_FILE, to_yaml(config))
        self.push()

    def push(self) -> None:
        """Bring an object store up to date, if `out` is one."""
        if self.mirror:
            self.mirror.push()

    def policy_folder(self, key: str) -> Path:
        """A policy's folder on this machine; of an object store's, what `find_policy` has fetched."""
        return self.store.cache / "policies" / key

    def policy_done(self, key: str) -> bool:
        """Whether the policy is finished, and every byte of it is what was written."""
        return self.store.has(f"policies/{key}")

    def find_policy(self, key: str) -> Path | None:
        """The folder of a finished policy, verified; None if it is not finished.

        Raises:
            DamagedError: it was finished once, and is not whole any more; says what is wrong.
        """
        return self.store.fetch(f"policies/{key}")

    @property
    def metrics_file(self) -> Path:
        return self.folder / "metrics.jsonl"

    def metrics(self) -> list[dict[str, Any]]:
        """One row per policy and optimiser step."""
        return store.read_jsonl(self.metrics_file)

    def set_policy_metrics(self, key: str, rows: Sequence[dict[str, Any]]) -> None:
        """Replace a policy's rows by what its folder says, so that after a resume each step stands there once."""
        others = [row for row in self.metrics() if row["key"] != key]
        store.write_jsonl(self.metrics_file, [*others, *rows])

    def add_metrics(self, row: dict[str, Any]) -> None:
        store.append_jsonl(self.metrics_file, row)
        if self.mirror:
            self.mirror.push_now_and_then()

    def events(self) -> list[dict[str, Any]]:
        """What happened to the run, oldest first: see add_event."""
        return store.read_jsonl(self.folder / EVENTS_FILE)

    def add_event(self, event: str, **details: Any) -> dict[str, Any]:
        """One line of events.jsonl.

        Args:
            event: started, finished, failed or stopped (the run); fault, hang, recovered, continued, lost or moved (a piece of it);
                resumed or saved (a policy).
            details: what (the process), iteration, policy, key, step, cause (out of memory, killed, node lost, hang, exception), message,
                seconds_lost, steps_repeated; whichever apply.
        """
        row = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "event": event, **details}
        store.append_jsonl(self.folder / EVENTS_FILE, row)
        return row

    def save_timing(self, iteration: int, row: Mapping[str, Any]) -> None:
        """Where the time of an iteration's fine-tuning went (see timing.Timing), in timing.json."""
        rows = [old for old in self.timing() if old["iteration"] != iteration]
        store.write_json(self.folder / TIMING_FILE, [*rows, {"iteration": iteration, **row}])

    def timing(self) -> list[dict[str, Any]]:
        path = self.folder / TIMING_FILE
        rows: list[dict[str, Any]] = json.loads(path.read_text()) if path.is_file() else []
        return rows

    def save_iteration(
        self, iteration: int, init: AdapterDelta, merged: AdapterDelta, keys: Sequence[str], task_vectors: Sequence[AdapterDelta]
    ) -> None:
        """init: θ_init that the policies started from; merged: θ_slerp; both as changes of the SFT model.

        policies.json lists the folders of θ_1..θ_M in the order they were merged, relative to the run's folder;
        geometry.json has each block's norms and angles of the task vectors θ_m − θ_init.
        """
        folder = self.folder / "iterations" / str(iteration)
        save_peft(init, folder / "init")
        save_peft(merged, folder / "merged")
        store.write_json(folder / "policies.json", [f"policies/{key}" for key in keys])
        store.write_json(folder / "geometry.json", geometry(task_vectors))

    def save_adapter(self, delta: AdapterDelta) -> None:
        """The chosen point of the front, as a plain PEFT adapter."""
        store.remove(self.folder / "adapter")
        save_peft(delta, self.folder / "adapter")
        store.seal(self.folder / "adapter")

    def samples(self) -> list[dict[str, str]]:
        rows: list[dict[str, str]] = json.loads((self.folder / "samples.json").read_text())
        return rows

    def save_front(self, front: Mapping[str, Any]) -> None:
        store.write_json(self.folder / "front.json", front)

    def has_front(self, key: str) -> bool:
        """Whether front.json is of exactly these policies and this evaluation, and adapter/ is there."""
        try:
            return bool(self.front()["key"] == key) and store.is_sealed(self.folder / "adapter")
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def front(self) -> dict[str, Any]:
        result: dict[str, Any] = json.loads((self.folder / "front.json").read_text())
        return result


def _differing_keys(saved: Path, config: Config) -> list[str]:
    try:
        theirs = yaml.safe_load(saved.read_text())
    except (OSError, yaml.YAMLError):
        theirs = None
    if not isinstance(theirs, dict):
        raise ConfigError(f"{saved} cannot be read; choose another out, or delete the folder")
    before, now = dict(_flat(theirs)), dict(_flat(config.model_dump(mode="json")))
    return [
        f"{key} is {before.get(key)!r} there and {value!r} here"
        for key, value in now.items()
        if key.partition(".")[0] not in _FREE_KEYS and before.get(key) != value
    ]


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
