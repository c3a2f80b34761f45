"""Tests of the section `tune`: what it means, and how a wrong one is refused.

A wrong section ends with exit code 2 and one message, before Ray starts.
"""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_models import save_tiny_llama

from raywarp.cli.commands import main
from raywarp.config.load import load_config, parse_config, to_yaml
from raywarp.config.schema import Config, ConfigError
from raywarp.config.search import describe, name_of, resolve_key, search_space
from raywarp.planning.plan import policy_runs

EMA, LITI = {"grid": [0.1, 0.4]}, {"grid": [0.3, 0.6, 1]}


def config(tune: dict[str, Any], **sections: Any) -> Config:
    return parse_config({"tune": tune, **sections})


def test_a_grid_is_every_combination_and_what_the_first_iteration_does_not_need_varies_last() -> (
    None
):
    space = search_space(config({"ema_rate": EMA, "liti_rate": LITI}))
    assert space.search == "grid"
    rates = [(point["warp.ema_rate"], point["warp.liti_rate"]) for point in space.points]
    assert rates == [(0.1, 0.3), (0.4, 0.3), (0.1, 0.6), (0.4, 0.6), (0.1, 1.0), (0.4, 1.0)]
    assert describe(space.points[0]) == "ema_rate=0.1, liti_rate=0.3"
    first = space.config(space.points[0])
    assert (first.warp.ema_rate, first.warp.liti_rate) == (0.1, 0.3)
    # every trial's front has the same points
    assert first.front.etas == [
        0.0,
        0.25,
        0.3,
        0.5,
        0.6,
        0.75,
        1.0,
    ]


def test_what_is_shared_is_known_in_advance() -> None:
    warp = {"iterations": 2, "policies": 2}
    assert policy_runs(search_space(config({"ema_rate": EMA, "liti_rate": LITI}, warp=warp))) == (
        24,
        16,
    )
    assert policy_runs(
        search_space(config({"liti_rate": LITI}, warp={**warp, "iterations": 1}))
    ) == (6, 2)
    assert policy_runs(
        search_space(config({"policies": {"grid": [1, 2, 3]}}, warp={**warp, "iterations": 1}))
    ) == (6, 3)
    assert policy_runs(search_space(config({"front.prompts": {"grid": [20, 40]}}, warp=warp))) == (
        8,
        4,
    )
    assert policy_runs(search_space(config({"seed": {"grid": [0, 1]}}, warp=warp))) == (8, 8)
    bases = {"base.quantize": {"grid": ["none", "nf4"]}, "sft_adapter": {"grid": ["a", "b"]}}
    for key, values in bases.items():
        assert policy_runs(search_space(config({key: values}, warp=warp))) == (8, 8)


def test_the_largest_trial_has_the_widest_base_in_any_order() -> None:
    dtypes = ["bfloat16", "auto", "float32"]
    for order in (1, -1):
        tune = {
            "base.quantize": {"grid": ["nf4", "none"][::order]},
            "dtype": {"grid": dtypes[::order]},
            "policies": {"grid": [1, 3, 2]},
        }
        largest = search_space(config(tune)).largest()
        found = (largest.base.quantize, largest.dtype, largest.warp.policies)
        assert found == ("none", "float32", 3)
    for few in (["bfloat16", "auto"], ["auto", "float16"]):
        assert search_space(config({"dtype": {"grid": few}})).largest().dtype == "auto"
    narrow = {"dtype": {"grid": ["float16", "bfloat16"]}}
    assert search_space(config(narrow)).largest().dtype == "float16"


def test_equal_values_are_one_trial() -> None:
    space = search_space(
        config({"lr": {"grid": [5e-4, "5e-4", 0.0005, 0.001]}, "policies": {"grid": [2, 2.0]}})
    )
    assert len(space.points) == 2
    assert name_of(space.points[0]) == name_of({"optim.lr": 0.0005, "warp.policies": 2})


def test_samples_are_the_seeds_within_their_range_and_the_same_again() -> None:
    tune = {
        "ema_rate": {"loguniform": [0.005, 0.2]},
        "kl_coef": {"uniform": [0.0, 0.5]},
        "iterations": {"randint": [1, 3]},
        "advantage": {"choice": ["rloo", "none"]},
        "num_samples": 200,
        "seed": 3,
    }
    points = search_space(config(tune)).points
    assert search_space(config(tune)).points == points
    assert search_space(config({**tune, "seed": 4})).points != points
    assert search_space(config({**tune, "num_samples": 100})).points == points[:100]
    rates = sorted(point["warp.ema_rate"] for point in points)
    assert 0.005 <= rates[0] < rates[-1] <= 0.2
    # half lie below the geometric mean
    assert math.sqrt(0.005 * 0.2) / 1.3 < rates[100] < math.sqrt(0.005 * 0.2) * 1.3
    assert {point["warp.iterations"] for point in points} == {1, 2}
    assert {point["warp.advantage"] for point in points} == {"rloo", "none"}
    assert all(0 <= point["warp.kl_coef"] < 0.5 for point in points)


def test_grids_in_a_random_search_are_repeated_by_every_sample() -> None:
    space = search_space(
        config({"ema_rate": {"uniform": [0.1, 0.2]}, "liti_rate": LITI, "num_samples": 2})
    )
    assert space.search == "random"
    assert len(space.points) == space.trials == 6
    assert len({point["warp.ema_rate"] for point in space.points}) == 6


def test_short_keys_mean_the_only_key_that_ends_with_them() -> None:
    assert resolve_key("ema_rate") == resolve_key("warp.ema_rate") == "warp.ema_rate"
    assert resolve_key("seed") == "seed"
    assert resolve_key("lr") == "optim.lr"  # the reward model's own is not of a trial
    assert resolve_key("choose.max_kl") == "front.choose.max_kl"


def test_keys_of_a_single_policy() -> None:
    tune = {
        "each.2.lr": {"grid": [1e-3, 2e-3]},
        "warp.each.1.rewards.good": {"grid": [0.5, 1.0]},
    }
    rewards = [{"name": name, "function": f"mine:{name}"} for name in ("good", "short")]
    base = {"rewards": rewards, "warp": {"policies": 2}, "tune": tune}
    space = search_space(parse_config(base))
    assert space.trials == 4
    trial = space.config(space.points[-1])
    assert trial.warp.each == [{"rewards": {"good": 1.0}}, {"optim.lr": 2e-3}]
    assert [own.optim.lr for own in trial.of_policies] == [Config().optim.lr, 2e-3]
    assert describe(space.points[-1]) == "each.2.lr=0.002, each.1.good=1"
    for key, message in (
        ("each.3.lr", "warp.each.3.optim.lr: the run has 2 policies"),
        ("each.1.temperature", "temperature cannot differ between the policies of a run"),
        ("each.1.rewards.none", "no reward has the name none"),
    ):
        with pytest.raises(ConfigError, match=f"tune.*{message}"):
            search_space(parse_config({**base, "tune": {key: {"grid": [1.0, 2.0]}}}))


def test_the_section_survives_being_saved(tmp_path: Path) -> None:
    before = config(
        {
            "ema_rate": {"loguniform": [0.005, 0.2]},
            "liti_rate": LITI,
            "search": "asha",
            "objectives": ["kl"],
        }
    )
    (tmp_path / "saved.yaml").write_text(to_yaml(before))
    assert load_config(tmp_path / "saved.yaml") == before


def test_overrides_reach_into_it() -> None:
    overrides = [
        "tune.ema_rate={grid: [0.1]}",
        "tune.warp.liti_rate={uniform: [0.2, 0.4]}",
        "tune.num_samples=3",
    ]
    space = search_space(load_config({"tune": {"ema_rate": EMA}}, overrides))
    assert {key: domain.values for key, domain in space.domains.items()} == {
        "warp.ema_rate": [0.1],
        "warp.liti_rate": [0.2, 0.4],
    }
    assert space.trials == 3


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "nothing to search": ({}, "tune has no key to search"),
    "only settings": ({"search": "random"}, "tune has no key to search"),
    "a value": ({"ema_rate": 0.1}, "ema_rate is no setting (search, num_samples"),
    "a list": ({"ema_rate": [0.1, 0.2]}, "ema_rate is no setting"),
    "a setting of another name": ({"ema_rate": EMA, "serch": "grid"}, "serch is no setting"),
    "an unknown key": ({"ema_rat": EMA}, "unknown key 'ema_rat'; did you mean 'warp.ema_rate'?"),
    "an unknown dotted key": ({"warp.ema_rat": EMA}, "did you mean 'warp.ema_rate'?"),
    "an ambiguous key": (
        {"batch_size": {"grid": [8]}},
        "batch_size is ambiguous: reward.batch_size or control.batch_size or optim.batch_size",
    ),
    "a key within its section": (
        {"warp": {"ema_rate": EMA}},
        "tune.warp: 'ema_rate' is none of grid, choice",
    ),
    "one key twice": ({"ema_rate": EMA, "warp.ema_rate": EMA}, "both mean warp.ema_rate"),
    "a section and its key": (
        {"front.choose": {"grid": [{"eta": 1}]}, "front.choose.eta": {"grid": [1]}},
        "both mean front.choose",
    ),
    "the place": ({"out": {"grid": ["a", "b"]}}, "a trial's policies do not depend on out"),
    "the cluster": ({"cluster.threads": {"grid": [1, 2]}}, "do not depend on cluster.threads"),
    "another stage's": (
        {"reward_training.lr": {"grid": [1]}},
        "do not depend on reward_training.lr",
    ),
    "itself": ({"num_samples": {"grid": [1]}}, "unknown key 'num_samples'"),
    "an unknown kind": (
        {"ema_rate": {"normal": [0, 1]}},
        "'normal' is none of grid, choice, uniform, loguniform, randint",
    ),
    "two kinds": ({"ema_rate": {"grid": [0.1], "choice": [0.2]}}, "needs exactly one of grid"),
    "no kind": ({"ema_rate": {}}, "needs exactly one of grid"),
    "an empty grid": (
        {"ema_rate": {"grid": []}},
        "tune.ema_rate.grid: list should have at least 1 item",
    ),
    "a grid that is a number": (
        {"ema_rate": {"grid": 0.1}},
        "tune.ema_rate.grid: input should be a valid list",
    ),
    "an empty range": ({"ema_rate": {"uniform": [0.2, 0.2]}}, "uniform: [0.2, 0.2] is empty"),
    "a range upside down": (
        {"ema_rate": {"loguniform": [0.2, 0.1]}},
        "loguniform: [0.2, 0.1] is empty",
    ),
    "a range of one": ({"ema_rate": {"uniform": [0.2]}}, "tune.ema_rate.uniform"),
    "a range of words": (
        {"ema_rate": {"uniform": ["a", "b"]}},
        "tune.ema_rate.uniform.0: input should be a valid number",
    ),
    "NaN": (
        {"ema_rate": {"uniform": [0.1, math.nan]}},
        "tune.ema_rate.uniform.1: input should be a finite number",
    ),
    "a logarithm of 0": (
        {"ema_rate": {"loguniform": [0, 0.2]}},
        "has no logarithm; its lower end must be above 0",
    ),
    "a logarithm of less": ({"ema_rate": {"loguniform": [-1, 0.2]}}, "has no logarithm"),
    "fractions of whole numbers": (
        {"policies": {"randint": [1.5, 3]}},
        "tune.policies.randint.0: input should be a valid integer",
    ),
    "a value out of range": (
        {"ema_rate": {"grid": [0.1, 1.5]}},
        "with ema_rate=1.5: warp.ema_rate: input should be less than or equal to 1",
    ),
    "an end out of range": (
        {"ema_rate": {"uniform": [0.1, 1.5]}},
        "with ema_rate=1.5: warp.ema_rate: input should be less",
    ),
    "a value of another kind": (
        {"advantage": {"choice": ["rloo", "gae"]}},
        "warp.advantage: input should be 'rloo'",
    ),
    "a number that is not whole": (
        {"policies": {"uniform": [1, 3]}},
        "warp.policies: input should be a valid integer",
    ),
    "values that do not go together": (
        {"optim.batch_size": {"grid": [8, 10]}},
        "is not a multiple of rollout.completions_per_prompt=4",
    ),
    "an unknown search": (
        {"ema_rate": EMA, "search": "bayes"},
        "tune.search: input should be 'grid', 'random', 'asha' or 'optuna'",
    ),
    "a range in a grid": (
        {"ema_rate": {"uniform": [0, 1]}, "search": "grid"},
        "tune.search=grid takes grids only, and warp.ema_rate is uniform",
    ),
    "a grid for optuna": (
        {"ema_rate": EMA, "search": "optuna"},
        "tune.search=optuna chooses the values itself, and warp.ema_rate is a grid",
    ),
    "asha with one iteration": (
        {"ema_rate": EMA, "search": "asha"},
        "ends trials between iterations, and warp.iterations=1",
    ),
    "asha with two objectives": (
        {"ema_rate": EMA, "search": "asha", "objectives": ["kl", "reward"]},
        "compares trials by one objective",
    ),
    "an unknown objective": (
        {"ema_rate": EMA, "objectives": ["loss"]},
        "tune.objectives.0: input should be 'hypervolume'",
    ),
    "an objective twice": ({"ema_rate": EMA, "objectives": ["kl", "kl"]}, "names one twice"),
    "no objective": (
        {"ema_rate": EMA, "objectives": []},
        "tune.objectives: list should have at least 1 item",
    ),
    "an objective without its score": (
        {"ema_rate": EMA, "objectives": ["control"]},
        "the configuration has no control score",
    ),
    "a share of no ceiling": (
        {
            "ema_rate": EMA,
            "objectives": ["ceiling_share"],
            "front.ceiling_completions": {"grid": [0, 32]},
        },
        "tune.objectives has ceiling_share, and front.ceiling_completions=0 measures no ceiling",
    ),
    "no sample": (
        {"ema_rate": {"uniform": [0, 1]}, "num_samples": 0},
        "tune.num_samples: input should be greater than or equal to 1",
    ),
    "too many trials": (
        {"seed": {"grid": list(range(200))}, "kl_to_sft_every": {"grid": list(range(1, 100))}},
        "tune has 19800 trials",
    ),
    "no room for any": (
        {"ema_rate": EMA, "max_concurrent": 0},
        "tune.max_concurrent: input should be greater than or equal to 1",
    ),
    "modules that do not exist": (
        {"lora.target_modules": {"grid": ["all-linear", ["nothing"]]}},
        "lora.target_modules=['nothing'] does not fit",
    ),
    "a reward that is not there": (
        {"reward.function": {"choice": ["nowhere:score"]}, "search": "random"},
        "nowhere",
    ),
}


@pytest.fixture(scope="module")
def search_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("space")
    save_tiny_llama(folder / "model")
    (folder / "own_reward.py").write_text(
        "def score(prompts, completions, **columns):\n    return [0.0] * len(completions)\n"
    )
    (folder / "prompts.jsonl").write_text(
        "".join(
            json.dumps({"text": f"the film {word}"}) + "\n"
            for word in ("is", "was", "of", "in", "I")
        )
    )
    return folder


@pytest.fixture
def inside(search_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(search_folder)
    monkeypatch.syspath_prepend(search_folder)
    monkeypatch.setattr("ray.init", lambda *args, **options: pytest.fail("Ray was started"))
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    return search_folder


def write(tune: dict[str, Any]) -> None:
    tree = {
        "model": "./model",
        "prompts": {"dataset": "./prompts.jsonl"},
        "reward": {"function": "own_reward:score"},
        "warp": {"iterations": 1},
        "rollout": {"engine": "transformers", "max_new_tokens": 4},
        "out": "sweep",
        "tune": tune,
    }
    Path("bad.yaml").write_text(yaml.safe_dump(tree))


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_message(
    case: str, inside: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tune, message = BAD[case]
    write(tune)
    assert main(["tune", "bad.yaml"]) == 2
    said = capsys.readouterr().err
    assert message in said, said
    assert "Traceback" not in said
    assert not Path("sweep").exists()


@pytest.mark.parametrize(
    ("package", "settings"), [("optuna", {"search": "optuna"}), ("mlflow", {})]
)
def test_a_package_that_is_missing_is_named(
    package: str,
    settings: dict[str, Any],
    inside: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec",
        lambda name, *rest: None if name == package else find(name, *rest),
    )
    write({"ema_rate": {"uniform": [0.1, 0.2]}, **settings})
    assert main(["tune", "bad.yaml", *(["loggers=[mlflow]"] if package == "mlflow" else [])]) == 2
    assert (
        f"{package} is not installed; pip install 'raywarp[{package}]'" in capsys.readouterr().err
    )


def test_a_config_without_the_section_is_told_how_it_looks() -> None:
    with pytest.raises(ConfigError, match=r"for example tune: \{ema_rate"):
        search_space(parse_config({}))
