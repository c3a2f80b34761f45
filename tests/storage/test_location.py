"""Tests of the store on a local folder and on an S3 server that runs on loopback.

Both get the same tests.
"""

import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import S3Server, random_delta

from raywarp.config.load import parse_config
from raywarp.config.schema import ConfigError
from raywarp.run.folder import Run
from raywarp.storage import sealed
from raywarp.storage.location import Storage
from raywarp.storage.mirror import Mirror
from raywarp.storage.sealed import DamagedError, StoreError


@pytest.fixture(params=["folder", "s3"])
def storage(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Storage:
    monkeypatch.setenv("RAYWARP_CACHE", str(tmp_path / "cache"))
    if request.param == "folder":
        return Storage(tmp_path / "store")
    server: S3Server = request.getfixturevalue("s3")
    return Storage(server.uri(tmp_path.name))


def fill(storage: Storage, name: str, **files: bytes) -> None:
    with storage.writing(name) as folder:
        for file, content in files.items():
            (folder / file).write_bytes(content)


def test_a_name_is_there_with_all_its_bytes(storage: Storage) -> None:
    assert storage.fetch("policies/k") is None
    assert storage.names("policies") == []
    fill(storage, "policies/k", weights=b"123", empty=b"")
    folder = storage.fetch("policies/k")
    assert folder is not None
    assert (folder / "weights").read_bytes() == b"123"
    assert (folder / "empty").read_bytes() == b""
    assert storage.names("policies") == ["k"]
    storage.remove("policies/k")
    assert not storage.has("policies/k")
    assert storage.names("policies/k") == []


def test_cleaning_does_not_mind_writers_at_work(tmp_path: Path) -> None:
    """Their temporary folders come and go while it looks."""
    storage, over = Storage(tmp_path), threading.Event()

    def write() -> None:
        while not over.is_set():
            for n in range(20):
                (tmp_path / f"policies/.k{n}.{n:08x}" / "inner").mkdir(parents=True)
            for n in range(20):
                shutil.rmtree(tmp_path / f"policies/.k{n}.{n:08x}")

    (writer := threading.Thread(target=write)).start()
    try:
        for _ in range(300):
            storage.clean("policies")
            storage.files("policies")
    finally:
        over.set()
        writer.join()


def test_the_first_to_finish_wins_and_the_damaged_is_replaced(storage: Storage) -> None:
    fill(storage, "p/k", weights=b"first")
    fill(storage, "p/k", weights=b"second")
    folder = storage.fetch("p/k")
    assert folder is not None
    assert (folder / "weights").read_bytes() == b"first"
    damage(storage, "p/k", lambda content: b"fIrst")
    with pytest.raises(DamagedError, match=r"weights is not what was written"):
        storage.fetch("p/k")
    fill(storage, "p/k", weights=b"third")
    folder = storage.fetch("p/k")
    assert folder is not None
    assert (folder / "weights").read_bytes() == b"third"


def damage(
    storage: Storage, name: str, change: Callable[[bytes], bytes], file: str = "weights"
) -> None:
    """Change a file behind the store's back, and forget what was fetched of it."""
    (path,) = [one for one in storage.files(name) if one.endswith(file)]
    content = storage.read(path)
    assert content is not None
    storage.write(path, change(content))
    if storage.folder is None:
        sealed.remove(storage.cache / name)


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c[: len(c) // 2],
        lambda c: b"",
        lambda c: bytes([c[0] ^ 1]) + c[1:],
        lambda c: c + b"x",
    ],
)
def test_no_damage_goes_unnoticed(storage: Storage, change: Callable[[bytes], bytes]) -> None:
    for file in ("weights", sealed.MANIFEST):
        fill(storage, f"p/{file}", weights=b"0123456789")
        damage(storage, f"p/{file}", change, file)
        assert not storage.has(f"p/{file}")


def test_what_no_manifest_names_does_not_count(storage: Storage) -> None:
    """A writer that died before the manifest, or fails: nothing is there, what was written goes
    when it is old, and a new try succeeds.
    """
    with suppress(ZeroDivisionError), storage.writing("p/k") as folder:
        (folder / "weights").write_bytes(b"123")
        raise ZeroDivisionError
    assert storage.files() == []
    left = f"p/.k.{'a' * 8}/weights" if storage.folder else f"p/k/.{'a' * 32}/weights"
    storage.write(left, b"12")
    assert not storage.has("p/k")
    fill(storage, "p/k", weights=b"123")
    storage.clean("p")  # it may be under way, for all that one knows
    assert left in storage.files()
    storage.clean("p", age=-1)
    assert left not in storage.files()
    assert storage.has("p/k")


def test_a_manifest_cannot_name_what_lies_outside(storage: Storage, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"123")
    fill(storage, "p/k", weights=b"123")
    damage(
        storage,
        "p/k",
        lambda manifest: manifest.replace(b'"weights"', b'"../../../secret"'),
        sealed.MANIFEST,
    )
    with pytest.raises(DamagedError, match="is no manifest"):
        storage.fetch("p/k")


def test_a_killed_writer_leaves_the_old_or_the_new(tmp_path: Path) -> None:
    """SIGKILL at many moments of writing, over and over: every name that is there is whole."""
    program = """
import sys
from raywarp.storage.location import Storage
storage = Storage(sys.argv[1])
for n in range(10_000):
    with storage.writing(f"p/{n % 7}") as folder:
        for name in "abc":
            (folder / name).write_bytes(bytes([n % 256]) * 50_000)
    print(n, flush=True)
    storage.remove(f"p/{(n + 3) % 7}")
"""
    storage = Storage(tmp_path)
    for trial in range(4):
        writer = subprocess.Popen(
            [sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE
        )
        assert writer.stdout is not None
        for _ in range(2 + trial):
            writer.stdout.readline()
        time.sleep(0.003 * trial)
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        for name in storage.names("p"):
            if storage.has(f"p/{name}"):
                assert len({(tmp_path / "p" / name / file).read_bytes() for file in "abc"}) == 1
        storage.clean("p", age=0)
        assert all(re.fullmatch(r"p/\d/(a|b|c|manifest.json)", file) for file in storage.files())


def test_a_full_disk_leaves_what_is_there(tmp_path: Path) -> None:
    """The system refuses to write any further, in the middle of a file: an explained error, and the
    old content.
    """
    fill(Storage(tmp_path), "p/old", weights=b"old")
    sealed.write_text(tmp_path / "front.json", "old")
    program = """
import resource, sys, torch
from pathlib import Path
from raywarp.storage import sealed
from raywarp.run.policy_files import Checkpoint, PolicyFiles
from raywarp.storage.location import Storage
from raywarp.storage.sealed import StoreError
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
folder = Path(sys.argv[1])
checkpoint = Checkpoint({"x": torch.zeros(100_000)}, {"step": 1}, [{}], [{}])
for write in (
    lambda: PolicyFiles(Storage(folder), "new").save_checkpoint(checkpoint),
    lambda: sealed.write_text(folder / "front.json", "x" * 200_000),
):
    try:
        write()
    except StoreError as error:
        print(error)
"""
    told = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert len(told) == 2
    assert all(
        "File too large" in line and "make room, and the same command continues" in line
        for line in told
    )
    assert sorted(Storage(tmp_path).files()) == [
        "front.json",
        "p/old/manifest.json",
        "p/old/weights",
    ]
    assert (tmp_path / "front.json").read_text() == "old"


def test_credentials_travel_in_memory_and_stay_out_of_uris(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    travelling = pickle.dumps(Storage(s3.uri("x")))
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    arrived = pickle.loads(travelling)
    assert os.environ["AWS_SECRET_ACCESS_KEY"] == "loopback"
    assert arrived.names("") == []
    for place in (
        "s3://key:verysecret@bucket/x",
        "s3://key@bucket/x",
        "gs://user:verysecret@bucket/x",
    ):
        for key in ("out", "store"):
            with pytest.raises(ConfigError, match="holds credentials") as caught:
                parse_config({key: place})
            assert "verysecret" not in str(caught.value)


def test_a_store_that_cannot_be_reached_says_so(s3: S3Server) -> None:
    with pytest.raises(StoreError, match=r"cannot write s3://nowhere.*bucket does not exist"):
        fill(Storage(s3.uri("x").replace("s3://bucket", "s3://nowhere")), "k", weights=b"1")
    with pytest.raises(ConfigError, match="cannot be opened as a store"):
        Storage("ftp://host/folder").names("")


def test_a_runs_folder_in_an_object_store(
    s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What one machine wrote, another one finds; what does not belong to it goes from the local
    copy.
    """
    config = parse_config({"out": s3.uri("run")})
    monkeypatch.setenv("RAYWARP_CACHE", str(tmp_path / "one"))
    first = Run.open(config)
    first.save_config(config)
    for step in range(3):
        first.add_metrics({"key": "a", "iteration": 1, "policy": 1, "step": step})
    first.save_timing(1, {"seconds": 1.0})
    first.push()
    monkeypatch.setenv("RAYWARP_CACHE", str(tmp_path / "two"))
    second = Run.open(config)
    (second.folder / "stray").write_text("")
    second = Run.open(config)
    assert second.folder != first.folder
    assert second.metrics() == first.metrics()
    assert second.timing() == first.timing() == [{"iteration": 1, "seconds": 1.0}]
    assert not (second.folder / "stray").exists()
    with pytest.raises(ConfigError, match="different run .seed is 0 there and 1 here"):
        Run.open(parse_config({"out": s3.uri("run"), "seed": 1}))


def test_a_run_in_an_object_store_says_where_another_store_has_its_policies(
    s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAYWARP_CACHE", str(tmp_path / "cache"))
    delta = random_delta(1)
    listed = []
    for config in (
        {"out": s3.uri("apart")},
        {"out": s3.uri("apart"), "store": s3.uri("others")},
        {"out": str(tmp_path / "run")},
    ):
        run = Run.open(parse_config(config))
        run.save_iteration(1, delta, delta, ["k1", "k2"], [delta, delta])
        listed.append(json.loads((run.folder / "iterations/1/policies.json").read_text())[0])
    assert listed == ["policies/k1", "s3://bucket/others/policies/k1", "policies/k1"]


def test_a_mirror_puts_what_changed_and_nothing_else(
    s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAYWARP_CACHE", str(tmp_path))
    mirror, put = Mirror(Storage(s3.uri("mirror"))), []
    mirror.pull()
    monkeypatch.setattr(mirror.storage, "put", lambda path, name: put.append(name))
    for name in (
        "b/manifest.json",
        "b/weights",
        "a.json",
        "policies/k/weights",
        ".a.json.12345678",
    ):
        sealed.write_text(mirror.folder / name, "1")
    mirror.push()
    assert put == ["a.json", "b/weights", "b/manifest.json"]
    sealed.write_text(mirror.folder / "a.json", "2")
    mirror.push_now_and_then()  # too early
    assert put[3:] == []
    mirror.push()
    assert put[3:] == ["a.json"]
