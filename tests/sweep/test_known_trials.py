"""Tests of which trials of a sweep are known, and not measured again."""

from types import SimpleNamespace
from typing import Any

import pytest

from raywarp.config.load import load_config
from raywarp.run.keys import front_key
from raywarp.sweep import trial


def test_a_soup_is_known_by_its_fronts_key_with_the_merges(monkeypatch: pytest.MonkeyPatch) -> None:
    rewards = [{"name": "helpful", "function": "a:b"}, {"name": "brief", "function": "a:c"}]
    front = {"ceiling_completions": 0}
    config = load_config({"recipe": "soup", "rewards": rewards, "front": front})
    key = front_key(config, "evaluation", ["a", "b"], config.mixes)
    monkeypatch.setattr(trial, "is_current", lambda *given: True)
    finished: Any = SimpleNamespace(
        own=config,
        inputs=SimpleNamespace(front="evaluation", measured=lambda config: config),
        record=SimpleNamespace(rows=[{}]),
        run=SimpleNamespace(has_front=lambda own: own == key, front=lambda: {"points": [{}]}),
        _chain=lambda: [["a", "b"]],
        _stored_ceiling=lambda: None,
        _row=lambda *row: row,
    )
    assert config.mixes
    assert trial.Trial._known(finished, 1) == (1, ["a", "b"], key, [{}], None)
