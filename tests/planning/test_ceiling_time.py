"""Tests of the ceiling's forecast: its size, and its time from a run's pace, by hand."""

from pathlib import Path
from typing import Any

import pytest

from raywarp.cluster import resources
from raywarp.config.load import parse_config
from raywarp.config.schema import Config
from raywarp.planning.ceiling_time import ceiling_lines, measured_pace
from raywarp.planning.memory import Shapes
from raywarp.storage import sealed

SHAPES = Shapes(135_000_000, {}, 0, 0, 0, 0, 0, 0)


def settings(out: object = "nowhere", **front: Any) -> Config:
    return parse_config(
        {
            "out": str(out),
            "front": {"prompts": 50, "ceiling_completions": 16, **front},
            "rollout": {"max_new_tokens": 10, "workers": 2},
            "optim": {"batch_size": 8},
            "cluster": {"threads": 3},
        }
    )


def lines(config: Config, shapes: Shapes | None = SHAPES) -> list[str]:
    return ceiling_lines(config, resources.wish(config, resources.Nodes.empty([])), shapes)


def test_an_assumption_is_called_one() -> None:
    """800 completions of 10 tokens, at 3 threads × 50 GFLOP/s / (2 × 135 M) = 556 tokens/s each:
    8,000 / 556 / 2 = 7 s.
    """
    (line,) = lines(settings())
    assert line.startswith(
        "ceiling of the front: 800 SFT completions (front.ceiling_completions = 16 of each of up to"
        " 50 prompts), at most 8,000 tokens; about 7 s at 556 tokens/s of a rollout worker"
        " (assumed: 50 GFLOP/s of each of 3 CPU threads;"
    )
    assert lines(settings(), None)[0].endswith("; their time is not known")
    assert lines(settings(ceiling_completions=0)) == []


def test_a_front_in_out_gives_the_pace(tmp_path: Path) -> None:
    """Two points of 4 prompts × 2, 6 tokens each: 96 tokens in 2 s, 16 rewards in .8 s.

    800 × (6 / 48 / 2 + .05) = 90 s.
    """
    front = {"prompts": 4, "completions_per_prompt": 2, "points": [{"length": 5}, {"length": 7}]}
    spans = {
        "rollout worker 1": [[0, 1.5]],
        "rollout worker 2": [[1, 1.5]],
        "reward worker": [[2, 2.8]],
        "control worker": [[0, 9]],
        "policy actor 1": [[0, 99]],
    }
    sealed.write_record(tmp_path / "front.json", front)
    sealed.write_record(
        tmp_path / "timing.json", {"iterations": [], "evaluation": {"spans": spans}}
    )
    (line,) = lines(settings(tmp_path))
    assert "4,800 tokens; about 90 s at 48 tokens/s of a rollout worker (measured in out=" in line
    assert "at most" not in line


def test_steps_of_training_give_the_pace_before_there_is_a_front(tmp_path: Path) -> None:
    rows = [
        {"tokens": 40, "spans": {"rollout worker 1": [[0, 2]], "reward worker": [[2, 2.4]]}},
        {"tokens": 40, "spans": {"rollout worker 1": [[3, 5]], "reward worker": [[5, 5.4]]}},
        {"tokens": 9},
    ]
    sealed.write_jsonl(tmp_path / "metrics.jsonl", rows)
    pace = measured_pace(settings(tmp_path))
    assert pace
    assert (pace.tokens, pace.score_seconds, pace.length) == pytest.approx((20, 0.05, 5))
    assert "on steps of its training" in lines(settings(tmp_path))[0]


def test_an_object_store_is_not_asked() -> None:
    assert measured_pace(settings("s3://bucket/run")) is None
