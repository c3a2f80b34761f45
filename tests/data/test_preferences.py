"""Tests of preferences in the forms that people have them: dialogues, messages, and ratings."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest

from raywarp.config.datasets import PreferencesConfig
from raywarp.config.schema import ConfigError
from raywarp.data.pairs import Preference, PreferenceSplits
from raywarp.data.preferences import load_preferences
from raywarp.data.turns import plain

Rows = list[dict[str, Any]]
Load = Callable[..., PreferenceSplits]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """Write rows as JSON lines, and load them as preferences."""

    def loaded(rows: Rows, seed: int = 0, **settings: Any) -> PreferenceSplits:
        path = tmp_path / "p.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return load_preferences(PreferencesConfig(dataset=str(path), **settings), seed)

    return loaded


def all_pairs(splits: PreferenceSplits) -> list[Preference]:
    return splits.train + splits.validation + splits.test


def talk(*turns: str) -> list[dict[str, str]]:
    """A conversation from texts such as "user: hi"."""
    split = (turn.partition(": ") for turn in turns)
    return [{"role": role, "content": content} for role, _, content in split]


def test_a_conversation_loses_no_turn(load: Load) -> None:
    before = ["user: pick one", "assistant: seven", "user: is it odd"]
    rows = [
        {
            "chosen": talk(f"system: be rude {n}", *before, f"assistant: yes {n}"),
            "rejected": talk(f"system: be rude {n}", *before, f"assistant: no {n}"),
        }
        for n in range(10)
    ]
    pair = next(p for p in all_pairs(load(rows)) if p.chosen == "yes 3")
    assert (
        pair.prompt + pair.chosen == "\n\nSystem: be rude 3\n\nHuman: pick one\n\nAssistant: seven"
        "\n\nHuman: is it odd\n\nAssistant: yes 3"
    )
    prompt, chosen = pair.texts[0]
    assert [turn.content for turn in (*prompt, *chosen)] == [
        "be rude 3",
        "pick one",
        "seven",
        "is it odd",
        "yes 3",
    ]
    assert pair.rejected == "no 3"


def test_dialogues_in_a_text_are_turns(load: Load) -> None:
    """The two texts of a row share their beginning, which is the prompt."""
    start = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: tell\nme"
    rows = [
        {
            "chosen": f"\n\nHuman: {n}{start}\n\nAssistant: gladly {n}",
            "rejected": f"\n\nHuman: {n}{start}\n\nAssistant: no",
        }
        for n in range(10)
    ]
    splits = load(rows)
    assert splits.dialogues
    pair = next(p for p in all_pairs(splits) if p.chosen == "gladly 3")
    assert [turn.role for turn in pair.texts[1][0]] == ["user", "user", "assistant", "user"]
    assert pair.prompt + pair.chosen == rows[3]["chosen"]
    assert pair.prompt + pair.rejected == rows[3]["rejected"]


def test_dialogues_may_part_at_an_earlier_answer(load: Load) -> None:
    rows = [
        {
            "chosen": f"\n\nHuman: hi {n}\n\nAssistant: a\n\nHuman: why\n\nAssistant: b",
            "rejected": f"\n\nHuman: hi {n}\n\nAssistant: c\n\nHuman: what\n\nAssistant: d",
        }
        for n in range(10)
    ]
    pair = next(p for p in all_pairs(load(rows)) if "hi 3" in p.prompt)
    assert pair.prompt == "\n\nHuman: hi 3\n\nAssistant: "
    assert pair.chosen == "a\n\nHuman: why\n\nAssistant: b"
    assert plain(sum(pair.texts[1], ())) == rows[3]["rejected"]


def test_a_prompt_column_may_repeat_what_the_messages_hold(tmp_path: Path) -> None:
    """UltraFeedback's form: a text `prompt`, whole conversations, and splits of other names."""

    def part(numbers: range) -> datasets.Dataset:
        rows = [
            {
                "prompt": f"question {n}",
                "chosen": talk(f"user: question {n}", f"assistant: good {n}"),
                "rejected": talk(f"user: question {n}", f"assistant: bad {n}"),
                "score_chosen": 8.0,
            }
            for n in numbers
        ]
        return datasets.Dataset.from_list(rows)

    folder = tmp_path / "ultra"
    (folder / "data").mkdir(parents=True)
    for name, numbers in (("train_prefs", range(40)), ("test_prefs", range(35, 55))):
        part(numbers).to_parquet(folder / "data" / f"{name}-00000-of-00001.parquet")
    settings = {"split": "train_prefs", "held_out_split": "test_prefs"}
    splits = load_preferences(PreferencesConfig(dataset=str(folder), **settings), 0)
    # 35 to 39 are held out, so they are not trained on
    assert {int(p.chosen.split()[-1]) for p in splits.train} == set(range(35))
    assert [len(splits.validation), len(splits.test)] == [10, 10]
    assert splits.train[0].prompt.count("question") == 1
    with pytest.raises(ConfigError, match="train_prefs"):
        load_preferences(PreferencesConfig(dataset=str(folder)), 0)


def test_an_explicit_prompt_of_messages_equals_an_implicit_one(load: Load) -> None:
    prompts = [talk("system: be nice", f"user: q{n}") for n in range(10)]
    answers = [(talk(f"assistant: good {n}"), talk("assistant: bad")) for n in range(10)]
    explicit = [
        {"prompt": p, "chosen": c, "rejected": r}
        for p, (c, r) in zip(prompts, answers, strict=True)
    ]
    implicit = [
        {"chosen": row["prompt"] + row["chosen"], "rejected": row["prompt"] + row["rejected"]}
        for row in explicit
    ]
    assert load(explicit) == load(implicit)
    texts = [
        {"prompt": p, "chosen": c[0]["content"], "rejected": r[0]["content"]}
        for p, (c, r) in zip(prompts, answers, strict=True)
    ]
    assert load(texts) == load(implicit)


def test_a_text_prompt_stands_before_the_answers_once(load: Load) -> None:
    rows = [{"prompt": f"q{n} ", "chosen": f"yes {n}", "rejected": "no"} for n in range(10)]
    whole = [
        {
            **row,
            "chosen": row["prompt"] + row["chosen"],
            "rejected": row["prompt"] + row["rejected"],
        }
        for row in rows
    ]
    assert load(rows) == load(whole)
    assert Preference("yes 3", "no", "q3 ") in all_pairs(load(rows))


def test_answers_are_compared_with_answers_to_the_same_prompt(load: Load) -> None:
    """HelpSteer's form: prompt, response, and several columns of numbers."""
    rows = [
        {
            "prompt": f"question {n // 3}",
            "response": f"answer {n}",
            "helpfulness": [4, 1, 1][n % 3],
            "verbosity": n % 3,
        }
        for n in range(60)
    ]
    splits = load(rows, text="response", rating="helpfulness")
    pairs = all_pairs(splits)
    assert splits.rated == []
    numbers = [(int(p.chosen.split()[1]), int(p.rejected.split()[1])) for p in pairs]
    assert sorted(numbers) == sorted((n, n + more) for n in range(0, 60, 3) for more in (1, 2))
    assert all(p.prompt == f"question {c // 3}" for p, (c, _) in zip(pairs, numbers, strict=True))
    assert all(pair.margin == 3 for pair in pairs)
    # each prompt's two answers of rating 1
    assert splits.left_out == {"pairs of ratings that differ by less than preferences.margin": 20}
    other = all_pairs(load(rows, text="response", rating="verbosity"))
    assert all(int(p.chosen.split()[1]) > int(p.rejected.split()[1]) for p in other)
    assert len(other) == 60


def test_several_ratings_of_one_text_are_averaged(load: Load) -> None:
    rows = [
        {"text": f"text number {n}", "rating": rating}
        for n in range(60)
        for rating in ((5, 1, 1) if n % 2 else (1, 5, 5))  # means 2.3 and 3.7
    ]
    splits = load(rows)
    assert splits.train
    assert all(int(pair.chosen.split()[-1]) % 2 == 0 for pair in all_pairs(splits))
    assert {round(one.rating, 4) for one in splits.rated} == {2.3333, 3.6667}
    assert splits.left_out["repeated ratings of one text, averaged"] == 120
    with_prompt = [
        {"prompt": f"q{n // 2}", "text": f"answer {n}", "rating": rating}
        for n in range(60)
        for rating in ((5, 1, 1) if n % 2 else (1, 5, 5))
    ]
    assert all(int(p.chosen.split()[-1]) % 2 == 0 for p in all_pairs(load(with_prompt)))


def test_equal_answers_are_left_out_and_counted(load: Load) -> None:
    rows = [
        {"prompt": f"q{n}", "chosen": "yes", "rejected": "yes" if n < 4 else "no"}
        for n in range(14)
    ]
    splits = load(rows)
    assert len(all_pairs(splits)) == 10
    assert splits.left_out == {"pairs of equal answers": 4}


def test_content_in_parts_and_calls_of_tools_are_kept(load: Load) -> None:
    call = [{"function": {"name": "add", "arguments": {"a": 1}}}]
    rows = [
        {
            "chosen": [
                {"role": "user", "content": [{"type": "text", "text": f"add {n}"}]},
                {"role": "assistant", "content": None, "tool_calls": call},
                {"role": "tool", "content": "2"},
                {"role": "assistant", "content": "two"},
            ],
            "rejected": talk(f"user: add {n}", "assistant: five"),
        }
        for n in range(10)
    ]
    prompt, chosen = all_pairs(load(rows))[0].texts[0]
    assert [turn.role for turn in (*prompt, *chosen)] == ["user", "assistant", "tool", "assistant"]
    assert prompt[0].content.startswith("add ")
    assert json.loads(chosen[0].more)["tool_calls"][0]["function"]["name"] == "add"
    assert '"add"' in plain(chosen)


GOOD = {"chosen": talk("user: q", "assistant: a"), "rejected": talk("user: q", "assistant: b")}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [GOOD, {**GOOD, "rejected": talk("user: other", "assistant: b")}],
            "row 1: chosen and rejected answer different prompts; their turn 1 is",
        ),
        (
            [
                {
                    "chosen": "\n\nHuman: q\n\nAssistant: a",
                    "rejected": "\n\nHuman: p\n\nAssistant: b",
                }
            ],
            "row 0: chosen and rejected answer different prompts",
        ),
        (
            [{"prompt": "something else", **GOOD}],
            "row 0: the conversation begins with another prompt, 'q', than the prompt's column",
        ),
        (
            [{**GOOD, "chosen": talk("user: q", "assistant: a", "user: more")}],
            "row 0: a conversation in column chosen has no assistant turn at its end",
        ),
        (
            [{"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "nothing of the kind"}],
            "row 0: one of chosen and rejected is a conversation, the other is not",
        ),
        (
            [
                {"chosen": "x", "rejected": "y"},
                {
                    "chosen": "\n\nHuman: q\n\nAssistant: a",
                    "rejected": "\n\nHuman: q\n\nAssistant: b",
                },
            ],
            "row 1 holds conversations, and the rows before it texts",
        ),
        (
            [{**GOOD, "chosen": [{"role": "user", "content": [{"type": "image", "url": "x"}]}]}],
            "row 0, column chosen: message 1 (user) has a content part of type image",
        ),
    ],
)
def test_a_row_that_is_no_pair_is_refused_by_its_number(
    rows: Rows, message: str, load: Load
) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        load(rows)
