"""Tests of the ceiling of real runs: a tiny Llama, its exact optimum by enumeration, and sweeps."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from tiny_run import Listener, files_of, tiny_config
from transformers import AutoModelForCausalLM, AutoTokenizer

from raywarp import ceiling_stage
from raywarp.ceiling_stage import ceiling
from raywarp.config.schema import Config
from raywarp.run.ceiling import Ceiling, ceiling_of
from raywarp.run.folder import Run
from raywarp.warp import train

TEMPERATURE = 0.7
REWARD = '''
"""A word's worth: a number from its letters."""

def worth(word):
    return (sum(map(ord, word)) * 37 % 101) / 50 - 1

def score(prompts, completions, **columns):
    return [worth(text.strip()) for text in completions]
'''


@pytest.fixture(scope="module")
def worth(project: Path) -> Path:
    (project / "worth.py").write_text(REWARD)
    return project


def settings(project: Path, model: Path, out: str, **changes: Any) -> Config:
    """Completions of one token, so that all of them can be enumerated."""
    own: dict[str, Any] = {
        "reward": {"function": "worth:score"},
        "warp": {"iterations": 1, "steps": 3},
        "rollout": {"max_new_tokens": 1, "temperature": TEMPERATURE},
        "front": {
            "prompts": 10,
            "completions_per_prompt": 16,
            "ceiling_completions": 256,
            "share_kl": 1.0,
        },
        "prompts": {"dataset": str(project / "prompts.jsonl"), "held_out_fraction": 0.6},
    }
    for section, values in changes.items():
        own[section] = {**own.get(section, {}), **values} if isinstance(values, dict) else values
    return tiny_config(project, model, project / out, **own)


@pytest.fixture(scope="module")
def heard() -> Listener:
    return Listener()


@pytest.fixture(scope="module")
def before(ray_cluster: Any, worth: Path, tiny_llama: Path, heard: Listener) -> Ceiling:
    """The ceiling before any training, in the folder of the later run."""
    return ceiling(settings(worth, tiny_llama, "run"), heard)


@pytest.fixture(scope="module")
def finished(before: Ceiling, worth: Path, tiny_llama: Path) -> tuple[Run, str]:
    run = train(settings(worth, tiny_llama, "run"), said := Listener())
    return run, said.text()


def enumerated(
    model: Path, prompts: list[str], temperature: float
) -> tuple[list[float], list[float]]:
    """KL and reward of π_sft·exp(r/β) by a sum over the whole vocabulary, from the logits of
    transformers' own model.
    """
    import worth

    tokenizer = AutoTokenizer.from_pretrained(model)
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    texts = [tokenizer.decode([n], skip_special_tokens=True) for n in range(len(tokenizer))]
    rewards = np.array([worth.worth(text.strip()) for text in texts])
    with torch.inference_mode():
        logits = [plain(**tokenizer(text, return_tensors="pt")).logits[0, -1] for text in prompts]
    sft = torch.softmax(torch.stack(logits).double() / temperature, -1).numpy()
    kl, reward = [0.0], [float((sft @ rewards).mean())]
    for beta in np.geomspace(100, 1e-3, 300):
        tilted = sft * np.exp((rewards - rewards.max()) / beta)
        tilted /= tilted.sum(1, keepdims=True)
        ratio = np.log(np.maximum(tilted, 1e-300)) - np.log(sft)
        kl.append(float((tilted * ratio).sum(1).mean()))
        reward.append(float((tilted @ rewards).mean()))
    return kl, reward


def test_the_ceiling_is_the_models_enumerated_optimum(
    before: Ceiling, worth: Path, tiny_llama: Path
) -> None:
    """Over the whole range: the pipeline against logits, with no sampling in between.

    It is exact enough to tell another temperature from the right one.
    """
    from raywarp.planning.inputs import prepare

    held_out = prepare(settings(worth, tiny_llama, "run")).prompts.held_out[:10]
    texts = [prompt.text for prompt in held_out]
    assert (before.prompts, before.completions) == (10, 256)
    assert before.end > 3
    line, kls = np.array(before.reward), np.array(before.kl)

    def error(temperature: float) -> Any:
        return np.abs(np.interp(kls, *enumerated(tiny_llama, texts, temperature)) - line)

    assert (error(TEMPERATURE) <= np.array(before.reward_ci)).all()
    assert error(TEMPERATURE)[kls < 1.5].max() < 0.035
    assert error(TEMPERATURE + 0.1)[kls < 1.5].max() > 0.04


def test_the_command_says_what_there_is_to_gain(before: Ceiling, heard: Listener) -> None:
    said = heard.text()
    gain = before.gain(1.0)
    assert gain
    assert f"1 nat can buy {gain[0]:+.2f} ± {gain[1]:.2f} of reward" in said
    assert "2560 completions in" in said
    assert f"{before.best_of[0].reward:.2f} ± {before.best_of[0].reward_ci:.2f}" in said


def test_training_finds_the_ceiling_that_was_measured_before(
    before: Ceiling, finished: tuple[Run, str]
) -> None:
    run, said = finished
    assert ceiling_of(run.front()) == before
    assert "SFT completions of each" not in said
    assert "SLERP's front: " in said
    assert "of ceiling" in said


def test_no_point_of_an_honest_front_is_above_the_ceiling(finished: tuple[Run, str]) -> None:
    run, _ = finished
    points = {point["name"]: point for point in run.front()["points"]}
    found = ceiling_of(run.front())
    assert found
    assert points["slerp"]["reward"] > points["sft"]["reward"] + 0.1
    for point in points.values():
        limit = found.at(point["kl"] + point["kl_ci"])
        assert limit is None or point["reward"] - point["reward_ci"] < sum(limit)


def test_a_finished_run_starts_nothing_for_it(
    finished: tuple[Run, str], worth: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither by `train` nor by `ceiling`; a new share_kl only rewrites what is shown."""
    monkeypatch.setattr(
        "raywarp.training.session.Session._start", lambda self: pytest.fail("actors would start")
    )
    run, _ = finished
    files = {path: path.read_bytes() for path in files_of(run.folder / "ceilings")}
    points = run.front()["points"]
    config = settings(worth, tiny_llama, "run", front={"share_kl": 0.5})
    assert ceiling(config, Listener()) == ceiling_of(run.front())
    train(config, said := Listener())
    assert "what 0.5 nats can buy" in said.text()
    assert run.front()["share_kl"] == 0.5
    assert run.front()["points"] == points
    assert {path: path.read_bytes() for path in files_of(run.folder / "ceilings")} == files
    train(settings(worth, tiny_llama, "run"), Listener())


def kill_in_the_first_call(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Kill the rollout worker once the first completions are scored, and others are asked for."""
    killed = list[int]()
    measure = ceiling_stage.rewards_of_sft

    def measured(session: Any, prompts: Any, completions: int, done: Any) -> Any:
        def first(count: int) -> None:
            done(count)
            for process in psutil.Process().children(recursive=True):
                if not killed and process.name().startswith("ray::RolloutW"):
                    process.kill()
                    killed.append(process.pid)

        return measure(session, prompts, completions, first)

    monkeypatch.setattr("raywarp.ceiling_stage.rewards_of_sft", measured)
    return killed


def test_other_completions_measure_only_the_ceiling_again(
    finished: tuple[Run, str], worth: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And none is measured where ceiling_completions is 0; the points stay.

    A damaged ceiling is measured again. Though the rollout worker dies meanwhile, the numbers are
    the same.
    """
    run, _ = finished
    points, before = run.front()["points"], ceiling_of(run.front())
    train(settings(worth, tiny_llama, "run", front={"ceiling_completions": 0}), Listener())
    assert "ceiling" not in run.front()
    said = Listener()
    train(settings(worth, tiny_llama, "run", front={"ceiling_completions": 8}), said)
    assert run.front()["points"] == points
    after = ceiling_of(run.front())
    assert before
    assert after
    assert (after.completions, after.end) == (8, pytest.approx(math.log(8) - 1))
    assert after.reward[0] == pytest.approx(before.reward[0], abs=sum(before.reward_ci[:1]))
    assert "8 SFT completions of each of 10 prompts" in said.text()
    assert "evaluating" not in said.text()
    killed = kill_in_the_first_call(monkeypatch)
    file = run.folder / "ceilings" / before.key / "rewards.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    train(settings(worth, tiny_llama, "run"), said := Listener())
    assert "the ceiling is measured again" in said.text()
    assert ceiling_of(run.front()) == before
    assert len(killed) == 1
