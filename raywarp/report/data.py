"""The data of the report page for one run, as plain values.

The run may be finished, under way or broken: all that is there is shown.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from typing import Any

from raywarp.config.secrets import redact
from raywarp.report import settings
from raywarp.report.files import RunFiles
from raywarp.report.findings import Finding, findings, points_of
from raywarp.report.page_json import plain
from raywarp.report.series import Curve, curves, number, summary
from raywarp.report.texts import clip, sample_texts, training_texts
from raywarp.report.timeline import timeline
from raywarp.report.trajectories import trajectories
from raywarp.run.ceiling import Ceiling, ceiling_of, front_share
from raywarp.run.config_file import CONFIG_FILE
from raywarp.run.figures import share_cell
from raywarp.run.folder import FRONT_FILE, MERGE, read_mark
from raywarp.run.history import EVENTS_FILE, METRICS_FILE, TIMING_FILE
from raywarp.run.points import Point, point_json
from raywarp.run.policy_files import TRAJECTORY_FILE
from raywarp.run.sampler_mark import Mark
from raywarp.storage.location import Storage
from raywarp.storage.sealed import MANIFEST

# A run without an end may be dead after this many seconds without a step.
SILENT = 120.0
EVENTS, MESSAGE = 1000, 2000  # events kept, the newest; characters of each message

Rows = list[dict[str, Any]]


def report_data(place: str, share: float = 1.0) -> dict[str, Any]:
    """Return the page's data about one run (see assets/page.js).

    It holds only what JSON can hold; NaN and infinity become None.

    Args:
        place: a run's folder, or s3://bucket/prefix.
        share: share of the page's size that the run may take, 0 to 1.

    Raises:
        ConfigError: there is no run of raywarp.
        StoreError: the run cannot be read.
    """
    files = RunFiles(Storage(place))
    files.check()
    part = files.section
    config: dict[str, Any] = part("The configuration", lambda: files.config() or {}, {})
    rows, events = files.rows(METRICS_FILE), files.rows(EVENTS_FILE)[-EVENTS:]
    found = part("The learning curves", lambda: curves(rows), list[Curve]())
    tracked = files.rows(TRAJECTORY_FILE)
    front: dict[str, Any] = part("The front", lambda: files.record(FRONT_FILE) or {}, {})
    points = part("The front", lambda: points_of(front), list[Point]())
    ceiling = part("The ceiling", lambda: ceiling_of(front), None)
    geometry = part("Angles and norms", lambda: _geometry(files), Rows())
    moments = [_timestamp(event.get("time")) for event in events]
    times: Mapping[str, Any] = part(
        "Where the time went", lambda: files.record(TIMING_FILE) or {}, {}
    )
    timing: Rows = times.get("iterations", [])
    chosen, mark = (
        front.get("chosen"),
        part("Which sampler it had", lambda: read_mark(files.storage), None),
    )
    data = {
        "name": redact(files.storage.uri.partition("?")[0].rstrip("/").rpartition("/")[2]) or "run",
        "place": redact(files.storage.uri),
        "state": part(
            "Whether it is finished",
            lambda: _state(events, moments, rows, bool(points)),
            {"word": "unknown"},
        ),
        "mark": mark and mark.title,
        "planned": part("What was asked for", lambda: settings.planned(config), None),
        "front": (
            {
                **front,
                "points": [point_json(point) for point in points],
                "ceiling": part("The ceiling", lambda: _ceiling(points, ceiling, front), None),
            }
            if points
            else None
        ),
        "findings": part(
            "What to look at",
            lambda: [
                asdict(one)
                for one in [
                    *_earlier_sampler(mark),
                    *findings(
                        points, chosen, _gaps(rows), _last(geometry), _effects(rows), ceiling
                    ),
                ]
            ],
            Rows(),
        ),
        "trajectories": part("The trajectories", lambda: trajectories(found, tracked), Rows()),
        "curves": summary(found, share) if found else None,
        "geometry": geometry,
        "texts": part(
            "The texts of the front",
            lambda: sample_texts(
                files.json("samples.json", front.get("files", {}).get("samples.json")),
                points,
                chosen,
                share,
            ),
            None,
        ),
        "training_texts": part(
            "Texts of the training",
            lambda: training_texts(files, found, config.get("store"), share),
            Rows(),
        ),
    }
    history = _history(files, config, [*rows, *tracked], events, times)
    unfinished = part(
        "What is unfinished",
        lambda: _unfinished(files.missing, config, found, front, events, timing),
        list[str](),
    )
    shown: dict[str, Any] = plain({**data, **history, "missing": [*files.missing, *unfinished]})
    return shown


def _history(
    files: RunFiles, config: Mapping[str, Any], rows: Rows, events: Rows, times: Mapping[str, Any]
) -> dict[str, Any]:
    """Return what happened in the run, and with which settings and versions."""
    moments = [_timestamp(event.get("time")) for event in events]
    versions = (event.get("versions") for event in reversed(events))
    return {
        "timeline": files.section(
            "The time line", lambda: timeline([*rows, *_evaluation(times)], moments), None
        ),
        "timing": times.get("iterations", []),
        "events": [
            {**_event_row(event), "seconds": moment}
            for event, moment in zip(events, moments, strict=True)
        ],
        "config": files.section("The configuration", lambda: settings.rows(config), Rows()),
        "versions": next((found for found in versions if isinstance(found, Mapping)), None),
    }


def _ceiling(
    points: Sequence[Point], ceiling: Ceiling | None, front: Mapping[str, Any]
) -> dict[str, Any] | None:
    """Return the ceiling, with each point's share of it and a line on the whole front."""
    if ceiling is None:
        return None
    return {
        **ceiling.json(),
        "shares": {point.name: share_cell(point, ceiling) for point in points},
        "said": str(front_share(points, ceiling, number(front.get("share_kl")))),
    }


def _earlier_sampler(mark: Mark | None) -> list[Finding]:
    """Return the mark of an earlier sampler as the page's first finding, if there is one."""
    return [Finding(mark.level, mark.title, mark.text)] if mark else []


def _evaluation(times: Mapping[str, Any]) -> Rows:
    """Return which actors measured the front and when, as a row with spans."""
    return [{"iteration": "evaluation", **times["evaluation"]}] if "evaluation" in times else []


def _unfinished(
    missing: Sequence[str],
    config: Mapping[str, Any],
    found: Sequence[Curve],
    front: Mapping[str, Any],
    events: Rows,
    timing: Rows,
) -> list[str]:
    """Return sentences about what a finished run would have and this run lacks.

    Args:
        missing: sentences about files; what they mention is not repeated.
        config: the run's configuration; empty if unknown.
        found: the learning curves.
        front: content of front.json; empty if unknown.
        events: rows of events.jsonl.
        timing: a row per iteration of timing.json.
    """
    if front.get("adapters"):  # they were trained elsewhere
        return []
    said = " ".join(missing)
    lacking = []
    if not config and CONFIG_FILE not in said:
        lacking.append(f"{CONFIG_FILE} is missing: what was asked for is not known.")
    if not found and METRICS_FILE not in said:
        lacking.append(f"{METRICS_FILE} has no steps: there are no learning curves.")
    if not front and FRONT_FILE not in said:
        lacking.append(f"{FRONT_FILE} is missing: the front is measured after the last iteration.")
    if not events and EVENTS_FILE not in said:
        lacking.append(
            f"{EVENTS_FILE} is missing or empty: when the run began, what befell it and how it"
            " ended are not known."
        )
    if front and not timing and TIMING_FILE not in said:
        lacking.append(f"{TIMING_FILE} is missing: how busy the actors were is not known.")
    wanted = settings.policy_steps(config) if config else []
    iterations = settings.warp_of(config)["iterations"] if config else 0
    done = {(curve.iteration, curve.policy): int(curve.steps[-1]) + 1 for curve in found}
    for event in events:
        if event.get("event") == "ended":  # by a stop rule
            done[event.get("iteration", 0), event.get("policy", 0)] = max(wanted, default=0)
    for iteration in range(1, iterations + 1):
        steps = [done.get((iteration, policy), 0) for policy in range(1, len(wanted) + 1)]
        if any(own < most for own, most in zip(steps, wanted, strict=True)):
            told = wanted if len({*wanted}) > 1 else wanted[:1]
            lacking.append(
                f"Iteration {iteration}: {', '.join(map(str, steps))} of"
                f" {', '.join(map(str, told))} steps of its policies are done."
            )
    return lacking


def _state(
    events: Sequence[Mapping[str, Any]],
    moments: Sequence[float | None],
    rows: Sequence[Mapping[str, Any]],
    measured: bool,
) -> dict[str, Any]:
    """Return the state of the run, with its message and times as far as they are known.

    Its word is finished, running, silent (the run may have been killed), stopped, failed or
    unknown.
    """
    times = [moment for moment in moments if moment is not None]
    last_sign = max([*times, *(_end_of_step(row) for row in rows[-50:])], default=0.0)
    state = {
        "word": "unknown",
        "since": times[0] if times else None,
        "last_sign": last_sign or None,
        "message": "",
    }
    last = next(
        (
            event
            for event in reversed(events)
            if event.get("event") in ("started", "finished", "failed", "stopped")
        ),
        None,
    )
    if last is None:
        return {**state, "word": "finished"} if measured else state
    if last["event"] == "started":
        alive = datetime.now(UTC).timestamp() - last_sign < SILENT
        return {**state, "word": "running" if alive else "silent"}
    return {**state, "word": last["event"], "message": str(last.get("message", ""))}


def _end_of_step(row: Mapping[str, Any]) -> float:
    """Return when a step ended, in Unix seconds, or 0 if its row does not say."""
    spans = row.get("spans")
    if not isinstance(spans, Mapping):
        return 0.0
    return max((number(end) for own in spans.values() for _, end in own), default=0.0)


def _timestamp(time: Any) -> float | None:
    try:
        return datetime.fromisoformat(time).timestamp()
    except (TypeError, ValueError):
        return None


def _geometry(files: RunFiles) -> Rows:
    """Return the geometry of the task vectors, one row per iteration.

    A row has the names of the blocks and the pairs of policies. Angles in degrees and norm ratios
    ‖δ_b‖ / ‖δ_a‖ are pairs × blocks. Norms are policies × blocks. "merge" is what was measured of
    the merge; runs of earlier versions lack it.
    """
    found = []
    for name in sorted(
        (name for name in files.storage.names("iterations") if name.isdigit()), key=int
    ):
        blocks = files.section(
            f"Iteration {name}", partial(_block_geometry, files, f"iterations/{name}"), None
        )
        if not blocks:
            continue
        measured = blocks.pop(MERGE, None)
        norms = [[number(value) for value in block["norms"]] for block in blocks.values()]
        pairs = [(a, b) for a in range(len(norms[0])) for b in range(a + 1, len(norms[0]))]
        found.append(
            {
                "iteration": int(name),
                "blocks": list(blocks),
                "pairs": [f"{a + 1}–{b + 1}" for a, b in pairs],
                "angles": [
                    [round(number(block["angles"][n]), 2) for block in blocks.values()]
                    for n in range(len(pairs))
                ],
                "ratios": [
                    [round(own[b] / own[a], 4) if own[a] else None for own in norms]
                    for a, b in pairs
                ],
                "norms": [[round(own[m], 5) for own in norms] for m in range(len(norms[0]))],
                "merge": _merge(measured),
            }
        )
    return found


def _merge(measured: Any) -> dict[str, float] | None:
    """Return the KL cosine of a merge and what belongs to it, or None if it was not measured."""
    if not isinstance(measured, Mapping):
        return None
    names = ("kl_cosine", "kl_cosine_ci", "kl_gain", "kl_lerp", "prompts")
    return {name: number(measured.get(name)) for name in names}


def _event_row(event: Mapping[str, Any]) -> dict[str, Any]:
    """Return an event with clipped texts and without the versions of packages.

    A stack trace may have hundreds of lines. The page shows the versions once.
    """
    return {
        name: clip(value, MESSAGE) if isinstance(value, str) else value
        for name, value in event.items()
        if name != "versions"
    }


def _block_geometry(files: RunFiles, folder: str) -> Any:
    manifest = files.json(f"{folder}/{MANIFEST}") or {}
    return files.json(f"{folder}/geometry.json", manifest.get("geometry.json"))


def _last(geometry: Sequence[Mapping[str, Any]]) -> list[float]:
    return [number(angle) for row in (geometry[-1]["angles"] if geometry else []) for angle in row]


def _effects(rows: Sequence[Mapping[str, Any]]) -> list[tuple[float, float]]:
    found = [
        (number(row.get("adapter_effect")), number(row.get("adapter_effect_error"))) for row in rows
    ]
    return [
        (value, error) for value, error in found if math.isfinite(value) and math.isfinite(error)
    ]


def _gaps(rows: Sequence[Mapping[str, Any]]) -> list[float]:
    return [number(row.get("sampler_gap")) for row in rows]
