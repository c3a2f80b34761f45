"""Tests of the texts that show what a policy keeps: the embedded ones and a user's."""

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_run import make_project, tiny_config
from transformers import AutoTokenizer

from raywarp.config.load import parse_config
from raywarp.config.schema import ConfigError
from raywarp.data import embedded
from raywarp.data.retention_texts import load_texts, retention_dataset
from raywarp.planning.inputs import prepare
from raywarp.run.keys import front_key, key_chain


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_the_editorials_are_the_published_ones() -> None:
    texts = embedded.editorials()
    assert len(texts) == 498
    assert texts[2].startswith("Have countries threatened with retaliatory tariffs under the new")
    assert "We can call them negotiations. They can call them a banana" in texts[2]
    assert all(text == " ".join(text.split()) and len(text) > 20 for text in texts)


def test_only_embedded_prompts_have_embedded_texts_by_default() -> None:
    assert retention_dataset(parse_config({})) == "embedded:editorials"
    assert retention_dataset(parse_config({"prompts": {"dataset": "me/prompts"}})) is None
    own = parse_config({"retention": {"dataset": "me/texts"}})
    assert retention_dataset(own) == "me/texts"


def test_texts_are_the_first_of_two_tokens_cut(tiny_llama: Path, tmp_path: Path) -> None:
    """A BOS stands before each, counts, and alone is no text."""
    rows = [{"body": text} for text in ("", None, "good", "a film is great", "the plot")]
    path = write(tmp_path / "texts.jsonl", rows)
    section = {"dataset": path, "column": "body", "texts": 2, "max_tokens": 4}
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    texts = load_texts(parse_config({"retention": section}), path, tokenizer, 512)
    assert texts == [
        tuple(tokenizer("good").input_ids),
        tuple(tokenizer("a film is great").input_ids[:4]),
    ]
    assert [len(text) for text in texts] == [2, 4]


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"column": "body"}, r"retention\.column=body: the dataset's columns are text, number"),
        ({"column": "number"}, r"retention\.column=number holds a int; it must hold texts"),
        ({"split": "test"}, r"cannot load split 'test'"),
        ({"dataset": "missing.jsonl"}, r"dataset missing\.jsonl does not exist"),
        ({"dataset": "embedded:tweets"}, r"there is embedded:editorials"),
        ({"max_tokens": 1000}, r"more than the model's context of 512 tokens"),
        ({"dataset": "empty"}, r"has no text of two tokens or more in its column text"),
        ({"dataset": "broken"}, r"cannot load split 'train'"),
    ],
)
def test_unusable_texts_are_refused_before_anything_starts(
    tiny_llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    no_ray: None,
    section: dict[str, Any],
    message: str,
) -> None:
    monkeypatch.chdir(make_project(tmp_path))
    monkeypatch.syspath_prepend(tmp_path)
    places = {
        "given": write(tmp_path / "texts.jsonl", [{"text": "good film", "number": 1}]),
        "empty": write(tmp_path / "empty.jsonl", [{"text": ""}, {"text": " "}]),
        "broken": str(tmp_path / "broken.parquet"),
    }
    Path(places["broken"]).write_text("no parquet")
    name = section.get("dataset", "given")
    own = {**section, "dataset": places.get(name, name)}
    with pytest.raises(ConfigError, match=message):
        prepare(tiny_config(tmp_path, tiny_llama, tmp_path / "run", retention=own))


def test_texts_belong_to_the_front_and_to_no_policy(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(make_project(tmp_path))
    monkeypatch.syspath_prepend(tmp_path)
    path = write(tmp_path / "texts.jsonl", [{"text": "good film"}, {"text": "a bad plot"}])
    fronts, chains = [], []
    sections: list[dict[str, Any]] = [{}, {"dataset": path}, {"dataset": path, "texts": 1}]
    for section in sections:
        config = tiny_config(tmp_path, tiny_llama, tmp_path / "run", retention=section)
        inputs = prepare(config)
        chains.append(key_chain(config, inputs.fingerprints()))
        fronts.append(front_key(config, inputs.front, ["key"]))
    assert chains[0] == chains[1] == chains[2]
    assert len(set(fronts)) == 3
    assert inputs.texts == [tuple(AutoTokenizer.from_pretrained(tiny_llama)("good film").input_ids)]
