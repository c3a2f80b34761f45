"""Tests that what earlier versions wrote still counts.

This is true of policy keys, fingerprints, the files of a run, and a checkpoint, which continues to
the same bits.

interrupted_run.tar.gz is a user's folder (model, prompts, reward) with a run that commit
caa9070 began. The run failed at step 4 of iteration 2. interrupted_run.json is what that
commit made of the same run without an interruption.
"""

import hashlib
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
from tiny_run import Listener, files_of, tiny_config

from raywarp.config.rewards import RewardConfig
from raywarp.config.schema import Config
from raywarp.rewards import score
from raywarp.run.folder import Run
from raywarp.warp import train

DATA = Path(__file__).parent
PINNED: dict[str, Any] = json.loads((DATA / "interrupted_run.json").read_text())


@pytest.fixture(scope="module")
def earlier_folder(ray_cluster: Any, working_directory: Path) -> Path:
    with tarfile.open(DATA / "interrupted_run.tar.gz") as archive:
        archive.extractall(working_directory, filter="data")
    return working_directory


def config(out: str) -> Config:
    changes = {
        "reward": {"function": "pinned_reward:score"},
        "control": {"function": "raywarp.embedded:vader"},
    }
    return tiny_config(Path(), Path("model"), out, prompts={"dataset": "prompts.jsonl"}, **changes)


def adapters(run: Run) -> dict[str, str]:
    names = {path: path.relative_to(run.folder).as_posix() for path in files_of(run.folder)}
    return {
        name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path, name in names.items()
        if name.endswith("adapter_model.safetensors")
    }


@pytest.fixture(scope="module")
def continued(earlier_folder: Path) -> tuple[Run, str]:
    run = train(config("run"), heard := Listener())
    return run, heard.text()


def test_it_continues_where_it_stopped(continued: tuple[Run, str]) -> None:
    run, said = continued
    assert "iteration 1: 0 of 2 policies to train" in said
    assert [(row["policy"], row["step"]) for row in run.events() if row["event"] == "resumed"] == [
        (1, 4),
        (2, 4),
    ]


def test_it_ends_with_the_same_bits(earlier_folder: Path, continued: tuple[Run, str]) -> None:
    """As the earlier version did, unless this CPU rounds in another way than its CPU."""
    found = adapters(continued[0])
    if found == PINNED["adapters"]:
        return
    today = adapters(train(config("whole"), Listener()))
    first = [name for name in today if name.startswith("iterations/1")]
    assert any(today[name] != PINNED["adapters"][name] for name in first), "the CPU is the same"
    assert found.keys() == today.keys() == PINNED["adapters"].keys()


def test_its_files_and_their_fields_are_as_before(continued: tuple[Run, str]) -> None:
    run, _ = continued
    front, texts = run.front(), json.loads((run.folder / "samples.json").read_text())
    assert front
    assert front["key"] == PINNED["front_key"]
    fields = {
        "front.json": front,
        "a point of front.json": front["points"][0],
        "samples.json": texts[0],
        "metrics.jsonl": {key for row in run.metrics() for key in row},
        "timing.json": json.loads((run.folder / "timing.json").read_text()),
    }
    for name, expected in PINNED["fields"].items():
        assert set(expected) <= set(fields[name]), name
    names = {path.relative_to(run.folder).as_posix() for path in files_of(run.folder)}
    assert set(PINNED["files"]) <= names


def test_the_embedded_control_has_the_fingerprint_of_before() -> None:
    """Though its module has moved and its source has changed."""
    assert (
        score.reward_fingerprint(RewardConfig(function="raywarp.embedded:vader"))
        == "7f7a66ec6e713b0d"
    )
