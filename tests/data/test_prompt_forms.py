"""Tests of prompts in the forms that people have: messages, templates, long ones, several datasets.

Token ids are compared with those of the tokenizer's own `apply_chat_template`.
"""

import gc
import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
from tiny_models import WORDS
from transformers import AutoTokenizer

from raywarp.config.datasets import PromptsConfig
from raywarp.config.load import load_config
from raywarp.config.schema import ConfigError
from raywarp.data.prompt_set import rendering, table, tokenising
from raywarp.data.prompt_set.table import PromptSplits
from raywarp.data.prompts import load_prompts, prompts_fingerprint
from raywarp.data.text import Prompt

Rows = list[dict[str, Any]]
Message = dict[str, Any]

# Writes roles, like most; refuses what it does not know, like Gemma's; and has a switch, like
# Qwen3's.
TEMPLATE = """{{ bos_token }}{% for m in messages %}
{%- if m['role'] not in ['system', 'user', 'assistant', 'tool'] %}
{{- raise_exception('unknown role ' + m['role']) }}{% endif %}
{{- ' ' + m['role'] + ' ' + (m['content'] or '') }}
{%- for call in m['tool_calls'] or [] %} {{ call['function']['name'] }}
{{- call['function']['arguments'] | tojson }}{% endfor %}
{%- if 'name' in m %} {{ m['name'] }}{% endif %} </s>{% endfor %}
{%- if add_generation_prompt %} assistant{% if thinking is false %} dull{% endif %}{% endif %}"""
ROLES = ("system", "user", "assistant", "tool", "search", "weather")


@pytest.fixture
def tokenizer(tiny_llama: Path) -> Any:
    own = AutoTokenizer.from_pretrained(tiny_llama)
    own.add_tokens(list(ROLES))
    own.chat_template = TEMPLATE
    return own


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Rows → the path of a JSONL file, as people write it: what a message lacks is absent."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def write(rows: Rows, name: str = "rows.jsonl") -> str:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write


def load(path: str, tokenizer: Any, limit: int = 100, **settings: Any) -> PromptSplits:
    return load_prompts(PromptsConfig(dataset=path, **settings), tokenizer, 0, limit)


def every(splits: PromptSplits) -> list[Prompt]:
    return splits.train + splits.held_out


def assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def own_ids(tokenizer: Any, messages: list[Message], **arguments: Any) -> tuple[int, ...]:
    """What the tokenizer itself makes of a conversation."""
    found = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, **arguments
    )
    return tuple(found["input_ids"])


SYSTEM = {"role": "system", "content": "a very good film"}
CALL = {"function": {"name": "search", "arguments": {"text": "film"}}}
CONVERSATIONS: dict[str, list[Message]] = {
    "one turn": [user("the film is")],
    "a system turn": [SYSTEM, user("the film was")],
    "earlier turns": [
        user("the plot"),
        {"role": "assistant", "content": "is dull"},
        user("a film"),
    ],
    "a tool's answer": [
        user("a film"),
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "great", "name": "search"},
    ],
}


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet"])
def test_messages_go_through_the_template_as_they_are(
    name: str, write: Callable[..., str], tokenizer: Any
) -> None:
    """TRL's form. Parquet gives every message the keys of all others, which must not show."""
    rows = [{"prompt": talk, "id": name} for name, talk in CONVERSATIONS.items()]
    path = write(rows, name)
    if name == "rows.parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
    found = every(load(path, tokenizer, column="prompt", template="chat"))
    assert len(found) == len(rows)
    for prompt in found:
        talk = CONVERSATIONS[prompt.columns["id"]]
        assert prompt.token_ids == own_ids(tokenizer, talk)
        assert prompt.messages == talk
        for message in talk:
            assert (message["content"] or "search") in prompt.text


def test_text_parts_are_read_by_templates_with_and_without_parts(
    write: Callable[..., str], tokenizer: Any
) -> None:
    parts = [{"type": "text", "text": "the film"}, {"type": "text", "text": " is"}]
    rows = [{"prompt": [{"role": "user", "content": parts}], "id": 0}]
    rows += [{"prompt": [{"role": "user", "content": parts[:1]}], "id": 1}]
    config = {"column": "prompt", "template": "chat"}
    for prompt in every(load(write(rows), tokenizer, **config)):
        text = ("the film is", "the film")[prompt.columns["id"]]
        assert (prompt.text, prompt.token_ids) == (text, own_ids(tokenizer, [user(text)]))
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['content'] is string %}{{ m['content'] }}{% else %}"
        "{% for part in m['content'] %}{{ part['text'] }}{% endfor %}{% endif %}{% endfor %}"
    )
    for prompt in every(load(write(rows), tokenizer, **config)):
        assert prompt.token_ids == own_ids(tokenizer, rows[prompt.columns["id"]]["prompt"])


def test_system_turns_and_template_arguments(write: Callable[..., str], tokenizer: Any) -> None:
    """The configuration's system turn is for prompts that have none, texts and messages alike."""
    settings = {"template": "chat", "system": "bad film", "template_kwargs": {"thinking": False}}
    added = {"role": "system", "content": "bad film"}
    talks = [CONVERSATIONS["one turn"], CONVERSATIONS["a system turn"]]
    found = every(load(write([{"text": talk} for talk in talks]), tokenizer, **settings))
    wanted = [[added, *talks[0]], talks[1]]
    assert {p.token_ids for p in found} == {
        own_ids(tokenizer, talk, thinking=False) for talk in wanted
    }
    texts = every(load(write([{"text": "the plot"}, {"text": "a plot"}]), tokenizer, **settings))
    assert {p.token_ids for p in texts} == {
        own_ids(tokenizer, [added, user(text)], thinking=False) for text in ("the plot", "a plot")
    }
    assert {p.text for p in texts} == {"the plot", "a plot"}
    plain = every(
        load(write([{"text": "the plot"}, {"text": "a plot"}]), tokenizer, template="chat")
    )
    assert prompts_fingerprint(plain) != prompts_fingerprint(texts)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"system": "be kind"}, r"prompts: system='be kind' is for a chat template"),
        ({"template_kwargs": {"thinking": False}}, r"prompts: template_kwargs=.*template=chat"),
        ({"dataset": "a.csv", "datasets": [{"dataset": "b.csv"}]}, "contradict each other"),
        ({"too_long": "drop", "min_tokens": 2, "max_tokens": 3}, "too_long=drop leaves out"),
        ({"datasets": [{"dataset": "b.csv", "weight": 0}]}, "weight: .*greater than 0"),
        ({"datasets": []}, "prompts.datasets: "),
    ],
)
def test_settings_that_contradict_each_other(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config({"prompts": settings})


@pytest.mark.parametrize(
    ("value", "settings", "message"),
    [
        (
            [user("a"), {"role": "critic", "content": "b"}],
            {},
            "template does not take.*role critic",
        ),
        ([{"from": "human", "value": "a film"}], {}, r"message 1 has no role \(it has from, value"),
        ([{"role": "user", "content": None}], {}, r"message 1 \(user\) has no content"),
        ([user("a"), {"role": "assistant", "content": "b"}], {}, "last_answer=drop"),
        ([SYSTEM], {}, "no turn to answer"),
        ([], {}, "holds an empty list; it must hold text, or a list of messages"),
        ([user("the film")], {"template": "none"}, r"holds messages; set prompts\.template=chat"),
        ([user("the film")], {"max_words": 3}, r"prompts\.max_words is for texts"),
        (
            [{"role": "user", "content": [{"type": "image", "text": None}]}],
            {},
            r"message 1 \(user\) has a content part of type image",
        ),
    ],
)
def test_a_row_that_is_no_conversation_is_named(
    value: Any, settings: dict[str, Any], message: str, write: Callable[..., str], tokenizer: Any
) -> None:
    rows = [{"text": [user(f"the film {word}")]} for word in WORDS[:6]]
    path = write([*rows[:3], {"text": value}, *rows[3:]])
    place = r"row [14] of prompts\.dataset=.*rows\.jsonl: "
    with pytest.raises(ConfigError, match=place + ".*" + message):
        load(path, tokenizer, **{"template": "chat", **settings})


def test_texts_and_numbers_in_one_column_are_refused(
    write: Callable[..., str], tokenizer: Any
) -> None:
    with pytest.raises(ConfigError, match=r"row 2 of .*prompts\.column=text holds a int"):
        load(write([{"text": "the film"}, {"text": 7}]), tokenizer)


def test_template_arguments_that_nothing_reads(write: Callable[..., str], tokenizer: Any) -> None:
    path = write([{"text": "the film"}])
    with pytest.raises(ConfigError, match=r"template_kwargs\.thinkng: .*does not read 'thinkng'"):
        load(path, tokenizer, template="chat", template_kwargs={"thinkng": False})
    with pytest.raises(ConfigError, match=r"template_kwargs\.messages is set by raywarp"):
        load(path, tokenizer, template="chat", template_kwargs={"messages": []})
    tokenizer.chat_template = "{{ [1, 2] | random }}"
    with pytest.raises(ConfigError, match="draws at random"):
        load(path, tokenizer, template="chat")


def test_a_last_answer_is_dropped_or_continued(write: Callable[..., str], tokenizer: Any) -> None:
    """UltraFeedback's lists end with an answer. Its splits are train_prefs and test_prefs."""
    for name in ("train_prefs", "test_prefs"):
        rows = [
            {
                "prompt": f"the film {word}",
                "chosen": [user(f"the film {word}"), {"role": "assistant", "content": "is good"}],
                "score_chosen": n,
            }
            for n, word in enumerate(WORDS[:5] if name == "train_prefs" else WORDS[5:8])
        ]
        folder = Path(write(rows, f"set/{name}-00000.jsonl")).parent
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n"
        + "".join(
            f"  - split: {name}\n    path: {name}-*.jsonl\n"
            for name in ("train_prefs", "test_prefs")
        )
        + "---\n"
    )
    splits = {"split": "train_prefs", "held_out_split": "test_prefs", "template": "chat"}
    by_text = load(str(folder), tokenizer, column="prompt", **splits)
    assert (len(by_text.train), len(by_text.held_out)) == (5, 3)
    dropped = load(str(folder), tokenizer, column="chosen", last_answer="drop", **splits)
    assert [p.token_ids for p in dropped.train] == [p.token_ids for p in by_text.train]
    assert [p.columns["score_chosen"] for p in dropped.train] == [0, 1, 2, 3, 4]
    continued = load(str(folder), tokenizer, column="chosen", last_answer="continue", **splits)
    for prompt, shorter in zip(continued.train, by_text.train, strict=True):
        answer = tuple(tokenizer(" is good", add_special_tokens=False).input_ids)
        assert prompt.token_ids == shorter.token_ids + answer


def test_hh_prompts_are_plain_texts(write: Callable[..., str], tokenizer: Any) -> None:
    rows = [{"text": f"\n\nHuman: the film {word}\n\nAssistant:"} for word in WORDS[:6]]
    found = every(load(write(rows), tokenizer))
    assert {p.text for p in found} == {row["text"] for row in rows}
    assert all(p.token_ids == tuple(tokenizer(p.text).input_ids) for p in found)


def test_hh_dialogues_are_turns_of_a_chat(write: Callable[..., str], tokenizer: Any) -> None:
    """Their last answer is one to drop, to continue, or a reason to refuse; also without chat."""
    asked = [f"\n\nHuman: a {w}\n\nAssistant: fine\n\nHuman: the film\n\nAssistant:" for w in WORDS]
    open_ones = load(write([{"text": text} for text in asked]), tokenizer, template="chat")
    wanted = {
        own_ids(tokenizer, [user(f"a {w}"), assistant("fine"), user("the film")]) for w in WORDS
    }
    assert {p.token_ids for p in every(open_ones)} == wanted
    answered = write([{"text": f"{text} good {n}"} for n, text in enumerate(asked)])
    for template in ("chat", "none"):
        with pytest.raises(ConfigError, match=r"row \d+ .*last_answer=drop"):
            load(answered, tokenizer, template=template)
    dropped = load(answered, tokenizer, template="chat", last_answer="drop")
    assert {p.token_ids for p in every(dropped)} == wanted
    texts = load(answered, tokenizer, last_answer="drop")
    assert {p.text for p in every(texts)} == set(asked)
    kept = load(answered, tokenizer, last_answer="continue")
    assert {p.text for p in every(kept)} == {f"{text} good {n}" for n, text in enumerate(asked)}


def test_verl_columns_reach_the_reward_as_they_are(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [
        {
            "data_source": "openai/gsm8k",
            "prompt": [user(f"the film {word}")],
            "ability": "math",
            "reward_model": {"ground_truth": f"00{n}", "style": "rule"},
            "extra_info": {"index": n, "split": "train"},
        }
        for n, word in enumerate(WORDS[:6])
    ]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "train.parquet")
    path = str(tmp_path / "train.parquet")
    for prompt in every(load(path, tokenizer, column="prompt", template="chat")):
        row = rows[prompt.columns["extra_info"]["index"]]
        assert prompt.columns == {name: row[name] for name in row if name != "prompt"}
        assert prompt.token_ids == own_ids(tokenizer, row["prompt"])


def test_a_template_whose_tokenizer_adds_a_bos_of_its_own_gives_one(
    write: Callable[..., str], tokenizer: Any
) -> None:
    class Adding(type(tokenizer)):  # type: ignore[misc]
        """Adds a BOS although it is told not to, as some tokenizers with code of their own do."""

        def __call__(self, text: Any, *arguments: Any, **named: Any) -> Any:
            return super().__call__(text, *arguments, **{**named, "add_special_tokens": True})

    talks = [[user("the film")], [user("a film")]]
    wanted = {own_ids(tokenizer, talk) for talk in talks}
    tokenizer.__class__ = Adding
    found = every(load(write([{"text": talk} for talk in talks]), tokenizer, template="chat"))
    assert {p.token_ids for p in found} == wanted
    assert all(p.token_ids.count(1) == 1 for p in found)


# What is too long


def test_long_prompts_are_refused_dropped_or_cut(write: Callable[..., str], tokenizer: Any) -> None:
    words = [*WORDS, *ROLES]
    rows = [{"text": f"the {a} {b}", "n": 0} for a in words[:8] for b in words[:8]]
    rows[40] = {"text": "the film is " + "good " * 30, "n": 40}
    path = write(rows)
    with pytest.raises(ConfigError, match=r"row 41 of .*has 34 tokens, the limit is 20.*=drop"):
        load(path, tokenizer, 20)
    dropped = load(path, tokenizer, 20, too_long="drop")
    assert len(every(dropped)) == 63
    assert dropped.notes == (f"prompts: 1 of 64 rows of {path} left out: too long"
                             " (prompts.too_long=drop)",)  # fmt: skip
    (cut,) = (p for p in every(load(path, tokenizer, 20, too_long="cut")) if p.columns["n"])
    assert cut.token_ids == tuple(tokenizer(cut.text).input_ids)
    assert (len(cut.token_ids), cut.text) == (20, "the film is " + " ".join(["good"] * 16))
    longest = max(len(p.token_ids) for p in every(load(path, tokenizer, max_tokens=3,
                                                        too_long="drop")))  # fmt: skip
    assert longest == 4


def test_a_long_conversation_loses_the_end_of_its_last_text(
    write: Callable[..., str], tokenizer: Any
) -> None:
    long = [SYSTEM, user("the film is " + "good " * 30)]
    path = write([{"text": long}, {"text": [user("a film")]}, {"text": [user("the film")]}])
    config = {"template": "chat", "too_long": "cut"}
    (cut,) = (p for p in every(load(path, tokenizer, 20, **config)) if len(p.messages or ()) == 2)
    assert cut.messages
    assert cut.messages[0] == SYSTEM
    assert cut.token_ids == own_ids(tokenizer, cut.messages)
    assert len(cut.token_ids) == 20
    assert long[1]["content"].startswith(cut.messages[1]["content"])
    with pytest.raises(ConfigError, match="row 1 of .*without its last turn's text"):
        load(path, tokenizer, 9, **config)
    by_key = load(path, tokenizer, template="chat", too_long="drop", max_tokens=10)
    assert len(every(by_key)) == 2


# Samples, repeated prompts, several datasets


def test_a_sorted_split_is_measured_on_a_sample(
    write: Callable[..., str], tokenizer: Any, tmp_path: Path
) -> None:
    """Of 400 rows by label, the first 100 of a sample have about 50 of each."""
    words = [f"{a} {b} {c}" for a in WORDS[:10] for b in WORDS[:10] for c in WORDS[:4]]
    for split, end in (("train", "fine"), ("test", "dull")):
        rows = [{"text": f"{text} {end}", "label": int(n >= 200)} for n, text in enumerate(words)]
        write(rows, f"set/{split}.jsonl")
    splits = load(str(tmp_path / "set"), tokenizer, held_out_split="test")
    assert [p.columns["label"] for p in splits.train] == [0] * 200 + [1] * 200  # keys stay
    for part in (splits.held_out, splits.sampled):
        labels = Counter(p.columns["label"] for p in part[:100])
        assert 30 < labels[0] < 70
        assert len(part) == 400
    assert load(str(tmp_path / "set"), tokenizer, held_out_split="test") == splits


def test_rows_of_one_prompt_keep_their_columns_and_stay_in_one_split(
    write: Callable[..., str], tokenizer: Any
) -> None:
    rows = [
        {"text": f"the film {word}", "reference": f"answer {n}"}
        for n in range(4)
        for word in WORDS[:5]
    ]
    splits = load(write([*rows, rows[3]]), tokenizer)
    references = Counter((p.text, p.columns["reference"]) for p in every(splits))
    assert references == Counter({(row["text"], row["reference"]): 1 for row in rows})
    held_out = {p.text for p in splits.held_out}
    assert held_out.isdisjoint(p.text for p in splits.train)
    # distinct ones first: the front's first prompts are as many as they say
    assert len({p.text for p in splits.sampled[:4]}) == 4


def test_datasets_are_mixed_by_weight(write: Callable[..., str], tokenizer: Any) -> None:
    few = write([{"text": f"a {w} film", "kind": "few"} for w in WORDS[:10]], "few.jsonl")
    many = write(
        [{"question": f"{a} {b}", "id": 1} for a in WORDS[:10] for b in WORDS[:10]], "many.jsonl"
    )
    sources = [
        {"dataset": few, "weight": 3},
        {"dataset": many, "column": "question", "weight": 1},
    ]
    splits = load_prompts(PromptsConfig(datasets=sources), tokenizer, 0, 100)
    kinds = Counter(p.columns["kind"] for p in splits.train)
    assert kinds == {"few": 240, None: 80}
    counts = Counter(p.text for p in splits.train)
    assert {counts[p.text] for p in splits.train if p.columns["kind"]} == {30}
    assert {counts[p.text] for p in splits.train if not p.columns["kind"]} == {1}
    assert Counter(p.columns["kind"] for p in splits.sampled[:8]) == {"few": 6, None: 2}
    assert set(splits.train[0].columns) == set(splits.train[-1].columns) == {"kind", "id"}
    assert {p.token_ids for p in splits.train}.isdisjoint(p.token_ids for p in splits.held_out)


# Many rows


def done_elsewhere(request: pytest.FixtureRequest) -> bool:
    """Run this test in a process without Ray, if Ray runs here: only there are others forked."""
    if not (ray := sys.modules.get("ray")) or not ray.is_initialized():
        return False
    variables = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    subprocess.run(
        [*command, f"{__file__}::{request.node.name}"],
        check=True,
        env=variables,
        cwd=Path(__file__).parents[2],
        stdout=subprocess.DEVNULL,
    )
    return True


def test_one_process_tokenises_where_ray_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    for runs in (False, True):
        ray = SimpleNamespace(is_initialized=lambda runs=runs: runs)
        monkeypatch.setitem(sys.modules, "ray", ray)
        assert (tokenising._processes() == 1) == (runs or os.cpu_count() == 1)


def test_many_rows_are_tokenised_in_parallel_to_the_same_prompts(
    write: Callable[..., str],
    tokenizer: Any,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    """In blocks, each with a line of progress, and in files that go with the prompts."""
    if done_elsewhere(request):
        return
    rows = [{"text": f"the {a} {b} {c}"} for a in WORDS[:9] for b in WORDS[:9] for c in WORDS[:3]]
    path = write(rows)
    few = load(path, tokenizer, template="chat")
    limits = {"IN_MEMORY": 100, "BLOCK": 100, "PER_PROCESS": 30}
    for name, value in limits.items():
        monkeypatch.setattr(tokenising, name, value)
    monkeypatch.setattr(table, "RELEASED", table.READ)
    lines: list[str] = []
    config = PromptsConfig(dataset=path, template="chat")
    many = load_prompts(config, tokenizer, 0, 100, lines.append)
    assert [line.partition(" rows")[0] for line in lines] == [
        f"prompts: {count} of 243" for count in (100, 200, 243)
    ]
    assert many == few
    assert many == few  # after pages were given back
    assert (many.longest, many.largest_token) == (few.longest, few.largest_token)
    assert prompts_fingerprint(many.train) == prompts_fingerprint(few.train)
    folders = {Path(file).parent for file in many.train.parts[0].files if "scratch" in file}
    assert len(folders) == 1
    del many
    gc.collect()
    assert not folders.pop().exists()


def test_a_tokenising_process_that_dies_is_done_without(
    write: Callable[..., str],
    tokenizer: Any,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    if done_elsewhere(request):
        return
    path = write([{"text": f"the {a} {b}"} for a in WORDS[:9] for b in WORDS[:9]])
    few, own, lines = load(path, tokenizer), os.getpid(), list[str]()
    whole = rendering.PromptRenderer.__call__

    def dying(self: Any, *arguments: Any, **named: Any) -> Any:
        return whole(self, *arguments, **named) if os.getpid() == own else os._exit(1)

    monkeypatch.setattr(rendering.PromptRenderer, "__call__", dying)
    for name, value in {"IN_MEMORY": 20, "BLOCK": 40, "PER_PROCESS": 20}.items():
        monkeypatch.setattr(tokenising, name, value)
    many = load_prompts(PromptsConfig(dataset=path), tokenizer, 0, 100, lines.append)
    assert many == few
    assert [line for line in lines if "died" in line] == lines[:1]


# The date


def test_a_template_with_the_date_gives_equal_keys_and_the_runs_own_date(
    write: Callable[..., str], tokenizer: Any
) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}{{ ['the', 'a', 'film'][strftime_now('%d') | int % 3] }}"
        " {{ m['content'] }}{% endfor %}"
    )
    path = write([{"text": f"good {word}"} for word in WORDS[:6]])

    def on(day: int) -> PromptSplits:
        config = PromptsConfig(dataset=path, template="chat")
        return load_prompts(config, tokenizer, 0, 100, moment=lambda: datetime(2026, 11, day))

    first, second, fourth = on(3), on(4), on(6)
    assert [p.token_ids[0] for p in (first.train[0], second.train[0])] == [3, 4]
    assert prompts_fingerprint(first.train) == prompts_fingerprint(second.train)
    assert [p.token_ids for p in first.train] == [p.token_ids for p in fourth.train]
    assert re.fullmatch("2026-11-03T.*", first.rendered_at or "")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    assert on(3).rendered_at is None
