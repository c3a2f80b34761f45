"""Tests of the study in tests/bench/evidence: its statistics, merges and verdicts, and a whole run.

Statistics are compared with hand-worked numbers, merges with their definitions, and verdicts are on
made-up results. The run is on a tiny model, and is killed on its way.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bench.evidence import claims, figures, fronts, merges, study
from bench.evidence.claims import CLAIMS
from bench.evidence.curves import CURVES, SFT, Trained
from bench.evidence.fronts import Effect
from bench.evidence.present_tense import score
from bench.evidence.results import Measured, OtherSettingsError, Results
from bench.evidence.settings import (
    ARMS,
    TASKS,
    TINY,
    Settings,
    arm_config,
    reward_configs,
    selected,
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


def test_hypervolume_is_the_area_of_the_stairs() -> None:
    kl, reward = np.array([0.0, 1.0, 3.0, 2.0]), np.array([1.0, 2.0, 4.0, 1.5])
    # from reward 1: nothing up to KL 1, then 1 for two nats (the point at 2 is dominated), then 3
    # for one nat
    assert fronts.hypervolume(kl, reward, 4.0, 1.0) == pytest.approx(2 * 1 + 1 * 3)
    assert fronts.hypervolume(kl, reward, 3.0, 1.0) == pytest.approx(2)
    assert fronts.hypervolume(kl, reward, 2.5, 2.0) == 0
    stacked = fronts.hypervolume(
        np.stack([kl, kl]), np.stack([reward, reward - 1]), 4.0, np.array([1.0, 0.0])
    )
    np.testing.assert_allclose(stacked, [5, 5])


def test_a_front_does_not_gain_hypervolume_by_denser_points() -> None:
    eta = np.linspace(0, 1, 3)
    dense_eta = np.linspace(0, 1, 33)
    sparse, fine = (
        fronts.front_hypervolume(9 * e**2, 2 * e, 12.0, 0.0, steps=2000) for e in (eta, dense_eta)
    )
    assert sparse == pytest.approx(fine, rel=1e-9)
    # ∫ 2·√(k/9) dk to 9, and the last reward from there to 12
    assert sparse == pytest.approx(2 / 3 * 9 * 2 + 3 * 2, rel=2e-3)


def test_chord_joins_the_ends() -> None:
    kl, reward = np.array([[2.0, 0.0, 8.0]]), np.array([[9.0, 1.0, 5.0]])
    np.testing.assert_allclose(fronts.chord_at(kl, reward, np.array([0.0, 4.0, 8.0])), [[1, 3, 5]])


def test_the_bootstrap_is_paired_and_covers_prompts_and_seeds() -> None:
    generator = np.random.default_rng(0)
    weights = fronts.resampling_weights(400, 500, generator)
    np.testing.assert_allclose(weights.sum(1), 1)
    # what prompts have in common cancels in a paired comparison
    prompts = generator.normal(size=400) * 5
    gain = weights @ (prompts + generator.normal(0.3, 0.2, 400)) - weights @ prompts
    one = fronts.paired_bootstrap(gain[None], generator)
    assert one.value == pytest.approx(0.3, abs=0.03)
    assert one.high - one.low == pytest.approx(2 * 1.96 * 0.2 / 20, rel=0.2)
    three = fronts.paired_bootstrap(
        np.stack([gain - 1, gain, gain + 1, np.full_like(gain, np.nan)]), generator
    )
    assert three.value == pytest.approx(one.value)
    assert three.low == pytest.approx(one.value - 1, abs=0.05)  # one seed alone is 4 % of the draws
    assert three.high == pytest.approx(one.value + 1, abs=0.05)
    assert len(three.per_seed) == 3


@pytest.mark.parametrize(
    ("low", "high", "seeds", "verdict"),
    [
        (0.01, 0.4, 3, "reproduced"),
        (0.01, 0.02, 3, "reproduced"),
        (0.01, 0.4, 2, "undecided"),
        (-0.2, 0.04, 3, "not reproduced"),
        (-0.4, -0.1, 3, "not reproduced"),
        (-0.1, 0.2, 3, "undecided"),
    ],
)
def test_verdict(low: float, high: float, seeds: int, verdict: str) -> None:
    assert (
        fronts.verdict(Effect((low + high) / 2, low, high, (0.0,) * seeds), margin=0.05, needed=3)
        == verdict
    )


def test_verdict_on_what_should_be_zero() -> None:
    def verdict(low: float, high: float) -> str:
        return fronts.within(Effect((low + high) / 2, low, high, (0.0,) * 3), margin=10)

    assert verdict(-6, 2) == "reproduced"
    assert verdict(-15, -11) == "not reproduced"
    assert verdict(-12, -8) == "undecided"


def test_verdicts_of_several_parts() -> None:
    assert claims.combined(["reproduced", "reproduced"]) == "reproduced"
    assert claims.combined(["reproduced", "undecided"]) == "undecided"
    assert claims.combined(["undecided", "not reproduced"]) == "not reproduced"


def test_the_present_tense_is_counted() -> None:
    texts = [
        "It's a film that is, is, is and has heart.",
        "It was loved, and it shows",
        "A breed of need, indeed",
        "We laughed",
        "",
    ]
    assert score([""] * len(texts), texts) == [3.0, -1.0, 1.0, -1.0, 0.0]


def test_every_task_is_a_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    configs = {task: arm_config(Settings(task=task), ARMS["warp"], 1, tmp_path) for task in TASKS}
    assert (configs["reviews"].reward.function, configs["present-tense"].reward.model) == (
        None,
        None,
    )
    assert configs["present-tense"].reward.function == "bench.evidence.present_tense:score"
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
    }
    assert configs["smollm2-control"] == configs["reviews"]


def test_another_task_has_the_learning_rate_of_the_first_until_it_has_its_own(
    tmp_path: Path,
) -> None:
    (first := tmp_path / "first").mkdir()
    (second := tmp_path / "second").mkdir()
    assert selected(Settings(), second, first) == Settings()
    (first / "selection.json").write_text('{"lr": 0.25}')
    assert selected(Settings(), second, first).lr == 0.25
    (second / "selection.json").write_text('{"lr": 0.125}')
    assert selected(Settings(), second, first).lr == 0.125


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


def test_every_curve_has_its_arm_and_its_ends() -> None:
    points = {point for curve in CURVES.values() for point in curve.points} | {SFT}
    for curve in CURVES.values():
        assert curve.arm in ARMS
        assert set(curve.front) <= points
        arm = ARMS[curve.arm]
        if curve.name.endswith("-training"):
            assert arm.kept == curve.values
    assert len(points) == 1 + sum(len(curve.values) for curve in CURVES.values())


@pytest.mark.parametrize("arm", ["high-rank", "warp", "warp-i2"])
def test_task_vectors_have_all_the_columns_of_their_arm(tmp_path: Path, arm: str) -> None:
    """Policies as a run leaves them, behind an init of rank 3 where there was an iteration before:
    a vector is what is behind it.
    """
    settings, own = TINY, TINY.rank * ARMS[arm].rank
    before = 3 if ARMS[arm].iterations > 1 else 0
    vectors = [random_delta(seed, (own,) * 4) for seed in (1, 2)]
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


def made_up(seed: int, gains: dict[str, float], prompts: int = 60) -> dict[str, Measured]:
    """Reward √KL + a gain of the curve, KL 12·value²; every prompt has a reward of its own, shared
    by all points.
    """
    generator = np.random.default_rng(seed)
    common = generator.normal(size=prompts)

    def measured(kl: float, gain: float) -> Measured:
        score = common + kl**0.5 * 0.5 + gain * min(kl, 1.0) + generator.normal(0, 0.05, prompts)
        lengths, finished = np.full(prompts, 20.0), np.ones(prompts)
        return Measured(score, score, score, np.full(prompts, kl), lengths, finished, 0.9)

    points = {SFT: measured(0.0, 0.0)}
    for curve in CURVES.values():
        for value in curve.values:
            points[curve.point(value)] = measured(12 * value**2, gains.get(curve.name, 0.0))
    return points


@pytest.fixture
def results(tmp_path: Path) -> Results:
    """Three seeds in which SLERP is better than everything else, and factors are worse than all."""
    results = Results(tmp_path / "results", Settings().as_json())
    for seed in (1, 2, 3):
        results.seed(seed).points.update(made_up(seed, {"slerp": 0.5, "factors": -0.5}))
        block = {"norms": [1.0, 0.9], "angles": [85.0 + seed]}
        for arm in ("warp", "shared"):
            results.seed(seed).facts[arm] = {
                "geometry": {"0": block, "1": block},
                "errors": {"SVD": {"error": 0.5, "length": 0.8}},
            }
        results.save(seed)
    return results


def test_results_are_read_back_and_others_refused(results: Results) -> None:
    again = Results(results.folder, results.settings)
    for number, seed in results.seeds.items():
        assert again.seeds[number].facts == seed.facts
        assert again.seeds[number].points.keys() == seed.points.keys()
        for name, point in seed.points.items():
            np.testing.assert_allclose(
                again.seeds[number].points[name].reward, point.reward, atol=6e-4
            )
            np.testing.assert_allclose(again.seeds[number].points[name].kl, point.kl, atol=6e-4)
    before = (results.folder / "seed-1.npz").read_bytes()
    again.save(1)
    assert (results.folder / "seed-1.npz").read_bytes() == before
    with pytest.raises(OtherSettingsError, match=r"'lr': 0.001"):
        Results(results.folder, {**results.settings, "lr": 1.0})


def test_numbers_of_an_earlier_sampler_are_shown_with_a_warning_and_nothing_is_added_to_them(
    results: Results, tmp_path: Path
) -> None:
    assert not results.are_earlier
    assert study.EARLIER not in study.page({})
    results.seeds[2].sampler = 0
    results.save(2)
    again = Results(results.folder, results.settings)
    assert [seed.sampler for seed in again.seeds.values()] == [1, 0, 1]
    assert again.are_earlier
    assert study.EARLIER in study.page({}, again.are_earlier)
    del again.seeds[2].points["slerp@1"]
    mine = study.Study(Settings(), tmp_path / "out", again, study.Clock(None))
    with pytest.raises(
        OtherSettingsError,
        match=(
            "the numbers of seed 2 in .* were sampled by an earlier version, from rounded weights"
        ),
    ):
        mine.run([2], ["H3"])
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


def test_the_committed_numbers_are_of_an_earlier_sampler_and_say_so() -> None:
    for page in Path(study.__file__).parent.glob("results*/README.md"):
        found = Results(page.parent, {})
        assert found.seeds
        assert (study.EARLIER in page.read_text()) == found.are_earlier


def test_verdicts_and_figures_of_made_up_results(results: Results, tmp_path: Path) -> None:
    of_seeds = claims.samples(Settings(), Results(results.folder, results.settings), resamples=50)
    judged = {name: claims.judge(claim, of_seeds) for name, claim in CLAIMS.items()}
    assert judged["H3"].verdict == "reproduced"
    assert judged["H3"].effects["SLERP over each policy"].value == pytest.approx(0.5, abs=0.15)
    assert judged["H11"].verdict == "reproduced"
    assert judged["H8"].verdict == "not reproduced"
    entry: dict[str, Any] = judged["H3"].as_json("command")
    assert {"verdict", "effect", "interval", "seeds", "command"} <= entry.keys()
    assert entry["interval"][0] < entry["effect"] < entry["interval"][1]
    assert entry["seeds"] == 3
    assert judged["H4"].verdict == "reproduced"
    assert judged["H4"].effects[
        "A independent: median angle of a block − 90"
    ].value == pytest.approx(-3)
    assert judged["H4"].effects[
        "A independent: median norm ratio of a block − 1"
    ].value == pytest.approx(-0.1)
    assert claims.facts_of(CLAIMS["H11"], results)["A independent, seed 2"]["SVD"]["error"] == 0.5
    for name, one in judged.items():
        figures.draw(one, of_seeds, tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").stat().st_size < 250_000


def test_a_part_without_its_points_is_left_out(results: Results) -> None:
    for seed in results.seeds.values():
        del seed.points["svd@1"]
    judged = claims.judge(CLAIMS["H11"], claims.samples(Settings(), results, resamples=20))
    assert "exact over SVD back to r" not in judged.as_json("")["parts"]
    assert judged.verdict == "reproduced"


def test_a_killed_study_continues(
    ray_cluster: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Points that were measured are not measured again, what was trained is not trained again, and
    a redrawing says the same.
    """
    arguments = [
        "--tiny",
        "--claim",
        "H5",
        "--seeds",
        "1",
        "--out",
        str(tmp_path / "run"),
        "--results",
        str(tmp_path / "results"),
    ]
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
    assert set(again) == {SFT, *(point for curve in CLAIMS["H5"].curves for point in curve.points)}
    assert points.keys() < again.keys()
    for name, point in points.items():
        assert f"seed 1: {name}:" not in output
        np.testing.assert_array_equal(point.kl, again[name].kl)
    assert again[SFT].kl.max() == 0
    assert again["training-1@0.75"].kl.mean() > again["training-1@0.25"].kl.mean() > 0
    for name in ("policy-1@1", "slerp@1"):
        assert again[name].kl.mean() > 0

    summary = tmp_path / "results" / "evidence.json"
    before = json.loads(summary.read_text())
    assert before["H5"]["seeds"] == 1
    assert before["H5"]["verdict"] == "undecided"
    summary.unlink()
    assert study.main([*arguments, "--redraw"]) == 0
    assert json.loads(summary.read_text()) == before
    assert (tmp_path / "results" / "H5.png").is_file()


def measured_points(folder: Path) -> dict[str, Measured]:
    return Results(folder, TINY.as_json()).seed(1).points
