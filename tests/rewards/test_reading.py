"""Tests of what a reward model reads: turns, special tokens, lengths, and its score's place."""

import json
import re
import sys
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import WORDS, build_bert, save_tiny_gpt2, save_tiny_llama, save_tokenizer
from tiny_run import make_project, tiny_config
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from raywarp.config.datasets import PromptsConfig
from raywarp.config.load import parse_config
from raywarp.config.rewards import RewardConfig, RewardTrainingConfig
from raywarp.config.schema import Config, ConfigError
from raywarp.data.embedded import Snippet
from raywarp.data.pairs import Preference, of_turns
from raywarp.data.turns import Turn
from raywarp.planning.inputs import prepare
from raywarp.rewards.bradley_terry import PairTrainer, pair_loss
from raywarp.rewards.classifier import ClassifierReward, encode
from raywarp.rewards.inputs import WORK, RewardInputs, prepare_reward, settings_of
from raywarp.rewards.reading import Reading, cut_warning
from raywarp.rewards.reward import Batch
from raywarp.rewards.score import REWARD_FILE, load_reward, reward_fingerprint, with_template
from raywarp.run.config_file import differing_keys
from raywarp.storage.sealed import write_record

ROLES = (
    "{% for m in messages %}{{ 'film ' if m['role'] == 'user' else 'plot ' if m['role'] =="
    " 'assistant' else 'it ' }}{{ m['content'] }}</s>{% endfor %}"
)
ENDED = "{{ bos_token }}" + ROLES


def talk(*turns: str) -> list[dict[str, str]]:
    split = (turn.partition(": ") for turn in turns)
    return [{"role": role, "content": content} for role, _, content in split]


@pytest.fixture
def backbone(tmp_path: Path) -> Path:
    """A tiny Llama whose chat template ends each turn with EOS."""
    return with_chat_template(save_tiny_llama(tmp_path / "backbone"), ENDED)


def with_chat_template(folder: Path, template: str | None) -> Path:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = template
    if template is None:
        (folder / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer.save_pretrained(folder)
    return folder


def classifier(folder: Path, template: str | None = None, **settings: Any) -> Path:
    """A tiny Llama with a score, and its tokenizer."""
    save_tiny_llama(folder)
    config = AutoConfig.from_pretrained(folder, num_labels=1)
    for key, value in settings.items():
        setattr(config, key, value)
    torch.manual_seed(5)
    LlamaForSequenceClassification(config).save_pretrained(folder)
    return with_chat_template(folder, template)


def reward_config(tmp_path: Path, backbone: Path, rows: list[Any], **changes: Any) -> Config:
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    training = {"backbone": str(backbone), "max_length": 64, **changes.pop("reward_training", {})}
    preferences = {"dataset": str(path), **changes.pop("preferences", {})}
    tree = {"preferences": preferences, "reward_training": training, "out": str(tmp_path / "out")}
    return parse_config(tree | changes)


def prepared(config: Config) -> RewardInputs:
    inputs = prepare_reward(config)
    assert inputs is not None
    return inputs


HUMAN = "\n\nHuman: a film {n}\n\nAssistant: fine\n\nHuman: in\n\nAssistant:"
QUESTION = ["system: it was", "user: is this film good", "assistant: fine", "user: and the plot"]
FORMS: dict[str, tuple[Callable[[int], dict[str, Any]], dict[str, str], list[str]]] = {
    "HH": (
        lambda n: {
            "chosen": f"{HUMAN.format(n=n)} good {n}",
            "rejected": f"{HUMAN.format(n=n)} bad",
        },
        {},
        ["user: a film {n}", "assistant: fine", "user: in"],
    ),
    "UltraFeedback": (
        lambda n: {
            "prompt": f"a film {n}",
            "chosen": talk(f"user: a film {n}", f"assistant: good {n}"),
            "rejected": talk(f"user: a film {n}", "assistant: bad"),
        },
        {},
        ["user: a film {n}"],
    ),
    "HelpSteer": (
        lambda n: {
            "prompt": f"a film {n // 2}",
            "response": "bad" if n % 2 else f"good {n // 2}",
            "helpfulness": 1 - n % 2,
            "verbosity": 3,
        },
        {"text": "response", "rating": "helpfulness"},
        ["user: a film {n}"],
    ),
    "TRL, explicit prompt": (
        lambda n: {
            "prompt": talk(*QUESTION, f"assistant: {n}", "user: it"),
            "chosen": talk(f"assistant: good {n}"),
            "rejected": talk("assistant: bad"),
        },
        {},
        [*QUESTION, "assistant: {n}", "user: it"],
    ),
    "TRL, implicit prompt": (
        lambda n: {
            "chosen": talk(*QUESTION, f"assistant: {n}", "user: it", f"assistant: good {n}"),
            "rejected": talk(*QUESTION, f"assistant: {n}", "user: it", "assistant: bad"),
        },
        {},
        [*QUESTION, "assistant: {n}", "user: it"],
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_training_and_scoring_read_the_templates_own_tokens(
    form: str, backbone: Path, tmp_path: Path
) -> None:
    row, columns, turns = FORMS[form]
    numbers = range(40 if form == "HelpSteer" else 20)
    rows = [row(n) for n in numbers]
    inputs = prepared(reward_config(tmp_path, backbone, rows, preferences=columns))
    tokenizer = AutoTokenizer.from_pretrained(backbone)
    pairs = [*inputs.splits.train, *inputs.splits.validation, *inputs.splits.test]
    assert len(pairs) == 20
    seen = set()
    for pair in pairs:
        number = re.findall(r"\d+", pair.chosen)[-1]
        seen.add(number)
        before = [turn.format(n=number) for turn in turns]
        wanted = [
            tokenizer.apply_chat_template(talk(*before, answer), tokenize=True)["input_ids"]
            for answer in (f"assistant: good {number}", "assistant: bad")
        ]
        prompts, completions = zip(*pair.texts, strict=True)
        batch = encode(tokenizer, prompts, completions, inputs.reading)
        found = zip(batch["input_ids"].tolist(), batch["attention_mask"].tolist(), strict=True)
        for (ids, mask), own in zip(found, wanted, strict=True):
            assert ids[: len(own)] == own
            assert mask == [1] * len(own) + [0] * (len(ids) - len(own))
        # the run's prompts: messages, or a text in the form of the training's
        score = encode(tokenizer, [talk(*before)], [f"good {number}"], inputs.reading)
        assert score["input_ids"][0].tolist() == wanted[0]
        if form == "HH":
            text = HUMAN.format(n=number)
            answer = f" good {number}"
            as_messages = talk(f"user: {text}"), [{"role": "assistant", "content": answer}]
            for prompt, completion in ((text, answer), as_messages):
                score = encode(tokenizer, [prompt], [completion], inputs.reading)
                assert score["input_ids"][0].tolist() == wanted[0]
    assert len(seen) == 20


def test_without_a_template_conversations_are_plain_text(backbone: Path, tmp_path: Path) -> None:
    rows = [FORMS["HH"][0](n) for n in range(20)]
    config = reward_config(tmp_path, backbone, rows, reward_training={"template": "none"})
    inputs = prepared(config)
    assert inputs.reading.template == "plain"
    assert prepared(
        reward_config(tmp_path, with_chat_template(backbone, None), rows)
    ).reading == replace(inputs.reading, chat_template=None)
    tokenizer = AutoTokenizer.from_pretrained(backbone)
    pair = inputs.splits.train[0]
    number = pair.chosen.split()[-1]
    (ids,) = encode(tokenizer, *zip(pair.texts[0], strict=True), inputs.reading)["input_ids"]
    assert ids.tolist() == tokenizer(rows[int(number)]["chosen"])["input_ids"]


@pytest.mark.parametrize("pad", [None, 0, 2, 7, -1])
@pytest.mark.parametrize("own_pad", ["<unk>", "</s>"])
def test_a_score_is_the_models_own_of_the_text_alone(
    pad: int | None, own_pad: str, tmp_path: Path
) -> None:
    """Whatever pads in the model's configuration and in its tokenizer, also where texts end so."""
    folder = classifier(tmp_path, ENDED, pad_token_id=None)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = own_pad
    tokenizer.save_pretrained(folder)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"pad_token_id": pad}))
    reward = ClassifierReward(str(folder), chat=True)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    prompts, completions = ["is this film", "a plot"], ["good", "very bad and dull acting"]
    wanted, last = [], []
    for prompt, completion in zip(prompts, completions, strict=True):
        turns = talk(f"user: {prompt}", f"assistant: {completion}")
        ids = tokenizer.apply_chat_template(turns, tokenize=True, return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            wanted.append(model(ids).logits.item())
            last.append(model.score(model.model(ids).last_hidden_state[0, -1]).item())
    assert reward.score(prompts, completions) == pytest.approx(wanted, abs=1e-5)
    assert reward.model.config.pad_token_id == pad
    if pad != 2:  # each turn ends with EOS, which is 2
        assert wanted == pytest.approx(last, abs=1e-6)


def test_an_encoder_counts_positions_from_its_own_padding(tmp_path: Path) -> None:
    """RoBERTa finds padding by its configuration's id; here the tokenizer pads with another."""
    config = RobertaConfig(
        vocab_size=3 + len(WORDS),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=20,
        pad_token_id=0,
        num_labels=1,
        initializer_range=0.3,
    )
    torch.manual_seed(0)
    model = RobertaForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path)
    save_tokenizer(tmp_path)  # pads with 2
    reward = ClassifierReward(str(tmp_path))
    texts = ["good", "the film is very bad and dull it was", "good film " * 20]
    wanted = []
    for text in texts:
        ids = reward.tokenizer(text)["input_ids"]
        with torch.inference_mode():
            wanted.append(model(torch.tensor([[1, *ids[1:][-18:]]])).logits.item())
    assert reward.reading.max_length == 19  # a position each, behind that of padding
    assert reward.score([""] * 3, texts) == pytest.approx(wanted, abs=1e-5)


def test_an_openrlhf_model_is_read_at_the_eos_that_is_put_behind_its_text(tmp_path: Path) -> None:
    """It takes the last token that the mask keeps, even where EOS pads."""
    folder = classifier(tmp_path, normalize_reward=False)
    decided = with_template(RewardConfig(model=str(folder)), PromptsConfig())
    assert decided.append_eos
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    wanted = []
    for text in ("the film is good", "the film is very bad"):
        ids = torch.tensor([[*tokenizer(text)["input_ids"], 2]])
        with torch.inference_mode():
            wanted.append(model.score(model.model(ids).last_hidden_state[0, -1]).item())
    scores = load_reward(decided).score(["the film "] * 2, ["is good", "is very bad"])
    assert scores == pytest.approx(wanted, abs=1e-5)


@pytest.fixture
def trl_arguments(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path, int | None], None]:
    """Write training_args.bin as TRL's trainer does, with a class of that module and name."""

    def write(folder: Path, max_length: int | None) -> None:
        module = types.ModuleType("trl.trainer.reward_config")
        kind = type("RewardConfig", (), {"__module__": module.__name__})
        module.RewardConfig = kind  # type: ignore[attr-defined]
        arguments = kind()
        arguments.__dict__ = {"max_steps": 4, "max_length": max_length, "eos_token": None}
        with monkeypatch.context() as patched:
            for name in ("trl", "trl.trainer"):
                patched.setitem(sys.modules, name, types.ModuleType(name))
            patched.setitem(sys.modules, module.__name__, module)
            torch.save(arguments, folder / "training_args.bin")

    return write


def test_a_model_of_trl_is_read_as_trl_trained_it(
    trl_arguments: Callable[[Path, int | None], None], tmp_path: Path
) -> None:
    """Texts get an EOS, turns only what the template gives; the length is that of the training."""
    folder = classifier(tmp_path, ENDED)
    config, chat = RewardConfig(model=str(folder)), PromptsConfig(template="chat")
    before = with_template(config, PromptsConfig())
    assert (before.append_eos, before.max_length) == (False, 256)
    trl_arguments(folder, 77)
    texts, turns = with_template(config, PromptsConfig()), with_template(config, chat)
    assert (texts.template, texts.append_eos, texts.max_length) == ("none", True, 77)
    assert (turns.template, turns.append_eos, turns.max_length) == ("chat", False, 77)
    assert reward_fingerprint(texts) != reward_fingerprint(before)
    own = config.model_copy(update={"append_eos": False, "max_length": 30})
    decided = with_template(own, PromptsConfig())
    assert (decided.append_eos, decided.max_length) == (False, 30)
    trl_arguments(folder, None)
    assert (with_template(config, PromptsConfig()).max_length or 0) > 10**6
    reward = load_reward(texts)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    # as TRL loads and pads it, where EOS pads: the score stands before it
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    batch = tokenizer(
        ["the film is good</s>", "a very bad film it is</s>"], padding=True, return_tensors="pt"
    )
    with torch.inference_mode():
        wanted = model(batch["input_ids"], batch["attention_mask"]).logits[:, 0].tolist()
    assert reward.score(["the film ", "a very "], ["is good", "bad film it is"]) == pytest.approx(
        wanted, abs=1e-5
    )


def test_an_eos_is_put_behind_texts_once(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(save_tiny_llama(tmp_path))
    reading = Reading(5, append_eos=True)
    batch = encode(tokenizer, ["the film ", "a "], ["is good</s>", "film is good"], reading)
    assert batch["input_ids"][:, -1].tolist() == [2, 2]
    assert batch["input_ids"][:, -2].tolist() == [tokenizer.convert_tokens_to_ids("good")] * 2
    assert batch["input_ids"][:, 0].tolist() == [1, 1]
    assert batch["input_ids"].shape == (2, 5)


def test_no_text_has_two_bos_and_a_cut_one_keeps_its_own(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(save_tiny_llama(tmp_path))
    (plain,) = encode(tokenizer, ["<s>the film "], ["is good"], 64)["input_ids"].tolist()
    assert plain == tokenizer("the film is good")["input_ids"]
    assert plain.count(1) == 1
    tokenizer.chat_template = ENDED
    whole, cut = (
        encode(tokenizer, ["the film is"], ["good"], Reading(length, "chat"))["input_ids"][0]
        for length in (64, 5)
    )
    assert whole.tolist().count(1) == 1
    assert cut.tolist() == [1, *whole.tolist()[-4:]]


def test_a_score_does_not_depend_on_the_day(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(save_tiny_llama(tmp_path))
    tokenizer.chat_template = "{{ strftime_now('%d') }} " + ROLES
    (text,) = Reading(64, "chat").texts(tokenizer, ["a film"], ["good"])
    assert text == "26 film a film</s>plot good</s>"


def test_a_training_of_texts_in_another_form_starts_over(backbone: Path, tmp_path: Path) -> None:
    """A checkpoint from before readings were kept is of prompt and answer as one text."""
    config = reward_config(tmp_path, backbone, [FORMS["HH"][0](n) for n in range(20)])
    (checkpoint := tmp_path / "out" / WORK / "run" / "checkpoint_1").mkdir(parents=True)
    write_record(tmp_path / "out" / WORK / "settings.json", settings_of(config))
    prepare_reward(config)
    assert not checkpoint.exists()
    checkpoint.mkdir(parents=True)
    kept = {**settings_of(config), "reading": "chat"}
    write_record(tmp_path / "out" / WORK / "settings.json", kept)
    prepare_reward(config)
    assert checkpoint.exists()


def test_a_model_is_scored_on_as_many_tokens_as_it_was_trained_on(tmp_path: Path) -> None:
    folder = classifier(tmp_path, max_position_embeddings=2048)
    long = "the film is very good " * 100
    texts = [long, "it was bad and dull " * 40 + long[len("the film is very good ") * 40 :]]
    assert len(set(load_reward(RewardConfig(model=str(folder))).score(["", ""], texts))) == 1
    # a model from before readings were kept
    write_record(folder / REWARD_FILE, {"settings": {"reward_training.max_length": 1024}})
    assert len(set(load_reward(RewardConfig(model=str(folder))).score(["", ""], texts))) == 2
    short = RewardConfig(model=str(folder), max_length=128)
    assert len(set(load_reward(short).score(["", ""], texts))) == 1
    assert with_template(RewardConfig(model=str(folder)), PromptsConfig()).max_length == 1024


def test_a_kept_reading_is_the_one_that_scores(tmp_path: Path) -> None:
    folder = classifier(tmp_path, ENDED)
    reading = {"template": "chat", "chat_template": ROLES, "max_length": 33, "append_eos": True}
    write_record(folder / REWARD_FILE, {"settings": {}, "reading": reading})
    decided = with_template(RewardConfig(model=str(folder)), PromptsConfig())
    assert (decided.template, decided.max_length, decided.append_eos) == ("chat", 33, True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    read = load_reward(decided).function.__self__.reading
    (ids,) = encode(tokenizer, ["a film"], ["good"], read)["input_ids"].tolist()
    assert ids == tokenizer("film a film</s>plot good</s>", add_special_tokens=False)["input_ids"]


def test_a_runs_conversations_are_scored_turn_by_turn(tmp_path: Path) -> None:
    """As the template renders them, with system and earlier answers; as plain text there is one."""
    folder = classifier(tmp_path, ENDED)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    asked = talk("system: is", "user: this film", "assistant: good", "user: a plot")
    ids = tokenizer.apply_chat_template(
        [*asked, *talk("assistant: bad")], tokenize=True, return_tensors="pt"
    )["input_ids"]
    with torch.inference_mode():
        wanted = model(ids).logits.item()
    chat, plain = (
        load_reward(RewardConfig(model=str(folder), template=template, standardise=False))
        for template in ("chat", "none")
    )
    batch = Batch(["is this film good a plot"], ["bad"], messages=[asked])
    assert chat.raw(batch) == pytest.approx([wanted], abs=1e-5)
    assert chat.raw(batch) != pytest.approx(plain.raw(batch), abs=1e-3)
    single = Batch(["a plot"], ["bad"], messages=[None])
    assert chat.raw(single) == chat.raw(replace(single, messages=[talk("user: a plot")]))


def test_positions_beyond_a_model_are_not_read(tmp_path: Path) -> None:
    """The tiny GPT-2 has 128 positions, and its tokenizer names no limit."""
    backbone = save_tiny_gpt2(tmp_path / "gpt2")
    rows = [{"chosen": f"good {'film ' * n}", "rejected": f"bad {n}"} for n in range(20)]
    for length in (129, 256):
        with pytest.raises(ConfigError, match="reads at most 128 tokens"):
            prepare_reward(
                reward_config(tmp_path, backbone, rows, reward_training={"max_length": length})
            )
    assert (
        prepared(
            reward_config(tmp_path, backbone, rows, reward_training={"max_length": 128})
        ).reading.max_length
        == 128
    )
    bert = build_bert(tmp_path / "bert")
    tokenizer = AutoTokenizer.from_pretrained(bert)
    tokenizer.model_max_length = 10**30
    tokenizer.save_pretrained(bert)
    reward = load_reward(RewardConfig(model=str(bert), max_length=500))
    assert len(reward.score(["the film "], ["good " * 300])) == 1


def test_a_template_that_raises_is_refused_with_its_row(backbone: Path, tmp_path: Path) -> None:
    alternating = (
        "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}{{ m['content'] }}{% endfor %}"
    )
    rows = [FORMS["HH"][0](n) for n in range(20)]
    rows[7] = {key: "\n\nHuman: a" + text for key, text in rows[7].items()}
    config = reward_config(tmp_path, with_chat_template(backbone, alternating), rows)
    with pytest.raises(ConfigError, match=r"row 7: .*roles must alternate.*template=none"):
        prepare_reward(config)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('no assistants') }}", "refuses a conversation (no assistants)"),
        ("{{ messages[0]['content'] }}", "does not show the assistant's turn"),
    ],
)
def test_a_reward_models_template_that_cannot_be_scored_by_is_refused(
    template: str, message: str, tmp_path: Path
) -> None:
    config = RewardConfig(model=str(classifier(tmp_path, template)))
    with pytest.raises(ConfigError, match=re.escape(message)):
        with_template(config, PromptsConfig(template="chat"))


def test_what_is_equal_in_the_tokens_that_are_read_is_left_out(
    backbone: Path, tmp_path: Path
) -> None:
    end = " the film" * 20
    rows = [
        {"chosen": f"good {n}{end if n < 5 else ''}", "rejected": f"bad {n}{end if n < 5 else ''}"}
        for n in range(25)
    ]
    inputs = prepared(reward_config(tmp_path, backbone, rows, reward_training={"max_length": 16}))
    assert sum(map(len, (inputs.splits.train, inputs.splits.validation, inputs.splits.test))) == 20
    assert any("left out: 5 pairs of answers that are equal in" in note for note in inputs.notes())
    words = ("a", "film", "plot", "acting", "story", "movie", "it", "this", "fine", "dull")
    rated = [
        {"text": f"{a} {b}", "rating": n}
        for n, (a, b) in enumerate((a, b) for a in words for b in words)
    ]
    # two unknown words are one token
    rated += [{"text": "unseen", "rating": 1.0}, {"text": "unheard", "rating": 4.0}]
    inputs = prepared(
        reward_config(tmp_path, backbone, rated, preferences={"held_out_fraction": 0.05}, seed=1)
    )
    merged = [one for one in inputs.splits.rated if one.text in ("unseen", "unheard")]
    assert [one.rating for one in merged] in ([2.5], [1.0], [4.0])  # both, or one, are in training


def test_the_chat_template_needs_something_to_render(backbone: Path, tmp_path: Path) -> None:
    rows = [{"chosen": f"good {n}", "rejected": f"bad {n}"} for n in range(20)]
    chat = {"template": "chat"}
    with pytest.raises(ConfigError, match="preferences are texts without a prompt"):
        prepare_reward(reward_config(tmp_path, backbone, rows, reward_training=chat))
    assert prepared(reward_config(tmp_path, backbone, rows)).reading.template == "none"
    with pytest.raises(ConfigError, match="has no chat template; use template=none"):
        prepare_reward(
            reward_config(tmp_path, with_chat_template(backbone, None), rows, reward_training=chat)
        )


def test_a_run_is_warned_where_completions_may_not_be_read(
    tiny_llama: Path, tmp_path: Path
) -> None:
    project = make_project(tmp_path)
    folder = classifier(tmp_path / "rm")

    def warnings(new_tokens: int, **reward: Any) -> list[str]:
        changes = {"reward": {"function": None, "model": str(folder), **reward}}
        rollout = {"rollout": {"max_new_tokens": new_tokens}}
        return prepare(
            tiny_config(project, tiny_llama, tmp_path / "r", **changes, **rollout)
        ).warnings

    assert warnings(200) == []
    (cut,) = warnings(400)
    assert "reads 256 tokens (reward.max_length), and completions have up to" in cut
    assert "rollout.max_new_tokens=400" in cut
    (prompt,) = warnings(255)
    assert "prompts may lose their beginning" in prompt
    assert warnings(400, max_length=512) == []
    assert cut_warning("control", 10, 5, 5) is None


def test_a_saved_default_length_is_still_the_same_run() -> None:
    assert differing_keys({"reward": {"max_length": 256}}, Config()) == []
    now = parse_config({"reward": {"model": "x", "max_length": 512}})
    assert differing_keys({"reward": {"model": "x", "max_length": 256}}, now) == [
        "reward.max_length is 256 there and 512 here"
    ]


def test_margins_and_centring_are_those_of_trl() -> None:
    """−log σ(x) is 0.3132617 at 1, 0.6931472 at 0, and 2.1269280 at −2."""
    chosen, rejected = torch.tensor([2.0, 1.0]), torch.tensor([0.5, 1.0])
    loss = pair_loss(chosen, rejected, torch.tensor([0.5, 2.0]))
    assert loss.item() == pytest.approx((0.3132617 + 2.1269280) / 2)
    loss = pair_loss(chosen, rejected - torch.tensor([-0.5, 0.0]), 0.0, 0.01)
    assert loss.item() == pytest.approx((0.3132617 + 0.6931472) / 2 + 0.01 * (9 + 4) / 2)


def trainer(backbone: Path, train: Any, reading: Reading | None = None, **settings: Any) -> Any:
    training = RewardTrainingConfig(
        lr=1e-2, batch_size=4, steps=4, warmup_steps=0, max_length=64, **settings
    )
    return PairTrainer(
        training, str(backbone), train, 3, torch.device("cpu"), reading=reading, margin=0.5
    )


def test_a_margin_is_the_given_one_or_the_difference_of_ratings(backbone: Path) -> None:
    pairs = [Preference(f"good film {w}", "bad", margin=n + 0.25) for n, w in enumerate("abcd")]
    one = trainer(backbone, pairs, margin_loss=True, center_rewards_coefficient=0.1)
    texts, better, worse = one._batch()
    with torch.no_grad():
        scores = one._score(one.model, texts).double()
    margin = {pair.texts[0]: pair.margin for pair in pairs}
    wanted = [
        torch.log1p(torch.exp(-(scores[b] - scores[w] - margin[texts[b]])))
        + 0.1 * (scores[b] + scores[w]) ** 2
        for b, w in zip(better, worse, strict=True)
    ]
    assert one.update()["loss"] == pytest.approx(float(sum(wanted)) / 4, rel=1e-4)
    rated = [Snippet(f"the film {w}", rating) for w, rating in (("is", 3.0), ("was", 1.0))]
    other = trainer(backbone, rated, margin_loss=True)
    _, better, worse = other._batch()
    assert set(other._margins(better, worse).tolist()) == {2.0}


def test_a_margin_that_a_row_lacks_is_refused(backbone: Path, tmp_path: Path) -> None:
    rows = [
        {"chosen": f"good {n}", "rejected": f"bad {n}", "margin": None if n == 3 else 1.0}
        for n in range(20)
    ]
    config = reward_config(tmp_path, backbone, rows, reward_training={"margin_loss": True})
    with pytest.raises(ConfigError, match="row 3 of the preferences has no number in the column"):
        prepare_reward(config)


def test_a_trained_model_scores_the_same_where_others_load_it(
    backbone: Path, tmp_path: Path
) -> None:
    """As TRL does: AutoModelForSequenceClassification, padded by the saved tokenizer's token."""
    pairs = [
        of_turns(
            (Turn("user", f"is the film {a}"),),
            (Turn("assistant", f"{b} good"),),
            (Turn("assistant", "bad"),),
        )
        for a in ("good", "bad", "this")
        for b in ("very", "a", "the plot is")
    ]
    one = trainer(backbone, pairs, Reading(64, "chat"))
    for _ in range(2):
        one.update()
    trained, _ = one.scores(pairs)
    (folder := tmp_path / "model").mkdir()
    one.export(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    assert tokenizer.pad_token_id == model.config.pad_token_id != tokenizer.eos_token_id
    turns = [
        [
            {"role": "user", "content": pair.turns[0][0].content},
            {"role": "assistant", "content": pair.chosen},
        ]
        for pair in pairs
    ]
    rows = [tokenizer.apply_chat_template(own, tokenize=True)["input_ids"] for own in turns]
    batch = tokenizer.pad({"input_ids": rows}, padding_side="right", return_tensors="pt")
    with torch.inference_mode():
        scores = model(**batch).logits[:, 0]
        ends = torch.stack(
            [model.score(model.model(torch.tensor([r])).last_hidden_state[0, -1])[0] for r in rows]
        )
    reward = ClassifierReward(str(folder), one.reading)
    chosen = torch.tensor(reward.score([own[:1] for own in turns], [p.chosen for p in pairs]))
    torch.testing.assert_close(chosen, trained, rtol=0, atol=0.1)  # which was in bfloat16
    torch.testing.assert_close(chosen, scores, rtol=0, atol=1e-5)
    torch.testing.assert_close(chosen, ends, rtol=0, atol=1e-5)  # at the EOS of the last turn
