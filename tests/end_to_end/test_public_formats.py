"""Tests of the two stages on the public forms of data: a reward model, then a policy, on each.

The rows are made here, in the forms of the public sets. What the trained reward model says is
compared with transformers on the template's own text, and each prompt with the template's tokens.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from tiny_models import WORDS, save_tiny_llama
from tiny_run import Listener, tiny_config
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from raywarp.config.load import parse_config
from raywarp.config.schema import Config
from raywarp.planning.inputs import prepare
from raywarp.reward_stage import reward
from raywarp.run.folder import Run
from raywarp.warp import train

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ 'film ' if m['role'] == 'user' else 'plot ' }}"
    "{{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}plot {% endif %}"
)
NUMBERS = range(24)


def said(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


def ask(n: int) -> str:
    return f"a {WORDS[n % len(WORDS)]} film {WORDS[(n // 3) % len(WORDS)]}"


def human(n: int) -> str:
    return f"\n\nHuman: {ask(n)}\n\nAssistant: fine\n\nHuman: is it good\n\nAssistant:"


@dataclass(frozen=True)
class Form:
    """row: one of NUMBERS as a row. turns: its prompt as messages. preferences, prompts: keys."""

    row: Callable[[int], dict[str, Any]]
    turns: Callable[[int], list[dict[str, str]]]
    preferences: dict[str, Any] | None
    prompts: dict[str, Any]


def one_turn(n: int) -> list[dict[str, str]]:
    return [said("user", ask(n))]


FORMS = {
    "HH": Form(
        lambda n: {"chosen": f"{human(n)} very good", "rejected": f"{human(n)} bad"},
        lambda n: [
            *(said("user", ask(n)), said("assistant", "fine"), said("user", "is it good")),
        ],
        {},
        {"column": "chosen", "last_answer": "drop"},
    ),
    "UltraFeedback": Form(
        lambda n: {
            "prompt": ask(n),
            "chosen": [*one_turn(n), said("assistant", "very good")],
            "rejected": [*one_turn(n), said("assistant", "bad")],
            "score_chosen": 8.0,
        },
        one_turn,
        {"split": "train_prefs", "held_out_split": "test_prefs"},
        {"column": "prompt", "split": "train_prefs", "held_out_split": "test_prefs"},
    ),
    "HelpSteer": Form(
        lambda n: {
            "prompt": ask(n // 2),
            "response": "bad" if n % 2 else "very good",
            "helpfulness": 4 - 3 * (n % 2),
            "verbosity": 2,
        },
        lambda n: one_turn(n // 2),
        {"text": "response", "rating": "helpfulness"},
        {"column": "prompt"},
    ),
    "TRL": Form(
        lambda n: {
            "prompt": one_turn(n),
            "chosen": [said("assistant", "very good")],
            "rejected": [said("assistant", "bad")],
        },
        one_turn,
        {},
        {"column": "prompt"},
    ),
    "verl": Form(
        lambda n: {
            "data_source": "openai/gsm8k",
            "prompt": one_turn(n),
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": "good"},
            "extra_info": {"index": n, "split": "train"},
        },
        one_turn,
        None,
        {"column": "prompt"},
    ),
}
RULE = '''
def score(prompts, completions, reward_model, extra_info, **columns):
    """Looks for the answer that verl's rows hold."""
    assert len({row["index"] for row in extra_info}) > 1
    truths = [row["ground_truth"] for row in reward_model]
    return [float(text.split().count(truth)) for text, truth in zip(completions, truths)]
'''


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_tiny_llama(tmp_path_factory.mktemp("formats"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


def save(form: str, folder: Path) -> str:
    """Write the rows as the public set has them: parquet with named splits, parquet, or JSONL."""
    rows = [FORMS[form].row(n) for n in NUMBERS]
    if form == "UltraFeedback":
        data = folder / "ultra" / "data"
        data.mkdir(parents=True)
        for split, own in (("train_prefs", rows[:16]), ("test_prefs", rows[16:])):
            name = f"{split}-00000-of-00001.parquet"
            datasets.Dataset.from_list(own).to_parquet(data / name)
        return str(folder / "ultra")
    if form == "verl":
        datasets.Dataset.from_list(rows).to_parquet(folder / "train.parquet")
        return str(folder / "train.parquet")
    path = folder / f"{form}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def train_reward(form: str, dataset: str, model: Path, out: Path) -> Path:
    training = {"backbone": str(model), "max_length": 64, "lr": 3e-3, "batch_size": 4, "steps": 12}
    stage = parse_config(
        {
            "out": str(out),
            "preferences": {"dataset": dataset, **(FORMS[form].preferences or {})},
            "reward_training": {**training, "warmup_steps": 1, "eval_every": 6},
        }
    )
    return reward(stage, Listener(), standardise=False).folder


def policy_config(form: str, dataset: str, model: Path, out: Path, source: Any) -> Config:
    return tiny_config(
        out.parent,
        model,
        out,
        prompts={"dataset": dataset, "template": "chat", **FORMS[form].prompts},
        reward={"function": None, **source},
        reward_training={"sft_completions": 8},
        warp={"iterations": 1, "policies": 1, "steps": 2},
        front={"etas": [1], "choose": {"eta": 1}, "ceiling_completions": 0},
    )


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_reward_model_and_policy_are_trained_on_what_the_rows_say(
    form: str,
    model: Path,
    place: Path,
    ray_cluster: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", place / "cache")
    monkeypatch.chdir(place)
    monkeypatch.syspath_prepend(str(place))
    dataset, source = save(form, place), {"function": "verl_rule:score"}
    (place / "verl_rule.py").write_text(RULE)
    if FORMS[form].preferences is not None:
        folder = train_reward(form, dataset, model, place / f"reward-{form}")
        assert good_over_bad(form, folder) > 0
        source = {"model": str(folder)}
    config = policy_config(form, dataset, model, place / f"run-{form}", source)
    check_prompts(form, config, model)
    check_run(train(config, Listener()), form, source.get("model"))


def good_over_bad(form: str, folder: Path) -> float:
    """Return by how much transformers scores the good answers above the bad ones, in the mean."""
    scores = [raw(folder, [*FORMS[form].turns(n)], a) for n in (0, 6) for a in ("very good", "bad")]
    return scores[0] - scores[1] + scores[2] - scores[3]


def raw(folder: str | Path, turns: list[dict[str, str]], answer: str) -> float:
    """Return the score by transformers, of the template's own text."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    whole = [*turns, said("assistant", answer)]
    ids = tokenizer.apply_chat_template(whole, tokenize=True, return_tensors="pt")["input_ids"]
    scorer = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        return float(scorer.eval()(input_ids=ids).logits)


def check_prompts(form: str, config: Config, model: Path) -> None:
    """Compare the run's prompts with the template's own tokens."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    wanted = {
        tuple(
            tokenizer.apply_chat_template(
                FORMS[form].turns(n), tokenize=True, add_generation_prompt=True
            )["input_ids"]
        )
        for n in NUMBERS
    }
    prompts = prepare(config).prompts
    found = {tuple(prompt.token_ids) for prompt in (*prompts.train, *prompts.held_out)}
    assert found == wanted


def check_run(run: Run, form: str, reward_model: str | None) -> None:
    """Compare the rewards of the front's texts with transformers or the rule, row by row."""
    told = json.loads((Path(reward_model) / "reward.json").read_text()) if reward_model else {}
    mean, deviation = told.get("score_mean", 0.0), told.get("score_std", 1.0)
    every = [FORMS[form].turns(n) for n in NUMBERS]
    for row in run.samples():
        turns = next(own for own in every if own[0]["content"] in row["prompt"])
        for name in ("sft", "slerp"):
            score = (
                raw(reward_model, turns, row[name])
                if reward_model
                else row[name].split().count("good")
            )
            assert row["rewards"][name] == pytest.approx((score - mean) / deviation, abs=2e-3)
