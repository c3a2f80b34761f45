"""Tests that the other commands accept what `raywarp config` writes."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from raywarp.cli.commands import main
from raywarp.cli.config import commented, schema
from raywarp.config.load import config_help, load_config
from raywarp.config.schema import Config

CONFIGS = sorted((Path(__file__).parents[2] / "cluster" / "configs").glob("*.yaml"))


def errors(tree: Any) -> list[str]:
    found = list(Draft202012Validator(schema()).iter_errors(tree))
    return [error.message for outer in found for error in (outer, *(outer.context or ()))]


def test_the_commented_configuration_is_the_default_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "new.yaml"
    assert main(["config", "--init", str(path)]) == 0
    assert path.read_text() == commented()
    assert load_config(path) == Config()
    assert main(["config", "--init"]) == 0
    assert capsys.readouterr().out == commented()
    path.write_text("model: mine\n")
    assert main(["config", "--init", str(path)]) == 2
    assert path.read_text() == "model: mine\n"
    assert "is there already" in capsys.readouterr().err


def test_every_key_that_help_explains_is_in_it_with_its_description() -> None:
    text = " ".join(commented().replace("#", " ").split())
    for line in config_help().replace("%%", "%").splitlines()[1:]:
        key, _, description = line.strip().partition(": ")
        assert f" {key.partition(' ')[0].rpartition('.')[2]}:" in text, key
        assert " ".join(description.rpartition("]: ")[2].split()) in text, key


def test_what_is_commented_out_may_be_let_in(tmp_path: Path) -> None:
    """All of it at once: each of these keys is known, in its place."""
    known = {
        name
        for line in config_help().splitlines()[1:]
        for name in line.strip().partition(":")[0].partition(" ")[0].split(".")
    }
    lines = []
    for line in commented().splitlines():
        bare = line.replace("# ", "", 1)
        opened = (
            line.lstrip().startswith("# ") and bare.split(":")[0].strip() in known and ":" in bare
        )
        whole = (
            opened
            and bare.partition(":")[2][:1] in ("", " ")
            and (not bare.partition(":")[2] or yaml.safe_load(bare) is not None)
        )
        lines.append(bare if whole else line)
    path = tmp_path / "all.yaml"
    path.write_text("\n".join(lines))
    config = load_config(path, ["reward.function=null", "tune.ema_rate={grid: [0.1]}"])
    assert config.control is not None
    assert config.reward_training.lora is not None
    assert config.reward_training.lora.rank == 16
    assert config.tune is not None


def test_the_schema_takes_what_the_commands_take(capsys: pytest.CaptureFixture[str]) -> None:
    Draft202012Validator.check_schema(schema())
    assert CONFIGS
    for path in CONFIGS:
        assert errors(yaml.safe_load(path.read_text())) == [], path.name
    assert errors(yaml.safe_load(commented())) == []
    assert main(["config", "--schema"]) == 0
    assert json.loads(capsys.readouterr().out) == schema()


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"warp": {"polices": 2}}, "'polices' was unexpected"),
        ({"warp": {"policies": 0}}, "0 is less than the minimum of 1"),
        ({"dtype": "float8"}, "is not one of"),
        ({"tune": {"ema_rate": {"grid": [0.1], "choice": [0.2]}}}, "too many properties"),
        ({"tune": {"ema_rate": {"grit": [0.1]}}}, "'grit' was unexpected"),
    ],
)
def test_the_schema_refuses_what_they_refuse(tree: dict[str, Any], message: str) -> None:
    assert any(message in error for error in errors(tree)), errors(tree)
