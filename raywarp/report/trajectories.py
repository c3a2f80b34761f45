"""The paths of the policies through the plane of KL and reward while they trained."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from raywarp.report.series import Curve, four_digits, number, trajectory

_VALUES = ("kl", "reward", "step", "kl_ci", "reward_ci", "control", "control_ci")


def trajectories(found: Sequence[Curve], rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return a path for each policy: its measurements on held-out prompts, if there are any.

    Without measurements, the path is made of means over training prompts.

    Args:
        found: the learning curves.
        rows: of trajectory.jsonl.

    Returns:
        rows with iteration, policy, held_out, and points. A point is [KL to SFT, reward, step]. On
        held-out prompts step is the number of finished steps, and the intervals of both follow,
        then the control score with its interval (NaN without one).
    """
    paths = {(curve.iteration, curve.policy): trajectory(curve) for curve in found}
    measured: dict[tuple[int, int], list[list[float]]] = {}
    for row in sorted(rows, key=lambda row: number(row.get("step"))):
        name = (row.get("iteration"), row.get("policy"))
        point = [number(row.get(value)) for value in _VALUES]
        if all(type(part) is int for part in name) and all(map(math.isfinite, point[:3])):
            measured.setdefault(name, []).append([four_digits(value) for value in point])  # type: ignore[arg-type]
    return [
        {"iteration": name[0], "policy": name[1], "held_out": name in measured, "points": points}
        for name, points in sorted((paths | measured).items())
    ]
