"""What a sweep's folder holds besides its trials' runs, and where: a record of each trial, by which
a rerun knows what is done.

trials/<name>.json     a trial's values, a row per finished iteration, and which policies were
                       trained for it
trials/<name>/         its run; policies are in the store that all trials share
numerics/<key>.json    what a policy's key depends on and only running engines know, so that a
                       finished trial needs none
plan.json              threads of each process, since results depend on them
sweep.json, sweep.png, best.yaml
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from raywarp.storage.location import Storage

SWEEP_FILE = "sweep.json"


@dataclass
class Record:
    """One trial, so far.

    point: dotted key → value. rows: of iterations 1, 2, …: policies (keys), front_key, front
    (points), chosen, and the objectives' values.
    trained: keys of the policies whose training this trial has begun. failed: why it ended early,
    or None.
    """

    point: dict[str, Any]
    rows: list[dict[str, Any]] = field(default_factory=list)
    trained: list[str] = field(default_factory=list)
    failed: str | None = None


class SweepFiles:
    """The place `out` of a sweep, a folder or an object store."""

    def __init__(self, out: str):
        self.out, self._storage = out, Storage(out)

    def trial_folder(self, name: str) -> str:
        """The `out` of a trial."""
        return within(self.out, f"trials/{name}")

    def begun(self) -> list[str]:
        """Names of the trials whose runs have begun; the best first, once that is known."""
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
        """Of the trial with this name and these values; a new one where there is none that can be
        read.
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
        """What a session once found, for policies' keys."""
        return self._read(f"numerics/{key}.json")

    def save_numerics(self, key: str, found: Mapping[str, Any]) -> None:
        self._write(f"numerics/{key}.json", dict(found))

    def plan(self) -> dict[str, Any]:
        return self._read("plan.json") or {}

    def save_plan(self, plan: Mapping[str, Any]) -> None:
        self._write("plan.json", dict(plan))

    def _read(self, name: str) -> dict[str, Any] | None:
        data = self._storage.read(name)
        try:
            tree = json.loads(data) if data is not None else None
        except ValueError:
            return None
        return tree if isinstance(tree, dict) else None

    def _write(self, name: str, tree: Mapping[str, Any]) -> None:
        self._storage.write(name, (json.dumps(tree, indent=1) + "\n").encode())


def within(place: str, name: str) -> str:
    """A name in a folder or under a URI, whose options stay behind the question mark."""
    path, mark, options = place.partition("?") if "://" in place else (place, "", "")
    return f"{path.rstrip('/')}/{name}{mark}{options}"
