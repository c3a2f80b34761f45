"""Tests of when a saved configuration is another run's: paths of the same files are not."""

import json
from pathlib import Path

import pytest

from raywarp.config.load import load_config
from raywarp.planning.jobs import absolute_paths
from raywarp.run.config_file import differing_keys

TREE = {
    "model": "llama",
    "prompts": {"datasets": [{"dataset": "data/prompts.jsonl", "weight": 1.0}, {"dataset": "a/b"}]},
    "reward": {"model": "./reward"},
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("llama", "reward", "data"):
        (tmp_path / name).mkdir()
    (tmp_path / "data" / "prompts.jsonl").touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_relative_and_absolute_paths_are_one_run(folder: Path) -> None:
    """A run by submit.py, which makes paths absolute, and the same one by `raywarp train`."""
    relative = load_config(TREE)
    absolute = load_config(TREE, absolute_paths(relative))
    assert absolute.model == str(folder / "llama")
    assert differing_keys(absolute.model_dump(mode="json"), relative) == []
    assert differing_keys(relative.model_dump(mode="json"), absolute) == []


def test_another_file_is_another_run(folder: Path) -> None:
    (folder / "other").mkdir()
    saved = load_config({**TREE, "model": str(folder / "other")}).model_dump(mode="json")
    assert differing_keys(saved, load_config(TREE)) == [
        f"model is '{folder / 'other'}' there and 'llama' here"
    ]
    # A hub id that no folder here is named after.
    saved = load_config({**TREE, "model": str(folder / "org" / "llama")}).model_dump(mode="json")
    assert differing_keys(saved, load_config({**TREE, "model": "org/llama"}))


def test_a_jobs_copy_of_the_directory_has_the_same_files(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = load_config(TREE).model_dump(mode="json") | {"model": "/home/user/project/llama"}
    assert differing_keys(saved, load_config(TREE))
    job = {"metadata": {"job_submission_id": "raysubmit_1"}}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps(job))
    assert differing_keys(saved, load_config(TREE)) == []
    assert differing_keys(saved | {"model": "/home/user/project/gpt"}, load_config(TREE))
