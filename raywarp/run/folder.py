"""A run's folder: configuration, metrics, events, policies, iterations, front and adapter.

Policies lie under their keys.
"""

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from raywarp.adapters.peft import load_peft, save_peft
from raywarp.adapters.start import Start, load_start, of_base, of_sft
from raywarp.algorithm.deltas import AdapterDelta
from raywarp.algorithm.geometry import geometry
from raywarp.config.schema import Config, ConfigError
from raywarp.data.moment import keep_moment
from raywarp.run.config_file import (
    CONFIG_FILE,
    SAMPLER_VERSION,
    differing_keys,
    read_saved_config,
    saved_form,
)
from raywarp.run.history import EVENTS_FILE, METRICS_FILE, TIMING_FILE, History
from raywarp.run.policy_files import TRAJECTORY_FILE
from raywarp.run.sampler_mark import Mark, sampler_mark
from raywarp.storage import sealed
from raywarp.storage.location import Storage
from raywarp.storage.mirror import Mirror
from raywarp.storage.sealed import DamagedError

FRONT_FILE = "front.json"
PICTURE = "front.png"
PREFERENCES = "preferences.png"  # where policies are trained on different rewards
MERGE = "merge"  # in geometry.json, beside the blocks
# Names that may be there before the configuration: policies and merges for other runs, what
# a killed or refused start left, and what `raywarp ceiling` measured.
_EARLY = re.compile(
    r"policies|merges|points|ceilings|sources\.json|ceiling\.json|prompts\.json|reward(-[\w.-]+)?\.json|tensorboard|wandb"
    r"|loggers\.json"
    r"|\.(preflight-|node-|config\.yaml\.|loggers\.json\.|ceiling\.json\.|reward\.json\.).*"
)
SOURCES_FILE = "sources.json"  # the adapters of `raywarp front`
FRONT_FILES = (
    PICTURE,
    "samples.json",
    "adapter/adapter_config.json",
    "adapter/adapter_model.safetensors",
)


def read_mark(place: Storage) -> Mark | None:
    """Return the mark of a run from an earlier sampler, or None for a run of this version.

    Args:
        place: the run's folder or object store.
    """
    return sampler_mark(*map(place.read, (CONFIG_FILE, FRONT_FILE, EVENTS_FILE)))


@dataclass(frozen=True)
class Run(History):
    """A run's folder, as `train` returns it. All its files are plain.

    Attributes:
        folder: the folder on this machine; where `out` is an object store, a copy of the store.
        place: the store of the policies, if it is not `out` itself.
        mirror: keeps an object store equal to the folder; None if `out` is a folder.
        say: gets a line for each damaged file, which also says what becomes of it.
        start: the SFT adapter. Adapters in files are changes of the base, and elsewhere of the SFT
            model.
    """

    folder: Path
    place: Storage | None = None
    mirror: Mirror | None = None
    say: Callable[[str], None] = field(default=print, repr=False, compare=False)
    start: Start | None = field(default=None, repr=False, compare=False)

    @property
    def store(self) -> Storage:
        """The store of the run's policies."""
        return self.place or (self.mirror.storage if self.mirror else Storage(self.folder))

    @classmethod
    def open(cls, config: Config, say: Callable[[str], None] = print, trains: bool = True) -> "Run":
        """Return the run at `out`, which is new or holds this same run.

        Args:
            trains: whether the run trains its policies, other than `raywarp front`.

        Raises:
            ConfigError: `out` holds a different run, a run that an earlier version sampled, or
                files that no run wrote. The message names the keys that differ.
            StoreError: an object store cannot be reached.
        """
        out, start = Storage(config.out), load_start(config.sft_adapter)
        place = Storage(config.store) if config.store else None
        if out.folder is None:
            mirror = Mirror(out)
            mirror.pull()
            run = cls(mirror.folder, place, mirror, say, start)
        else:
            run = cls(out.folder, place, say=say, start=start)
        run._check(config, trains)
        return run

    def _check(self, config: Config, trains: bool) -> None:
        """Raise ConfigError if the folder holds another run, or files that no run wrote.

        A run of an earlier sampler is refused, too. A lost or damaged configuration is written
        again. Policies are found by their keys, so they do not depend on that file.
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
        if saved.is_file() and trains == (folder / SOURCES_FILE).is_file():
            holds = "a front of `raywarp front`" if trains else "a run of `raywarp train`"
            raise ConfigError(f"out={config.out} holds {holds}; choose another out")
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

    def save_config(self, config: Config, rendered_at: str | None = None) -> None:
        """Save the configuration, and when the prompts were rendered."""
        keep_moment(self.store, rendered_at)
        sealed.write_text(self.folder / CONFIG_FILE, saved_form(config))
        self.push()

    @contextmanager
    def mirrored(self) -> Iterator[None]:
        """Bring an object store up to date at the end of the body, if `out` is one.

        If the body fails and the store cannot be reached, only the body's error is raised.
        """
        try:
            yield
        except BaseException:
            with suppress(sealed.StoreError):  # the body's error says more
                self.push()
            raise
        self.push()

    def clean(self) -> None:
        """Remove what interrupted writers left.

        Where only this run writes, it is removed at once; elsewhere after a day.
        """
        for name in ("policies", "ceilings"):
            self.store.clean(name, sealed.DAY if self.place or self.mirror else 0)
        if not self.mirror:
            Storage(self.folder).clean("iterations", 0)

    def push(self) -> None:
        """Bring an object store up to date, if `out` is one."""
        if self.mirror:
            self.mirror.push()

    def policy_folder(self, key: str) -> Path:
        """Return a policy's folder on this machine.

        For an object store, it holds what `find_policy` has fetched.
        """
        return self.store.cache / "policies" / key

    def policy_done(self, key: str) -> bool:
        """Return whether the policy is finished and every byte is as it was written."""
        return self.store.has(f"policies/{key}")

    def has_policies(self, keys: Sequence[Sequence[str]]) -> bool:
        """Return whether the policies of all iterations are finished and whole.

        Args:
            keys: the policies' keys, one sequence per iteration.
        """
        return all(self.policy_done(key) for of_iteration in keys for key in of_iteration)

    def find_policy(self, key: str) -> Path | None:
        """Return the folder of a finished policy, verified, or None if it is not finished.

        Raises:
            DamagedError: the policy was finished once, but its files are no longer whole. The
                message says what is wrong.
        """
        return self.store.fetch(f"policies/{key}")

    def load_policy(self, folder: Path) -> AdapterDelta:
        """Return the adapter in a policy's folder, as a change of the SFT model."""
        return of_sft(self.start, load_peft(folder))

    def restore_rows(self, iteration: int, iterations: int, finished: Sequence[str]) -> None:
        """Rebuild an iteration's rows of both tables from the folders of its finished policies.

        The tables are metrics.jsonl and trajectory.jsonl.

        The rows of the other policies come with their checkpoints (`set_policy_rows`).

        Args:
            iteration: the iteration, counted from 1.
            iterations: I. Rows of an iteration beyond 1..I are removed.
            finished: keys of the iteration's finished policies.
        """
        for name in (METRICS_FILE, TRAJECTORY_FILE):
            path, folders = self.folder / name, map(self.policy_folder, finished)
            before = sealed.read_jsonl(path)
            rows = [row for folder in folders for row in sealed.read_jsonl(folder / name)]
            known = {json.dumps(row) for row in before}
            if path.is_file() and any(json.dumps(row) not in known for row in rows):
                self.say(
                    f"{path} lacked rows of iteration {iteration} or had others; taken from the"
                    " policies' folders"
                )
            earlier, later = range(1, iteration), range(iteration + 1, iterations + 1)
            kept = [
                [row for row in before if row.get("iteration") in some] for some in (earlier, later)
            ]
            if path.is_file() or rows or name == METRICS_FILE:
                sealed.write_jsonl(path, [*kept[0], *rows, *kept[1]])

    def save_iteration(
        self,
        iteration: int,
        init: AdapterDelta,
        merged: AdapterDelta,
        keys: Sequence[str],
        task_vectors: Sequence[AdapterDelta],
        measured: Mapping[str, Any] | None = None,
    ) -> None:
        """Save an iteration's init, merged adapter, list of policies, and geometry.

        policies.json lists the folders of θ_1..θ_M in the order they were merged. The paths are
        relative to the run's folder if the policies are there. geometry.json has each block's
        norms and angles of the task vectors, and beside the blocks what was measured of the merge.

        Args:
            iteration: the iteration, counted from 1.
            init: θ_init that the policies started from, as a change of the SFT model.
            merged: θ_slerp, as a change of the SFT model.
            keys: keys of θ_1..θ_M; none for adapters that no run has trained.
            task_vectors: θ_m − θ_init.
            measured: see raywarp.training.merges.measure_merge; None for one policy.
        """
        name = f"iterations/{iteration}"
        for part, delta in (("init", init), ("merged", merged)):
            with self._replacing(f"{name}/{part}") as folder:
                save_peft(of_base(self.start, delta), folder)
        place = f"{self.place.uri.partition('?')[0].rstrip('/')}/" if self.place else ""
        with self._replacing(name) as folder:
            if keys:
                listed = [f"{place}policies/{key}" for key in keys]
                sealed.write_json(folder / "policies.json", listed)
            beside = {MERGE: measured} if measured else {}
            sealed.write_json(folder / "geometry.json", {**geometry(task_vectors), **beside})
        self.push()

    @contextmanager
    def _replacing(self, name: str) -> Iterator[Path]:
        """Yield a folder to fill, whose files replace those of `name` if the body succeeds."""
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

    def find_measured(self, name: str) -> dict[str, Any] | None:
        """Return what was measured and saved under a name, or None.

        Args:
            name: `merges/` or `points/` with a key, see raywarp/run/keys.py.
        """
        data = self.store.read(f"{name}.json")
        try:
            return (
                None if data is None else sealed.parse_record(data, f"{self.store.uri}/{name}.json")
            )
        except DamagedError as error:
            self.say(f"{error}; measured again")
            return None

    def save_measured(self, name: str, measured: Mapping[str, Any]) -> None:
        """Save what was measured, for all runs with this store."""
        self.store.write(f"{name}.json", sealed.record_bytes(measured))

    def save_adapter(self, delta: AdapterDelta, card: str) -> None:
        """Save the chosen point of the front as a plain PEFT adapter of the base.

        Its card and the front's picture are saved with it. Where a run has an SFT adapter,
        adapter-of-sft/ holds the same point as a change of the SFT model.
        """
        if self.start:
            with self._replacing("adapter-of-sft") as folder:
                save_peft(delta, folder)
        with self._replacing("adapter") as folder:
            save_peft(of_base(self.start, delta), folder)
            (folder / "README.md").write_text(card, encoding="utf-8")
            shutil.copyfile(self.folder / PICTURE, folder / PICTURE)

    def samples(self) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = json.loads((self.folder / "samples.json").read_text())
        return rows

    def save_front(self, front: Mapping[str, Any]) -> None:
        """Save front.json, which has the checksums of the front's other files.

        It must be saved last, because it vouches for the others.
        """
        files = {name: sealed.file_entry(self.folder / name) for name in FRONT_FILES}
        sealed.write_record(
            self.folder / FRONT_FILE, {**front, "sampler": SAMPLER_VERSION, "files": files}
        )
        self.push()

    def has_front(self, key: str) -> bool:
        """Return whether front.json is of exactly these policies and this evaluation.

        All files that belong to the front must be whole, too.

        Args:
            key: see raywarp.run.keys.front_key.
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
        """Return what the session of the finished run here found about its numerics, or None.

        None means that no finished run is here, or that its numerics have another key.

        Args:
            key: see raywarp.run.keys.key_of_numerics.
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
