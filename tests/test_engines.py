"""What is refused before anything starts, and the fallback engine's sampler."""

import importlib.util
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from raywarp.config import ConfigError, parse_config
from raywarp.engines import check_engine, front_rank, lora_slots
from raywarp.transformers_engine import draw, uniform_numbers


def test_ranks_that_vllm_has_slots_for() -> None:
    assert [lora_slots(rank) for rank in (1, 8, 9, 65, 512)] == [8, 8, 16, 128, 512]
    assert lora_slots(513, refuse=False) == 0
    with pytest.raises(ConfigError, match=r"lora\.rank=513 exceeds vLLM's largest, 512; use rollout\.adapter=merged"):
        check_engine(parse_config({"lora": {"rank": 513}, "rollout": {"adapter": "lora"}}))
    check_engine(parse_config({"lora": {"rank": 513}, "rollout": {"adapter": "merged"}}))


def test_slots_are_for_policies_and_for_the_front_up_to_64() -> None:
    warp = {"iterations": 2, "policies": 2}
    assert front_rank(parse_config({"lora": {"rank": 8}, "warp": warp})) == 32
    assert front_rank(parse_config({"lora": {"rank": 32}, "warp": warp})) == 64  # not 128
    assert front_rank(parse_config({"lora": {"rank": 128}, "warp": warp})) == 128


def test_no_vllm_names_the_extra_and_the_fallback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"not installed: .*raywarp\[gpu\].*raywarp\[cpu\].*local\.sh.*rollout\.engine=transformers"):
        check_engine(parse_config({}))
    check_engine(parse_config({"rollout": {"engine": "transformers"}}))


@pytest.mark.parametrize(("rollout", "key"), [({"adapter": "lora"}, "rollout.adapter"), ({"tensor_parallel_size": 2}, "rollout.engine")])
def test_what_transformers_cannot_do(rollout: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError, match=key.replace(".", r"\.")):
        check_engine(parse_config({"rollout": {"engine": "transformers", **rollout}}))


def test_a_draw_inverts_the_distribution_function() -> None:
    """Probabilities .5, 0, .25, .25 at temperature 2: the logits are twice the log-probs."""
    logits = 2 * torch.tensor([[math.log(0.5), -math.inf, math.log(0.25), math.log(0.25)]]).expand(6, 4)
    tokens, logprobs = draw(logits, 2.0, torch.tensor([0.0, 0.49, 0.51, 0.74, 0.76, 1 - 1e-16], dtype=torch.float64))
    assert tokens.tolist() == [0, 0, 2, 2, 3, 3]
    torch.testing.assert_close(logprobs.exp(), torch.tensor([0.5, 0.5, 0.25, 0.25, 0.25, 0.25]))


def test_random_numbers_depend_on_the_own_seed_alone() -> None:
    together = uniform_numbers([5, 6, 7], 4)
    assert torch.equal(together[1:2], uniform_numbers([6], 4))
    assert len(set(together.flatten().tolist())) == 12
    assert together.min() >= 0
    assert together.max() < 1


def test_a_vllm_that_cannot_be_imported_names_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Installed, but broken: found out when the engine starts."""
    from raywarp.engines import EngineSettings, start_engine

    (tmp_path / "vllm.py").write_text("raise ImportError('libcuda.so.1: cannot open shared object file')")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in [name for name in __import__("sys").modules if name.partition(".")[0] == "vllm"]:
        monkeypatch.delitem(__import__("sys").modules, name)
    settings = EngineSettings("nowhere", "float32", 16, 8, parse_config({}).rollout, gpu=False)
    with pytest.raises(ConfigError, match=r"libcuda.*raywarp\[cpu\].*rollout\.engine=transformers"):
        start_engine(settings)
