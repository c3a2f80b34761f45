"""Preferences from any source that prompts.py reads: given pairs, or rated texts to be paired.

Everything random here is a function of the seed, and no text is in two splits.
"""

import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from raywarp.config.datasets import SNIPPETS, PreferencesConfig
from raywarp.config.schema import ConfigError
from raywarp.data import embedded
from raywarp.data.embedded import Snippet
from raywarp.data.prompts import load_rows
from raywarp.data.text import text_key
from raywarp.identity import derive_seed

TRAIN_PAIRS, TEST_PAIRS = 20_000, 4_000
PAIRINGS = 16  # the most other texts that each rated text is compared with


@dataclass(frozen=True)
class Preference:
    """A human preferred `chosen` to `rejected`; the prompt, if any, stands before both."""

    chosen: str
    rejected: str
    prompt: str = ""


@dataclass(frozen=True)
class PreferenceSplits:
    """Preferences for training, validation and test, disjoint by text.

    Attributes:
        rated: the texts that `train` was paired from, so that every pair in a batch of rated texts
            can be used. It is empty where the dataset holds pairs.
    """

    train: list[Preference]
    validation: list[Preference]
    test: list[Preference]
    rated: list[Snippet] = field(default_factory=list)


def load_preferences(config: PreferencesConfig, seed: int) -> PreferenceSplits:
    """Load preferences, from columns chosen/rejected or from rated texts.

    The columns hold strings or chat messages. Rated texts are paired where their ratings differ by
    the margin.

    Rated texts are split before they are paired: about 20,000 pairs for training, 4,000 each for
    validation and test, fewer where there are few texts. Given pairs are split so that no prompt is
    in two splits; without prompts, no text is.

    Raises:
        ConfigError: see load_rows; columns that are missing or of the wrong type, or nothing left
            in a split.
    """
    if config.dataset == SNIPPETS:
        parts = embedded.split_snippets(seed)
        splits = _pair_splits(
            (parts.reward_train, parts.reward_validation, parts.reward_test), config.margin, seed
        )
    else:
        rows = load_rows(config.dataset, config.name, config.split)
        columns = rows.column_names
        if config.prompt is not None and config.prompt not in columns:
            raise ConfigError(
                f"preferences.prompt={config.prompt}: the dataset's columns are"
                f" {', '.join(columns)}"
            )
        if {config.chosen, config.rejected} <= set(columns):
            pairs = [
                pair
                for pair in (_preference(row, config) for row in rows)
                if pair.chosen != pair.rejected
            ]
            splits = PreferenceSplits(*_split_pairs(pairs, config.held_out_fraction, seed))
        elif {config.text, config.rating} <= set(columns):
            splits = _pair_splits(_split_rated(rows, config, seed), config.margin, seed)
        else:
            wanted = f"{config.chosen} and {config.rejected}, or {config.text} and {config.rating}"
            raise ConfigError(
                f"preferences.dataset={config.dataset} needs columns {wanted}; it has"
                f" {', '.join(columns)}"
            )
    if not (splits.train and splits.validation and splits.test):
        sizes = (
            f"{len(splits.train)} for training, {len(splits.validation)} for validation,"
            f" {len(splits.test)} for the test"
        )
        raise ConfigError(
            f"preferences.dataset={config.dataset} gives too few preferences: {sizes}"
        )
    return splits


def _preference(row: dict[str, Any], config: PreferencesConfig) -> Preference:
    (before, chosen), (_, rejected) = (
        _turns(row[config.chosen], config.chosen),
        _turns(row[config.rejected], config.rejected),
    )
    prompt = before if config.prompt is None else _prompt_text(row[config.prompt], config.prompt)
    return Preference(chosen, rejected, prompt)


def _turns(value: Any, column: str) -> tuple[str, str]:
    """Return prompt and completion of a text (which has no prompt) or of chat messages.

    The prompt is the user's turns, the completion the assistant's last turn.
    """
    if isinstance(value, str):
        return "", value
    answers = [n for n, turn in enumerate(_messages(value, column)) if turn["role"] == "assistant"]
    if not answers:
        raise ConfigError(
            f"preferences: a conversation in column {column} has no assistant turn:"
            f" {str(value)[:100]}"
        )
    return _prompt_text(value[: answers[-1]], column), value[answers[-1]]["content"]


def _prompt_text(value: Any, column: str) -> str:
    return (
        value
        if isinstance(value, str)
        else "\n".join(
            turn["content"] for turn in _messages(value, column) if turn["role"] == "user"
        )
    )


def _messages(value: Any, column: str) -> list[dict[str, str]]:
    if isinstance(value, list) and all(
        isinstance(turn, dict) and isinstance(turn.get("content"), str) and "role" in turn
        for turn in value
    ):
        return value
    raise ConfigError(
        f"preferences: column {column} holds {str(value)[:60]}; it must hold texts or lists of role"
        " and content"
    )


def _split_pairs(
    pairs: Sequence[Preference], fraction: float, seed: int
) -> tuple[list[Preference], list[Preference], list[Preference]]:
    """Split pairs into train, validation and test.

    Pairs linked by a prompt, or without one by a text, stay together (union-find).
    """
    parent: dict[str, str] = {}

    def root(key: str) -> str:
        parent.setdefault(key, key)
        while parent[key] != key:
            parent[key] = key = parent[parent[key]]
        return key

    for pair in pairs:
        if not pair.prompt:
            parent[root(pair.chosen)] = root(pair.rejected)
    groups: dict[str, list[Preference]] = {}
    for pair in pairs:
        groups.setdefault(
            f"prompt:{pair.prompt}" if pair.prompt else f"text:{root(pair.chosen)}", []
        ).append(pair)
    parts: tuple[list[Preference], list[Preference], list[Preference]] = ([], [], [])
    for key in _shuffled(groups, derive_seed(seed, "preferences")):
        target = next((n for n in (2, 1) if len(parts[n]) < fraction * len(pairs)), 0)
        parts[target].extend(groups[key])
    return parts


def _shuffled(keys: Iterable[str], seed: int) -> list[str]:
    return random.Random(seed).sample(order := sorted(keys), len(order))


def _split_rated(
    rows: Iterable[dict[str, Any]], config: PreferencesConfig, seed: int
) -> tuple[list[Snippet], ...]:
    """Split rated texts into train, validation and test."""
    if config.prompt is not None:
        raise ConfigError(
            "preferences.prompt is for chosen/rejected columns; for rated data put the prompt into"
            " the text column"
        )
    rated: dict[str, Snippet] = {}
    for row in rows:
        text, rating = row[config.text], row[config.rating]
        if (
            not isinstance(text, str)
            or isinstance(rating, bool)
            or not isinstance(rating, int | float)
            or not math.isfinite(rating)
        ):
            raise ConfigError(
                f"preferences: a rated row needs a text and a number, found {str(text)[:60]!r} and"
                f" {rating!r}"
            )
        rated.setdefault(text_key(text), Snippet(text, float(rating)))
    order = [rated[key] for key in _shuffled(rated, derive_seed(seed, "rated"))]
    count = round(len(order) * config.held_out_fraction)
    return order[2 * count :], order[:count], order[count : 2 * count]


def _pair_splits(parts: Sequence[Sequence[Snippet]], margin: float, seed: int) -> PreferenceSplits:
    limits = (TRAIN_PAIRS, TEST_PAIRS, TEST_PAIRS)
    jobs = enumerate(zip(parts, limits, strict=True))
    train, validation, test = (
        _pair_rated(part, margin, limit, derive_seed(seed, "pairs", n)) for n, (part, limit) in jobs
    )
    return PreferenceSplits(train, validation, test, rated=list(parts[0]))


def _pair_rated(rated: Sequence[Snippet], margin: float, limit: int, seed: int) -> list[Preference]:
    """Return distinct pairs of texts whose ratings differ by the margin.

    Pairs are neighbours in random orders, so that all texts occur about equally often.
    """
    generator, order, pairs = random.Random(seed), list(rated), dict[Preference, None]()
    for _ in range(PAIRINGS):
        generator.shuffle(order)
        for one, other in zip(order[::2], order[1::2], strict=False):
            low, high = sorted((one, other), key=lambda snippet: snippet.rating)
            if high.rating - low.rating >= margin and len(pairs) < limit:
                pairs[Preference(high.text, low.text)] = None
    return list(pairs)
