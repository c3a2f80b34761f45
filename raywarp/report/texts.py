"""The texts of a run for the report page: few enough to keep the page small, and those that changed
most rather than others.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

from raywarp.report.files import RunFiles
from raywarp.report.page_json import plain, to_json
from raywarp.report.series import Curve, four_digits, number
from raywarp.run.front import Point

CLIPPED = 4000  # characters of one text
# bytes of the texts of all points together, before they are packed to a third or half
ALL = 4_000_000
TRAINING_ROWS = 600  # of all policies together
TRAINING_CLIPPED = 600
_VALUES = ("rewards", "kl", "control")


def sample_texts(
    rows: Any, points: Sequence[Point], chosen: str | None, share: float = 1.0
) -> dict[str, Any] | None:
    """samples.json: per prompt each point's completion, with its reward, KL and control score, and
    how much of it is not SFT's.

    Args:
        share: of the page that is there for it.

    Returns:
        points: names; rows: prompt, and texts and values in the order of the points, None where
            there is none; changed: characters by which
        the chosen text departs from SFT's; total: rows there were, of which those that changed most
        are kept where all would be too many; None where there are no texts.
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
    """Characters of the longer text that the two do not share at their beginnings and ends."""
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
    """The rows that changed most, as many as fit, in their old order."""
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
    """What each policy wrote while it trained: a text per step, of which some, evenly over the
    steps.
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
