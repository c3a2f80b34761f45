"""The Pareto front in the KL–reward plane, and its hypervolume.

More reward and less KL (nats) are better.
"""

from collections.abc import Sequence

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
    area, height = 0.0, reference[1]
    inside = sorted(
        ((kl, reward) for kl, reward in points if kl <= reference[0]),
        key=lambda point: (point[0], -point[1]),
    )
    for kl, reward in inside:
        if reward > height:
            area += (reference[0] - kl) * (reward - height)
            height = reward
    return area
