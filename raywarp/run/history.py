"""What happened in a run: a row per optimiser step, its events, and where the time went."""

from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from raywarp.config.schema import ConfigError
from raywarp.run.policy_files import TRAJECTORY_FILE
from raywarp.storage import sealed
from raywarp.storage.location import Storage
from raywarp.storage.mirror import Mirror
from raywarp.storage.sealed import DamagedError

METRICS_FILE = "metrics.jsonl"
TIMING_FILE = "timing.json"
EVENTS_FILE = "events.jsonl"


def last_iteration(place: Storage) -> int:
    """Return how many iterations the run at a place has finished."""
    return max((int(name) for name in place.names("iterations") if name.isdigit()), default=0)


def fetched(place: Storage, name: str) -> Path:
    """Return a whole folder of a run.

    Raises:
        ConfigError: it is damaged, or not there.
    """
    try:
        folder = place.fetch(name)
    except DamagedError as error:
        raise ConfigError(f"{error}; `raywarp train` makes it anew") from None
    if folder is None:
        raise ConfigError(f"{place.uri} has no {name}/: is it the folder of a finished run?")
    return folder


class History:
    """The part of a run's folder that grows while it trains; see Run for the attributes."""

    folder: Path
    mirror: Mirror | None
    say: Callable[[str], None]

    def trajectory(self) -> list[dict[str, Any]]:
        """Return one row per policy and measurement on held-out prompts while it trained."""
        return sealed.read_jsonl(self.folder / TRAJECTORY_FILE)

    @property
    def metrics_file(self) -> Path:
        return self.folder / METRICS_FILE

    def metrics(self) -> list[dict[str, Any]]:
        """Return one row per policy and optimiser step."""
        return sealed.read_jsonl(self.metrics_file)

    def set_policy_rows(self, key: str, rows: Mapping[str, Sequence[dict[str, Any]]]) -> None:
        """Replace a policy's rows by those of its folder.

        After a resume, each step and each measurement then has one row.

        Args:
            rows: file → its rows of this policy.
        """
        for name, own in rows.items():
            path = self.folder / name
            others = [row for row in sealed.read_jsonl(path) if row.get("key") != key]
            sealed.write_jsonl(path, [*others, *own])

    def add_metrics(self, row: dict[str, Any]) -> None:
        self._append(METRICS_FILE, row)

    def add_measurement(self, row: dict[str, Any]) -> None:
        self._append(TRAJECTORY_FILE, row)

    def _append(self, file: str, row: dict[str, Any]) -> None:
        sealed.append_jsonl(self.folder / file, row)
        if self.mirror:
            self.mirror.push_now_and_then()

    def events(self) -> list[dict[str, Any]]:
        """Return the events of the run, oldest first; see add_event."""
        return [
            row
            for row in sealed.read_jsonl(self.folder / EVENTS_FILE)
            if "event" in row and "time" in row
        ]

    def lost_events(self) -> str:
        """Return a sentence about the events that damage has destroyed, or an empty string.

        Only damage that leaves a trace can be seen.
        """
        path = self.folder / EVENTS_FILE
        data = path.read_bytes() if path.is_file() else b""
        lost = sealed.lost_rows(data, sealed.parse_jsonl(data))
        if not data and self.metrics_file.is_file():
            return f"{path} is missing or empty: what befell the run before is not known any more"
        return f"{path}: {lost} of its lines cannot be read, and are left out" if lost else ""

    def add_event(self, event: str, **details: Any) -> dict[str, Any]:
        """Append a line to events.jsonl, and return it.

        Args:
            event: started, finished, failed or stopped (the run); fault, hang, recovered,
                continued, lost or moved (a part of it); resumed, saved or ended (a policy, the
                last by a stop rule).
            details: those of the following that apply. At the start of a run: versions (of
                packages) and sampler (its version). Otherwise: what (the process), iteration,
                policy, key, step, cause (out of memory, killed, node lost, hang, exception),
                message, seconds_lost, steps_repeated.
        """
        row = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "event": event,
            **details,
        }
        sealed.append_jsonl(self.folder / EVENTS_FILE, row)
        return row

    def save_timing(self, iteration: int, row: Mapping[str, Any]) -> None:
        """Save to timing.json where the time of an iteration's fine-tuning went.

        Args:
            row: see raywarp.training.timing.Timing.
        """
        times = self._times()
        rows = [old for old in times["iterations"] if old["iteration"] != iteration]
        sealed.write_record(
            self.folder / TIMING_FILE,
            {**times, "iterations": [*rows, {"iteration": iteration, **row}]},
        )

    def save_evaluation_work(self, spans: Mapping[str, Any]) -> None:
        """Save to timing.json which actors measured the front, and when.

        Args:
            spans: as in a step's row: actor → pairs of start and end in Unix seconds.
        """
        sealed.write_record(
            self.folder / TIMING_FILE, {**self._times(), "evaluation": {"spans": spans}}
        )

    def timing(self) -> list[dict[str, Any]]:
        """Return one row per iteration that was trained."""
        rows: list[dict[str, Any]] = self._times()["iterations"]
        return rows

    def _times(self) -> dict[str, Any]:
        path = self.folder / TIMING_FILE
        try:
            return sealed.read_record(path) or {"iterations": []}
        except DamagedError as error:
            self.say(f"{error}; where the time went so far is lost")
            path.unlink()
            return {"iterations": []}
