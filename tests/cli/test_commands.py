"""Tests that the command line answers wrong input with exit code 2 and one readable message.

This comes before any work starts, and never as a traceback.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_models import WORDS

from raywarp.cli.commands import main
from raywarp.cli.quickstart import QUICKSTART
from raywarp.config.front import ChooseConfig
from raywarp.config.load import load_config
from raywarp.config.schema import ConfigError
from raywarp.run.folder import Run


@pytest.fixture
def command_folder(tmp_path: Path, tiny_llama: Path) -> Iterator[Path]:
    """A folder with a config whose only fault will be the one that a test adds."""
    texts = [f"the film {a} {b}" for a in WORDS[:6] for b in WORDS[6:11]]
    (tmp_path / "prompts.jsonl").write_text(
        "".join(json.dumps({"text": text, "id": n}) + "\n" for n, text in enumerate(texts))
    )
    (tmp_path / "fine_reward.py").write_text(
        "def score(prompts, completions, **columns):\n    return [0.0] * len(completions)\nNUMBER"
        " = 3\n"
    )
    (tmp_path / "raising_reward.py").write_text("import nothing_of_that_name\n")
    tree = {
        "model": str(tiny_llama),
        "out": str(tmp_path / "run"),
        "prompts": {"dataset": str(tmp_path / "prompts.jsonl"), "max_words": 4},
        "reward": {"function": "fine_reward:score"},
        "optim": {"batch_size": 8},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    before = Path.cwd()
    os.chdir(tmp_path)
    yield tmp_path
    os.chdir(before)


def refused(
    capsys: pytest.CaptureFixture[str],
    *overrides: str,
    command: str = "train",
    config: str = "config.yaml",
) -> str:
    """The message of a run that must end with exit code 2."""
    assert main([command, config, *overrides]) == 2
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err + captured.out
    lines = captured.err.splitlines()
    # libraries may have warned before
    first = next(n for n, line in enumerate(lines) if line.startswith("raywarp: "))
    return "\n".join(lines[first:])


def test_an_override_takes_the_place_of_its_alternative() -> None:
    config = load_config(
        QUICKSTART, ["front.choose.eta=0.4", "control.model=embedded:all-minilm-l6-v2"]
    )
    assert config.front.choose == ChooseConfig(eta=0.4)
    assert config.control is not None
    assert config.control.function is None


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["warp.ema_rat=0.1"], ["unknown key 'warp.ema_rat'", "did you mean 'warp.ema_rate'"]),
        (["ema_rate=0.1"], ["unknown key 'ema_rate'", "'warp.ema_rate'"]),
        (["warp.ema_rate=1.5"], ["warp.ema_rate", "less than or equal to 1", "1.5"]),
        (["warp.liti_rate=-0.1"], ["warp.liti_rate", "greater than or equal to 0"]),
        (["warp.policies=0"], ["warp.policies", "greater than or equal to 1"]),
        (["warp.policies=two"], ["warp.policies", "integer", "'two'"]),
        (["warp.advantage=gae"], ["warp.advantage", "'rloo'", "'gae'"]),
        (
            ["rollout.completions_per_prompt=1"],
            ["rollout.completions_per_prompt must be at least 2", "rloo"],
        ),
        (
            ["optim.batch_size=10"],
            ["optim.batch_size=10 is not a multiple of rollout.completions_per_prompt=4"],
        ),
        (["optim.lr=0"], ["optim.lr", "greater than 0"]),
        (["rollout.temperature=.nan"], ["rollout.temperature"]),
        (["front.choose={eta: 0.5, max_kl: 2}"], ["front.choose", "exactly one of eta and max_kl"]),
        (["nonsense"], ["'nonsense' is not of the form key=value"]),
        (["model=no/such/folder/at/all"], ["model", "no/such/folder"]),
        (["model=./missing"], ["missing", "does not exist"]),
        (["model=embedded:gpt5"], ["embedded:gpt5", "embedded:smollm2-135m-instruct"]),
        (["prompts.dataset=./missing.jsonl"], ["missing.jsonl"]),
        (["prompts.column=question"], ["question", "text", "id"]),
        (["prompts.split=test"], ["test"]),
        (["rollout.max_new_tokens=600"], ["rollout.max_new_tokens=600", "512"]),
        (["rollout.max_new_tokens=510"], ["prompts.max_tokens"]),
        (["reward={}"], ["there is no reward", "reward.model", "reward.function"]),
        (["reward.function=fine_reward"], ["module:function"]),
        (["reward.function=missing_module:score"], ["missing_module"]),
        (["reward.function=raising_reward:score"], ["raising_reward", "nothing_of_that_name"]),
        (["reward.function=fine_reward:missing"], ["fine_reward", "missing"]),
        (["reward.function=fine_reward:NUMBER"], ["not a function"]),
        (["reward={model: ./missing}"], ["missing", "does not exist"]),
        (["reward={model: ./here, function: 'a:b'}"], ["reward", "both"]),
    ],
)
def test_wrong_input(
    command_folder: Path, capsys: pytest.CaptureFixture[str], overrides: list[str], words: list[str]
) -> None:
    message = refused(capsys, *overrides)
    assert all(word in message for word in words), message
    assert not (command_folder / "run").exists()


def test_wrong_files(
    command_folder: Path, capsys: pytest.CaptureFixture[str], tiny_llama: Path
) -> None:
    assert "nowhere.yaml" in refused(capsys, config="nowhere.yaml")
    (command_folder / "broken.yaml").write_text("model: [unclosed")
    assert "not valid YAML" in refused(capsys, config="broken.yaml")
    (command_folder / "list.yaml").write_text("- 1\n- 2\n")
    assert "keys and values" in refused(capsys, config="list.yaml")
    (command_folder / "typo.yaml").write_text("warp: {polices: 3}\n")
    assert "did you mean 'warp.policies'" in refused(capsys, config="typo.yaml")
    # a language model is no reward model: two labels by default, not one
    assert "num_labels=2" in refused(capsys, f"reward={{model: {tiny_llama}}}")


def test_a_folder_that_holds_something_else(
    command_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (command_folder / "run").mkdir()
    (command_folder / "run" / "thesis.txt").write_text("mine")
    assert "holds no run of raywarp" in refused(capsys)
    (command_folder / "run" / "config.yaml").write_text(
        (command_folder / "config.yaml").read_text()
    )
    assert "holds a different run" in refused(capsys, "warp.steps=3")
    assert (command_folder / "run" / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize(
    "left",
    [
        "tensorboard/events",
        ".preflight-0f",
        ".node-0f",
        ".config.yaml.0f",
        "loggers.json",
        ".loggers.json.0f",
    ],
)
def test_a_start_that_failed_leaves_a_folder_that_can_be_started_in(
    tmp_path: Path, left: str
) -> None:
    """Loggers start before the configuration is written, and so do the checks, in which a process
    may be killed.
    """
    (tmp_path / "run" / left).parent.mkdir(parents=True)
    (tmp_path / "run" / left).write_text("")
    Run.open(load_config({"out": str(tmp_path / "run")}))
    (tmp_path / "run" / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match="holds no run of raywarp"):
        Run.open(load_config({"out": str(tmp_path / "run")}))


def test_reward_stage_refuses_too(
    command_folder: Path, capsys: pytest.CaptureFixture[str], ray_cluster: Any
) -> None:
    assert "./missing.csv does not exist" in refused(
        capsys, "preferences.dataset=./missing.csv", command="reward"
    )
    message = refused(
        capsys, f"preferences.dataset={command_folder / 'prompts.jsonl'}", command="reward"
    )
    assert "chosen and rejected, or text and rating" in message
    assert "backbone" in refused(capsys, "reward_training.backbone=./missing", command="reward")


def test_more_than_the_cluster_has(
    command_folder: Path, capsys: pytest.CaptureFixture[str], ray_cluster: Any
) -> None:
    """It is asked for all the same, since nodes may come; each time with the reasons."""
    soon = "cluster.wait_seconds=1"
    more = ("cluster.gpus_per_policy=1", "cluster.gpus_per_rollout_worker=2")
    message = refused(capsys, soon, *more)
    assert "raywarp: waited " in message
    assert (
        "asks for 3 GPUs (1 policy x 1 + 1 rollout worker x 2), the cluster has 0 of 0 available"
        in message
    )
    assert "cluster.gpus_per_policy" in message
    message = refused(capsys, soon, "cluster.cpus_per_policy=64")
    assert "CPUs" in message
    assert "cluster.cpus_per_policy" in message


def test_help_names_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("quickstart", "reward", "train"):
        with pytest.raises(SystemExit) as stopped:
            main([command, "--help"])
        assert stopped.value.code == 0
        text = capsys.readouterr().out
        assert "warp.ema_rate: mu, rate at which the EMA follows the policy" in text
        assert "control.function" in text


def test_no_command_is_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([])
    assert stopped.value.code == 2
    assert "usage: raywarp" in capsys.readouterr().err


def test_a_config_round_trips(tmp_path: Path) -> None:
    from raywarp.config.load import load_config, to_yaml

    config = load_config(
        None, ["warp.policies=5", "optim.lr=1e-4", "front.etas=[0, 0.1]", "front.choose={eta: 0.1}"]
    )
    assert (config.warp.policies, config.optim.lr, config.front.etas) == (5, 1e-4, [0, 0.1])
    (tmp_path / "saved.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "saved.yaml") == config


def test_shares_that_name_something_twice_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["front", "a", "b", "--out", "c", "--weights", "good=.9,good=.1,short=.5"])
    assert end.value.code == 2
    assert "'good=.9,good=.1,short=.5' names good twice" in capsys.readouterr().err
