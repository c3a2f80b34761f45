"""Tests of damage to events.jsonl and to the workers' metrics.jsonl, which have no manifest.

A run reads what damage has left of them, and says what is lost.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_run import DAMAGE, Listener

from raywarp.rewards.progress import following
from raywarp.run.events import Journal
from raywarp.run.folder import Run
from raywarp.run.prometheus import RunMetrics

EVENTS = [
    {"time": "2026-01-31T12:00:00.000+00:00", "event": "started", "versions": {"ray": "2.60.0"}},
    {
        "time": "2026-01-31T12:00:09.500+00:00",
        "event": "fault",
        "what": "policy actor 1",
        "cause": "killed",
        "message": "SIGKILL",
    },
    {
        "time": "2026-01-31T12:00:19.500+00:00",
        "event": "recovered",
        "what": "policy actor 1",
        "seconds_lost": 10.0,
    },
]
METRICS = [
    {"step": 1, "loss": 0.7},
    {"step": 1, "validation_accuracy": 0.5, "validation_loss": 0.7},
    {"step": 2, "loss": 0.6},
]


def bytes_of(rows: list[dict[str, object]]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def flips(data: bytes) -> Iterator[bytes]:
    """Contents that differ from it in one bit, one or two for each byte."""
    for bit in range(0, 8 * len(data), 7):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        yield bytes(flipped)


def test_no_flipped_bit_of_the_events_stops_a_run(tmp_path: Path) -> None:
    run = Run(tmp_path)
    for data in flips(bytes_of(EVENTS)):
        (tmp_path / "events.jsonl").write_bytes(data)
        with Journal(run, display := Listener(), RunMetrics("run")) as journal:
            journal.begin()
        display.faults(run.events())
        told = run.events()
        assert [row["event"] for row in told[-2:]] == ["started", "finished"]
        assert len(told) >= len(EVENTS) + 2 - 2  # a flipped end of a line takes two of them
        lines = len([line for line in data.split(b"\n") if line])
        assert ("cannot be read" in display.text()) == (
            lines > sum(map(is_object, data.split(b"\n")))
        )


def is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


@pytest.mark.parametrize("way", ["halved", "emptied", "deleted"])
def test_what_is_lost_of_the_events_is_said(way: str, tmp_path: Path) -> None:
    run, events = Run(tmp_path), tmp_path / "events.jsonl"
    events.write_bytes(bytes_of(EVENTS))
    run.metrics_file.write_text('{"step": 0}\n')
    assert run.lost_events() == ""
    DAMAGE[way](events)
    gone = f"{events} is missing or empty: what befell the run before is not known any more"
    assert run.lost_events() == (
        f"{events}: 1 of its lines cannot be read, and are left out" if way == "halved" else gone
    )
    run.metrics_file.unlink()
    events.unlink(missing_ok=True)
    assert run.lost_events() == ""  # a new run


def test_no_flipped_bit_of_its_metrics_stops_a_reward_training(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for data in flips(bytes_of(METRICS)):
        path.write_bytes(data)
        with following(path, 2, display := Listener()):
            path.write_bytes(
                data
                + bytes_of([{"step": 100, "validation_accuracy": 0.75, "validation_loss": 0.5}])
            )
        assert (
            "reward step 100/2  validation accuracy 0.750  loss 0.500" in display.text()
            or data[-1:] != b"\n"
        )
