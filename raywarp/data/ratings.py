"""Rated texts: read from rows, averaged, split, and paired where their ratings differ.

Answers to a prompt are compared with other answers to the same prompt alone.
"""

import math
import random
import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

from raywarp.config.schema import ConfigError
from raywarp.data.embedded import Snippet
from raywarp.data.pairs import Preference, PreferenceSplits, Rated, of_turns, shuffled
from raywarp.data.text import text_key
from raywarp.data.turns import (
    Part,
    Turn,
    asked,
    is_conversation,
    plain,
    read_messages,
)
from raywarp.identity import derive_seed

TRAIN_PAIRS, TEST_PAIRS = 20_000, 4_000  # of texts without a prompt
PAIRINGS = 16  # the most other texts that each rated text is compared with
TIES = "pairs of ratings that differ by less than preferences.margin"
TWICE = "repeated ratings of one text, averaged"


def read_rated(
    rows: Iterable[Mapping[str, Any]], text: str, rating: str, prompt: str | None
) -> list[Rated]:
    """Return each row's rated text.

    Args:
        text, rating, prompt: the columns.

    Raises:
        ConfigError: a row holds something else. The message names the row.
    """
    found: list[Rated] = []
    for number, row in enumerate(rows):
        one = _rated(row[text], row[rating], row[prompt] if prompt else "", number, (text, prompt))
        if found and (one.turns is None) != (found[0].turns is None):
            raise ConfigError(
                f"preferences: row {number}: texts and conversations must not be mixed; row 0 is"
                f" {'a text' if found[0].turns is None else 'a conversation'}"
            )
        found.append(one)
    return found


def _rated(text: Any, rating: Any, prompt: Any, row: int, columns: tuple[str, str | None]) -> Rated:
    where = f"preferences: row {row}, column"
    if (
        isinstance(rating, bool)
        or not isinstance(rating, int | float)
        or not math.isfinite(rating)
        or not isinstance(text, str | list)
    ):
        raise ConfigError(
            f"preferences: row {row}: a rated row needs a text and a number, found"
            f" {str(text)[:60]!r} and {rating!r}"
        )
    before: Part = prompt
    if not isinstance(prompt, str):
        before = read_messages(prompt or [], f"{where} {columns[1]}")
    if isinstance(text, str) and (not before or not is_conversation(before)):
        return Rated(text, float(rating), before if isinstance(before, str) else "", row=row)
    said = read_messages(text, f"{where} {columns[0]}") if isinstance(text, list) else ()
    turns = (*asked(before, True), *(said or (Turn("assistant", str(text).strip()),)))
    if turns[-1].role != "assistant":
        raise ConfigError(f"{where} {columns[0]}: the last turn is not the assistant's")
    return Rated(turns[-1].content, float(rating), plain(turns[:-1]), (turns[:-1], turns[-1:]), row)


def averaged(rated: Iterable[Rated]) -> tuple[list[Rated], int]:
    """Return one rating per text, the mean of its ratings, and how many were merged into others.

    Without a prompt, texts that differ only in case, spaces and punctuation are one.
    """
    same: dict[tuple[str, object], list[Rated]] = {}
    for one in rated:
        key = one.text if one.prompt else text_key(one.text)
        same.setdefault((one.prompt, (key, one.turns) if one.prompt else key), []).append(one)
    unique = [_with_rating(own) for own in same.values()]
    return unique, sum(map(len, same.values())) - len(unique)


def _with_rating(same: Sequence[Rated]) -> Rated:
    first = same[0]
    mean = statistics.fmean(one.rating for one in same)
    return Rated(first.text, mean, first.prompt, first.turns, first.row)


def split_rated(
    rated: Sequence[Rated], fraction: float, seed: int, held_out: Sequence[Rated] = ()
) -> tuple[list[Rated], list[Rated], list[Rated]]:
    """Split rated texts into train, validation and test; a prompt's answers stay together.

    Args:
        held_out: texts of a split of their own, which validation and test are then taken from.
    """
    groups = _grouped(rated)
    if held_out:
        others = _grouped(held_out)
        order = [others[key] for key in shuffled(others, derive_seed(seed, "rated"))]
        own = [groups[key] for key in shuffled(groups.keys() - others, derive_seed(seed, "rated"))]
        count = len(order) // 2
        return _flat(own), _flat(order[:count]), _flat(order[count:])
    order = [groups[key] for key in shuffled(groups, derive_seed(seed, "rated"))]
    count = round(len(order) * fraction)
    return _flat(order[2 * count :]), _flat(order[:count]), _flat(order[count : 2 * count])


def _grouped(rated: Iterable[Rated]) -> dict[str, list[Rated]]:
    groups: dict[str, list[Rated]] = {}
    for one in rated:
        key = f"prompt:{one.prompt}" if one.prompt else text_key(one.text)
        groups.setdefault(key, []).append(one)
    return groups


def _flat(groups: Iterable[list[Rated]]) -> list[Rated]:
    return [one for group in groups for one in group]


def pair_splits(
    parts: Sequence[Sequence[Snippet]], margin: float, seed: int, left_out: Mapping[str, int]
) -> PreferenceSplits:
    """Pair the rated texts of train, validation and test.

    Texts without a prompt are paired at random: about 20,000 pairs for training and 4,000 each for
    validation and test. Answers to one prompt give every pair among them.

    Args:
        left_out: what was left out before.
    """
    limits, found, ties = (TRAIN_PAIRS, TEST_PAIRS, TEST_PAIRS), [], Counter(left_out)
    prompted = any(isinstance(one, Rated) and one.prompt for part in parts for one in part)
    for n, (part, limit) in enumerate(zip(parts, limits, strict=True)):
        own = derive_seed(seed, "pairs", n)
        pairs, tied = (
            _pair_within(part, margin, own) if prompted else _pair_rated(part, margin, limit, own)
        )
        found.append(pairs)
        ties[TIES] += tied
    train, validation, test = found
    rated = [] if prompted else list(parts[0])
    return PreferenceSplits(train, validation, test, rated, +ties)


def _pair_rated(
    rated: Sequence[Snippet], margin: float, limit: int, seed: int
) -> tuple[list[Preference], int]:
    """Return distinct pairs of texts whose ratings differ by the margin, and how many are closer.

    Pairs are neighbours in random orders, so that all texts occur about equally often.
    """
    generator, order, pairs, ties = random.Random(seed), list(rated), dict[Preference, None](), 0
    for _ in range(PAIRINGS):
        generator.shuffle(order)
        for one, other in zip(order[::2], order[1::2], strict=False):
            low, high = sorted((one, other), key=lambda snippet: snippet.rating)
            if high.rating - low.rating < margin:
                ties += 1
            elif len(pairs) < limit:
                pairs[Preference(high.text, low.text, margin=high.rating - low.rating)] = None
    return list(pairs), ties


def _pair_within(
    rated: Sequence[Snippet], margin: float, seed: int
) -> tuple[list[Preference], int]:
    """Return the pairs of answers to one prompt, and how many are closer than the margin."""
    pairs, ties = [], 0
    groups: dict[str, list[Rated]] = {}
    for one in rated:
        if isinstance(one, Rated):
            groups.setdefault(one.prompt, []).append(one)
    for group in groups.values():
        for one, other in _couples(group, derive_seed(seed, group[0].prompt)):
            low, high = sorted((one, other), key=lambda answer: answer.rating)
            if high.rating - low.rating < margin:
                ties += 1
            else:
                pairs.append(_preference(high, low))
    return pairs, ties


def _couples(group: Sequence[Rated], seed: int) -> Iterator[tuple[Rated, Rated]]:
    """Yield every pair of a group; of a large one, so many that each member has about PAIRINGS."""
    if len(group) <= PAIRINGS + 1:
        yield from combinations(group, 2)
        return
    generator, order, places = random.Random(seed), list(range(len(group))), set()
    for _ in range(PAIRINGS):
        generator.shuffle(order)
        places |= {(min(p), max(p)) for p in zip(order[::2], order[1::2], strict=False)}
    yield from ((group[i], group[j]) for i, j in sorted(places))


def _preference(high: Rated, low: Rated) -> Preference:
    margin = high.rating - low.rating
    if high.turns is None or low.turns is None:
        return Preference(high.text, low.text, high.prompt, None, margin, high.row)
    return of_turns(high.turns[0], high.turns[1], low.turns[1], margin, high.row)
