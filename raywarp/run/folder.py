"""What a run's folder holds, and where: config, metrics, policies under their keys, iterations,
front, and the chosen adapter.
"""

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from raywarp.adapters.peft import save_peft
from raywarp.algorithm.averaging import geometry
from raywarp.algorithm.deltas import AdapterDelta
from raywarp.config.schema import Config, ConfigError
from raywarp.run.config_file import (
    CONFIG_FILE,
    SAMPLER_VERSION,
    differing_keys,
    read_saved_config,
    saved_form,
)
from raywarp.run.sampler_mark import Mark, sampler_mark
from raywarp.storage import sealed
from raywarp.storage.location import Storage
from raywarp.storage.mirror import Mirror
from raywarp.storage.sealed import DamagedError

METRICS_FILE = "metrics.jsonl"
TIMING_FILE = "timing.json"
EVENTS_FILE = "events.jsonl"
FRONT_FILE = "front.json"
PICTURE = "front.png"
# What is there before the configuration: policies for others, and what a start left that was killed
# or refused.
_EARLY = re.compile(
    r"policies|tensorboard|wandb|loggers\.json|\.(preflight-|node-|config\.yaml\.|loggers\.json\.).*"
)
FRONT_FILES = (
    PICTURE,
    "samples.json",
    "adapter/adapter_config.json",
    "adapter/adapter_model.safetensors",
)


def read_mark(place: Storage) -> Mark | None:
    """What marks the run of a folder or object store as one of an earlier sampler; None where it is
    one of this version.
    """
    return sampler_mark(*map(place.read, (CONFIG_FILE, FRONT_FILE, EVENTS_FILE)))


@dataclass(frozen=True)
class Run:
    """A run's folder. `train` returns it; its files are all plain.

    folder: on this machine; where `out` is an object store, a copy of what is there.
    place: the store of its policies, where that is not `out` itself. mirror: what keeps an object
    store equal to the folder.
    say: gets a line for everything that was found damaged, and what becomes of it.
    """

    folder: Path
    place: Storage | None = None
    mirror: Mirror | None = None
    say: Callable[[str], None] = field(default=print, repr=False, compare=False)

    @property
    def store(self) -> Storage:
        """Where its policies are."""
        return self.place or (self.mirror.storage if self.mirror else Storage(self.folder))

    @classmethod
    def open(cls, config: Config, say: Callable[[str], None] = print) -> "Run":
        """The place `out`, new or with this same run in it.

        Raises:
            ConfigError: it holds a different run (the keys that differ are named), one that an
                earlier version sampled, or files that no run wrote.
            StoreError: an object store cannot be reached.
        """
        out = Storage(config.out)
        place = Storage(config.store) if config.store else None
        if out.folder is None:
            mirror = Mirror(out)
            mirror.pull()
            run = cls(mirror.folder, place, mirror, say)
        else:
            run = cls(out.folder, place, say=say)
        run._check(config)
        return run

    def _check(self, config: Config) -> None:
        """Raises ConfigError where the folder holds another run, one of an earlier sampler, or
        files that no run wrote.

        A configuration that is lost or damaged is written anew: policies are found by their keys,
        whatever it said.
        """
        folder = self.folder
        saved, ours = (
            folder / CONFIG_FILE,
            any((folder / name).exists() for name in (METRICS_FILE, TIMING_FILE, "iterations")),
        )
        if ours and (mark := read_mark(Storage(folder))):
            raise ConfigError(
                f"out={config.out} cannot be continued: {mark.reason}; choose another out, or"
                " delete the folder"
            )
        if saved.is_file():
            theirs = read_saved_config(saved.read_bytes())
            if theirs is None and not ours:
                raise ConfigError(
                    f"{saved} cannot be read; choose another out, or delete the folder"
                )
            if theirs is None:
                self.say(f"{saved} is not what was written; written anew")
            elif differing := differing_keys(theirs, config):
                raise ConfigError(
                    f"out={config.out} holds a different run ({', '.join(differing)}); choose"
                    " another out, or delete the folder"
                )
        elif ours:
            self.say(f"{saved} is missing; written anew")
        elif folder.exists() and (
            not folder.is_dir() or any(not _EARLY.fullmatch(path.name) for path in folder.iterdir())
        ):
            raise ConfigError(
                f"out={config.out} exists and holds no run of raywarp; choose another out, or"
                " empty it"
            )

    def save_config(self, config: Config) -> None:
        sealed.write_text(self.folder / CONFIG_FILE, saved_form(config))
        self.push()

    @contextmanager
    def mirrored(self) -> Iterator[None]:
        """At the end of the body an object store is up to date, if `out` is one and can be
        reached.
        """
        try:
            yield
        except BaseException:
            with suppress(sealed.StoreError):  # the body's error says more
                self.push()
            raise
        self.push()

    def clean(self) -> None:
        """Remove what interrupted writers left: at once where only this run writes, else after a
        day.
        """
        self.store.clean("policies", sealed.DAY if self.place or self.mirror else 0)
        if not self.mirror:
            Storage(self.folder).clean("iterations", 0)

    def push(self) -> None:
        """Bring an object store up to date, if `out` is one."""
        if self.mirror:
            self.mirror.push()

    def policy_folder(self, key: str) -> Path:
        """A policy's folder on this machine; of an object store's, what `find_policy` has
        fetched.
        """
        return self.store.cache / "policies" / key

    def policy_done(self, key: str) -> bool:
        """Whether the policy is finished, and every byte of it is what was written."""
        return self.store.has(f"policies/{key}")

    def has_policies(self, keys: Sequence[Sequence[str]]) -> bool:
        """Whether those of all iterations are."""
        return all(self.policy_done(key) for of_iteration in keys for key in of_iteration)

    def find_policy(self, key: str) -> Path | None:
        """The folder of a finished policy, verified; None if it is not finished.

        Raises:
            DamagedError: it was finished once, and is not whole any more; says what is wrong.
        """
        return self.store.fetch(f"policies/{key}")

    @property
    def metrics_file(self) -> Path:
        return self.folder / METRICS_FILE

    def metrics(self) -> list[dict[str, Any]]:
        """One row per policy and optimiser step."""
        return sealed.read_jsonl(self.metrics_file)

    def restore_metrics(self, iteration: int, iterations: int, finished: Sequence[str]) -> None:
        """Make an iteration's rows anew: those of its finished policies are in their folders, and
        those of the others come with their checkpoints (`set_policy_metrics`).

        Args:
            iterations: I; what claims to be of another one goes.
            finished: keys of the iteration's policies that are.
        """
        before = self.metrics()
        rows = [
            row
            for key in finished
            for row in sealed.read_jsonl(self.policy_folder(key) / METRICS_FILE)
        ]
        known = {json.dumps(row) for row in before}
        if self.metrics_file.is_file() and any(json.dumps(row) not in known for row in rows):
            self.say(
                f"{self.metrics_file} lacked rows of iteration {iteration} or had others; taken"
                " from the policies' folders"
            )
        earlier, later = range(1, iteration), range(iteration + 1, iterations + 1)
        kept = [
            [row for row in before if row.get("iteration") in some] for some in (earlier, later)
        ]
        sealed.write_jsonl(self.metrics_file, [*kept[0], *rows, *kept[1]])

    def set_policy_metrics(self, key: str, rows: Sequence[dict[str, Any]]) -> None:
        """Replace a policy's rows by what its folder says, so that after a resume each step stands
        there once.
        """
        others = [row for row in self.metrics() if row.get("key") != key]
        sealed.write_jsonl(self.metrics_file, [*others, *rows])

    def add_metrics(self, row: dict[str, Any]) -> None:
        sealed.append_jsonl(self.metrics_file, row)
        if self.mirror:
            self.mirror.push_now_and_then()

    def events(self) -> list[dict[str, Any]]:
        """What happened to the run, oldest first: see add_event."""
        return [
            row
            for row in sealed.read_jsonl(self.folder / EVENTS_FILE)
            if "event" in row and "time" in row
        ]

    def lost_events(self) -> str:
        """What damage has taken of them, as far as it shows; empty where nothing is amiss."""
        path = self.folder / EVENTS_FILE
        data = path.read_bytes() if path.is_file() else b""
        lost = sealed.lost_rows(data, sealed.parse_jsonl(data))
        if not data and self.metrics_file.is_file():
            return f"{path} is missing or empty: what befell the run before is not known any more"
        return f"{path}: {lost} of its lines cannot be read, and are left out" if lost else ""

    def add_event(self, event: str, **details: Any) -> dict[str, Any]:
        """One line of events.jsonl.

        Args:
            event: started, finished, failed or stopped (the run); fault, hang, recovered,
                continued, lost or moved (a piece of it); resumed or saved (a policy).
            details: versions (of packages) and sampler (its version), where a run has started; what
                (the process), iteration, policy, key, step, cause (out of memory, killed, node
                lost, hang, exception), message, seconds_lost, steps_repeated; whichever apply.
        """
        row = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "event": event,
            **details,
        }
        sealed.append_jsonl(self.folder / EVENTS_FILE, row)
        return row

    def save_timing(self, iteration: int, row: Mapping[str, Any]) -> None:
        """Where the time of an iteration's fine-tuning went (see timing.Timing), in timing.json."""
        times = self._times()
        rows = [old for old in times["iterations"] if old["iteration"] != iteration]
        sealed.write_record(
            self.folder / TIMING_FILE,
            {**times, "iterations": [*rows, {"iteration": iteration, **row}]},
        )

    def save_evaluation_work(self, spans: Mapping[str, Any]) -> None:
        """Who was at the front when, in timing.json; as the spans of a step."""
        sealed.write_record(
            self.folder / TIMING_FILE, {**self._times(), "evaluation": {"spans": spans}}
        )

    def timing(self) -> list[dict[str, Any]]:
        """A row per iteration that was trained."""
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

    def save_iteration(
        self,
        iteration: int,
        init: AdapterDelta,
        merged: AdapterDelta,
        keys: Sequence[str],
        task_vectors: Sequence[AdapterDelta],
    ) -> None:
        """init: θ_init that the policies started from; merged: θ_slerp; both as changes of the SFT
        model.

        policies.json lists the folders of θ_1..θ_M in the order they were merged, relative to the
        run's folder if they are there; geometry.json has each block's norms and angles of the task
        vectors θ_m − θ_init.
        """
        name = f"iterations/{iteration}"
        with self._replacing(f"{name}/init") as folder:
            save_peft(init, folder)
        with self._replacing(f"{name}/merged") as folder:
            save_peft(merged, folder)
        with self._replacing(name) as folder:
            place = f"{self.place.uri.partition('?')[0].rstrip('/')}/" if self.place else ""
            sealed.write_json(folder / "policies.json", [f"{place}policies/{key}" for key in keys])
            sealed.write_json(folder / "geometry.json", geometry(task_vectors))
        self.push()

    @contextmanager
    def _replacing(self, name: str) -> Iterator[Path]:
        """A folder to fill in the place of what was there, whose files take their places if the
        body succeeds.
        """
        try:
            Storage(self.folder).fetch(name)
        except DamagedError as error:
            self.say(f"{error}; made anew")
        with (
            sealed.explained("write", self.folder / name),
            sealed.new_files(self.folder / name, sealed.MANIFEST) as folder,
        ):
            yield folder
            sealed.seal(folder)

    def save_adapter(self, delta: AdapterDelta, card: str) -> None:
        """The chosen point of the front, as a plain PEFT adapter, with its card and the front's
        picture.
        """
        with self._replacing("adapter") as folder:
            save_peft(delta, folder)
            (folder / "README.md").write_text(card, encoding="utf-8")
            shutil.copyfile(self.folder / PICTURE, folder / PICTURE)

    def samples(self) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = json.loads((self.folder / "samples.json").read_text())
        return rows

    def save_front(self, front: Mapping[str, Any]) -> None:
        """front.json, last of what belongs to it: it vouches for the others."""
        files = {name: sealed.file_entry(self.folder / name) for name in FRONT_FILES}
        sealed.write_record(
            self.folder / FRONT_FILE, {**front, "sampler": SAMPLER_VERSION, "files": files}
        )
        self.push()

    def has_front(self, key: str) -> bool:
        """Whether front.json is of exactly these policies and this evaluation, and all that belongs
        to it is whole.
        """
        try:
            front = sealed.read_record(self.folder / FRONT_FILE)
            if front is None or front["key"] != key:
                return False
            for name in FRONT_FILES:
                sealed.check_file(self.folder / name, front["files"][name])
            sealed.check_sealed(self.folder / "adapter")
        except DamagedError as error:
            self.say(f"{error}; the front is measured again")
            return False
        return True

    def numerics(self, key: str) -> dict[str, Any] | None:
        """What the session of the finished run that is here found of its numerics; None where it
        was another one's, or none is here.

        Args:
            key: of what they follow from.
        """
        try:
            front = sealed.read_record(self.folder / FRONT_FILE) or {}
        except DamagedError:
            return None
        found: dict[str, Any] | None = front.get("numerics", {}).get(key)
        return found

    def front(self) -> dict[str, Any]:
        result: dict[str, Any] = json.loads((self.folder / FRONT_FILE).read_text())
        return result
