"""Tests of where a merge is written: folders, object stores, what looks like one, interrupts."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from conftest import S3Server, random_delta

from raywarp.adapters.destination import new_adapter
from raywarp.adapters.merging import merge
from raywarp.adapters.peft import load_peft, save_peft
from raywarp.adapters.peft_config import ADAPTER_CONFIG_FILE, ADAPTER_FILE
from raywarp.adapters.recipe import Recipe
from raywarp.algorithm.factors import AdapterError
from raywarp.cli import merge as merge_command
from raywarp.cli.commands import main
from raywarp.storage.location import Storage
from raywarp.storage.scratch import PREFIX

FILES = ["README.md", ADAPTER_CONFIG_FILE, ADAPTER_FILE]


@pytest.fixture
def sources(tmp_path: Path) -> list[str]:
    for n in range(2):
        save_peft(random_delta(n + 1), tmp_path / f"a{n}")
    return [str(tmp_path / f"a{n}") for n in range(2)]


def scratch_folders() -> set[Path]:
    return set(Path(tempfile.gettempdir()).glob(f"{PREFIX}*"))


def test_a_merge_lands_in_an_object_store(
    s3: S3Server,
    tmp_path: Path,
    sources: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    here, scratch = sorted(tmp_path.rglob("*")), scratch_folders()
    out = s3.uri("merged/here")
    assert main(["merge", "lerp", *sources, "--out", out]) == 0
    assert "written to s3://bucket/merged/here" in capsys.readouterr().out.replace("\n", "")
    assert sorted(tmp_path.rglob("*")) == here
    assert scratch_folders() <= scratch
    store = Storage(out)
    assert store.files() == FILES
    for name in FILES:
        store.get(name, tmp_path / "fetched" / name)
    merge(Recipe("lerp", tuple(sources)), tmp_path / "local")
    fetched, local = (load_peft(tmp_path / name).factors for name in ("fetched", "local"))
    assert all((fetched[m].B == local[m].B).all() for m in local)
    assert main(["merge", "lerp", *sources, "--out", out]) == 2
    assert "is not empty" in capsys.readouterr().err
    store.write("thesis.txt", b"mine")
    merge(Recipe("lerp", tuple(sources[:1])), out, overwrite=True)
    assert store.files() == sorted([*FILES, "thesis.txt"])
    rank = json.loads(store.read(ADAPTER_CONFIG_FILE) or b"")["r"]
    assert rank == json.loads((Path(sources[0]) / ADAPTER_CONFIG_FILE).read_text())["r"]


def test_a_merge_that_fails_leaves_nothing_in_an_object_store(
    s3: S3Server, tmp_path: Path, sources: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, scratch = s3.uri("fails"), scratch_folders()
    with pytest.raises(AdapterError, match="no such folder"):
        merge(Recipe("lerp", (sources[0], str(tmp_path / "missing"))), out)
    assert Storage(out).files() == []
    put = Storage.put

    def interrupted(self: Storage, path: Path, name: str) -> None:
        put(self, path, name)
        if name == ADAPTER_FILE:
            raise KeyboardInterrupt

    monkeypatch.setattr(Storage, "put", interrupted)
    with pytest.raises(KeyboardInterrupt):
        merge(Recipe("lerp", tuple(sources)), out)
    assert Storage(out).files() == []
    assert scratch_folders() <= scratch
    elsewhere = out.replace("s3://bucket", "s3://nowhere")
    with pytest.raises(AdapterError, match=r"cannot write s3://nowhere.*does not exist"):
        merge(Recipe("lerp", tuple(sources)), elsewhere)


@pytest.mark.parametrize(
    ("out", "part"),
    [
        ("s3:/bucket/x", "write s3://bucket/x"),
        ("s3:bucket/x", "write s3://bucket/x"),
        ("S3://bucket/x", "write s3://bucket/x"),
        ("gs:/bucket/x", "write gs://bucket/x"),
        ("s3://", "no address of an object store"),
        ("s3:///bucket/x", "write s3://bucket/x"),
        (Path("s3://bucket/x"), "write s3://bucket/x"),
        ("file:/x/y", "write file:///folder"),
        ("file://x/y", "write file:///folder"),
        ("s3://key:verysecret@bucket/x", "holds credentials"),
        ("ftp://host/x", "cannot be opened as a store"),
        ("https://host/x", "cannot be opened as a store"),
    ],
)
def test_what_looks_like_an_object_store_makes_no_folder(
    tmp_path: Path,
    sources: list[str],
    out: str | Path,
    part: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert main(["merge", "lerp", *sources, "--out", str(out)]) == 2
    message = capsys.readouterr().err
    assert part in message
    assert "verysecret" not in message
    assert sorted(tmp_path.rglob("*")) == before


def test_a_file_address_and_odd_names_are_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for out, folder in (
        (f"file://{tmp_path}/with%20space", "with space"),
        ("run:1", "run:1"),
        ("./s3:x", "s3:x"),
        (Path("plain"), "plain"),
    ):
        with new_adapter(out) as new:
            (new / ADAPTER_CONFIG_FILE).write_text("{}")
        assert (tmp_path / folder / ADAPTER_CONFIG_FILE).is_file()


SLOW = """
import sys, time
from raywarp.adapters import merging
from raywarp.cli.commands import main
merged = merging._merged_block
def slowly(*arguments):
    print("block", flush=True)
    time.sleep(0.3)
    return merged(*arguments)
merging._merged_block = slowly
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -9)]
)
def test_a_merge_that_is_stopped_leaves_nothing(
    tmp_path: Path, sources: list[str], number: signal.Signals, code: int
) -> None:
    """Nothing but a hidden folder after SIGKILL, which no process can clean up after."""
    (tmp_path / "old").mkdir()
    (tmp_path / "temp").mkdir()
    (tmp_path / "old" / ADAPTER_CONFIG_FILE).write_text("old")
    before = sorted(tmp_path.rglob("*"))
    for out in ("new/merged", "old"):
        words = ["merge", "lerp", *sources, "--out", str(tmp_path / out), "--overwrite"]
        process = subprocess.Popen(
            [sys.executable, "-c", SLOW, *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"TMPDIR": str(tmp_path / "temp")},
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "block\n"
        time.sleep(0.05)
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
        assert process.returncode == code
        assert "Traceback" not in said
        if number == signal.SIGKILL:
            assert not [*tmp_path.glob(f"new/merged/{ADAPTER_CONFIG_FILE}")]
        else:
            assert "nothing was written" in said
            assert sorted(tmp_path.rglob("*")) == before
        assert (tmp_path / "old" / ADAPTER_CONFIG_FILE).read_text() == "old"


def test_a_full_disk_leaves_nothing(tmp_path: Path, sources: list[str]) -> None:
    program = """
import resource, sys
from raywarp.cli.commands import main
resource.setrlimit(resource.RLIMIT_FSIZE, (900, 900))
sys.exit(main(sys.argv[1:]))
"""
    before = sorted(tmp_path.rglob("*"))
    words = ["merge", "lerp", *sources, "--out", str(tmp_path / "new" / "merged")]
    done = subprocess.run(
        [sys.executable, "-c", program, *words], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "cannot write" in done.stderr
    assert sorted(tmp_path.rglob("*")) == before


def test_a_path_is_said_as_it_is(
    tmp_path: Path,
    sources: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["merge", "lerp", *sources, "--out", "a:key:[b]"]) == 0
    assert capsys.readouterr().out.endswith("written to a:key:[b]\n")
    assert (tmp_path / "a:key:[b]" / ADAPTER_FILE).is_file()


def test_a_long_merge_says_how_far_it_is(
    tmp_path: Path,
    sources: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(merge_command, "_PROGRESS_SECONDS", 0.0)
    words = ["merge", "lerp", *sources, "--out", str(tmp_path / "out"), "--json"]
    assert main(words) == 0
    said = capsys.readouterr()
    blocks = len(json.loads(said.out)["blocks"])
    assert said.err.splitlines() == [f"{n} of {blocks} blocks, 0 s" for n in range(1, blocks)]
    assert blocks > 1
