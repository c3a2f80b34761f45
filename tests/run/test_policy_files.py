"""Tests of a policy's checkpoints, of which the last good one is kept when its numbers break."""

from pathlib import Path

import torch
from conftest import random_delta

from raywarp.adapters.peft import load_peft
from raywarp.run.policy_files import Checkpoint, PolicyFiles
from raywarp.storage.location import Storage
from raywarp.storage.sealed import read_jsonl


def save(files: PolicyFiles, step: int) -> None:
    rows = [{"step": n} for n in range(step)]
    position = {"step": step, "key": files.key}
    files.save_checkpoint(Checkpoint({"step": torch.tensor(step)}, position, rows, rows))


def test_the_last_good_checkpoint_is_of_an_earlier_step_and_later_ones_are_discarded(
    tmp_path: Path,
) -> None:
    files = PolicyFiles(Storage(tmp_path), "key")
    assert files.last_before(3) is None
    save(files, 2)
    save(files, 4)
    found = files.last_before(4)
    assert found is not None
    assert found.step == 2
    assert files.checkpoints() == ["policies/key/checkpoint-000002"]
    assert files.last_before(2) is None
    assert files.checkpoints() == []


def test_what_is_kept_of_a_broken_policy_is_an_adapter_with_the_batch(tmp_path: Path) -> None:
    files, delta = PolicyFiles(Storage(tmp_path), "key"), random_delta(0)
    delta = delta.map(lambda _, f: type(f)(f.B.float(), f.A.float()))
    for reward in (1.0, 2.0):
        place = Path(files.save_last_good(delta, [{"completion": "x", "reward": reward}]))
    assert place == tmp_path / "policies" / "key-last-good"
    assert read_jsonl(place / "batch.jsonl") == [{"completion": "x", "reward": 2.0}]
    assert load_peft(place).factors.keys() == delta.factors.keys()
