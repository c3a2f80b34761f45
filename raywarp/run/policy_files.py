"""A policy's files in a store: its checkpoints while it trains, and its result.

They are safetensors and JSON, verified before they are read.

policies/<key>/checkpoint-<step>/state.safetensors   adapter, EMA adapter, AdamW's moments and step,
                                                     states of the random generators
                                 progress.json       step, prompts drawn, version of the adapter
                                                     that the next rollouts are sampled from
                                 metrics.jsonl       a row per step so far
                                 samples.jsonl       a completion per step so far
                                 trajectory.jsonl    a row per measurement on held-out prompts
policies/<key>/                                      θ_m as a PEFT adapter, and the three tables
policies/<key>-ema/                                  its EMA, with warp.elastic_reset
policies/<key>-last-good/                            its last good checkpoint as a PEFT adapter and
                                                     the batch, where something was not finite

Three things need no state of their own. The learning rate follows from the step. The prompts of a
step follow from (seed, iteration, policy, step). The seeds of its completions follow from
(seed, iteration, policy, step, index).
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from raywarp.adapters.peft import save_peft
from raywarp.algorithm.deltas import AdapterDelta
from raywarp.storage.location import Storage
from raywarp.storage.sealed import DamagedError, read_jsonl, write_json, write_jsonl

KEPT_CHECKPOINTS = 2
TRAJECTORY_FILE = "trajectory.jsonl"
LAST_GOOD = "-last-good"  # ends the key of what is left of a policy that had to stop
EMA = "-ema"  # ends the key under which a policy's EMA is stored


@dataclass(frozen=True)
class Checkpoint:
    """The state of a policy: all that its next steps depend on, and its measurements so far.

    Attributes:
        state: see raywarp.model.checkpoint.state_of.
        progress: step, prompts_drawn, rollout_version, and whose checkpoint it is (iteration,
            policy, key).
        metrics: a row per finished step.
        samples: a row per finished step.
        trajectory: a row per measurement on held-out prompts.
    """

    state: Mapping[str, Tensor]
    progress: Mapping[str, Any]
    metrics: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    trajectory: list[dict[str, Any]] = field(default_factory=list)

    @property
    def step(self) -> int:
        return int(self.progress["step"])


class PolicyFiles:
    """The files of one policy in a store, found by the policy's key."""

    def __init__(self, storage: Storage, key: str):
        self.storage, self.key, self.name = storage, key, f"policies/{key}"

    def save_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Save a checkpoint beside the previous one, and remove older ones.

        Raises:
            StoreError: it could not be written. The earlier checkpoints are unchanged.
        """
        with self.storage.writing(f"{self.name}/checkpoint-{checkpoint.step:06d}") as folder:
            _save_tensors(checkpoint.state, folder / "state.safetensors")
            write_json(folder / "progress.json", checkpoint.progress)
            _save_rows(folder, checkpoint.metrics, checkpoint.samples, checkpoint.trajectory)
        for old in self.checkpoints()[:-KEPT_CHECKPOINTS]:
            self.storage.remove(old)

    def checkpoints(self) -> list[str]:
        """Return the names of the checkpoints in the store, oldest first."""
        return [
            f"{self.name}/{name}"
            for name in self.storage.names(self.name)
            if name.startswith("checkpoint-")
        ]

    def load_checkpoint(self, name: str) -> Checkpoint | None:
        """Return a checkpoint, verified, or None if no finished one is there.

        Raises:
            DamagedError: the checkpoint is not what was written, or it is another policy's.
        """
        folder = self.storage.fetch(name)
        if folder is None:
            return None
        try:
            progress = json.loads((folder / "progress.json").read_bytes())
            state = load_file(folder / "state.safetensors")
            checkpoint = Checkpoint(
                state,
                progress,
                read_jsonl(folder / "metrics.jsonl"),
                read_jsonl(folder / "samples.jsonl"),
                read_jsonl(folder / TRAJECTORY_FILE),
            )
            whole = (
                len(checkpoint.metrics) == len(checkpoint.samples) == checkpoint.step
                and progress["key"] == self.key
            )
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            raise DamagedError(f"{folder} cannot be read: {error}") from None
        if not whole:
            raise DamagedError(f"{folder} is not of step {checkpoint.step} of policy {self.key}")
        return checkpoint

    def last_before(self, step: int) -> Checkpoint | None:
        """Return the newest whole checkpoint of an earlier step, and discard the later ones."""
        for name in reversed(self.checkpoints()):
            try:
                checkpoint = self.load_checkpoint(name)
            except DamagedError:
                checkpoint = None
            if checkpoint is not None and checkpoint.step < step:
                return checkpoint
            self.discard(name)
        return None

    def save_last_good(self, adapter: AdapterDelta, batch: Sequence[dict[str, Any]]) -> str:
        """Save the adapter of a policy that had to stop, with the batch, and return the place.

        Raises:
            StoreError: it could not be written.
        """
        name = f"{self.name}{LAST_GOOD}"
        self.storage.remove(name)
        with self.storage.writing(name) as folder:
            save_peft(adapter, folder)
            write_jsonl(folder / "batch.jsonl", batch)
        return f"{self.storage.uri.rstrip('/')}/{name}"

    def save_ema(self, adapter: AdapterDelta) -> None:
        """Save the EMA of the policy, before the policy itself.

        Raises:
            StoreError: it could not be written.
        """
        with self.storage.writing(f"{self.name}{EMA}") as folder:
            save_peft(adapter, folder)

    def discard(self, name: str) -> None:
        """Remove a checkpoint that cannot be used."""
        self.storage.remove(name)

    def save_result(
        self,
        adapter: AdapterDelta,
        metrics: Sequence[dict[str, Any]],
        samples: Sequence[dict[str, Any]],
        trajectory: Sequence[dict[str, Any]] = (),
    ) -> None:
        """Save the finished policy, and remove its checkpoints.

        Raises:
            StoreError: it could not be written. The checkpoints are unchanged.
        """
        with self.storage.writing(self.name) as folder:
            save_peft(adapter, folder)
            _save_rows(folder, metrics, samples, trajectory)
        for old in self.checkpoints():
            self.storage.remove(old)


def _save_rows(
    folder: Path,
    metrics: Sequence[dict[str, Any]],
    samples: Sequence[dict[str, Any]],
    trajectory: Sequence[dict[str, Any]],
) -> None:
    write_jsonl(folder / "metrics.jsonl", metrics)
    write_jsonl(folder / "samples.jsonl", samples)
    if trajectory:
        write_jsonl(folder / TRAJECTORY_FILE, trajectory)


def _save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    try:
        save_file(dict(tensors), path)
    except SafetensorError as error:  # safetensors raises it for file system errors, too
        code = re.search(r"os error (\d+)", str(error))
        raise OSError(int(code[1]) if code else None, str(error), str(path)) from None


@dataclass(frozen=True)
class Job:
    """One policy to fine-tune.

    Attributes:
        iteration: i, counted from 1.
        index: m, counted from 1.
        key: the key of its result.
        store: the store that gets the result.
    """

    iteration: int
    index: int
    key: str
    store: Storage

    @property
    def label(self) -> dict[str, Any]:
        return {"iteration": self.iteration, "policy": self.index, "key": self.key}
