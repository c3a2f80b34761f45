"""Tests of the study in tests/bench/evidence: its statistics, merges and outcomes, and a whole run.

Statistics are compared with hand-worked numbers, merges with their definitions, and outcomes are on
made-up results with known effects. The run is on a tiny model, and is killed on its way.
"""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bench.evidence import ceilings, checks, claims, fronts, merges, recheck, report, study
from bench.evidence.claims import ARMS_OF, CLAIMS, SHARE_OF
from bench.evidence.curves import CURVES, END, SFT, Trained, size
from bench.evidence.fronts import Effect
from bench.evidence.results import Measured, OtherSettingsError, Results
from bench.evidence.settings import (
    ARMS,
    TASKS,
    TINY,
    Settings,
    arm_config,
    reward_configs,
)
from conftest import assert_same_change, random_delta
from peft import LoraConfig, get_peft_model

from raywarp.adapters.peft import save_peft
from raywarp.algorithm.averaging import lerp
from raywarp.algorithm.deltas import AdapterDelta, add, scale
from raywarp.algorithm.factors import Factors, dense
from raywarp.algorithm.geometry import geometry
from raywarp.config.rewards import MINILM
from raywarp.config.schema import SMOLLM2
from raywarp.run.folder import Run
from raywarp.storage import sealed

NUMBERS = Path(study.__file__).parent / "numbers"


def test_reward_at_fixed_kl_is_linear_in_the_root_of_the_kl() -> None:
    kl, reward = np.array([4.0, 0.0, 1.0]), np.array([3.0, 0.0, 2.0])  # √KL 2, 0, 1
    np.testing.assert_allclose(
        fronts.reward_at(kl, reward, np.array([0.0, 0.25, 1.0, 2.25, 4.0, 6.25])),
        [0, 1, 2, 2.5, 3, 3.5],
    )
    many = fronts.reward_at(
        np.stack([kl, kl]), np.stack([reward, 2 * reward]), np.array([0.25, 2.25])
    )
    np.testing.assert_allclose(many, [[1, 2.5], [2, 5]])


def test_a_t_interval_is_students() -> None:
    """Of 1, 2, 3: the mean is 2, its standard error √⅓, and the quantile of 2 degrees 4.303."""
    assert fronts.t_half([1.0, 2.0, 3.0]) == pytest.approx(4.3027 / 3**0.5, rel=1e-4)
    assert fronts.t_half([1.0]) == np.inf


def test_an_effect_is_paired_over_prompts_and_has_both_intervals() -> None:
    generator = np.random.default_rng(0)
    weights = fronts.resampling_weights(400, 500, generator)
    np.testing.assert_allclose(weights.sum(1), 1)
    # what prompts have in common cancels in a paired comparison
    prompts = generator.normal(size=400) * 5
    gain = weights @ (prompts + generator.normal(0.3, 0.2, 400)) - weights @ prompts
    missing = np.full_like(gain, np.nan)
    found = fronts.effect_of(np.stack([gain - 1, gain, gain + 1, missing]))
    assert found.value == pytest.approx(0.3, abs=0.03)
    assert found.high - found.low == pytest.approx(2 * 4.3027 / 3**0.5, rel=0.01)
    width = found.prompts[1] - found.prompts[0]  # the seeds' prompts move together here
    assert width == pytest.approx(2 * 1.96 * 0.2 / 20, rel=0.2)
    assert len(found.per_seed) == 3


@pytest.mark.parametrize(
    ("value", "low", "high", "seeds", "outcome"),
    [
        (0.1, 0.01, 0.19, 5, "better"),
        (0.1, 0.01, 0.19, 2, "undecided"),
        (0.015, 0.001, 0.029, 5, "equal"),
        (-0.1, -0.19, -0.01, 3, "worse"),
        (-0.01, -0.049, 0.029, 5, "equal"),
        (0.0, -0.06, 0.06, 5, "undecided"),
        (0.03, -0.01, 0.07, 5, "undecided"),
    ],
)
def test_outcome(value: float, low: float, high: float, seeds: int, outcome: str) -> None:
    effect = Effect(value, low, high, (low, high), (0.0,) * seeds)
    assert fronts.outcome(effect) == outcome
    assert recheck.outcome(value, low, high, seeds) == outcome


def test_peft_linear_is_what_peft_makes() -> None:
    sizes = {"q": (6, 5), "up": (4, 6)}
    parts = [
        random_delta(seed, (3, 3, 3, 3), (*sizes.values(), (1, 1), (1, 1))).factors.values()
        for seed in (1, 2)
    ]
    deltas = [AdapterDelta(dict(zip(sizes, factors, strict=False))) for factors in parts]
    layers = torch.nn.ModuleDict(
        {
            name: torch.nn.Linear(width, out, bias=False, dtype=torch.float64)
            for name, (out, width) in sizes.items()
        }
    )
    settings = LoraConfig(r=3, lora_alpha=3, target_modules=list(sizes))
    model = get_peft_model(layers, settings, adapter_name="0")
    model.add_adapter("1", settings)
    for index, delta in enumerate(deltas):
        for name, f in delta.factors.items():
            layer = model.base_model.model[name]
            layer.lora_A[str(index)].weight.data, layer.lora_B[str(index)].weight.data = f.A, f.B
    model.add_weighted_adapter(["0", "1"], [0.5, 0.5], "merged", combination_type="linear")
    merged = merges.peft_linear(deltas)
    for name in sizes:
        torch.testing.assert_close(
            dense(merged.factors[name]),
            model.base_model.model[name].get_delta_weight("merged").double(),
        )


def test_slerp_of_factors() -> None:
    """Orthogonal tensors of norm 1: both weights are √½. One shared A stays what it is."""
    a, b = torch.eye(2, dtype=torch.float64)
    x, y = (AdapterDelta({"m": Factors(v[:, None], w[None])}) for v, w in ((a, a), (b, b)))
    torch.testing.assert_close(
        dense(merges.slerp_of_factors([x, y]).factors["m"]),
        torch.full((2, 2), 0.5, dtype=torch.float64),
    )
    z = AdapterDelta({"m": Factors(b[:, None], a[None])})
    expected = torch.tensor([[0.5**0.5, 0], [0.5**0.5, 0]], dtype=torch.float64)
    torch.testing.assert_close(dense(merges.slerp_of_factors([x, z]).factors["m"]), expected)


def test_errors_of_merges() -> None:
    x, y = random_delta(1), random_delta(2)
    assert merges.relative_error(x, x) < 1e-7
    assert merges.relative_error(scale(x, 3.0), x) == pytest.approx(2)
    assert merges.length_ratio(scale(x, 3.0), x) == pytest.approx(3)
    wrong = sum(
        float((dense(y.factors[m]) - dense(f)).square().sum()) for m, f in x.factors.items()
    )
    assert merges.relative_error(y, x) == pytest.approx(
        (wrong / sum(float(dense(f).square().sum()) for f in x.factors.values())) ** 0.5
    )
    # cross terms as large as the mean itself
    assert_same_change(merges.peft_linear([x, x]), scale(lerp([x, x]), 2.0))


def test_every_task_is_a_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    configs = {task: arm_config(Settings(task=task), ARMS["warp"], 1, tmp_path) for task in TASKS}
    assert configs["reviews"].reward.function is None
    assert configs["present-tense"].reward.function == "raywarp.rewards.tense:present"
    assert configs["present-tense"].warp == configs["reviews"].warp
    backbones = {
        task: [
            one.reward_training.backbone for one in reward_configs(Settings(task=task), 1, tmp_path)
        ]
        for task in TASKS
    }
    assert backbones == {
        "reviews": [MINILM, MINILM],
        "present-tense": [],
        "smollm2-control": [MINILM, SMOLLM2],
        "two-rewards": [MINILM],
    }
    mixed = arm_config(Settings(task="two-rewards"), ARMS["mix-4"], 1, tmp_path)
    assert [[one.weight for one in own.rewards] for own in mixed.of_policies] == [
        *([0.8, 0.2], [0.6, 0.4], [0.4, 0.6], [0.2, 0.8])
    ]
    assert {own.warp.steps for own in mixed.of_policies} == {128}
    assert configs["smollm2-control"] == configs["reviews"]


def test_arms_that_are_compared_at_equal_compute_cost_the_same() -> None:
    assert ARMS["warp-i2"].cost == ARMS["ema-4t"].cost == ARMS["sft-4t"].cost == 4
    assert {ARMS[arm].cost for arm in ARMS_OF["P6"]} == {8}
    assert [ARMS[arm].cost for arm in ARMS_OF["P7"]] == [8, 8, 16]
    steps = {name: ARMS[name].length * Settings().steps for name in ARMS_OF["P6"]}
    assert steps == {
        **{"sft-m2": 128, "sft-m4": 64, "sft-8t": 256},
        **{"sft-decay": 256, "sft-batch": 64},
    }


def test_every_curve_has_its_arm_and_its_ends() -> None:
    for curve in CURVES.values():
        assert curve.arm in ARMS
        assert curve.is_line != bool(curve.end)
        if curve.end:
            assert ARMS[curve.arm].kept == curve.parts
            assert CURVES[curve.end.removesuffix(f"@{END}")].is_line
    for arm, policies in checks.POLICIES.items():
        assert len(policies) == ARMS[arm].policies
        assert {*policies, checks.LERPS[arm]} <= CURVES.keys()
    for claim in CLAIMS.values():
        assert {name for part in claim.parts for name in part.curves} <= CURVES.keys()
    same = {name: ([*c.parts[0].ours], [*c.parts[0].theirs]) for name, c in CLAIMS.items()}
    assert same == {**recheck.COMPARED, **recheck.JOINT}


@pytest.mark.parametrize("arm", ["warp", "warp-i2"])
def test_task_vectors_have_all_the_columns_of_their_arm(tmp_path: Path, arm: str) -> None:
    """Policies as a run leaves them, behind an init of rank 3 where there was an iteration before:
    a vector is what is behind it.
    """
    settings = TINY
    before = 3 if ARMS[arm].iterations > 1 else 0
    vectors = [random_delta(seed, (settings.rank,) * 4) for seed in (1, 2)]
    init = random_delta(3, (before,) * 4)
    folder = tmp_path / "iterations" / str(ARMS[arm].iterations)
    folder.mkdir(parents=True)
    for m, vector in enumerate(vectors):
        save_peft(add(init, vector), tmp_path / "policies" / str(m))
    (folder / "policies.json").write_text(json.dumps(["policies/0", "policies/1"]))
    (tmp_path / "metrics.jsonl").write_text(
        json.dumps(dict.fromkeys(("rollout_seconds", "request_seconds", "update_seconds"), 1.0))
        + "\n"
    )
    trained = Trained(settings, lambda _: Run(tmp_path), tmp_path)
    for found, vector in zip(trained.vectors(arm), vectors, strict=True):
        assert_same_change(
            found.map(lambda _, f: Factors(f.B.double(), f.A.double())), vector, tolerance=1e-5
        )
    facts, expected = trained.facts(arm), geometry(vectors)
    assert facts["geometry"].keys() == expected.keys()
    for block, one in expected.items():
        np.testing.assert_allclose(facts["geometry"][block]["norms"], one["norms"], rtol=1e-4)
        np.testing.assert_allclose(facts["geometry"][block]["angles"], one["angles"], atol=1e-2)


def test_the_size_of_a_change_is_that_of_its_dense_weights() -> None:
    delta = random_delta(1)
    square = sum(float(dense(f).square().sum()) for f in delta.factors.values())
    assert size(delta) == pytest.approx(square**0.5)


PROMPTS, COMPLETIONS, DEVIATION = 200, 48, 1.0


def made_up(seed: int, gains: dict[str, float], settings: Settings) -> dict[str, Measured]:
    """Fronts with reward ½·√KL + a gain of the curve, from 1 nat on; each prompt has a level that
    all points share. Their texts' log-ratios are their KLs with noise.
    """
    generator = np.random.default_rng(seed)
    common = generator.normal(0, DEVIATION, PROMPTS)

    def measured(kl: float, gain: float, eta: float) -> Measured:
        score = common + 0.5 * kl**0.5 + gain * min(kl, 1.0) + generator.normal(0, 0.1, PROMPTS)
        ratio = generator.normal(kl, 0.1, settings.checked_prompts)
        kls, lengths = np.full(PROMPTS, kl), np.full(PROMPTS, 20.0)
        return Measured(
            *(score, score, score, kls, ratio, lengths, np.ones(PROMPTS)),
            *(0.9, eta, 1.3 * eta + generator.uniform(0, 0.01), 1.001, 0.01, 0.02, kl**0.5),
        )

    points = {SFT: measured(0.0, 0.0, 0.0)}
    for name, curve in CURVES.items():
        places = curve.parts or (0.4, 0.6, 0.8, 1.0)
        for part in places:
            at = END if curve.is_line and part == 1.0 else part
            points[curve.point(at)] = measured(7 * part**2, gains.get(name, 0.0), part)
    return points


@pytest.fixture
def results(tmp_path: Path) -> Results:
    """Three seeds in which SLERP of two is better than all else, and factors are worse."""
    settings = Settings()
    results = Results(tmp_path / "results", settings.as_json())
    for number in (1, 2, 3):
        seed = results.seed(number)
        seed.points.update(made_up(number, {"slerp": 0.3, "factors": -0.3}, settings))
        for name, curve in CURVES.items():
            seed.facts.setdefault(curve.arm, {"curves": []})["curves"].append(name)
        generator = np.random.default_rng(number)
        seed.ceiling = generator.normal(0, 3.0, (PROMPTS, COMPLETIONS))
        results.save(number)
    return results


def test_results_are_read_back_and_others_refused(results: Results) -> None:
    again = Results(results.folder, results.settings)
    for number, seed in results.seeds.items():
        assert again.seeds[number].facts == seed.facts
        assert again.seeds[number].points.keys() == seed.points.keys()
        assert seed.ceiling is not None
        np.testing.assert_allclose(again.seeds[number].ceiling, seed.ceiling, atol=6e-4)
        for name, point in seed.points.items():
            read = again.seeds[number].points[name]
            for column in ("reward", "kl", "log_ratio", "control", "vader"):
                np.testing.assert_allclose(getattr(read, column), getattr(point, column), atol=6e-4)
            assert (read.norm, read.slope, read.eta) == (point.norm, point.slope, point.eta)
    before = (results.folder / "seed-1.npz").read_bytes()
    again.save(1)
    assert (results.folder / "seed-1.npz").read_bytes() == before
    with pytest.raises(OtherSettingsError, match=r"'lr': 0.0003"):
        Results(results.folder, {**results.settings, "lr": 1.0})


def test_nothing_is_added_to_numbers_of_another_sampler(results: Results, tmp_path: Path) -> None:
    results.seeds[2].sampler = 0
    results.save(2)
    again = Results(results.folder, results.settings)
    again.seeds[2].facts["warp"]["curves"].remove("slerp")
    mine = study.Study(Settings(), tmp_path / "out", again, study.Clock(None))
    with pytest.raises(OtherSettingsError, match="seed 2 in .* were sampled by another version"):
        mine.run([2], ["P1"])
    assert not (tmp_path / "out").exists()


def test_an_arm_whose_numbers_are_there_is_not_trained_on_a_fresh_machine(
    results: Results, tmp_path: Path
) -> None:
    mine = study.Study(Settings(), tmp_path / "out", results, study.Clock(None))
    mine.run([1, 2, 3], claims.NAMES)
    assert not (tmp_path / "out").exists()


def test_an_arm_of_an_earlier_sampler_is_not_used(results: Results, tmp_path: Path) -> None:
    mine = study.Study(TINY, tmp_path / "out", results, study.Clock(None))
    folder = mine.arm_run(1, ARMS["warp"]).folder
    folder.mkdir(parents=True)
    sealed.write_record(folder / "front.json", {"chosen": "slerp"})
    with pytest.raises(
        OtherSettingsError, match="cannot be used: it was sampled by an earlier version of raywarp"
    ):
        mine.train(1, ARMS["warp"])


def test_points_of_a_line_are_placed_by_its_end(tmp_path: Path) -> None:
    mine = study.Study(Settings(), tmp_path, Results(tmp_path, {}), study.Clock(None))
    assert mine.placed(4.0) == [(1.0, 0.5), (2.0, 0.5**0.5), (3.3, pytest.approx(0.825**0.5))]
    assert mine.placed(0.9) == []


def test_outcomes_of_made_up_results(results: Results, tmp_path: Path) -> None:
    """And they are what the second script finds, in all claims and shares."""
    report.report(Results(results.folder, results.settings), Settings(), tmp_path)
    told = json.loads((tmp_path / "evidence.json").read_text())
    outcomes = {name: entry["outcome"] for name, entry in told["claims"].items()}
    assert outcomes == {
        **{"P1": "better", "P2": "better", "P3": "equal", "P4": "better"},
        **{"P5.ema": "equal", "P5.sft": "equal", "P6": "equal", "P7": "equal", "P8": "worse"},
    }
    deviation = np.mean([seed.points[SFT].reward.std() for seed in results.seeds.values()])
    assert told["claims"]["P1"]["effect"] == pytest.approx(0.3 / deviation, abs=0.02)
    assert told["claims"]["P4"]["parts"]["exact over SLERP of A and B apart"][
        "effect"
    ] == pytest.approx(0.6 / deviation, abs=0.02)
    assert told["claims"]["P1"]["kl_range"] == [1.0, 5.0]
    for entry in told["claims"].values():
        assert entry["slope_min"] == entry["slope_max"] == 1.001
        assert {"effect", "interval", "seeds", "kl_range", "command"} <= entry.keys()
    assert recheck.recheck(results.folder, told) == []
    told["claims"]["P1"]["effect"] += 0.01
    assert recheck.recheck(results.folder, told) == ["P1"]
    page = (tmp_path / report.PAGE).read_text()
    assert "| SLERP over its two policies | better |" in page
    assert (tmp_path / "evidence" / "fronts.png").stat().st_size < 250_000


def test_hypervolumes_of_made_up_results(tmp_path: Path) -> None:
    """Rewards grow with √KL; the areas of their staircases are worked by hand."""
    settings = Settings(task="two-rewards")
    results = Results(tmp_path / "results", settings.as_json())
    places = {"soup-1": (1.0, 0.25), "soup-0.75": (0.9, 0.6), "soup-0.5": (0.75, 0.75)}
    places |= {"soup-0.25": (0.6, 0.9), "soup-0": (0.25, 1.0)}
    places |= {"mix-2-1": (0.75, 0.5), "mix-2-2": (0.5, 0.75)}
    places |= {f"mix-4-{m}": (0.95, 0.95) for m in (1, 2, 3, 4)}
    for number in (1, 2, 3):
        seed = results.seed(number)
        for name, point in made_up(number, {}, settings).items():
            right, up = places.get(name.partition("@")[0], (0.0, 0.0))
            root = point.kl.mean() ** 0.5
            base = np.random.default_rng(number).normal(0, 1, (2, PROMPTS))
            noise = np.random.default_rng([number, len(name)]).normal(0, 0.02, (2, PROMPTS))
            own = base + noise + root * np.array([[right], [up]])
            seed.points[name] = replace(point, reward=own[0], control=own[1])
        for name, curve in CURVES.items():
            if curve.arm in ARMS_OF["P7"]:
                seed.facts.setdefault(curve.arm, {"curves": []})["curves"].append(name)
        results.save(number)
    report.report(Results(results.folder, settings.as_json()), settings, tmp_path / "results")
    told = json.loads((tmp_path / "results/evidence.json").read_text())
    assert told["claims"].keys() == {"P7"}
    two, four = told["claims"]["P7"]["parts"].values()
    soup = 1.0 * 0.25 + 0.9 * 0.35 + 0.75 * 0.15 + 0.6 * 0.15 + 0.25 * 0.1
    mixed = 0.75 * 0.5 + 0.5 * 0.25
    roots = np.mean([kl**0.5 for kl in settings.kls])
    assert two["effect"] == pytest.approx(roots * (soup**0.5 - mixed**0.5), rel=0.05)
    assert four["effect"] == pytest.approx(roots * (soup**0.5 - 0.95), rel=0.1)
    assert (two["outcome"], four["outcome"]) == ("better", "worse")
    assert (tmp_path / "results/evidence/preferences.png").stat().st_size > 5_000
    low, high = two["interval_over_prompts"]
    assert low <= two["effect"] <= high
    assert recheck.recheck(results.folder, told) == []
    told["claims"]["P7"]["effect"] += 0.01
    assert recheck.recheck(results.folder, told) == ["P7"]


def test_a_share_is_of_the_ceiling_that_gaussian_rewards_have(results: Results) -> None:
    """The highest reward of N(0, 3²) at k nats is 3·√(2k)."""
    of_seeds = claims.samples(Settings(), results)
    for kl in (1.0, 1.5):
        ceiling = ceilings.ceiling_of(of_seeds[1])
        assert ceiling is not None
        assert (ceiling.at(kl) or (0.0,))[0] == pytest.approx(3 * (2 * kl) ** 0.5, rel=0.06)
        found = ceilings.gain_lost(of_seeds[1], SHARE_OF, kl)
        assert found is not None
        own = float(of_seeds[1].seed.points[SFT].reward.mean()) + 0.5 * kl**0.5
        assert found[0] == pytest.approx(own / (3 * (2 * kl) ** 0.5), abs=0.04)


def test_an_arm_that_fails_the_check_is_not_reported(results: Results, tmp_path: Path) -> None:
    """Its sampler loses a tenth of every log-ratio, or its texts' log-ratios are not its KLs."""
    good = checks.arms(results)["warp"]
    assert not good.fault
    assert good.slope == pytest.approx(1.001)
    assert good.kl_ratio == pytest.approx(1.0, abs=0.01)
    for wrong in ({"slope": 0.9}, {"log_ratio": np.full(Settings().checked_prompts, 2.0)}):
        for seed in results.seeds.values():
            for name in list(seed.points):
                if name != SFT and CURVES[name.partition("@")[0]].arm == "warp-i2":
                    seed.points[name] = replace(seed.points[name], **wrong)
        assert checks.arms(results)["warp-i2"].fault
        report.report(results, Settings(), tmp_path)
        told = json.loads((tmp_path / "evidence.json").read_text())
        assert "P1" in told["claims"]
        assert not {"P5.ema", "P5.sft"} & told["claims"].keys()
        assert not told["measurement"]["arms"]["warp-i2"]["passes"]


def test_residuals_show_a_reward_that_follows_the_size_of_the_change(results: Results) -> None:
    """Curves reach the same KLs with changes of different sizes."""
    sizes = {name: 0.6 + 0.05 * n for n, name in enumerate(CURVES)}
    within = []
    for lost, correlation in ((0.0, 0.0), (0.5, 1.0)):
        for seed in results.seeds.values():
            for name, point in seed.points.items():
                if name != SFT:
                    norm = sizes[name.partition("@")[0]] * point.eta
                    reward = point.reward + lost * np.log(norm)  # what rounding takes
                    seed.points[name] = replace(point, norm=norm, reward=reward)
        left = checks.residuals(results)
        assert left.correlation == pytest.approx(correlation, abs=0.35)
        within.append(left.within)
    assert within[1] > within[0] + 0.3


def test_the_committed_claims_follow_from_the_committed_numbers() -> None:
    """By the study's own code, and by the second script."""
    told = json.loads((NUMBERS.parents[1] / "evidence.json").read_text())
    assert told["settings"] == Settings().as_json()
    results = Results(NUMBERS, Settings().as_json())
    of_seeds = claims.samples(Settings(), results)
    first = CLAIMS["P1"].parts[0]
    assert told["claims"]["P1"]["effect"] == claims.judge(first, of_seeds).as_json()["effect"]
    assert recheck.recheck(NUMBERS, told) == []


def test_a_killed_study_continues(
    ray_cluster: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Points that were measured are not measured again, what was trained is not trained again, and
    a redrawing says the same.
    """
    folders = ["--out", str(tmp_path / "run"), "--results", str(tmp_path / "results")]
    arguments = ["--tiny", "--claim", "P2", "P8", "--seeds", "1", *folders]
    command = [sys.executable, str(Path(study.__file__).parent), *arguments]
    # a user's shell has none
    environment = {name: value for name, value in os.environ.items() if name != "RAY_AUTH_MODE"}
    stderr = (tmp_path / "stderr").open("w")
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=stderr, start_new_session=True
    )
    while len(points := measured_points(tmp_path / "results")) < 3:
        assert process.poll() is None, (tmp_path / "stderr").read_text()
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    points = measured_points(tmp_path / "results")
    assert study.main([*arguments, "--hours", "0"]) == 0
    assert "the hours are over" in capsys.readouterr().out
    assert measured_points(tmp_path / "results").keys() == points.keys()

    assert study.main(arguments) == 0
    output = capsys.readouterr().out
    assert "arm warp trained" not in output
    again = measured_points(tmp_path / "results")
    assert {name.partition("@")[0] for name in again} == {
        SFT,
        *(curve.name for curve in CURVES.values() if curve.arm == "warp"),
    }
    assert points.keys() < again.keys()
    for name, point in points.items():
        assert f"seed 1: {name}:" not in output
        np.testing.assert_array_equal(point.kl, again[name].kl)
    assert again[SFT].kl.max() == 0
    assert again["training-1@0.75"].kl.mean() > again["training-1@0.25"].kl.mean() > 0
    for name in ("policy-1@end", "slerp@end"):
        assert again[name].kl.mean() > 0
        assert again[name].slope == pytest.approx(1, abs=0.01)  # float32, one engine
        spread = again[name].log_ratio.std() / TINY.checked_prompts**0.5
        assert again[name].log_ratio.mean() == pytest.approx(
            again[name].kl.mean(), abs=4 * spread + 1e-3
        )

    summary = tmp_path / "results" / "evidence.json"
    before = json.loads(summary.read_text())
    assert before["claims"]["P2"]["outcome"] == "undecided"
    ceiling = Results(tmp_path / "results", TINY.as_json()).seed(1).ceiling
    assert ceiling is not None
    assert ceiling.shape == (TINY.ceiling_prompts, TINY.ceiling_completions)
    assert "P8" not in before["claims"]  # no line of this run comes as far as a nat
    summary.unlink()
    assert study.main([*arguments, "--redraw"]) == 0
    assert json.loads(summary.read_text()) == before
    assert "trained" not in (output := capsys.readouterr().out), output


def measured_points(folder: Path) -> dict[str, Measured]:
    return Results(folder, TINY.as_json()).seed(1).points
