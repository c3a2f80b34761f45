"""Tests of when a run's prompts were rendered, and of newer settings in keys."""

from pathlib import Path

import pytest

from raywarp.config.load import parse_config
from raywarp.config.schema import Config, ConfigError
from raywarp.data.moment import MOMENT_FILE, keep_moment, stored_moment
from raywarp.run.config_file import differing_keys
from raywarp.run.keys import ceiling_key, key_chain, key_of_numerics, used_settings
from raywarp.storage.location import Storage


def test_the_first_moment_of_a_store_stays(tmp_path: Path) -> None:
    config = parse_config({"out": str(tmp_path / "run"), "store": str(tmp_path / "store")})
    store = Storage(tmp_path / "store")
    assert stored_moment(config) is None
    keep_moment(store, None)  # a template without a date
    assert stored_moment(config) is None
    keep_moment(store, "2026-11-03T12:00:00")
    keep_moment(store, "2026-11-03T12:00:00")
    found = stored_moment(config)
    assert found is not None
    assert found.isoformat() == "2026-11-03T12:00:00"
    with pytest.raises(ConfigError, match="start this run again"):
        keep_moment(store, "2026-11-04T12:00:00")
    path = tmp_path / "store" / MOMENT_FILE
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ConfigError, match=r"prompts\.json.*Without the file"):
        stored_moment(config)


def test_newer_settings_enter_keys_only_where_they_are_used() -> None:
    inputs = {"base": "b", "prompts": "p", "reward": "r"}
    plain, stopping = Config(), parse_config({"rollout": {"stop": ["END", "STOP"]}})
    assert "stop" not in used_settings(plain, {"rollout"})["rollout"]
    assert used_settings(stopping, {"rollout"})["rollout"]["stop"] == ["END", "STOP"]
    assert key_chain(plain, inputs) != key_chain(stopping, inputs)
    assert key_of_numerics(plain, inputs) != key_of_numerics(stopping, inputs)
    assert ceiling_key(plain, "p", inputs) != ceiling_key(stopping, "p", inputs)
    swapped = parse_config({"rollout": {"stop": ["STOP", "END"]}})
    assert key_chain(swapped, inputs) == key_chain(stopping, inputs)


def test_other_arguments_of_the_template_are_another_run() -> None:
    own = {"template": "chat", "template_kwargs": {"enable_thinking": False}}
    config = parse_config({"prompts": own})
    without = parse_config({"prompts": {"template": "chat"}})
    assert differing_keys(config.model_dump(mode="json"), config) == []
    for theirs, ours in ((config, without), (without, config)):
        (found,) = differing_keys(theirs.model_dump(mode="json"), ours)
        assert found.startswith("prompts.template_kwargs is ")
