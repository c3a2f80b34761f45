"""Tests of whole runs by their prompts: the date in a template, and few held-out prompts."""

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from tiny_run import Listener, tiny_config
from transformers import AutoTokenizer

from raywarp.config.schema import Config
from raywarp.data import prompts
from raywarp.run.folder import Run
from raywarp.warp import train

# The day decides the first token.
DATED = (
    "{{ bos_token }}{{ ['the', 'a', 'film', 'is'][strftime_now('%d') | int % 4] }}"
    "{% for m in messages %} {{ m['content'] }}{% endfor %}"
)


@pytest.fixture
def dated(tiny_llama: Path, tmp_path: Path) -> Path:
    """The tiny Llama with a date in its template."""
    folder = tmp_path / "dated"
    folder.mkdir()
    for path in tiny_llama.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = DATED
    tokenizer.save_pretrained(folder)
    return folder


def on(day: int, monkeypatch: pytest.MonkeyPatch) -> None:
    class Clock(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            return datetime(2026, 11, day, 12)

    monkeypatch.setattr(prompts, "datetime", Clock)


def policies(run: Run, iteration: int) -> list[bytes]:
    """The bytes of an iteration's adapters."""
    listed = run.folder / "iterations" / str(iteration) / "policies.json"
    return [
        (run.policy_folder(Path(name).name) / "adapter_model.safetensors").read_bytes()
        for name in json.loads(listed.read_text())
    ]


def test_a_run_with_the_date_in_its_template_continues_a_day_later_to_the_same_bits(
    project: Path, dated: Path, ray_cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One run of two iterations on one day; and one whose second iteration is on the next day."""

    def config(out: str, iterations: int) -> Config:
        warp = {"iterations": iterations, "policies": 1, "steps": 2}
        settings = {"dataset": str(project / "prompts.jsonl"), "template": "chat"}
        front = {"prompts": 200, "completions_per_prompt": 1, "ceiling_completions": 0}
        store = str(project / f"{out.partition('-')[0]}-store")
        return tiny_config(
            project, dated, project / out, warp=warp, prompts=settings, front=front, store=store
        )

    on(3, monkeypatch)
    display = Listener()
    whole = train(config("whole", 2), display)
    train(config("part-one", 1), Listener())
    on(4, monkeypatch)
    part = train(config("part-two", 2), Listener())
    assert policies(whole, 1) == policies(part, 1)
    assert policies(whole, 2) == policies(part, 2)
    assert whole.front()["points"] == part.front()["points"]

    # A finished run starts nothing, and is not trained again.
    before = (whole.folder / "metrics.jsonl").read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr(
            "raywarp.cluster.runtime.start_ray", lambda: pytest.fail("Ray would have started")
        )
        train(config("whole", 2), Listener())
    assert (whole.folder / "metrics.jsonl").read_bytes() == before

    # Few held-out prompts: all that tells the number tells the one that was measured.
    rows = len((project / "prompts.jsonl").read_text().splitlines())
    held_out = round(rows / 5)
    assert whole.front()["prompts"] == held_out
    assert f"front.prompts=200, but only {held_out} are held out" in display.text()
    card = (whole.folder / "adapter" / "README.md").read_text()
    assert f"{held_out} held-out prompts" in card
