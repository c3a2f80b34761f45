"""Who of a run's actors was busy when: shares of equal slices of time, however long the run; what
it stood still is cut out.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

SLICES = 240
# seconds without any work that count as standing still, and at least this share of the rest:
PAUSE = 60.0
PAUSE_SHARE = 0.05

Spans = NDArray[np.float64]  # (N, 2): start and end in Unix seconds, in order, without overlaps


def timeline(
    rows: Iterable[Mapping[str, Any]], moments: Sequence[float | None] = ()
) -> dict[str, Any] | None:
    """From the `spans` of metrics.jsonl's rows; None where there are none.

    Args:
        moments: Unix seconds of events, as far as they are known.

    Returns:
        starts: Unix seconds of each slice; seconds: length of one; lanes: actor → busy share of
            each slice; pauses: slices before which
        time was cut out, with its seconds; iterations: the slice where each begins, and that where
        the evaluation does; moments: slice of each event, None where it is in no slice.
    """
    lanes, begins = _lanes(rows)
    if not lanes:
        return None
    pieces = _pieces(np.concatenate(list(lanes.values())))
    lengths = pieces[:, 1] - pieces[:, 0]
    before = np.concatenate([[0.0], np.cumsum(lengths)])
    edges = np.linspace(0, before[-1], SLICES + 1)
    width = max(float(edges[1]), 1e-9)

    def active(times: Any) -> Any:
        """Seconds of active time before a moment."""
        return np.interp(times, pieces.ravel(), np.stack([before[:-1], before[1:]], axis=1).ravel())

    def slice_of(moment: float) -> int:
        return int(min(active(moment) / width, SLICES - 1))

    index = np.clip(np.searchsorted(before, edges[:-1], side="right") - 1, 0, len(pieces) - 1)
    first, last = pieces[0, 0] - PAUSE, pieces[-1, 1] + PAUSE
    return {
        "starts": [
            round(float(start), 1) for start in pieces[index, 0] + edges[:-1] - before[index]
        ],
        "seconds": width,
        "lanes": {
            name: _shares(active(spans), edges)
            for name, spans in sorted(lanes.items(), key=lambda lane: _rank(lane[0]))
        },
        "pauses": [[slice_of(float(b[0])), float(b[0] - a[1])] for a, b in pairwise(pieces)],
        "iterations": {
            stage: slice_of(start)
            for stage, start in sorted(begins.items(), key=lambda item: item[1])
        },
        "moments": [
            slice_of(moment) if moment is not None and first <= moment <= last else None
            for moment in moments
        ],
    }


def _lanes(rows: Iterable[Mapping[str, Any]]) -> tuple[dict[str, Spans], dict[str, float]]:
    """Each actor's spans, and when each iteration began, and the evaluation."""
    found: dict[str, list[Any]] = {}
    begins: dict[str, float] = {}
    for row in rows:
        spans = row.get("spans")
        if not isinstance(spans, Mapping):
            continue
        for name, own in spans.items():
            found.setdefault(str(name), []).extend(own)
        first = min(start for own in spans.values() for start, _ in own)
        stage = str(row["iteration"])
        begins[stage] = min(first, begins.get(stage, first))
    arrays = {name: np.array(own, dtype=float).reshape(-1, 2) for name, own in found.items() if own}
    return {name: _merged(spans[np.argsort(spans[:, 0])]) for name, spans in arrays.items()}, begins


def _merged(spans: Spans, gap: float = 0.0) -> Spans:
    """Spans in order of their starts, those that overlap or lie no more than `gap` apart as one."""
    ends = np.maximum.accumulate(spans[:, 1])
    new = np.concatenate([[True], spans[1:, 0] > ends[:-1] + gap])
    last = np.concatenate([np.flatnonzero(new)[1:] - 1, [len(spans) - 1]])
    return np.stack([spans[new, 0], ends[last]], axis=1)


def _pieces(spans: Spans) -> Spans:
    """The stretches of time in which the run was under way."""
    ordered = spans[np.argsort(spans[:, 0])]
    busy = _merged(ordered)
    return _merged(ordered, max(PAUSE, PAUSE_SHARE * float((busy[:, 1] - busy[:, 0]).sum())))


def _shares(spans: Spans, edges: NDArray[np.float64]) -> list[float]:
    """Busy share of each slice; spans and edges in seconds of active time."""
    done = np.concatenate([[0.0], np.cumsum(spans[:, 1] - spans[:, 0])])
    times, busy = spans.ravel(), np.stack([done[:-1], done[1:]], axis=1).ravel()
    shares = np.diff(np.interp(edges, times, busy)) / max(float(edges[1]), 1e-9)
    return [round(float(share), 3) for share in np.clip(shares, 0, 1)]


def _rank(name: str) -> tuple[int, str, int]:
    kinds = ("policy actor", "rollout worker", "reward worker", "control worker")
    kind, _, digits = name.rpartition(" ") if name[-1:].isdigit() else (name, "", "0")
    return (kinds.index(kind) if kind in kinds else len(kinds), kind, int(digits or 0))
