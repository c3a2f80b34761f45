"""Which prompts are trained on and measured, and in what order: splits, samples and shares.

Prompts are positions here: numbers of rows, of several datasets one after another. Rows of one
prompt form a group, which is in one split as a whole.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from raywarp.identity import derive_seed

Numbers = NDArray[np.int64]
MOST_DRAWS = 1_000_000  # of an epoch of several datasets, or twice their prompts if that is more


@dataclass(frozen=True)
class Split:
    """The prompts of one dataset, or of several.

    Attributes:
        train, held_out: see raywarp.data.prompt_set.table.PromptSplits.
        sampled: likewise.
    """

    train: Numbers
    held_out: Numbers
    sampled: Numbers


@dataclass(frozen=True)
class Grouped:
    """Rows of a dataset by the prompt that they share.

    Attributes:
        rows: (N,) positions, in the dataset's order.
        number: (N,) which prompt each has, counted in the order of their first rows.
        copy: (N,) how many earlier rows have the same prompt.
    """

    rows: Numbers
    number: Numbers
    copy: Numbers

    @classmethod
    def of(cls, rows: Numbers, groups: Numbers) -> "Grouped":
        """Return these rows, grouped by `groups`, which has an entry for every position."""
        _, first, inverse = np.unique(groups[rows], return_index=True, return_inverse=True)
        number = np.argsort(np.argsort(first))[inverse]
        by_number = np.argsort(number, kind="stable")
        counts = np.bincount(number)
        starts = np.repeat(np.cumsum(counts) - counts, counts)
        copy = np.empty_like(number)
        copy[by_number] = np.arange(len(number)) - starts
        return cls(rows, number, copy)

    def places(self, seed: int | None) -> Numbers:
        """Return each row's place among the prompts in a random order; seed None: their own."""
        order = list(range(int(self.number.max(initial=-1)) + 1))
        if seed is not None:
            random.Random(seed).shuffle(order)
        places = np.empty(len(order), np.int64)
        places[order] = np.arange(len(order))
        found: Numbers = places[self.number]
        return found

    def spread(self, places: Numbers) -> Numbers:
        """Return the rows so that all prompts come once before one comes again."""
        found: Numbers = self.rows[np.lexsort((places, self.copy))]
        return found

    def together(self, places: Numbers) -> Numbers:
        """Return the rows so that those of a prompt stand next to each other."""
        found: Numbers = self.rows[np.lexsort((self.copy, places))]
        return found


def distinct(rows: Numbers, same: Numbers) -> Numbers:
    """Return the first row of each of `same`, which has an entry for every position."""
    return rows[np.sort(np.unique(same[rows], return_index=True)[1])]


def held_back(own: Grouped, share: float, seed: int) -> Split:
    """Keep back a share of a dataset's prompts for evaluation."""
    places = own.places(seed)
    count = max(1, round(int(places.max(initial=-1) + 1) * share))
    held = np.sort(own.rows[places < count])
    together, spread = own.together(places), own.spread(places)
    is_held = np.isin(spread, held)
    return Split(together[~np.isin(together, held)], spread[is_held], spread[~is_held])


def of_two(train: Grouped, held_out: Grouped, seeds: tuple[int, int] | None) -> Split:
    """Return two splits as they are, with random orders for samples of both.

    Args:
        seeds: of the orders; None: both splits are in a random order.
    """
    first, second = seeds or (None, None)
    return Split(
        train.rows, held_out.spread(held_out.places(first)), train.spread(train.places(second))
    )


def without_evaluated(split: Split, groups: Numbers, evaluated: Numbers) -> Split:
    """Return a split without the training prompts that are evaluated anywhere."""

    def left(rows: Numbers) -> Numbers:
        return rows[~np.isin(groups[rows], evaluated)]

    return Split(left(split.train), split.held_out, left(split.sampled))


def mixed(splits: Sequence[Split], weights: Sequence[float]) -> Split:
    """Return several datasets' prompts as one, with shares by weight.

    An epoch of training has every prompt of a dataset equally often, or almost. Of the held-out
    prompts and the sample, the first ones have the shares, as long as a dataset lasts.
    """
    if len(splits) == 1:
        return splits[0]
    return Split(
        np.concatenate(_repeated(splits, weights)),
        _by_share([split.held_out for split in splits], weights),
        _by_share([split.sampled for split in splits], weights),
    )


def _repeated(splits: Sequence[Split], weights: Sequence[float]) -> list[Numbers]:
    total, sizes = sum(weights), [len(split.train) for split in splits]
    whole = max(size * total / weight for size, weight in zip(sizes, weights, strict=True))
    draws = min(whole, max(MOST_DRAWS, 2 * sum(sizes)))
    found = []
    for split, weight in zip(splits, weights, strict=True):
        count = round(draws * weight / total)
        times, rest = divmod(count, len(split.train)) if len(split.train) else (0, 0)
        found.append(np.concatenate([np.tile(split.train, times), split.sampled[:rest]]))
    return found


def _by_share(orders: Sequence[Numbers], weights: Sequence[float]) -> Numbers:
    places = [(np.arange(len(o)) + 0.5) / weight for o, weight in zip(orders, weights, strict=True)]
    return np.concatenate(orders)[np.argsort(np.concatenate(places), kind="stable")]


def seed_of(seed: int, number: int, name: str) -> int:
    """Return a seed by its use; that of the first dataset is that of a single one."""
    return derive_seed(seed, name, *([number] if number else []))
