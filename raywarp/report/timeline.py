"""The time line: which of a run's actors were busy, as shares of equal slices of time.

The number of slices does not depend on the length of the run. Time in which the run stood still is
cut out.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

SLICES = 240
# The run stood still where it had no work for longer than PAUSE seconds and this share of its work.
PAUSE = 60.0
PAUSE_SHARE = 0.05

Spans = NDArray[np.float64]  # (N, 2): start and end in Unix seconds, in order, without overlaps


def timeline(
    rows: Iterable[Mapping[str, Any]], moments: Sequence[float | None] = ()
) -> dict[str, Any] | None:
    """Return the time line of the `spans` in metrics.jsonl's rows, or None if there are none.

    Args:
        rows: rows of metrics.jsonl.
        moments: Unix seconds of events, or None where unknown.

    Returns:
        starts: Unix seconds of each slice's start.
        seconds: length of a slice.
        lanes: actor → busy share of each slice.
        pauses: (slice, seconds) of the time that was cut out before a slice.
        iterations: the slice where each iteration begins, and the one where the evaluation does.
        moments: the slice of each event; None if it is in no slice.
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
        """Return the seconds of active time before a moment."""
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
            iteration: slice_of(start)
            for iteration, start in sorted(begins.items(), key=lambda item: item[1])
        },
        "moments": [
            slice_of(moment) if moment is not None and first <= moment <= last else None
            for moment in moments
        ],
    }


def _lanes(rows: Iterable[Mapping[str, Any]]) -> tuple[dict[str, Spans], dict[str, float]]:
    """Return each actor's spans, and the start of each iteration and of the evaluation."""
    found: dict[str, list[Any]] = {}
    begins: dict[str, float] = {}
    for row in rows:
        spans = row.get("spans")
        if not isinstance(spans, Mapping):
            continue
        for name, own in spans.items():
            found.setdefault(str(name), []).extend(own)
        first = min(start for own in spans.values() for start, _ in own)
        iteration = str(row["iteration"])
        begins[iteration] = min(first, begins.get(iteration, first))
    arrays = {name: np.array(own, dtype=float).reshape(-1, 2) for name, own in found.items() if own}
    return {name: _merged(spans[np.argsort(spans[:, 0])]) for name, spans in arrays.items()}, begins


def _merged(spans: Spans, gap: float = 0.0) -> Spans:
    """Return the spans, with those merged that overlap or lie at most `gap` apart.

    Args:
        spans: in order of their starts.
        gap: in seconds.
    """
    ends = np.maximum.accumulate(spans[:, 1])
    new = np.concatenate([[True], spans[1:, 0] > ends[:-1] + gap])
    last = np.concatenate([np.flatnonzero(new)[1:] - 1, [len(spans) - 1]])
    return np.stack([spans[new, 0], ends[last]], axis=1)


def _pieces(spans: Spans) -> Spans:
    """Return the stretches of time in which the run was under way."""
    ordered = spans[np.argsort(spans[:, 0])]
    busy = _merged(ordered)
    return _merged(ordered, max(PAUSE, PAUSE_SHARE * float((busy[:, 1] - busy[:, 0]).sum())))


def _shares(spans: Spans, edges: NDArray[np.float64]) -> list[float]:
    """Return the busy share of each slice.

    Args:
        spans: in seconds of active time.
        edges: edges of the slices, in seconds of active time.
    """
    done = np.concatenate([[0.0], np.cumsum(spans[:, 1] - spans[:, 0])])
    times, busy = spans.ravel(), np.stack([done[:-1], done[1:]], axis=1).ravel()
    shares = np.diff(np.interp(edges, times, busy)) / max(float(edges[1]), 1e-9)
    return [round(float(share), 3) for share in np.clip(shares, 0, 1)]


def _rank(name: str) -> tuple[int, str, int]:
    kinds = ("policy actor", "rollout worker", "reward worker", "control worker")
    kind, _, digits = name.rpartition(" ") if name[-1:].isdigit() else (name, "", "0")
    return (kinds.index(kind) if kind in kinds else len(kinds), kind, int(digits or 0))
