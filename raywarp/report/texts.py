"""The texts of a run for the report page.

They are few enough to keep the page small. The texts that changed most are kept first.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

from raywarp.report.files import RunFiles
from raywarp.report.page_json import plain, to_json
from raywarp.report.series import Curve, four_digits, number
from raywarp.run.points import Point

CLIPPED = 4000  # characters of one text
# Bytes of all points' texts together, before compression to a third or half.
ALL = 4_000_000
TRAINING_ROWS = 600  # texts of all policies together
TRAINING_CLIPPED = 600  # characters of one training text
_VALUES = ("rewards", "kl", "control")


def sample_texts(
    rows: Any, points: Sequence[Point], chosen: str | None, share: float = 1.0
) -> dict[str, Any] | None:
    """Return the texts of the front for the page, or None if there are none.

    Args:
        rows: content of samples.json, or None.
        points: points of the front.
        chosen: name of the chosen point.
        share: share of the page's size that the texts may take, 0 to 1.

    Returns:
        points: names of the points.
        target: name of the point that is compared with SFT: the chosen one if possible.
        total: number of rows in samples.json.
        rows: one per prompt. If they are too many for the page, those that changed most are kept.
            Each has its place in samples.json and the prompt. Its texts, rewards, KL and control
            scores are in the order of the points, with None for what is absent. `changed` is the
            number of characters in which the target's text departs from SFT's.
    """
    if rows is None:
        return None
    names = [point.name for point in points] or [
        name for name in (rows[0] if rows else {}) if name not in ("prompt", *_VALUES)
    ]
    target = (
        chosen
        if chosen in names and chosen != "sft"
        else "slerp"
        if "slerp" in names
        else names[-1]
        if names
        else ""
    )
    found = []
    for place, row in enumerate(rows):
        texts = [clip(row[name], CLIPPED) if name in row else None for name in names]
        values = {
            name: [four_digits(number(row[name].get(point))) for point in names]
            for name in _VALUES
            if name in row
        }
        changed = departure(row.get("sft", ""), row.get(target, ""))
        found.append(
            {
                "place": place,
                "prompt": clip(row["prompt"], CLIPPED),
                "texts": texts,
                "changed": changed,
                **values,
            }
        )
    return {
        "points": names,
        "target": target,
        "total": len(found),
        "rows": _within(found, share * ALL),
    }


def departure(before: str, after: str) -> int:
    """Return how many characters of the longer text lie outside the shared beginning and end."""
    shortest = min(len(before), len(after))
    start = next((n for n in range(shortest) if before[n] != after[n]), shortest)
    end = next(
        (n for n in range(shortest - start) if before[-1 - n] != after[-1 - n]), shortest - start
    )
    return max(len(before), len(after)) - start - end


def clip(text: Any, limit: int) -> str:
    text = str(text)
    return text if len(text) <= limit else f"{text[:limit]} … ({len(text) - limit} more characters)"


def _within(rows: list[dict[str, Any]], limit: float) -> list[dict[str, Any]]:
    """Return the rows that changed most, as many as fit, in their old order."""
    kept: list[dict[str, Any]] = []
    size = 0
    for row in sorted(rows, key=lambda row: -row["changed"]):
        size += len(to_json(plain(row)).encode())
        if size > limit and kept:
            break
        kept.append(row)
    return sorted(kept, key=lambda row: row["place"])


def training_texts(
    files: RunFiles, found: Sequence[Curve], place: str | None, share: float = 1.0
) -> list[dict[str, Any]]:
    """Return texts that each policy wrote while it trained.

    A policy keeps one text per step. If they are too many, some are picked evenly over the steps.

    Args:
        files: the run's files.
        found: the learning curves, one per policy.
        place: the store of the policies, if it is not the run itself.
        share: share of the page's size that the texts may take, 0 to 1.
    """
    most = max(6, int(share * TRAINING_ROWS) // max(len(found), 1))
    result: list[dict[str, Any]] = []
    for curve in found:
        what = f"What policy {curve.policy} of iteration {curve.iteration} wrote"
        rows = files.section(
            what, partial(files.policy_samples, curve.key, place), list[dict[str, Any]]()
        )
        picked = (
            [rows[round(n * (len(rows) - 1) / max(most - 1, 1))] for n in range(most)]
            if len(rows) > most
            else rows
        )
        texts = [
            {
                "step": row["step"],
                "prompt": clip(row["prompt"], TRAINING_CLIPPED),
                "completion": clip(row["completion"], TRAINING_CLIPPED),
                "reward": number(row.get("reward")),
            }
            for row in picked
        ]
        if texts:
            result.append(
                {
                    "iteration": curve.iteration,
                    "policy": curve.policy,
                    "rows": texts,
                    "total": len(rows),
                }
            )
    return result
