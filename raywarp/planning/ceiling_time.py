"""The time that a front's ceiling takes, from a run's measured pace or from an assumption."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from raywarp.cluster import resources
from raywarp.config.schema import Config
from raywarp.planning.memory import DTYPE_BYTES, Shapes
from raywarp.run.ceiling import CALL
from raywarp.run.folder import FRONT_FILE
from raywarp.run.history import METRICS_FILE, TIMING_FILE
from raywarp.storage import sealed
from raywarp.storage.location import Storage
from raywarp.storage.sealed import DamagedError

# Assumed where no run was measured.
THREAD_FLOPS = 50e9  # floating-point operations a second that a CPU thread does while it samples
GPU_BANDWIDTH = 1e12  # bytes of weights a second that a GPU reads while it samples
LAST_ROWS = 50  # rows of metrics.jsonl that a pace is taken from


@dataclass(frozen=True)
class Pace:
    """How fast a rollout worker samples, and the reward worker scores.

    Attributes:
        tokens: tokens a second of one rollout worker.
        score_seconds: seconds of the reward worker for one completion; 0 if unknown.
        length: tokens of a completion; None if unknown.
        source: where the pace is from, in words.
    """

    tokens: float
    score_seconds: float
    length: float | None
    source: str


def ceiling_lines(config: Config, placed: resources.Plan, shapes: Shapes | None) -> list[str]:
    """Return a line on the size and time of the ceiling; none where it is not measured.

    Args:
        placed: the run's actors with their resources.
        shapes: shapes of the model, if they are known.
    """
    each, prompts = config.front.ceiling_completions, config.front.prompts
    if not each:
        return []
    pace = measured_pace(config) or assumed_pace(config, placed, shapes)
    length = (pace.length if pace else None) or config.rollout.max_new_tokens
    most = "" if pace and pace.length else "at most "
    line = (
        f"ceiling of the front: {each * prompts:,} SFT completions (front.ceiling_completions ="
        f" {each} of each of up to {prompts} prompts), {most}{each * prompts * length:,.0f} tokens"
    )
    if pace is None:
        return [f"{line}; their time is not known"]
    seconds = each * prompts * (length / pace.tokens / placed.rollout.count + pace.score_seconds)
    return [f"{line}; about {_duration(seconds)} at {pace.tokens:,.0f} tokens/s {pace.source}"]


def measured_pace(config: Config) -> Pace | None:
    """Return the pace of the run in `out`, or None if there is none in a folder.

    The measurement of its front comes first, since its calls are as large. The steps of its
    training have smaller ones.
    """
    folder = Storage(config.out).folder
    if folder is None:
        return None
    try:
        front = sealed.read_record(folder / FRONT_FILE)
        times = sealed.read_record(folder / TIMING_FILE) or {}
    except DamagedError:
        front, times = None, {}
    if front and "evaluation" in times:
        count = front["prompts"] * front["completions_per_prompt"]
        tokens = count * sum(point["length"] for point in front["points"])
        source = f"of a rollout worker (measured in out={config.out}, on its front)"
        return _pace([times["evaluation"]["spans"]], tokens, count * len(front["points"]), source)
    rows = [row for row in sealed.read_jsonl(folder / METRICS_FILE) if "spans" in row][-LAST_ROWS:]
    tokens, count = sum(row["tokens"] for row in rows), config.optim.batch_size * len(rows)
    source = f"of a rollout worker (measured in out={config.out}, on steps of its training)"
    return _pace([row["spans"] for row in rows], tokens, count, source)


def assumed_pace(config: Config, placed: resources.Plan, shapes: Shapes | None) -> Pace | None:
    """Return the pace that is assumed of this model, or None if its shapes are not known."""
    if shapes is None:
        return None
    if not placed.rollout.gpus:
        threads = placed.threads or config.cluster.threads or max(1, int(placed.rollout.cpus))
        tokens = threads * THREAD_FLOPS / (2 * shapes.parameters)
        assumption = f"{THREAD_FLOPS / 1e9:.0f} GFLOP/s of each of {threads} CPU threads"
    else:
        weights = shapes.parameters * DTYPE_BYTES[placed.dtype]
        gpus = placed.rollout.gpus
        tokens = gpus * GPU_BANDWIDTH / weights * CALL
        assumption = f"{GPU_BANDWIDTH / 1e12:.0f} TB/s of each of {gpus:g} GPUs"
    source = (
        f"of a rollout worker (assumed: {assumption}; without the reward's time. A run in out gives"
        " a measured pace)"
    )
    return Pace(tokens, 0.0, None, source)


def _pace(
    spans: Sequence[Mapping[str, Any]], tokens: float, completions: int, source: str
) -> Pace | None:
    """Return the pace of work that was measured, or None without any.

    Args:
        spans: actor → pairs of start and end in Unix seconds.
        tokens: all tokens that were sampled.
        completions: all completions that were sampled and scored.
        source: see Pace.
    """
    rollout, reward = (_seconds(spans, who) for who in ("rollout worker", "reward worker"))
    if not (rollout and tokens and completions):
        return None
    return Pace(tokens / rollout, reward / completions, tokens / completions, source)


def _seconds(spans: Sequence[Mapping[str, Any]], who: str) -> float:
    """Return the seconds that actors with this name worked."""
    pieces = [
        float(end - start)
        for own in spans
        for name, theirs in own.items()
        if name.startswith(who)
        for start, end in theirs
    ]
    return sum(pieces)


def _duration(seconds: float) -> str:
    """Return a time in seconds, minutes or hours, as text."""
    if seconds < 100:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
