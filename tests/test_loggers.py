from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from raywarp.config import ConfigError, parse_config
from raywarp.loggers import Loggers, check_loggers


def test_tensorboard_reads_back_what_was_logged(tmp_path: Path) -> None:
    config = parse_config({"loggers": ["tensorboard"]})
    check_loggers(config)
    with Loggers(config, tmp_path) as loggers:
        for step, reward in enumerate((0.5, 1.5)):
            loggers.log({"iteration": 1, "policy": 2, "key": "abc", "step": step, "reward": reward})
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert events.Tags()["scalars"] == ["reward/iteration_1_policy_2"]
    assert [(e.step, e.value) for e in events.Scalars("reward/iteration_1_policy_2")] == [(0, 0.5), (1, 1.5)]


def test_a_logger_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"mlflow is not installed; pip install 'raywarp\[mlflow\]'"):
        check_loggers(parse_config({"loggers": ["mlflow"]}))
    check_loggers(parse_config({}))
