"""Tests of the chosen adapter's card, and of its upload to a hub.

The hub is a small server on loopback that answers as the real one does.
"""

import base64
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from tiny_run import as_of_before

from raywarp.adapters.peft import load_peft
from raywarp.algorithm.factors import dense
from raywarp.config.load import load_config
from raywarp.config.schema import SMOLLM2
from raywarp.run.card import card
from raywarp.run.folder import Run
from raywarp.run.points import Point

TOKEN = "hf_" + "t" * 34


def point(name: str, eta: float | None, reward: float, control: float | None = None) -> Point:
    return Point(
        name, eta, reward, 0.25, 3.0, 0.5, control, None if control is None else 0.1, 0.9, 12.0, 0.5
    )


def test_a_finished_run_has_a_card_beside_its_adapter(tiny_finished: Run) -> None:
    folder, front = tiny_finished.folder / "adapter", tiny_finished.front()
    found = ModelCard.load(folder / "README.md")
    found.validate = lambda **_: None  # type: ignore[method-assign]
    assert found.data.library_name == "peft"
    assert found.data.base_model is None  # a folder of this machine is nothing to anybody else
    assert {"warp", "lora"} <= set(found.data.tags)
    for one in front["points"]:
        assert (
            f"{one['reward']:.2f} ± {one['reward_ci']:.2f} | {one['kl']:.2f} ± {one['kl_ci']:.2f}"
            in found.text
        )
    assert f"**{front['chosen']}** (this adapter)" in found.text
    assert f"--max-lora-rank {8 if load_peft(folder).rank <= 8 else 16} " in found.text
    assert (folder / "front.png").read_bytes() == (tiny_finished.folder / "front.png").read_bytes()
    assert "function `raywarp.embedded:vader`" in found.text


def test_a_card_says_what_a_reader_needs() -> None:
    config = load_config(
        {"model": SMOLLM2, "reward": {"model": "me/re|ward"}, "rollout": {"max_new_tokens": 33}}
    )
    points = [point("sft", 0.0, -0.5), point("liti 0.5", 0.5, 1.5), point("slerp", 1.0, 2.5)]
    text = card(
        config, points, points[1], 600, ["model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"]
    )
    assert ModelCard(text).data.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert 'AutoModelForCausalLM.from_pretrained("HuggingFaceTB/SmolLM2-135M-Instruct")' in text
    assert "η = 0.5: reward 1.50 ± 0.25" in " ".join(text.split())
    beyond = Point(**{**asdict(points[2]), "name": "liti 1.5", "eta": 1.5, "extrapolated": True})
    text_beyond = card(config, [*points, beyond], beyond, 600, ["model.layers.0.mlp.up_proj"])
    assert "η = 1.5, extrapolated beyond the policies: reward 2.50" in " ".join(text_beyond.split())
    assert "**liti 1.5 †** (this adapter)" in text_beyond
    assert "† is extrapolated beyond SLERP" in text_beyond
    assert "extrapolated" not in text
    assert "retention" not in text
    assert "control" not in text.partition("## What it was")[0]
    kept = [Point(**{**asdict(one), "retention": 0.25, "retention_ci": 0.5}) for one in points]
    text_kept = card(config, kept, kept[1], 600, ["model.layers.0.mlp.up_proj"])
    assert "| retention |" in text_kept
    assert "+0.25 ± 0.50" in text_kept
    assert "cross-entropy on unrelated texts" in text_kept
    assert "rank 600 on `up_proj`" in text
    assert "vLLM serves no LoRA of this rank" in text
    assert r"`me/re\|ward`" in text
    assert "no control score was measured" in text
    assert "up to 33 tokens" in text


class Hub(ThreadingHTTPServer):
    """repos: made so far, and whether they are private. commits: branch, and path → content of
    each.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.repos: dict[str, bool] = {}
        self.branches: list[str] = []
        self.commits: list[tuple[str, dict[str, bytes]]] = []


class Answers(BaseHTTPRequestHandler):
    server: Hub

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer(403, {"error": "forbidden"})
        place = f"http://127.0.0.1:{self.server.server_address[1]}"
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            if name in self.server.repos:
                return self.answer(
                    409, {"error": "You already created this model repo", "url": f"{place}/{name}"}
                )
            self.server.repos[name] = asked.get("visibility") == "private" or bool(
                asked.get("private")
            )
            return self.answer(200, {"url": f"{place}/{name}", "name": name, "id": "1"})
        kind, _, revision = self.path.removeprefix("/api/models/me/warped/").partition("/")
        if kind == "branch":
            self.server.branches.append(revision)
            return self.answer(200, {})
        if kind == "preupload":
            files = [
                {"path": one["path"], "uploadMode": "regular", "shouldIgnore": False}
                for one in json.loads(body)["files"]
            ]
            return self.answer(200, {"files": files})
        if kind == "commit":
            rows = [json.loads(line) for line in body.splitlines()]
            files = {
                row["value"]["path"]: base64.b64decode(row["value"]["content"])
                for row in rows
                if row["key"] == "file"
            }
            self.server.commits.append((revision.partition("?")[0], files))
            return self.answer(
                200,
                {"success": True, "commitUrl": f"{place}/me/warped/commit/abc", "commitOid": "abc"},
            )
        self.answer(404, {"error": self.path})

    def do_GET(self) -> None:
        self.answer(404, {"error": self.path})

    def answer(self, status: int, tree: dict[str, Any]) -> None:
        data = json.dumps(tree).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    server = Hub()
    (thread := threading.Thread(target=server.serve_forever)).start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def push(
    hub: Hub | None, home: Path, *arguments: str, token: str | None = TOKEN
) -> "subprocess.CompletedProcess[str]":
    """By the real command; the library reads its settings when it is imported."""
    endpoint = f"http://127.0.0.1:{hub.server_address[1] if hub else 1}"
    environment = {
        **os.environ,
        "HF_ENDPOINT": endpoint,
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
    }
    environment.pop("HF_TOKEN", None)
    environment |= {"HF_TOKEN": token} if token else {}
    command = [sys.executable, "-m", "raywarp.cli", "push", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.slow
def test_push_uploads_the_adapter_with_card_and_picture(
    tiny_finished: Run, hub: Hub, tmp_path: Path
) -> None:
    folder = tiny_finished.folder
    done = push(hub, tmp_path, str(folder), "me/warped", "--private")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("/me/warped/commit/abc")
    assert hub.repos == {"me/warped": True}
    ((branch, files),) = hub.commits
    assert branch == "main"
    assert sorted(files) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "front.png",
    ]
    for name, content in files.items():
        assert content == (folder / "adapter" / name).read_bytes(), name
    # it is there already
    again = push(hub, tmp_path, str(folder), "me/warped", "--revision", "longer")
    assert again.returncode == 0, again.stderr
    assert (hub.branches, hub.commits[1][0]) == (["longer"], "longer")


@pytest.mark.slow
@pytest.mark.parametrize("points", ["subfolders", "revisions"])
def test_push_uploads_every_point_of_the_line(
    tiny_finished: Run, hub: Hub, tmp_path: Path, points: str
) -> None:
    """Each is η times the merge, which is the point at η = 1, and one card tells of them all."""
    before = len(hub.commits)
    done = push(hub, tmp_path, str(tiny_finished.folder), "me/warped", "--points", points)
    assert done.returncode == 0, done.stderr
    found: dict[str, dict[str, bytes]] = {}
    for branch, files in hub.commits[before:]:
        assert f"{points[:-1]}=" in files["README.md"].decode()
        for name, content in files.items():
            folder, _, own = name.rpartition("/")
            found.setdefault(folder or branch, {})[own] = content
    etas = [point["eta"] for point in tiny_finished.front()["points"] if point["eta"]]
    assert len(etas) > 1
    assert found.keys() == {"main", *(f"eta-{eta:g}" for eta in etas)}
    merged = load_peft(tiny_finished.folder / "iterations/2/merged")
    for eta in etas:
        place = tmp_path / f"{eta:g}"
        place.mkdir()
        for name, content in found[f"eta-{eta:g}"].items():
            (place / name).write_bytes(content)
        for module, f in load_peft(place).factors.items():
            assert torch.allclose(dense(f), eta * dense(merged.factors[module]), atol=1e-7)
            assert dense(f).abs().max() > 1e-4


def test_an_old_run_is_pushed_with_a_mark_on_its_card(
    tiny_finished: Run, hub: Hub, tmp_path: Path
) -> None:
    folder = as_of_before(Path(shutil.copytree(tiny_finished.folder, tmp_path / "run")))
    done = push(hub, tmp_path, str(folder), "me/warped")
    assert done.returncode == 0, done.stderr
    files = hub.commits[-1][1]
    assert (
        "> **Sampled from rounded weights.** An earlier version of raywarp made this run"
        in files.pop("README.md").decode()
    )
    assert all(
        content == (folder / "adapter" / name).read_bytes() for name, content in files.items()
    )
    assert len(files) == 3


@pytest.mark.slow
def test_what_cannot_be_pushed_is_one_message(tiny_finished: Run, hub: Hub, tmp_path: Path) -> None:
    run, count = str(tiny_finished.folder), len(hub.commits)
    (tmp_path / "empty").mkdir()
    damaged = shutil.copytree(tiny_finished.folder, tmp_path / "damaged")
    (damaged / "adapter" / "README.md").write_text("other")
    cases: list[tuple[Hub | None, list[str], str | None, int, str]] = [
        (
            hub,
            [str(tmp_path / "empty"), "me/warped"],
            TOKEN,
            2,
            "is it the folder of a finished run?",
        ),
        (hub, [str(damaged), "me/warped"], TOKEN, 2, "`raywarp train` makes it anew"),
        (hub, [run, "me/wa rped"], TOKEN, 2, "is no repository's name"),
        (hub, [run, "me/other"], "hf_wrong", 2, "does not let you write to me/other"),
        (hub, [run, "me/other"], None, 2, "HF_TOKEN"),
        (None, [run, "me/warped"], TOKEN, 1, "cannot be reached"),
    ]
    for server, arguments, token, code, message in cases:
        done = push(server, tmp_path, *arguments, token=token)
        assert (done.returncode, message in done.stderr) == (code, True), (arguments, done.stderr)
        assert "Traceback" not in done.stderr
        assert TOKEN not in done.stderr
    assert len(hub.commits) == count
