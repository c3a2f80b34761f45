"""Tests of the front: its points, their means and intervals, and the choice of one."""

import math

import pytest
import torch
from conftest import random_delta

from raywarp.algorithm.averaging import lerp, slerp
from raywarp.algorithm.deltas import add, zeros_like
from raywarp.algorithm.factors import dense
from raywarp.config.front import ChooseConfig
from raywarp.run.front import (
    Point,
    Scored,
    candidates,
    choose,
    distinct_2,
    mean_interval,
    summarise,
)


def point(name: str, eta: float | None, kl: float) -> Point:
    return Point(name, eta, 0.0, 0.1, kl, 0.1, None, None, 0.5, 10.0, 0.0)


def test_intervals_by_hand() -> None:
    """Values 1, 2, 3, 4: mean 2.5, s² = 5/3, half-width 1.96·√(5/12)."""
    mean, half = mean_interval([1.0, 2.0, 3.0, 4.0])
    assert mean == 2.5
    assert half == pytest.approx(1.96 * math.sqrt(5 / 12))
    # completions of one prompt are one observation
    assert mean_interval([1.0, 3.0, 2.0, 2.0, 0.0, 4.0], group=2) == (2.0, 0.0)
    assert mean_interval([1.0]) == (1.0, math.inf)


def test_distinct_2() -> None:
    assert distinct_2(["a b a b", "a b"]) == pytest.approx(2 / 4)  # ab, ba, ab, ab
    assert distinct_2(["one", ""]) == 0.0


def test_the_front_runs_from_sft_to_slerp() -> None:
    init, vectors = random_delta(1), [random_delta(2), random_delta(3)]
    points = {c.name: c for c in candidates(init, vectors, [0, 0.25, 1])}
    assert list(points) == ["sft", "policy 1", "policy 2", "lerp", "liti 0.25", "slerp"]
    assert points["sft"].delta is None
    merged = add(init, slerp(vectors))
    for module in init.factors:
        change = {
            name: dense(c.delta.factors[module])
            for name, c in points.items()
            if c.delta is not None
        }
        torch.testing.assert_close(change["slerp"], dense(merged.factors[module]))
        # towards SFT, not towards init
        torch.testing.assert_close(change["liti 0.25"], 0.25 * dense(merged.factors[module]))
        torch.testing.assert_close(
            change["policy 2"], dense(init.factors[module]) + dense(vectors[1].factors[module])
        )
        torch.testing.assert_close(
            change["lerp"], dense(init.factors[module]) + dense(lerp(vectors).factors[module])
        )


def test_one_policy_and_no_init() -> None:
    vector = random_delta(1)
    points = {c.name: c for c in candidates(zeros_like(vector), [vector], [])}
    for module, f in vector.factors.items():
        for name in ("policy 1", "lerp", "slerp"):
            change = points[name].delta
            assert change is not None
            torch.testing.assert_close(dense(change.factors[module]), dense(f))


def test_choosing() -> None:
    points = [
        point("sft", 0.0, 0.0),
        point("policy 1", None, 1.0),
        point("liti 0.5", 0.5, 2.0),
        point("slerp", 1.0, 7.0),
    ]
    assert choose(points, ChooseConfig(eta=0.5)).name == "liti 0.5"
    assert choose(points, ChooseConfig(max_kl=2.0)).name == "liti 0.5"
    assert choose(points, ChooseConfig(max_kl=50)).name == "slerp"
    assert choose(points, ChooseConfig(max_kl=0.5)).name == "sft"


def test_summary() -> None:
    scored = Scored(
        ["a b", "a b", "c", "d e"],
        [2, 2, 1, 4],
        [True, True, True, False],
        [1.0, 2.0, 3.0, 4.0],
        [0.5] * 4,
        [0.1, 0.3, 0.2, 0.2],
    )
    found = summarise(candidates(random_delta(1), [random_delta(2)], [])[0], scored, group=2)
    assert (found.reward, found.kl, found.control) == (2.5, pytest.approx(0.2), 0.5)
    assert (found.length, found.eos_rate, found.distinct_2) == (2.25, 0.75, pytest.approx(2 / 3))
