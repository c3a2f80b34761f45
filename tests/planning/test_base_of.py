"""Test of what `raywarp front` takes from the adapters' own configuration."""

from dataclasses import replace
from pathlib import Path

import pytest
from conftest import random_delta

from raywarp import front_stage
from raywarp.adapters.peft import save_peft
from raywarp.cli.commands import main
from raywarp.config.schema import Config, ConfigError


def test_a_front_is_of_the_base_that_its_adapters_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its name, and that it is held in 4 bits; what the user says comes after both."""
    seen: list[Config] = []

    def front(adapters: list[str], config: Config, *_: object) -> None:
        seen.append(config)
        raise ConfigError("enough")

    monkeypatch.setattr(front_stage, "front", front)
    plain = replace(random_delta(1), base_model="some/base")
    save_peft(plain, tmp_path / "plain")
    save_peft(replace(plain, peft={"base_quantize": "nf4"}), tmp_path / "four")
    reward = ["--reward", "raywarp.embedded:vader", "--prompts", "some/prompts"]
    found = []
    for name, *given in (
        ["plain"],
        ["four"],
        ["four", "base.quantize=none"],
        ["four", "--model", "my/base"],
    ):
        out = str(tmp_path / "out")
        assert main(["front", str(tmp_path / name), *given, *reward, "--out", out]) == 2
        found.append((seen[-1].model, seen[-1].base.quantize))
    assert found == [
        ("some/base", "none"),
        ("some/base", "nf4"),
        ("some/base", "none"),
        ("my/base", "nf4"),
    ]
