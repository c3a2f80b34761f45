"""Pareto fronts of KL and reward, or of several rewards, and their hypervolumes.

More reward and less KL (nats) are better.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

KlReward = tuple[float, float]


def dominates(a: KlReward, b: KlReward) -> bool:
    """Return whether a is at least as good as b in both KL and reward, and better in one."""
    return a != b and a[0] <= b[0] and a[1] >= b[1]


def pareto(points: Sequence[KlReward]) -> list[int]:
    """Return the indices of the points that no other dominates, by rising KL.

    Points that are equal are all included.
    """
    best = [
        n for n, point in enumerate(points) if not any(dominates(other, point) for other in points)
    ]
    return sorted(best, key=lambda n: points[n])


def hypervolume(points: Sequence[KlReward], reference: KlReward) -> float:
    """Return the area (nats × reward) that the points dominate, left of and above a reference.

    Args:
        points: (KL, reward) of each. Points beyond the reference in either count nothing.
        reference: the largest KL and the least reward that count.

    Returns:
        The area of the union of the rectangles [kl, reference KL] × [reference reward, reward] over
            the points; 0 without points.
    """
    return dominated_volume([(-kl, reward) for kl, reward in points], (-reference[0], reference[1]))


def dominated_volume(points: Sequence[Sequence[float]], reference: Sequence[float]) -> float:
    """Return the volume of the union of the boxes between a reference and the points.

    More is better in each of the R numbers of a point. The volume is a sum of slabs, from the
    largest last number down, of which each is a volume in R − 1 numbers.

    Args:
        points: (N, R). Points that are not above the reference in every number count nothing.
        reference: (R,).
    """
    inside = [
        point for point in points if all(p > r for p, r in zip(point, reference, strict=True))
    ]
    if not reference:
        return 1.0 if points else 0.0
    return _volume_above(inside, reference)


def _volume_above(points: Sequence[Sequence[float]], reference: Sequence[float]) -> float:
    """Return the volume between a reference and points that are above it in all numbers, R ≥ 1."""
    *rest, last = reference
    if not rest:
        return max((point[0] - last for point in points), default=0.0)
    by_last = sorted(points, key=lambda point: point[-1], reverse=True)
    slabs, best = list[float](), list[Sequence[float]]()
    for point, below in pairwise([*by_last, reference]):
        best = _with(best, point[:-1])
        if point[-1] > below[-1]:
            slabs.append((point[-1] - below[-1]) * _volume_above(best, rest))
    return math.fsum(slabs)


def _with(points: Sequence[Sequence[float]], new: Sequence[float]) -> list[Sequence[float]]:
    """Return points of which none is at least as good as another, and a new one, likewise."""
    if any(_at_least(point, new) for point in points):
        return list(points)
    return [*(point for point in points if not _at_least(new, point)), new]


def _at_least(a: Sequence[float], b: Sequence[float]) -> bool:
    return all(p >= q for p, q in zip(a, b, strict=True))


def simplex(corners: int, steps: int) -> list[tuple[float, ...]]:
    """Return all weights that are multiples of 1/steps, at least 0, and sum to 1.

    The first has all weight on the first corner, the last on the last.
    """
    return [tuple(n / steps for n in counts) for counts in _compositions(corners, steps)]


def _compositions(parts: int, total: int) -> list[tuple[int, ...]]:
    if parts == 1:
        return [(total,)]
    return [
        (first, *rest)
        for first in range(total, -1, -1)
        for rest in _compositions(parts - 1, total - first)
    ]
