"""Tests of a ceiling as it is shown and stored, and of a front's share of it, by hand."""

import math
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tiny_run import flip

from raywarp.algorithm.tilting import BestOf
from raywarp.ceiling_stage import ceiling
from raywarp.config.schema import Config, ConfigError
from raywarp.run.ceiling import (
    Ceiling,
    capped_share,
    ceiling_of,
    find_ceiling,
    front_share,
    points_above,
    save_ceiling,
    verdict,
)
from raywarp.run.figures import ceiling_table, front_table, plot_front, share_cell
from raywarp.run.keys import ceiling_key, front_key
from raywarp.run.points import Point
from raywarp.storage.location import Storage

# SFT 0.1; 1 nat buys 1, 4 nats 2.5.
CEILING = Ceiling(
    key="k",
    prompts=50,
    completions=32,
    deviation=0.8,
    kl=[0.0, 1.0, 4.0],
    reward=[0.1, 1.1, 2.6],
    reward_ci=[0.05, 0.1, 0.2],
    gain_ci=[0.0, 0.08, 0.16],
    best_of=[BestOf(2, 0.19, 0.5, 0.06)],
)


def point(name: str, eta: float | None, kl: float, reward: float) -> Point:
    return Point(name, eta, reward, 0.02, kl, 0.0, None, None, 0.5, 10.0, 0.0)


FRONT = [
    point("sft", 0.0, 0.0, 0.1),
    point("policy 1", None, 1.0, 0.9),
    point("liti 0.5", 0.5, 0.25, 0.25),
    point("slerp", 1.0, 2.25, 0.8),
]


def test_the_ceiling_between_its_points_and_beyond() -> None:
    assert CEILING.at(0.5) == pytest.approx((0.6, 0.075))
    assert CEILING.at(4.0) == pytest.approx((2.6, 0.2))
    assert CEILING.at(4.01) is None
    assert CEILING.gain(2.5) == pytest.approx((1.75, 0.12))


def test_a_share_is_of_the_gain_above_sft() -> None:
    assert CEILING.share(1.0, 0.6) == pytest.approx(0.5)
    assert CEILING.share(0.0, 0.1) is None  # nothing to gain there
    assert CEILING.share(5.0, 2.0) is None  # not measured


def test_a_fronts_share_is_interpolated_on_its_line() -> None:
    """At 1 nat, half-way in √KL from η = ½ to SLERP: .525; the policy is off the line."""
    found = front_share(FRONT, CEILING, 1.0)
    assert found.share == pytest.approx(0.425)
    assert str(found) == "SLERP's front: 43 % of what 1 nat can buy"
    # a quarter of the KL is half the way from SFT
    assert front_share(FRONT, CEILING, 0.25 / 4).share == pytest.approx(0.075 / 0.0625)


def test_a_front_that_ends_earlier_says_so() -> None:
    """At its end, 2.25 nats: .7 of 1.625."""
    found = front_share(FRONT, CEILING, 3.0)
    assert (found.kl, found.share) == (2.25, pytest.approx(0.7 / 1.625))
    assert (
        str(found) == "SLERP's front: 43 % of what 2.25 nats can buy; it ends there, before 3 nats"
    )


def test_a_ceiling_that_ends_earlier_says_so() -> None:
    far = [*FRONT[:-1], point("slerp", 1.0, 9.0, 2.0)]
    found = front_share(far, CEILING, 6.0)
    assert found.kl == 4.0
    assert str(found).endswith("of what 4 nats can buy; at 6 nats the ceiling is not measured")


def test_trials_are_compared_by_their_best_within_the_kl() -> None:
    """A front that ends at 2.25 nats counts with its best there, over what 3 nats can buy."""
    assert capped_share(FRONT, CEILING, 3.0) == pytest.approx(0.7 / 2.0)
    assert capped_share(FRONT, CEILING, 1.0) == pytest.approx(0.425)
    # Past its best, a front still has it.
    falling = [FRONT[0], point("liti 0.5", 0.5, 0.5, 0.9), point("slerp", 1.0, 1.5, 0.2)]
    assert capped_share(falling, CEILING, 1.0) == pytest.approx(0.8)
    assert capped_share(FRONT, CEILING, 9.0) == pytest.approx(0.7 / 2.5)
    assert capped_share([point("sft", 0.0, 0.0, -0.3)], CEILING, 1.0) == 0.0
    flat = Ceiling("k", 5, 4, 0.0, [0.0], [0.1], [0.0], [0.0], [])
    assert capped_share(FRONT, flat, 2.0) == 0.0


def test_a_point_above_the_ceiling_by_more_than_both_intervals_is_told() -> None:
    inside = point("slerp", 1.0, 1.0, 1.21)
    above = point("slerp", 1.0, 1.0, 1.23)
    assert points_above([*FRONT, inside], CEILING) == []
    assert points_above([*FRONT, above], CEILING) == [above]
    uncertain = Point("slerp", 1.0, 1.23, 0.02, 1.0, 0.3, None, None, 0.5, 10.0, 0.0)
    assert points_above([uncertain, point("slerp", 1.0, 5.0, 9.0)], CEILING) == []


def test_the_verdict_in_words() -> None:
    assert verdict(CEILING, 2.0) == (
        "2 nats can buy +1.50 ± 0.11 of reward, from 0.10 to 1.60, which is 1.9 standard"
        " deviations of SFT completions' rewards"
    )
    assert verdict(CEILING, 5.0).endswith("; 5 nats are not measured")
    same = Ceiling.of("k", [[3.0] * 4, [1.0] * 4])
    assert verdict(same, 2.0) == "nothing to gain: all completions of a prompt score the same"
    noise = Ceiling("k", 5, 4, 0.8, [0.0, 1.0], [0.1, 0.2], [0.3, 0.4], [0.0, 0.3], [])
    assert verdict(noise, 1.0).startswith("nothing to gain beyond the error: 1 nat can buy +0.10")


def test_tables_say_what_is_not_measured() -> None:
    console = Console(width=200, record=True)
    far = point("slerp", 1.0, 7.0, 2.0)
    console.print(front_table([*FRONT[:-1], far], far, CEILING))
    console.print(ceiling_table(CEILING))
    text = console.export_text()
    assert "of ceiling" in text
    assert [share_cell(one, CEILING) for one in (*FRONT[:3], far)] == [
        "",
        "80 %",
        "60 %",
        "not measured",
    ]
    assert text.count("not measured") == 1
    assert "0.50 ± 0.06" in text


def test_a_front_without_a_ceiling_is_shown_as_before() -> None:
    console = Console(width=200, record=True)
    console.print(front_table(FRONT, FRONT[-1]))
    assert "ceiling" not in console.export_text()
    assert ceiling_of({"points": []}) is None


def test_the_picture_has_the_ceiling(tmp_path: Path) -> None:
    plot_front(FRONT, FRONT[-1], tmp_path / "without.png", "a front")
    plot_front(FRONT, FRONT[-1], tmp_path / "with.png", "a front", CEILING)
    assert (tmp_path / "with.png").read_bytes() != (tmp_path / "without.png").read_bytes()


def test_a_ceiling_is_stored_and_found_under_its_key(tmp_path: Path) -> None:
    store, said = Storage(tmp_path), list[str]()
    rewards = torch.randn(3, 8, generator=torch.Generator().manual_seed(0)).tolist()
    saved = save_ceiling(store, "one", rewards)
    assert find_ceiling(store, "one", said.append) == saved
    assert find_ceiling(store, "two", said.append) is None
    assert said == []
    flip(tmp_path / "ceilings" / "one" / "rewards.safetensors")
    assert find_ceiling(store, "one", said.append) is None
    assert "measured again" in said[0]
    assert save_ceiling(store, "one", rewards) == find_ceiling(store, "one", said.append)


def test_one_prompt_has_no_interval_and_survives_storage(tmp_path: Path) -> None:
    saved = save_ceiling(Storage(tmp_path), "one", [[0.0, 1.0, 2.0, 3.0]])
    assert math.isinf(saved.reward_ci[-1])
    assert find_ceiling(Storage(tmp_path), "one", print) == saved
    assert saved.share(saved.end, 2.0) is None


def test_no_completions_are_refused_before_anything_starts(no_ray: None) -> None:
    with pytest.raises(ConfigError, match="front.ceiling_completions=0 measures no ceiling"):
        ceiling(with_front(ceiling_completions=0))


def with_front(**changes: float) -> Config:
    return Config.model_validate({"front": changes})


def test_keys_change_with_what_they_depend_on_and_nothing_else() -> None:
    """share_kl measures nothing again; ceiling_completions only the ceiling."""
    plain, found = Config(), {"base": "b", "reward": "r", "dtype": "float32", "threads": 1}
    share, more = with_front(share_kl=3.0), with_front(ceiling_completions=64)
    assert front_key(plain, "e", ["p"]) == front_key(share, "e", ["p"])
    assert front_key(plain, "e", ["p"]) == front_key(more, "e", ["p"])
    key = ceiling_key(plain, "held out", found)
    assert ceiling_key(share, "held out", {**found, "prompts": "x", "evaluation": "y"}) == key
    policies = Config.model_validate({"warp": {"steps": 3}, "optim": {"lr": 0.5}})
    assert ceiling_key(policies, "held out", found) == key
    others = [
        ceiling_key(more, "held out", found),
        ceiling_key(plain, "others", found),
        ceiling_key(Config.model_validate({"seed": 5}), "held out", found),
        ceiling_key(Config.model_validate({"rollout": {"temperature": 0.5}}), "held out", found),
        *(ceiling_key(plain, "held out", {**found, name: "other"}) for name in found),
    ]
    assert len({key, *others}) == 1 + len(others)
