"""Files in a sweep's folder, among them a record of each trial that tells a rerun what is done.

trials/<name>.json     a trial's values, a row per finished iteration, and the keys of the policies
                       that were trained for it
trials/<name>/         the trial's run; its policies are in the store that all trials share
numerics/<key>.json    the part of a policy's key that only running engines know; with it, a
                       finished trial starts no engine
plan.json              threads of each process, because results depend on them
sweep.json, sweep.png, best.yaml
                       the results, see results.py
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from raywarp.storage.location import Storage

SWEEP_FILE = "sweep.json"


@dataclass
class Record:
    """The state of one trial.

    Attributes:
        point: the trial's values, dotted key → value.
        rows: one row for each of iterations 1, 2, …: policies (keys), front_key, front (points),
            ceiling, chosen, and the objectives' values.
        trained: keys of the policies whose training this trial has begun.
        failed: why the trial ended early; None if it did not.
    """

    point: dict[str, Any]
    rows: list[dict[str, Any]] = field(default_factory=list)
    trained: list[str] = field(default_factory=list)
    failed: str | None = None


class SweepFiles:
    """The files in the place `out` of a sweep, a folder or an object store."""

    def __init__(self, out: str):
        self.out, self._storage = out, Storage(out)

    def trial_folder(self, name: str) -> str:
        """Return the `out` of a trial."""
        return within(self.out, f"trials/{name}")

    def begun(self) -> list[str]:
        """Return the names of the trials whose runs have begun.

        Once sweep.json ranks them, the best is the first.
        """
        trials = (self._read(SWEEP_FILE) or {}).get("trials")
        ranked = (
            [trial.get("name") for trial in trials if isinstance(trial, dict)]
            if isinstance(trials, list)
            else []
        )
        found = [name for name in self._storage.names("trials") if not name.endswith(".json")]
        return sorted(
            found, key=lambda name: (ranked.index(name) if name in ranked else len(ranked), name)
        )

    def record(self, name: str, point: Mapping[str, Any]) -> Record:
        """Return a trial's record, or a new one if none can be read.

        Args:
            name: name of the trial.
            point: values of a new record.
        """
        tree = self._read(f"trials/{name}.json")
        return (
            Record(**tree)
            if tree is not None and tree.keys() == asdict(Record({})).keys()
            else Record(dict(point))
        )

    def save_record(self, name: str, record: Record) -> None:
        self._write(f"trials/{name}.json", asdict(record))

    def numerics(self, key: str) -> dict[str, Any] | None:
        """Return the determinants of policies' keys that an earlier session found, or None."""
        return self._read(f"numerics/{key}.json")

    def save_numerics(self, key: str, found: Mapping[str, Any]) -> None:
        self._write(f"numerics/{key}.json", dict(found))

    def plan(self) -> dict[str, Any]:
        """Return plan.json; empty before it is first written."""
        return self._read("plan.json") or {}

    def save_plan(self, plan: Mapping[str, Any]) -> None:
        self._write("plan.json", dict(plan))

    def _read(self, name: str) -> dict[str, Any] | None:
        """Return a JSON file's object; None if it is missing or unreadable."""
        data = self._storage.read(name)
        try:
            tree = json.loads(data) if data is not None else None
        except ValueError:
            return None
        return tree if isinstance(tree, dict) else None

    def _write(self, name: str, tree: Mapping[str, Any]) -> None:
        self._storage.write(name, (json.dumps(tree, indent=1) + "\n").encode())


def within(place: str, name: str) -> str:
    """Return the path of a name in a folder or under a URI.

    A URI's options stay at its end, after the question mark.
    """
    path, mark, options = place.partition("?") if "://" in place else (place, "", "")
    return f"{path.rstrip('/')}/{name}{mark}{options}"
