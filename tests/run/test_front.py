"""Tests of the front: its points, their means and intervals, and the choice of one."""

import io
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import random_delta
from matplotlib.collections import PathCollection
from rich.console import Console

from raywarp.algorithm.averaging import lerp, slerp
from raywarp.algorithm.deltas import add, zeros_like
from raywarp.algorithm.factors import dense
from raywarp.algorithm.finite import NotFiniteError
from raywarp.config.front import ChooseConfig
from raywarp.rollout.protocol import Scores
from raywarp.run.figures import front_table, plot_front, plot_preferences
from raywarp.run.front import candidates, choose, on_line
from raywarp.run.points import (
    Candidate,
    Point,
    Scored,
    distinct_2,
    mean_interval,
    retention,
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


def test_retention_by_hand() -> None:
    """Changes 3, 1 and 2 nats over 2, 1 and 3 tokens: 6 / 6 per token. Residuals 1, 0, −1 over a
    mean of 2 tokens, so s = ½ and the half-width 1.96·½/√3.
    """
    kept, half = retention([5.0, 2.0, 6.0], [2.0, 1.0, 4.0], [2, 1, 3])
    assert kept == 1
    assert half == pytest.approx(1.96 * 0.5 / math.sqrt(3))
    assert retention([5.0, 2.0], [5.0, 2.0], [2, 1]) == (0, 0)
    assert retention([5.0], [4.0], [2]) == (0.5, math.inf)


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


def test_points_beyond_slerp_are_its_multiples_and_marked() -> None:
    init, vectors = random_delta(1), [random_delta(2), random_delta(3)]
    found = candidates(init, vectors, [2.25, 0.25, 1.5])
    assert [(c.name, c.eta) for c in found[4:]] == [
        ("liti 0.25", 0.25),
        ("slerp", 1),
        ("liti 1.5", 1.5),
        ("liti 2.25", 2.25),
    ]
    merged = add(init, slerp(vectors))
    for eta, delta in (
        (1.5, found[6].delta),
        (1.5, on_line(found, 1.5)),
        (0.3, on_line(found, 0.3)),
    ):
        assert delta is not None
        for module, f in merged.factors.items():
            torch.testing.assert_close(dense(delta.factors[module]), eta * dense(f))
    scored = Scored(["a"], [1], [True], [1.0], None, [0.1])
    marks = {c.name: summarise(c, scored, 1) for c in found}
    assert {name for name, one in marks.items() if one.extrapolated} == {"liti 1.5", "liti 2.25"}
    assert marks["liti 1.5"].title == "liti 1.5 †"
    assert marks["policy 1"].title == "policy 1"


def test_the_picture_and_the_table_mark_extrapolated_points(tmp_path: Path) -> None:
    points = [point("sft", 0.0, 0.0), point("slerp", 1.0, 4.0), point("liti 1.5", 1.5, 9.0)]
    beyond = replace(points[2], extrapolated=True)
    console = Console(file=io.StringIO(), width=200)
    console.print(front_table([*points[:2], beyond], beyond))
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert "liti 1.5 † *" in said
    assert "† is extrapolated beyond SLERP" in said
    pictures = []
    for name, last in (("inside.png", points[2]), ("beyond.png", beyond)):
        plot_front([*points[:2], last], points[1], tmp_path / name, "title")
        pictures.append((tmp_path / name).read_bytes())
    assert pictures[0] != pictures[1]  # dashed and hollow
    console.print(front_table(points[:2], points[1]))
    assert console.file.getvalue().count("extrapolated") == 1  # type: ignore[attr-defined]


def test_the_table_shows_what_was_measured_whole_in_any_width() -> None:
    """Without control and texts, their columns are left out; a narrow terminal cuts no number."""
    plain = [point("sft", 0.0, 0.0), point("slerp", 1.0, 4.0)]
    kept = [replace(one, retention=0.125, retention_ci=0.015) for one in plain]
    shown = {}
    for name, points, width in (("plain", plain, 120), ("kept", kept, 120), ("narrow", kept, 70)):
        console = Console(file=io.StringIO(), width=width)
        console.print(front_table(points, points[1]))
        shown[name] = console.file.getvalue()  # type: ignore[attr-defined]
    assert "control" not in shown["plain"]
    assert "retention" not in shown["plain"]
    assert "retention" in shown["kept"]
    assert shown["kept"].count("+0.12 ± 0.01") == 2
    assert "…" not in shown["narrow"]
    assert shown["narrow"].count("+0.12 ±") == 2


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
    points.append(point("liti 1.5", 1.5, 12.0))
    assert choose(points, ChooseConfig(eta=1.5)).name == "liti 1.5"
    assert choose(points, ChooseConfig(max_kl=50)).name == "liti 1.5"
    assert choose(points, ChooseConfig(max_kl=10)).name == "slerp"


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


def test_means_leave_out_what_has_no_reward_and_refuse_what_is_not_finite() -> None:
    """Two prompts of two completions: means 1 and 5, so 3 ± 1.96 · 2."""
    rewards = Scores([1.0, math.nan, 4.0, 6.0])
    rewards.parts = {"a": Scores([0.0, 2.0, 4.0, 6.0])}
    shared = {"texts": ["x"] * 4, "lengths": [1] * 4, "finished": [True] * 4, "control": None}
    sft, whole = Candidate("sft", 0.0, None), Scored(rewards=rewards, kl=[0.0] * 4, **shared)
    point = summarise(sft, whole, 2)
    assert (point.reward, point.reward_ci) == (3.0, pytest.approx(1.96 * 2))
    assert point.rewards == {"a": 3.0}
    broken = Scored(rewards=rewards, kl=[0.0, math.nan, 0.0, math.inf], **shared)
    with pytest.raises(NotFiniteError, match="the KL of sft to SFT is nan"):
        summarise(sft, broken, 2)
    none = Scored(rewards=[math.nan] * 4, kl=[0.0] * 4, **shared)
    with pytest.raises(NotFiniteError, match="applies to no completion of sft"):
        summarise(sft, none, 2)


def test_the_picture_of_rewards_has_squares_for_policies_and_what_has_both_rewards(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Merges may be named after policies, and a reward may apply to no completion of a point."""
    figures: list[Any] = []
    monkeypatch.setattr("raywarp.run.figures._save", lambda figure, _: figures.append(figure))

    def rewarded(name: str, kl: float, share: float | None = None, **means: float) -> Point:
        weights = {} if share is None else {"policy 1": share, "policy 2": 1 - share}
        own = {"rewards": means, "rewards_ci": dict.fromkeys(means, 0.1)}
        return replace(point(name, None, kl), weights=weights, **own)

    sft, policy = rewarded("sft", 0.0, good=0, short=0), rewarded("policy 1", 4.0, good=2, short=1)
    half = rewarded("policy 1 0.5 policy 2 0.5", 3.0, 0.5, good=1, short=2)
    empty = rewarded("policy 1 0.25 policy 2 0.75", 3.0, 0.25, good=1)
    partly = rewarded("policy 2", 4.0, short=3)
    points = [sft, policy, partly, half, empty]
    plot_preferences(points, [half.name, empty.name], empty, tmp_path / "preferences.png")
    axes = figures[0].axes[0]
    drawn = [
        own.get_offsets().tolist() for own in axes.collections if isinstance(own, PathCollection)
    ]
    assert drawn == [[[1, 2]], [[0, 0], [2, 1]]]
    assert {text.get_text() for text in axes.texts} == {"0.5/0.5", "sft", "policy 1"}
