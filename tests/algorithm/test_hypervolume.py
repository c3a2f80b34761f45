"""Tests of the hypervolume against areas worked by hand, and against counted cells of a grid."""

import itertools
import math
import random

import pytest

from raywarp.algorithm.hypervolume import dominated_volume, dominates, hypervolume, pareto, simplex


def test_one_point_is_a_rectangle() -> None:
    assert hypervolume([(2.0, 3.0)], (5.0, 1.0)) == 6.0  # 3 nats wide, 2 high


def test_a_staircase_counts_what_overlaps_once() -> None:
    """SFT at (0, 0), then (1, 1), (3, 2): widths 4 and 2 of heights 1 and 1; (2, 0.5) is dominated,
    (5, 9) beyond, (1, 1) there twice.
    """
    points = [(3.0, 2.0), (0.0, 0.0), (1.0, 1.0), (1.0, 1.0), (2.0, 0.5), (5.0, 9.0)]
    assert hypervolume(points, (5.0, 0.0)) == 4 * 1 + 2 * 1
    assert hypervolume(points, (4.0, 0.0)) == 3 * 1 + 1 * 1
    assert hypervolume(points, (5.0, -1.0)) == 5 * 1 + 4 * 1 + 2 * 1


def test_nothing_within_the_reference_is_nothing() -> None:
    assert hypervolume([], (5.0, 0.0)) == 0
    assert hypervolume([(6.0, 3.0), (1.0, -1.0), (5.0, 2.0)], (5.0, 0.0)) == 0


def test_the_area_is_that_of_the_cells_which_a_point_dominates() -> None:
    draw = random.Random(0)
    for _ in range(20):
        points = [(float(draw.randrange(12)), float(draw.randrange(12))) for _ in range(6)]
        cells = [
            (x, y)
            for x in range(10)
            for y in range(2, 12)
            if any(kl <= x and reward > y for kl, reward in points)
        ]
        assert hypervolume(points, (10.0, 2.0)) == len(cells)


def test_a_better_point_never_makes_it_smaller_and_optuna_agrees() -> None:
    wfg = pytest.importorskip("optuna._hypervolume")
    numpy = pytest.importorskip("numpy")
    draw = random.Random(1)
    points = [(draw.random() * 4, draw.random()) for _ in range(9)]
    before = 0.0
    for n in range(1, 10):
        area = hypervolume(points[:n], (4.0, 0.0))
        losses = numpy.array([[kl, -reward] for kl, reward in points[:n]])
        assert area == pytest.approx(wfg.compute_hypervolume(losses, numpy.array([4.0, 0.0])))
        assert area >= before
        before = area


def test_pareto_keeps_what_nothing_beats_by_rising_kl() -> None:
    assert dominates((1, 2), (1, 1))
    assert dominates((0, 2), (1, 2))
    assert not dominates((1, 2), (1, 2))
    assert not dominates((2, 3), (1, 2))
    assert pareto([(3, 2), (0, 0), (1, 1), (2, 0.5), (1, 1), (4, 2)]) == [1, 2, 4, 0]
    assert pareto([]) == []


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_a_volume_is_that_of_the_cells_which_a_point_dominates(count: int) -> None:
    draw = random.Random(count)
    for _ in range(10):
        points = [tuple(float(draw.randrange(-1, 6)) for _ in range(count)) for _ in range(5)]
        cells = [
            cell
            for cell in itertools.product(range(1, 6), repeat=count)
            if any(all(p > c for p, c in zip(point, cell, strict=True)) for point in points)
        ]
        assert dominated_volume(points, [1.0] * count) == len(cells)


def test_many_points_of_which_none_dominates_another() -> None:
    """The 91 points of a plane, x + y + z = 12, whole and above 0: the unit cells below them are
    the pyramid of those with i + j + k ≤ 12. Beside them lie 91 points that they dominate.
    """
    plane = [tuple(12 * share + 1 for share in shares) for shares in simplex(3, 12)]
    worse = [tuple(value - 0.5 for value in point) for point in plane]
    cells = sum(
        any(all(p > c for p, c in zip(point, cell, strict=True)) for point in plane)
        for cell in itertools.product(range(14), repeat=3)
    )
    assert len(plane) == 91
    assert dominated_volume([*worse, *plane], [0.0] * 3) == pytest.approx(cells, rel=1e-12)


def test_many_points_of_a_sphere_against_counted_draws() -> None:
    draw = random.Random(0)
    points = [[math.sqrt(share) for share in shares] for shares in simplex(3, 12)]
    places = [[draw.random() for _ in range(3)] for _ in range(4000)]
    below = sum(
        any(all(p > x for p, x in zip(point, place, strict=True)) for point in points)
        for place in places
    )
    error = 3 * math.sqrt(0.25 / len(places))
    assert dominated_volume(points, [0.0] * 3) == pytest.approx(below / len(places), abs=error)


def test_the_simplex_by_hand() -> None:
    assert simplex(2, 4) == [(1, 0), (0.75, 0.25), (0.5, 0.5), (0.25, 0.75), (0, 1)]
    assert simplex(3, 1) == [(1, 0, 0), (0, 1, 0), (0, 0, 1)]
    found = simplex(4, 3)
    assert len({*found}) == len(found) == math.comb(6, 3)
    assert all(math.isclose(sum(weights), 1) for weights in found)
