"""Tests of a process's scratch folders, which go when the process ends and not before."""

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from raywarp.storage import scratch

CLAIM = """
import sys
from raywarp.storage import scratch

folder = scratch.claim()
(folder / "a").touch()
print(folder, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def claimants(n: int) -> list[subprocess.Popen[str]]:
    command = [sys.executable, "-c", CLAIM]
    return [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(n)
    ]


def claimed(process: subprocess.Popen[str]) -> Path:
    assert process.stdout
    return Path(process.stdout.readline().strip())


def killed(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


@pytest.mark.parametrize("by", ["claim", "release"])
def test_what_a_killed_process_has_just_written_is_taken_away_at_once(
    folder: Path, by: str
) -> None:
    ours = scratch.claim()
    (process,) = claimants(1)
    theirs = claimed(process)
    (theirs / "adapter.safetensors").write_bytes(b"0" * 100)
    killed(process)
    if by == "claim":
        another = scratch.claim()
        assert set(folder.iterdir()) == {ours, another}
        scratch.discard(another)
    scratch.discard(ours)
    assert not list(folder.iterdir())


def test_nobody_takes_away_what_another_has_just_claimed(folder: Path) -> None:
    processes = claimants(4)
    folders = {claimed(process) for process in processes}
    scratch.discard(scratch.claim())
    assert set(folder.iterdir()) == folders
    assert all((path / "a").exists() for path in folders)
    for process in processes:
        killed(process)
    scratch.discard(scratch.claim())
    assert not list(folder.iterdir())
