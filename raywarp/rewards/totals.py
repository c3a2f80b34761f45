"""The total of several rewards. NaN stands for a completion that a reward does not apply to."""

import math
from collections.abc import Iterable, Mapping, Sequence


def total(weights: Sequence[float], parts: Sequence[Sequence[float]]) -> list[float]:
    """Return Σ w_k · s_k for each completion, NaN where no reward with a weight applies.

    Where a reward does not apply, its term is dropped, and the others' weights are scaled so that
    the sum of their sizes stays the same.

    Args:
        weights: K numbers.
        parts: K lists of N standardised scores.
    """
    return [_sum(weights, scores) for scores in zip(*parts, strict=True)]


def _sum(weights: Sequence[float], scores: Sequence[float]) -> float:
    there = [(w, s) for w, s in zip(weights, scores, strict=True) if not math.isnan(s)]
    if not any(w for w, _ in there):
        return math.nan
    found = sum(w * s for w, s in there if w)
    if len(there) == len(scores):
        return found
    return found * sum(map(abs, weights)) / sum(abs(w) for w, _ in there)


def present(scores: Iterable[float]) -> list[float]:
    """Return the scores that there are."""
    return [score for score in scores if not math.isnan(score)]


def means(parts: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Return the mean of each reward's scores, by `reward/NAME`, where it has any."""
    found = {name: present(scores) for name, scores in parts.items()}
    return {f"reward/{name}": sum(own) / len(own) for name, own in found.items() if own}
