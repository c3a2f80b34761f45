"""Tests, with hand-worked log-probs, of how the proof by effect judges an engine."""

import math
import random
from dataclasses import replace

import pytest

from raywarp.cli import commands
from raywarp.rollout.effect import SLOPES, Effect, Probe, Sampler, slope

GOOD = Effect(
    slope=1.0,
    error=0.01,
    rms=0.6,
    engine_gap=0.05,
    adapted_gap=0.06,
    noise=0.04,
    adapted_noise=0.05,
)


def test_slope_by_hand() -> None:
    """z = (1, 2), t = (1, 3), s = (2, 3): (2 + 6) / (1 + 6); e = (2 − 8/7, 3 − 24/7), √((6/7)² + (2
    · 3/7)²) / 7.
    """
    value, error = slope([1, 2], [1, 3], [2, 3])
    assert value == pytest.approx(8 / 7)
    assert error == pytest.approx(math.sqrt(2 * (6 / 7) ** 2) / 7)
    assert slope([1, 2], [3, 6], [1.5, 3]) == (0.5, 0.0)
    nothing, unknown = slope([0, 0], [1, 1], [1, 1])
    assert math.isnan(nothing)
    assert unknown == math.inf


def test_noise_in_both_does_not_move_the_slope() -> None:
    """Log-ratios of 0.3 under noise of 0.3: a plain regression says 0.5, the instrument 1 within
    three of its own errors.
    """
    draw = random.Random(0)
    z = [draw.gauss(0, 0.3) for _ in range(4000)]
    ours, theirs = ([value + draw.gauss(0, 0.3) for value in z] for _ in range(2))
    plain = sum(t * s for t, s in zip(ours, theirs, strict=True)) / sum(t * t for t in ours)
    value, error = slope(z, ours, theirs)
    assert plain == pytest.approx(0.5, abs=0.05)
    assert abs(value - 1) < 3 * error
    assert error == pytest.approx(0.3 * math.sqrt(2) / (0.3 * math.sqrt(4000)), rel=0.1)


def test_a_few_wild_tokens_do_not_move_the_slope() -> None:
    draw = random.Random(1).gauss
    z = [draw(0, 0.6) for _ in range(1000)]
    ours = [value + draw(0, 0.1) for value in z]
    theirs = [value + draw(0, 0.1) for value in z]
    theirs[:9] = [-4.0 * value for value in z[:9]]
    value, error = slope(z, ours, theirs)
    assert value == pytest.approx(1.0, abs=3 * error)
    assert error < 0.012


def test_an_adapter_that_some_tokens_lack_is_seen() -> None:
    draw = random.Random(1).gauss
    z = [draw(0, 0.6) for _ in range(1000)]
    theirs = [0.0 if number % 6 == 0 else value for number, value in enumerate(z)]
    value, _ = slope(z, z, theirs)
    assert value < SLOPES[0]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({}, ""),
        ({"slope": 0.89}, "0.89 ± 0.01 times what it is in the trainer (it must be 0.9 to 1.1)"),
        ({"slope": 1.2}, "1.20 ± 0.01"),
        ({"slope": 0.5, "error": 0.031}, ""),  # not precise enough
        ({"slope": 0.5, "rms": 0.49}, ""),  # too small an effect
        ({"slope": 0.5, "rms": 0.49, "least": 0.0}, "0.50 ± 0.01"),
        (
            {"engine_gap": 0.19},
            (
                "without any adapter its log-probs are 0.19 nats per token from the trainer's, of"
                " which"
            ),
        ),
        ({"engine_gap": 0.17}, ""),  # 4 · 0.04 + 0.02
        ({"engine_gap": math.nan}, "without any adapter its log-probs are nan"),
        (
            {"adapted_gap": 0.23, "error": 0.2},
            "with an adapter its log-probs are 0.23 nats per token",
        ),
        ({"adapted_gap": 0.23, "rms": 0.4}, ""),
    ],
)
def test_what_is_a_fault(change: dict[str, float], says: str) -> None:
    found = replace(GOOD, **change).fault()
    assert says in found
    assert bool(found) == bool(says)


def test_the_refusal_names_everything_and_is_wrong_input() -> None:
    error = Sampler("some/model", "vllm", "lora", "bfloat16").refusal(
        "rollout worker 2", "it is off"
    )
    for part in (
        "model=some/model",
        "rollout.engine=vllm",
        "rollout.adapter=lora",
        "dtype=bfloat16",
        "rollout worker 2: it is off",
    ):
        assert part in str(error)
    assert "try rollout.engine=transformers, dtype=float32 or lora.target_modules=[q_proj" in str(
        error
    )
    assert "try lora.target_modules=" in str(
        Sampler("some/model", "transformers", "merged", "float32").refusal("x", "y")
    )
    assert commands._exit_code(error) == 2


def test_scored_tokens_by_hand() -> None:
    probe = Probe(((5, 6, 7, 8), (1, 2)), (2, 1))
    assert probe.scored([(-1.0, -2.0, -3.0), (-4.0,)]) == [-2.0, -3.0, -4.0]
