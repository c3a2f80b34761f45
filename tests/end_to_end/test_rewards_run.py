"""Runs with several rewards, and a run whose numbers stop being finite."""

import contextlib
import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny_models import WORDS
from tiny_run import Listener, make_project, tiny_config

from raywarp.adapters.peft import load_peft
from raywarp.algorithm.factors import dense
from raywarp.algorithm.finite import NotFiniteError
from raywarp.cli.commands import _exit_code
from raywarp.config.load import load_config
from raywarp.config.schema import Config
from raywarp.report.series import curves, summary
from raywarp.run.folder import Run
from raywarp.storage import sealed
from raywarp.warp import train

CODE = '''
import asyncio, signal

def timed(completions, prompts, **columns):
    """Limits its own time by a signal, as math_verify does; of TRL's order of parameters."""
    old = signal.signal(signal.SIGALRM, lambda *_: None)
    signal.alarm(20)
    try:
        return [float(text.split().count("good")) for text in completions]
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)

async def words(prompts, completions, id, completion_ids):
    """Asynchronous, and not applicable to every third prompt."""
    await asyncio.sleep(0)
    both = zip(completions, completion_ids)
    lengths = [float(len(ids)) + 10.0 * len(set(text)) for text, ids in both]
    return [None if row % 3 == 0 else length for row, length in zip(id, lengths)]
'''
CONFIGS = Path(__file__).parents[2] / "cluster" / "configs"
REWARDS = [
    {"name": "good", "function": "two_rewards:timed"},
    {"name": "words", "function": "two_rewards:words", "weight": 0.5, "standardise": True},
]


@pytest.fixture(scope="module")
def configured(
    ray_cluster: Any, tiny_llama: Path, tmp_path_factory: Any
) -> Iterator[tuple[Config, Run]]:
    folder = make_project(tmp_path_factory.mktemp("several"))
    (folder / "two_rewards.py").write_text(CODE)
    changes: dict[str, Any] = {
        "reward": {"function": None},
        "rewards": REWARDS,
        "reward_training": {"sft_completions": 8},
        "warp": {"iterations": 1, "steps": 3, "advantage": "grpo"},
        "front": {"every": 2, "ceiling_completions": 0},
        "optim": {"weight_decay": 0.01, "betas": [0.8, 0.95], "importance_cap": 1.5},
    }
    with contextlib.chdir(folder):
        config = tiny_config(folder, tiny_llama, folder / "run", **changes)
        yield config, train(config)


@pytest.fixture(scope="module")
def finished(configured: tuple[Config, Run]) -> Run:
    return configured[1]


def test_each_reward_is_logged_by_its_name(finished: Run) -> None:
    rows = sealed.read_jsonl(finished.folder / "metrics.jsonl")
    assert len(rows) == 6
    assert all({"reward", "reward/good", "reward/words", "flat_groups"} <= set(row) for row in rows)
    trajectory = sealed.read_jsonl(finished.folder / "trajectory.jsonl")
    assert all("reward/good" in row for row in trajectory)
    titles = [metric["title"] for metric in summary(curves(rows))["metrics"]]
    assert {"Reward good", "Reward words"} < {*titles}
    card = (finished.folder / "adapter" / "README.md").read_text()
    assert "reward words, weight 0.5" in card
    assert "(good " in card


def test_the_front_has_the_total_that_its_texts_give(finished: Run) -> None:
    """The total of each shown text, computed anew from the text and the stored statistics."""
    known = json.loads((finished.folder / "reward-words.json").read_text())
    prompts = {
        row["text"]: row["id"]
        for row in map(json.loads, (finished.folder.parent / "prompts.jsonl").open())
    }
    lengths = {0}
    for row in finished.samples():
        for name, got in row["rewards"].items():
            text = row[name]
            good = float(text.split().count("good"))
            if prompts[row["prompt"]] % 3 == 0:
                assert got == pytest.approx(1.5 * good, rel=1e-6)
                continue
            rest = 2 * (got - good) * known["score_std"] + known["score_mean"]
            tokens = rest - 10 * len(set(text))
            assert tokens == pytest.approx(round(tokens), abs=1e-6)
            lengths.add(round(tokens))
    assert max(lengths) <= 4
    for point in finished.front()["points"]:
        assert set(point["rewards"]) <= {"good", "words"}
        assert math.isfinite(point["reward"])


def test_a_finished_run_of_several_rewards_starts_no_actors(
    configured: tuple[Config, Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("raywarp.training.session.Session._start", lambda _: pytest.fail("starts"))
    train(configured[0])


def test_the_example_of_gsm8k_runs_in_small(
    ray_cluster: Any, tiny_llama: Path, tmp_path: Path
) -> None:
    """With its own rewards; only model, data and sizes are others."""
    rows = [
        {"question": f"{first} {second}", "answer": f"{n}+1=<<{n}+1={n + 1}>>\n#### {n + 1}"}
        for n, (first, second) in enumerate(itertools.pairwise(WORDS))
    ]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    small = tiny_config(tmp_path, tiny_llama, tmp_path / "run").model_dump(mode="json")
    example = load_config(CONFIGS / "gsm8k.yaml").model_dump(mode="json", exclude_unset=True)
    example["prompts"] = {"dataset": str(tmp_path / "sums.jsonl"), "column": "question"}
    for section in ("model", "dtype", "out", "lora", "optim", "rollout", "cluster", "front"):
        example[section] = small[section]
    example["warp"] |= {"iterations": 1, "policies": 1, "steps": 1}
    run = train(load_config(example))
    (row,) = sealed.read_jsonl(run.folder / "metrics.jsonl")
    total = row["reward/correct"] - 0.05 * row["reward/length"]
    assert row["reward"] == pytest.approx(total, abs=1e-6)
    assert row["reward/length"] == pytest.approx(row["length"] / 100, abs=1e-6)


def test_a_policy_that_is_no_longer_finite_stops_at_its_last_good_checkpoint(
    ray_cluster: Any, tiny_llama: Path, tmp_path: Path
) -> None:
    folder = make_project(tmp_path)
    config = tiny_config(
        folder,
        tiny_llama,
        folder / "run",
        optim={"lr": 1e20},
        warp={"iterations": 1, "policies": 1, "steps": 6},
    )
    with contextlib.chdir(folder), pytest.raises(NotFiniteError) as caught:
        train(config, Listener())
    message = str(caught.value)
    assert _exit_code(caught.value) == 1
    assert "iteration 1 policy 1 step 2: the log-prob is nan for completion " in message
    assert "prompt: " in message
    assert "completion: " in message
    rows = sealed.read_jsonl(folder / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1]
    (place,) = (folder / "run" / "policies").glob("*-last-good")
    assert f"out=NEW sft_adapter={place}" in message
    assert f"raywarp train {folder / 'run'}/config.yaml optim.lr=0.0005 " in message
    kept = load_peft(place)
    assert all(dense(f).abs().max() == 0 for f in kept.factors.values())  # step 0: the SFT model
    batch = sealed.read_jsonl(place / "batch.jsonl")
    assert len(batch) == 8
    assert any("not_finite" in row for row in batch)
    with contextlib.chdir(folder), pytest.raises(NotFiniteError, match="step 2: "):
        train(config, Listener())
    path, *overrides = message.rpartition("raywarp train ")[2].split()
    overrides[overrides.index("out=NEW")] = f"out={folder / 'new'}"
    with contextlib.chdir(folder):
        train(load_config(path, [*overrides, "warp.steps=1"]), Listener())
