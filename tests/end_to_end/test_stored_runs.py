"""Tests of whole runs on an S3 server, and of runs that are damaged file by file.

The same command again ends as the run that nothing disturbed.
"""

import json
import shutil
import subprocess
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import S3Server, assert_same_change
from tiny_run import DAMAGE, Listener, files_of, tiny_config

from raywarp.adapters.peft import load_peft
from raywarp.config.schema import Config
from raywarp.rewards import score
from raywarp.rewards.reward import RewardError
from raywarp.run.folder import Run
from raywarp.run.policy_files import PolicyFiles
from raywarp.storage import sealed
from raywarp.storage.location import Storage
from raywarp.storage.sealed import DamagedError, StoreError
from raywarp.warp import train


@dataclass(frozen=True)
class Project:
    """A user's folder, two runs in it: one finished, one that failed in iteration 2 with two
    checkpoints of each policy.
    """

    folder: Path
    model: Path
    finished: Run
    failed: Run

    def config(self, out: str | Path, **changes: Any) -> Config:
        return tiny_config(self.folder, self.model, out, **changes)

    def fail_at(self, call: int, config: Config) -> None:
        """Train until the reward's Nth call returns NaN."""
        (self.folder / "broken").write_text(str(call))
        with pytest.raises(RewardError):
            train(config, Listener())
        (self.folder / "broken").unlink()


@pytest.fixture(scope="module")
def runs(ray_cluster: Any, project: Path, tiny_llama: Path) -> Project:
    finished = train(tiny_config(project, tiny_llama, project / "finished"), Listener())
    both = Project(project, tiny_llama, finished, Run(project / "failed"))
    both.fail_at(21, both.config(both.failed.folder))
    return both


def copied(run: Run, folder: Path) -> Path:
    return Path(shutil.copytree(run.folder, folder))


def assert_same_results(run: Run, reference: Run) -> None:
    """Every adapter's bytes, the front, the texts, and each step's row once, with the same
    reward.
    """
    names = [path.relative_to(reference.folder) for path in files_of(reference.folder)]
    results = [
        name
        for name in names
        if name.name.startswith(("adapter_", "geometry", "samples.json", "policies"))
    ]
    assert len(results) > 20
    for name in results:
        assert (run.folder / name).read_bytes() == (reference.folder / name).read_bytes(), name
    assert run.front() == reference.front()
    rewards = [
        sorted(
            (row["iteration"], row["policy"], row["step"], row["reward"]) for row in some.metrics()
        )
        for some in (run, reference)
    ]
    assert rewards[0] == rewards[1]
    assert len(rewards[0]) == 24


def test_a_run_in_an_object_store_continues_on_another_machine(
    runs: Project, s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It fails in the middle; what has no manifest is not taken for a policy; the credentials are
    nowhere in it.
    """
    config = runs.config(s3.uri("whole"))
    monkeypatch.setenv("RAYWARP_CACHE", str(tmp_path / "one"))
    runs.fail_at(15, config)
    bucket = Storage(config.out)
    assert any("/checkpoint-" in name for name in bucket.files())
    key = Path(
        json.loads((runs.finished.folder / "iterations/2/policies.json").read_text())[0]
    ).name
    bucket.write(f"policies/{key}/.{'a' * 32}/adapter_model.safetensors", b"half of it")
    monkeypatch.setenv("RAYWARP_CACHE", str(tmp_path / "two"))
    run = train(config, heard := Listener())
    assert "iteration 1: 0 of 2 policies to train" in heard.text()
    assert_same_results(run, runs.finished)
    assert {
        "config.yaml",
        "metrics.jsonl",
        "front.json",
        "front.png",
        "adapter/adapter_model.safetensors",
    } <= set(bucket.files())
    assert not any("/checkpoint-" in name for name in bucket.files())
    for path in files_of(run.folder):
        name = path.relative_to(run.folder).as_posix()
        assert b"loopback" not in path.read_bytes()
        assert name.startswith("policies/") or bucket.read(name) == path.read_bytes()


def test_runs_share_policies_through_a_store(runs: Project, tmp_path: Path) -> None:
    config = runs.config(
        tmp_path / "second", store=str(runs.finished.folder), warp={"iterations": 1}
    )
    run = train(config, heard := Listener())
    assert "iteration 1: 0 of 2 policies to train" in heard.text()
    assert not (run.folder / "policies").exists()
    folders = json.loads((run.folder / "iterations/1/policies.json").read_text())
    assert folders == [str(runs.finished.folder / name) for name in policies_of(runs.finished, 1)]
    assert len(run.metrics()) == 12


def policies_of(run: Run, iteration: int) -> list[str]:
    names: list[str] = json.loads(
        (run.folder / "iterations" / str(iteration) / "policies.json").read_text()
    )
    return names


def test_a_damaged_checkpoint_gives_way_to_the_one_before(runs: Project, tmp_path: Path) -> None:
    """One policy loses its newest checkpoint, another one both; the run's own files are damaged,
    too.
    """
    folder = copied(runs.failed, tmp_path / "run")
    one, two = (folder / name for name in policies_of(runs.finished, 2))
    for policy in (one, two):
        assert [path.name for path in sorted(policy.glob("checkpoint-*"))] == [
            "checkpoint-000002",
            "checkpoint-000004",
        ]
    DAMAGE["flipped"](one / "checkpoint-000004" / "state.safetensors")
    DAMAGE["halved"](two / "checkpoint-000004" / "metrics.jsonl")
    DAMAGE["deleted"](two / "checkpoint-000002" / "manifest.json")
    DAMAGE["halved"](folder / "config.yaml")
    DAMAGE["flipped"](folder / "metrics.jsonl")
    run = train(runs.config(folder), heard := Listener())
    assert_same_results(run, runs.finished)
    said = heard.text()
    damaged = [
        (row["policy"], row["step"], row["message"])
        for row in run.events()
        if row.get("cause") == "damaged"
    ]
    assert sorted(damaged) == [
        (
            1,
            2,
            f"{one / 'checkpoint-000004' / 'state.safetensors'} is not what was written (sha256)",
        ),
        *sorted((2, 0, problem) for _, _, problem in damaged[1:]),
    ]
    assert f"{two / 'checkpoint-000004' / 'metrics.jsonl'} has" in said
    assert f"{two / 'checkpoint-000002'} has no manifest" in said
    assert all(problem in said for _, _, problem in damaged)
    assert [(row["policy"], row["step"]) for row in run.events() if row["event"] == "resumed"] == [
        (1, 2)
    ]
    assert f"{folder / 'config.yaml'} is not what was written; written anew" in said


def test_a_full_disk_stops_the_run_and_room_lets_it_continue(runs: Project, tmp_path: Path) -> None:
    """A file system of its own, which somebody else fills after the first steps."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", folder], capture_output=True
    ).returncode:
        pytest.skip("mounting a small file system takes root")
    run = Run(folder / "run")

    def fill() -> None:
        while not run.metrics():
            time.sleep(0.02)
        with suppress(OSError), (folder / "filler").open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))

    try:
        (filler := threading.Thread(target=fill, daemon=True)).start()
        with pytest.raises(
            StoreError, match=r"No space left on device.*make room, and the same command continues"
        ):
            train(runs.config(run.folder), Listener())
        filler.join()
        assert run.metrics()
        (folder / "filler").unlink()
        assert_same_results(train(runs.config(run.folder), Listener()), runs.finished)
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.mark.parametrize("shift", [0, 2])
def test_every_file_of_a_finished_run_is_made_good(
    runs: Project, tmp_path: Path, shift: int
) -> None:
    """All files that do not hide one another are damaged at once, each in its way."""
    folder = copied(runs.finished, tmp_path / "run")
    names = ["config.yaml", "metrics.jsonl", "timing.json", "front.json"]
    names += [str(path.relative_to(folder)) for path in files_of(folder / "iterations")]
    one, two = policies_of(runs.finished, 1)
    names += [f"{one}/adapter_model.safetensors", f"{two}/metrics.jsonl"]
    ways = list(DAMAGE)
    for n, name in enumerate(names):
        DAMAGE[ways[(n + shift) % len(ways)]](folder / name)
    run = train(runs.config(folder), heard := Listener())
    assert_same_results(run, runs.finished)
    said = heard.text()
    told = [
        name
        for name in names
        if str(folder / name) in said or str((folder / name).parent) + " has no manifest" in said
    ]
    assert "iteration 1: 2 of 2 policies to train" in said
    deleted = {name for n, name in enumerate(names) if ways[(n + shift) % len(ways)] == "deleted"}
    assert set(names) - set(told) <= deleted | {n for n in names if n.startswith("iterations")}
    if not shift:  # once is enough: a finished run is that of the other case, byte by byte
        train(runs.config(folder), heard := Listener())
        assert "made anew" not in heard.text()


def test_a_finished_run_starts_no_actor_for_what_is_made_from_its_policies(
    runs: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even Ray. With a policy lost, or another front wanted, it does."""
    folder = copied(runs.finished, tmp_path / "run")
    shutil.rmtree(folder / "iterations")
    for name in ("metrics.jsonl", "timing.json", "config.yaml"):
        DAMAGE["halved"](folder / name)

    def refuse() -> None:
        raise AssertionError("Ray is wanted")

    monkeypatch.setattr("raywarp.cluster.runtime.start_ray", refuse)
    run = train(runs.config(folder), heard := Listener())
    assert_same_results(run, runs.finished)
    assert "iteration 1: 0 of 2 policies to train" in heard.text()
    # another choice of what is measured
    train(runs.config(folder, front={"choose": {"eta": 1.0}}), Listener())
    assert run.front()["chosen"] == "slerp"
    merged, chosen = (load_peft(folder / name) for name in ("iterations/2/merged", "adapter"))
    assert_same_change(chosen, merged, 1e-5)
    with pytest.raises(AssertionError, match="Ray is wanted"):
        train(runs.config(folder, front={"etas": [0.25]}), Listener())
    DAMAGE["flipped"](folder / policies_of(run, 2)[0] / "adapter_model.safetensors")
    with pytest.raises(AssertionError, match="Ray is wanted"):
        train(runs.config(folder), Listener())


@pytest.mark.parametrize("way", DAMAGE)
def test_each_file_of_a_policy_counts(runs: Project, tmp_path: Path, way: str) -> None:
    """One at a time: results and checkpoints."""
    folder = copied(runs.failed, tmp_path / "run")
    name = policies_of(runs.finished, 1)[0]
    for path in files_of(folder / name):
        kept = path.read_bytes()
        DAMAGE[way](path)
        with pytest.raises(DamagedError, match=str(folder / name)):
            Run(folder).find_policy(Path(name).name)
        path.write_bytes(kept)
    files = PolicyFiles(Storage(folder), Path(policies_of(runs.finished, 2)[0]).name)
    for checkpoint in files.checkpoints():
        for path in files_of(folder / checkpoint):
            kept = path.read_bytes()
            DAMAGE[way](path)
            with pytest.raises(DamagedError):
                files.load_checkpoint(checkpoint)
            path.write_bytes(kept)
        assert files.load_checkpoint(checkpoint) is not None
    foreign = PolicyFiles(Storage(folder), Path(policies_of(runs.finished, 2)[1]).name)
    with pytest.raises(DamagedError, match="is not of step"):
        foreign.load_checkpoint(files.checkpoints()[0])


@pytest.mark.parametrize("way", DAMAGE)
def test_each_file_of_the_front_and_of_a_reward_model_counts(
    runs: Project, tmp_path: Path, way: str
) -> None:
    folder, said = copied(runs.finished, tmp_path / "run"), list[str]()
    run = Run(folder, say=said.append)
    key = run.front()["key"]
    for name in (
        "front.json",
        "front.png",
        "samples.json",
        *(f"adapter/{path.name}" for path in files_of(folder / "adapter")),
    ):
        assert run.has_front(key)
        kept = (folder / name).read_bytes()
        DAMAGE[way](folder / name)
        assert not run.has_front(key)
        assert (name, way) == ("front.json", "deleted") or (
            len(said) == 1 and "measured again" in said.pop()
        )
        (folder / name).write_bytes(kept)

    model = tmp_path / "reward"
    shutil.copytree(runs.model, model)
    sealed.seal(model)
    sealed.write_record(
        model / score.REWARD_FILE, {"settings": {}, "score_mean": 0.5, "score_std": 2.0}
    )
    for path in files_of(model):
        assert score.check_trained(model)
        kept = path.read_bytes()
        DAMAGE[way](path)
        with pytest.raises(DamagedError, match=str(model)):
            score.check_trained(model)
        path.write_bytes(kept)
