"""Tests of Bradley–Terry reward training: its loss, pairs, workers, checkpoints and results."""

import contextlib
import io
import json
import math
import re
import shutil
import threading
import time
from pathlib import Path

import psutil
import pytest
import ray
import torch
from safetensors.torch import load_file
from tiny_models import build_bert
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from raywarp.config.datasets import PromptsConfig
from raywarp.config.load import parse_config
from raywarp.config.rewards import RewardConfig, RewardTrainingConfig
from raywarp.config.schema import Config, ConfigError
from raywarp.data.embedded import Snippet
from raywarp.data.preferences import Preference
from raywarp.rewards.bradley_terry import PairTrainer, accuracy_interval, learning_rate, pair_loss
from raywarp.rewards.inputs import WORK, prepare_reward
from raywarp.rewards.score import load_reward, with_template
from raywarp.rewards.training import RewardSummary, train_reward

pytestmark = pytest.mark.slow

FILLER = ["the film", "a plot", "the plot was a film", "film", "was a"]


@pytest.fixture(scope="module")
def cluster(ray_cluster):
    return ray_cluster


@pytest.fixture(scope="module")
def backbone(tmp_path_factory) -> Path:
    return build_bert(tmp_path_factory.mktemp("backbone"), labels=2)


@pytest.fixture(scope="module")
def preferences(tmp_path_factory) -> Path:
    """Texts with `good` are preferred to texts with `bad`, whatever surrounds the word."""
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    rows = [
        {"chosen": f"{a} good {b} {c}", "rejected": f"{b} bad {c} {a}"}
        for a in FILLER
        for b in FILLER
        for c in FILLER
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make_config(out: Path, backbone: Path, preferences: Path, **training) -> Config:
    settings = {
        "lr": 3e-3,
        "batch_size": 8,
        "steps": 40,
        "warmup_steps": 2,
        "eval_every": 5,
        "max_length": 32,
    } | training
    settings["backbone"] = str(backbone)
    return parse_config(
        {"out": str(out), "preferences": {"dataset": str(preferences)}, "reward_training": settings}
    )


def make_trainer(backbone: Path, **settings) -> PairTrainer:
    pairs = [Preference(f"{a} good {b}", f"{b} bad") for a in FILLER for b in FILLER]
    training = RewardTrainingConfig(
        lr=1e-3, batch_size=4, steps=8, warmup_steps=2, max_length=32
    ).model_copy(update=settings)
    return PairTrainer(training, str(backbone), pairs, seed=3, device=torch.device("cpu"))


def test_the_loss_is_that_of_bradley_and_terry():
    loss = pair_loss(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0]))
    assert loss.item() == pytest.approx((0.3132617 + 2.1269280) / 2)  # log(1 + e^-1), log(1 + e^2)


def test_the_learning_rate_warms_up_and_decays():
    settings = RewardTrainingConfig(lr=1.0, steps=6, warmup_steps=2)
    assert [learning_rate(settings, step) for step in range(6)] == [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]


def test_the_interval_is_wilsons_for_independent_pairs():
    pairs = [Preference(f"a{n}", f"b{n}") for n in range(100)]
    assert accuracy_interval(pairs, [n < 80 for n in range(100)]) == pytest.approx(
        (0.7112, 0.8666), abs=1e-3
    )
    assert accuracy_interval(pairs, [True] * 100) == pytest.approx((0.9630, 1.0), abs=1e-3)


def test_pairs_that_share_a_text_count_less():
    shared = [Preference(f"a{n // 10}", f"b{n}") for n in range(100)]
    low, high = accuracy_interval(shared, [n < 80 for n in range(100)])
    assert high - low > 1.5 * (0.8666 - 0.7112)


def test_a_checkpoint_continues_bit_by_bit(backbone, tmp_path):
    straight = make_trainer(backbone)
    losses = [straight.update()["loss"] for _ in range(8)]
    before = make_trainer(backbone)
    assert [before.update()["loss"] for _ in range(4)] == losses[:4]
    before.validate(before.train)
    before.save(tmp_path)
    after = make_trainer(backbone)
    after.load(tmp_path)
    assert [after.update()["loss"] for _ in range(4)] == losses[4:]
    assert all(torch.equal(p, after.parameters[name]) for name, p in straight.parameters.items())


def test_two_workers_take_disjoint_halves_of_the_batch(backbone):
    one, two = make_trainer(backbone), make_trainer(backbone)
    one.world = two.world = 2
    two.rank = 1
    assert sorted(one._positions() + two._positions()) == sorted(
        make_trainer(backbone)._positions()
    )


@pytest.fixture(scope="module")
def straight(
    cluster, backbone, preferences, tmp_path_factory
) -> tuple[Config, RewardSummary, list[str]]:
    """An uninterrupted training of all weights, shared by the tests since Ray Train takes seconds
    to start.
    """
    return train_and_listen(
        make_config(tmp_path_factory.mktemp("straight") / "reward", backbone, preferences)
    )


def test_conversations_are_trained_on_and_scored_in_the_chat_template(
    cluster, tiny_llama, tmp_path
):
    """The backbone's only padding token is EOS, which also ends each turn of its template."""
    backbone = tmp_path / "backbone"
    shutil.copytree(tiny_llama, backbone)
    tokenizer = AutoTokenizer.from_pretrained(backbone)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}</s>{% endfor %}"
    tokenizer.save_pretrained(backbone)
    rows = [
        {
            "prompt": [{"role": "system", "content": a}, {"role": "user", "content": f"{b} {c}"}],
            "chosen": [{"role": "assistant", "content": f"good {c}"}],
            "rejected": [{"role": "assistant", "content": f"bad {c}"}],
        }
        for a in FILLER
        for b in FILLER
        for c in FILLER
    ]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    _, summary, lines = train_and_listen(
        make_config(tmp_path / "out", backbone, tmp_path / "p.jsonl", steps=10)
    )
    assert summary.accuracy > 0.9
    assert any("reads the backbone's chat template, at most 32 tokens" in line for line in lines)
    reading = json.loads((summary.folder / "reward.json").read_text())["reading"]
    assert (reading["template"], reading["max_length"]) == ("chat", 32)
    assert reading["chat_template"] == tokenizer.chat_template

    reward = load_reward(
        with_template(RewardConfig(model=str(summary.folder)), PromptsConfig(template="chat"))
    )
    scores = reward.score([row["prompt"] for row in rows[:8]] * 2, ["good film"] * 8 + ["bad"] * 8)
    assert min(scores[:8]) > max(scores[8:])
    # as transformers and the template have it, at the EOS that ends the answer
    own = AutoTokenizer.from_pretrained(summary.folder)
    model = AutoModelForSequenceClassification.from_pretrained(summary.folder).eval()
    turns = [*rows[0]["prompt"], {"role": "assistant", "content": "good film"}]
    ids = own.apply_chat_template(turns, tokenize=True, return_tensors="pt")["input_ids"]
    assert ids[0, -1] == own.eos_token_id != own.pad_token_id
    with torch.inference_mode():
        last = model.score(model.model(ids).last_hidden_state[0, -1]).item()
        assert model(ids).logits.item() == pytest.approx(last, abs=1e-6)
    assert scores[0] == pytest.approx(last, abs=1e-5)


def train_and_listen(config: Config) -> tuple[Config, RewardSummary, list[str]]:
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        summary = train_reward(config)
    return config, summary, printed.getvalue().splitlines()


@pytest.mark.parametrize("how", ["full", "lora"])
def test_a_learnable_preference_is_learnt_and_loads_plainly(
    cluster, backbone, preferences, tmp_path, straight, how
):
    if how == "lora":
        straight = train_and_listen(
            make_config(tmp_path / "lora", backbone, preferences, lora={"rank": 4}, lr=1e-2)
        )
    config, summary, lines = straight
    assert summary.accuracy > 0.9
    assert summary.accuracy_ci[0] < summary.accuracy <= summary.accuracy_ci[1]
    assert len([line for line in lines if "reward step" in line]) == 8

    reward = load_reward(RewardConfig(model=str(summary.folder)))
    good, bad = reward.score(["the film was ", "the film was "], ["a good plot", "a bad plot"])
    assert good > bad
    assert AutoModelForSequenceClassification.from_pretrained(summary.folder).config.num_labels == 1

    rows = [
        json.loads(line) for line in (summary.folder / "metrics.jsonl").read_text().splitlines()
    ]
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 41))
    assert rows[0].keys() == {"step", "loss", "accuracy", "lr", "step_seconds"}
    assert not (summary.folder / WORK).exists()

    _, again, lines = train_and_listen(config)
    assert again.already_complete
    assert "already complete" in lines[0]
    other = config.model_copy(
        update={"reward_training": config.reward_training.model_copy(update={"steps": 41})}
    )
    with pytest.raises(
        ConfigError,
        match=r"trained with reward_training.steps=40, and now reward_training.steps=41",
    ):
        train_reward(other)


def test_a_killed_training_continues_to_the_same_weights(
    cluster, backbone, preferences, tmp_path, straight
):
    _, uninterrupted, _ = straight
    config = make_config(tmp_path / "killed", backbone, preferences)
    killer = threading.Thread(target=_kill_worker_after_checkpoint, args=(tmp_path / "killed",))
    killer.start()
    with pytest.raises(ray.train.TrainingFailedError):
        train_reward(config)
    killer.join()
    assert not (tmp_path / "killed" / "reward.json").exists()
    rows = (tmp_path / "killed" / "metrics.jsonl").read_text().splitlines(keepends=True)
    steps_done = len(rows)
    (tmp_path / "killed" / "metrics.jsonl").write_text("".join(rows[1:]))

    _, resumed, lines = train_and_listen(config)
    assert re.search(
        r"metrics\.jsonl lacks 1 of the first \d+ steps; how the training went there is not known",
        " ".join(" ".join(lines).split()),
    )
    assert 0 < steps_done < 48
    assert resumed.accuracy == uninterrupted.accuracy
    one, two = (
        load_file(uninterrupted.folder / "model.safetensors"),
        load_file(resumed.folder / "model.safetensors"),
    )
    assert all(torch.equal(one[name], two[name]) for name in one.keys() | two.keys())
    first = json.loads(rows[0])
    assert first["step"] not in _losses(resumed.folder)
    assert _losses(uninterrupted.folder) == {first["step"]: first["loss"]} | _losses(resumed.folder)


def test_a_training_whose_settings_are_lost_starts_over(backbone, preferences, tmp_path, capsys):
    """It may be another one's, whose checkpoints are of no use."""
    config = make_config(tmp_path, backbone, preferences)
    (checkpoint := tmp_path / WORK / "run" / "checkpoint_1").mkdir(parents=True)
    prepare_reward(config)
    assert (
        f"reward model: {tmp_path / WORK / 'settings.json'} is missing; its training starts over"
        in capsys.readouterr().out
    )
    assert not checkpoint.exists()


def test_impossible_requests_are_the_users_errors(cluster, backbone, preferences, tmp_path):
    with pytest.raises(ConfigError, match="num_workers=9 needs 9 CPUs, the cluster has 4"):
        train_reward(
            make_config(tmp_path, backbone, preferences, num_workers=9, batch_size=9, use_gpu=False)
        )
    with pytest.raises(ConfigError, match="batch_size=8 is not a multiple"):
        train_reward(make_config(tmp_path, backbone, preferences, num_workers=3))
    with pytest.raises(ConfigError, match="a reward model is trained into a folder"):
        train_reward(
            make_config(tmp_path, backbone, preferences).model_copy(
                update={"out": "s3://bucket/reward"}
            )
        )


def test_rated_texts_give_every_pair_above_the_margin(backbone):
    """Ratings 3, 1, 0.8, −1 at margin 0.5: of the six pairs only (1, 0.8) is too close to call."""
    rated = [Snippet(f"the film {n}", rating) for n, rating in enumerate((3.0, 1.0, 0.8, -1.0))]
    settings = RewardTrainingConfig(batch_size=2, steps=2, warmup_steps=0, max_length=32)
    trainer = PairTrainer(
        settings, str(backbone), rated, seed=3, device=torch.device("cpu"), margin=0.5
    )
    texts, better, worse = trainer._batch()
    rating_of = {snippet.text: snippet.rating for snippet in rated}
    pairs = {
        (rating_of[texts[b][1]], rating_of[texts[w][1]]) for b, w in zip(better, worse, strict=True)
    }
    assert pairs == {(3.0, 1.0), (3.0, 0.8), (3.0, -1.0), (1.0, -1.0), (0.8, -1.0)}
    scores = dict(
        zip((text for _, text in texts), trainer._score(trainer.model, texts).tolist(), strict=True)
    )
    by_hand = [
        math.log1p(math.exp(scores[b] - scores[a]))
        for a in scores
        for b in scores
        if rating_of[a] - rating_of[b] >= 0.5
    ]
    assert trainer.update()["loss"] == pytest.approx(sum(by_hand) / 5, rel=1e-4)


def test_a_batch_without_a_pair_changes_nothing_but_the_step(backbone):
    rated = [Snippet(f"the film {n}", 1.0) for n in range(4)]
    trainer = PairTrainer(
        RewardTrainingConfig(batch_size=2, steps=2),
        str(backbone),
        rated,
        seed=3,
        device=torch.device("cpu"),
        margin=0.5,
    )
    before = {name: p.detach().clone() for name, p in trainer.parameters.items()}
    assert trainer.update()["loss"] == 0
    assert all(torch.equal(before[name], p) for name, p in trainer.parameters.items())


def _losses(folder: Path) -> dict[int, float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def _kill_worker_after_checkpoint(folder: Path) -> None:
    """SIGKILL this test's own Ray Train worker as soon as a first checkpoint is registered."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if list((folder / WORK / "run").glob("checkpoint_manager_snapshot.json")):
            killed = [
                process.pid
                for process in psutil.Process().children(recursive=True)
                if _kill_if_train_worker(process)
            ]
            if killed:
                return
        time.sleep(0.01)


def _kill_if_train_worker(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):  # it may be gone by now
        if "RayTrainWorker" in " ".join(process.cmdline()):
            process.kill()
            return True
    return False
