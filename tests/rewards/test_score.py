"""Tests of reward models and reward functions: texts, scores, standardisation and fingerprints."""

import dataclasses
import json
import math
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import BERT_WORDS, build_bert, build_tokenizer
from tiny_run import make_project, tiny_config
from transformers import (
    GPT2Config,
    GPT2ForSequenceClassification,
)

from raywarp.config.datasets import PromptsConfig
from raywarp.config.rewards import RewardConfig
from raywarp.config.schema import ConfigError
from raywarp.data.text import Completion
from raywarp.planning.inputs import prepare
from raywarp.rewards.actor import RewardActor
from raywarp.rewards.classifier import ClassifierReward, classify, encode
from raywarp.rewards.functions import load_function
from raywarp.rewards.reading import Reading
from raywarp.rewards.reward import Reward, RewardError
from raywarp.rewards.score import (
    REWARD_FILE,
    load_reward,
    reward_fingerprint,
    with_template,
)
from raywarp.rollout.protocol import Rollout
from raywarp.run.folder import Run
from raywarp.standardisation import is_standardised, reward_statistics, save_standardisation
from raywarp.storage import sealed
from raywarp.training.session import Session


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> Path:
    return build_bert(tmp_path_factory.mktemp("bert"))


def scored_by(function) -> Reward:
    return Reward("mine:score", function, source=__file__)


def test_truncation_keeps_the_completion_and_drops_the_beginning_of_the_prompt():
    ids = encode(build_tokenizer(), ["the film was a plot "], ["good bad"], 5)["input_ids"]
    assert [BERT_WORDS[i] for i in ids[0]] == ["[CLS]", "plot", "good", "bad", "[SEP]"]


def test_a_reward_model_with_a_chat_template_reads_turns(bert: Path, tmp_path: Path) -> None:
    chat, plain = PromptsConfig(template="chat"), PromptsConfig()
    with pytest.raises(
        ConfigError, match=r"the tokenizer of .* has no chat template; use template=none"
    ):
        with_template(RewardConfig(model=str(bert), template="chat"), plain)
    assert with_template(RewardConfig(model=str(bert)), chat).template == "none"

    model = build_bert(tmp_path / "chat")
    tokenizer = build_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ 'good' if m['role'] == 'user' else 'bad' }} {{ m['content'] }}"
        " {% endfor %}"
    )
    tokenizer.save_pretrained(model)
    config = RewardConfig(model=str(model))
    assert with_template(config, plain).template == "none"
    turns = with_template(config, chat)
    assert turns.template == "chat"
    assert (
        reward_fingerprint(turns)
        != reward_fingerprint(with_template(config, plain))
        == reward_fingerprint(config)
    )
    ids = encode(tokenizer, ["a film"], ["the plot"], Reading(16, "chat"))["input_ids"]
    # special tokens are the template's own
    assert [BERT_WORDS[i] for i in ids[0]] == [
        "good",
        "a",
        "film",
        "bad",
        "the",
        "plot",
    ]
    (score,) = load_reward(turns).score(["a film"], ["the plot"])
    (same,) = ClassifierReward(str(model), chat=True).score(["a film"], ["the plot"])
    (other,) = load_reward(with_template(config, plain)).score(["a film"], ["the plot"])
    assert score == same != other

    sealed.write_record(model / REWARD_FILE, {"score_mean": 0.0, "score_std": 1.0})
    assert with_template(config, chat).template == "none"  # raywarp trains on plain texts


def test_texts_are_padded_on_the_right():
    batch = encode(build_tokenizer(), ["", ""], ["good", "good film"], 8)
    assert batch["input_ids"].tolist() == [[2, 4, 3, 0], [2, 4, 6, 3]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]


def test_scores_come_back_in_order_and_do_not_depend_on_the_batch(bert):
    texts = [
        "good",
        "the film was a good good film",
        "bad plot",
        "",
        "a bad bad bad plot was the film",
    ]
    together, alone = (
        ClassifierReward(str(bert), batch_size=2),
        ClassifierReward(str(bert), batch_size=1),
    )
    expected = [alone.score([""], [text])[0] for text in texts]
    assert together.score([""] * 5, texts) == pytest.approx(expected, abs=1e-5)
    assert len(set(expected)) == 5
    assert together.score([], []) == []


def test_scoring_is_the_function_that_training_differentiates(bert):
    reward = ClassifierReward(str(bert), batch_size=3)
    scores = classify(
        reward.model, reward.tokenizer, ["the "] * 3, ["good", "bad", "a film"], 256, 8
    )
    assert scores.requires_grad
    assert reward.score(["the "] * 3, ["good", "bad", "a film"]) == pytest.approx(
        scores.tolist(), abs=1e-5
    )


def test_a_decoder_without_padding_token_scores_the_last_real_token(tmp_path):
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(BERT_WORDS),
        n_positions=64,
        n_embd=32,
        n_layer=2,
        n_head=2,
        num_labels=1,
        pad_token_id=None,
    )
    GPT2ForSequenceClassification(config).save_pretrained(tmp_path)
    build_tokenizer(pad=False).save_pretrained(tmp_path)
    reward = ClassifierReward(str(tmp_path))
    short = reward.score([""], ["good"])[0]
    assert reward.score(["", ""], ["good", "the film was a good film"])[0] == pytest.approx(
        short, abs=1e-5
    )


def test_a_classifier_with_two_labels_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="num_labels=2, a reward needs 1"):
        ClassifierReward(str(build_bert(tmp_path, labels=2)))


def test_a_model_is_standardised_by_what_its_folder_says(tmp_path):
    folder = str(build_bert(tmp_path))
    raw = load_reward(RewardConfig(model=folder)).score(["", ""], ["good", "bad"])
    with pytest.raises(ConfigError, match=r"has no reward\.json with score_mean"):
        load_reward(RewardConfig(model=folder, standardise=True))
    assert not is_standardised(folder)
    assert save_standardisation(folder, [1.0, 3.0, 5.0]) == (3.0, 2.0)
    assert is_standardised(folder)
    assert load_reward(RewardConfig(model=folder)).score(
        ["", ""], ["good", "bad"]
    ) == pytest.approx([(r - 3) / 2 for r in raw])
    assert (
        load_reward(RewardConfig(model=folder, standardise=False)).score(["", ""], ["good", "bad"])
        == raw
    )


def test_a_run_standardises_again_once_what_it_reads_has_changed(ray_cluster, tiny_llama, tmp_path):
    """A classifier that another one made has no statistics; they are the run's."""
    reward = {"function": None, "model": str(build_bert(tmp_path / "bert"))}
    project = make_project(tmp_path)
    config = tiny_config(
        project, tiny_llama, tmp_path / "run", reward=reward, reward_training={"sft_completions": 8}
    )
    said, inputs = [], prepare(config)
    run = Run.open(config, said.append)
    with Session(config, inputs.model, inputs.longest_prompt, policies=False) as session:
        measured = reward_statistics(session, run, inputs)
        record = sealed.read_record(run.folder / REWARD_FILE)
        sealed.write_record(run.folder / REWARD_FILE, record | {"score_mean": 123.0})
        # not measured again
        assert reward_statistics(session, run, inputs) == measured | {"score_mean": 123.0}
        assert said == []
        session.set_reward_statistics(0.0, 1.0)  # as a new session has it
        retrained = dataclasses.replace(inputs, reward="other weights")
        assert reward_statistics(session, run, retrained) == measured
        assert said == [
            f"{run.folder / REWARD_FILE} is of another model, reward or prompts; measured again"
        ]


@pytest.mark.parametrize("scores", [[], [1.0], [2.0, 2.0], [1.0, math.nan], [1.0, math.inf]])
def test_scores_that_cannot_standardise_are_refused(tmp_path, scores):
    sealed.write_record(tmp_path / "reward.json", {"accuracy": 0.8})
    with pytest.raises(RewardError, match="cannot standardise"):
        save_standardisation(tmp_path, scores)
    assert sealed.read_record(tmp_path / "reward.json") == {"accuracy": 0.8}


def test_a_function_gets_the_columns_and_may_return_numpy_or_tensors():
    def score(prompts, completions, stars):
        return torch.tensor(
            [len(c) * s for c, s in zip(completions, stars, strict=True)], dtype=torch.float64
        ).numpy()

    assert scored_by(score).score(
        ["x", "y"], ["ab", "c"], {"stars": [2, 5], "prompts": [0, 0]}
    ) == [4.0, 5.0]


@pytest.mark.parametrize(
    ("result", "problem", "shown"),
    [
        ([1.0], "returned 1 scores for 2 completions", "first"),
        ([1.0, math.nan], "returned nan, not a finite number", "second"),
        ([math.inf, 1.0], "returned inf, not a finite number", "first"),
        ([1.0, "3"], "returned '3', not a finite number", "second"),
        ([1.0, [None, 2.0]], "returned [None, 2.0], not a finite number", "second"),
        (None, "returned NoneType, not a list", "first"),
    ],
)
def test_a_wrong_result_names_the_problem_and_shows_the_text(result, problem, shown):
    reward = scored_by(lambda prompts, completions: result)
    with pytest.raises(RewardError) as caught:
        reward.score(["p" * 500, "p" * 500], ["the first", "the second"])
    message = str(pickle.loads(pickle.dumps(caught.value)))
    assert "mine:score" in message
    assert problem in message
    assert f"the {shown}" in message
    assert "p" * 199 + "…" in message
    assert "p" * 201 not in message


def test_an_exception_of_the_function_comes_with_its_line():
    def score(prompts, completions):
        return [json.loads(c) for c in completions]

    with pytest.raises(RewardError) as caught:
        scored_by(score).score(["the prompt"], ["{no json"])
    message = str(pickle.loads(pickle.dumps(caught.value)))
    line = score.__code__.co_firstlineno + 1
    assert "raised JSONDecodeError" in message
    assert f"({__file__}:{line})" in message
    assert "the prompt" in message
    assert "{no json" in message


@pytest.fixture
def user_module(tmp_path, monkeypatch):
    """A module of the user's in the current directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    path = tmp_path / "users_rewards.py"
    path.write_text(
        "number = 3\ndef score(prompts, completions, **columns):\n    return [float(len(c)) for c"
        " in completions]\n"
    )
    yield path
    sys.modules.pop("users_rewards", None)


def test_a_function_in_the_current_directory_is_found(user_module):
    assert load_reward(RewardConfig(function="users_rewards:score")).score([""], ["four"]) == [4.0]


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("users_rewards", "not of the form module:function"),
        ("no_such_module:score", "cannot be imported"),
        ("users_rewards:scores", "has no 'scores'"),
        ("users_rewards:number", "is a int, not a function"),
    ],
)
def test_a_function_that_cannot_be_loaded_is_the_users_error(user_module, path, problem):
    with pytest.raises(ConfigError, match=problem):
        load_function(path)


def test_the_fingerprint_of_a_function_follows_its_source_and_version(user_module):
    first = reward_fingerprint(RewardConfig(function="users_rewards:score"))
    assert reward_fingerprint(RewardConfig(function="users_rewards:score")) == first
    assert reward_fingerprint(RewardConfig(function="users_rewards:score", version="2")) != first
    user_module.write_text(user_module.read_text() + "# changed\n")
    assert reward_fingerprint(RewardConfig(function="users_rewards:score")) != first


def test_the_fingerprint_of_a_model_follows_its_weights_and_not_its_statistics(tmp_path):
    """Statistics may come after the first look at the model; they are part of a policy's key by
    themselves.
    """
    config = RewardConfig(model=str(build_bert(tmp_path)))
    prints = [reward_fingerprint(config)]
    (tmp_path / "README.md").write_text("no part of the model")
    assert reward_fingerprint(config) == prints[0]
    save_standardisation(tmp_path, [0.0, 1.0])
    assert reward_fingerprint(config) == prints[0]
    weights = bytearray((tmp_path / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (tmp_path / "model.safetensors").write_bytes(weights)
    prints.append(reward_fingerprint(config))
    assert len(set(prints)) == 2


def test_the_actor_scores_the_workers_rollouts_with_their_columns(ray_cluster, user_module):
    user_module.write_text(
        "def score(prompts, completions, bonus):\n    return [len(c) + b for c, b in"
        " zip(completions, bonus)]\n"
    )
    actor = RewardActor(RewardConfig(function="users_rewards:score"))
    actor.start()
    rollouts = [Rollout([Completion((1,), (0.0,), text, True)], ()) for text in ("a", "bcd")]
    assert actor.score_rollouts(None, ["p", "q"], [{"bonus": 10}, {"bonus": 20}], *rollouts) == [
        11.0,
        23.0,
    ]


def test_processes_without_a_model_do_without_torch():
    """It is more than a second and 200 MB of each of them."""
    lines = (
        "import sys, raywarp.rollout.pool",
        "from raywarp.config.rewards import RewardConfig",
        "from raywarp.rewards.actor import RewardActor",
        "RewardActor(RewardConfig(function='raywarp.embedded:vader')).start()",
        "print([name for name in ('torch', 'transformers', 'datasets') if name in sys.modules])",
    )
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"
