"""Tests of what an engine refuses before anything starts, and of the fallback engine's sampler."""

import importlib.util
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from raywarp.config.load import parse_config
from raywarp.config.schema import ConfigError
from raywarp.rollout.engine import (
    EngineSettings,
    check_engine,
    check_mode,
    largest_rank,
    lora_slots,
)
from raywarp.rollout.transformers_engine import draw, uniform_numbers
from raywarp.rollout.vllm import models as vllm_models


def test_ranks_that_vllm_has_slots_for() -> None:
    assert [lora_slots(rank) for rank in (1, 8, 9, 65, 512)] == [8, 8, 16, 128, 512]
    assert lora_slots(513) == 0
    settings = {
        "dtype": "float32",
        "lora": {"rank": 129},
        "warp": {"iterations": 2, "policies": 2},
        "rollout": {"adapter": "lora"},
    }
    with pytest.raises(
        ConfigError,
        match=(
            r"reach rank 516 \(lora\.rank=129 .* vLLM's largest is 512; lower .*lora\.init=frozen"
        ),
    ):
        check_engine(parse_config(settings))
    check_engine(parse_config(settings | {"lora": {"rank": 128}}))
    check_engine(parse_config(settings | {"lora": {"rank": 129, "init": "frozen"}}))
    check_engine(parse_config(settings | {"rollout": {"adapter": "merged"}}))


def test_the_largest_rank_is_the_last_merges() -> None:
    """Or, where a frozen A keeps merges small, that of a policy beside its init."""
    warp = {"iterations": 3, "policies": 2}
    assert largest_rank(parse_config({"lora": {"rank": 8}, "warp": warp})) == 48
    assert largest_rank(parse_config({"lora": {"rank": 8, "init": "frozen"}, "warp": warp})) == 16
    assert (
        largest_rank(
            parse_config({"lora": {"rank": 8, "init": "frozen"}, "warp": warp | {"iterations": 1}})
        )
        == 8
    )


@pytest.mark.parametrize(
    ("each", "iterations", "rank"),
    [
        ([{}, {}], 1, 4),
        ([{"lr": 1e-4}, {}], 2, 8),
        ([{"rank": 8}, {"rank": 8}], 1, 8),
        ([{}, {"rank": 64}], 1, 68),
        ([{}, {"rank": 64}], 2, 136),
        ([{}, {"seed": 3}], 1, 8),
        ([{"seed": 3}, {"seed": 3}], 1, 4),
    ],
    ids=str,
)
def test_frozen_a_of_other_ranks_or_seeds_make_larger_merges(
    each: list[dict[str, Any]], iterations: int, rank: int
) -> None:
    warp = {"iterations": iterations, "policies": 2, "each": each}
    config = parse_config({"lora": {"rank": 4, "init": "frozen"}, "warp": warp})
    assert largest_rank(config) == rank


ON_CPUS, ON_GPUS = {"gpus_per_rollout_worker": 0}, {"gpus_per_rollout_worker": 1}


@pytest.mark.parametrize(
    ("rollout", "dtype", "cluster", "remedy"),
    [
        ({"adapter": "merged"}, "bfloat16", ON_CPUS, "rollout.adapter=unmerged"),
        ({"adapter": "merged"}, "bfloat16", ON_GPUS, "rollout.adapter=lora"),
        ({"adapter": "merged"}, "bfloat16", {}, "rollout.adapter="),
        (
            {"adapter": "merged", "engine": "transformers"},
            "bfloat16",
            ON_CPUS,
            "rollout.adapter=unmerged",
        ),
        ({"adapter": "lora"}, "bfloat16", ON_CPUS, "rollout.adapter=unmerged"),
        ({"adapter": "merged"}, "float16", ON_CPUS, "rollout.adapter=unmerged"),
        ({"adapter": "lora"}, "float16", ON_CPUS, "rollout.adapter=unmerged"),
        ({"adapter": "unmerged"}, "bfloat16", ON_GPUS, "rollout.adapter=lora"),
        (
            {"adapter": "lora", "engine": "transformers"},
            "float32",
            ON_GPUS,
            "rollout.adapter=unmerged",
        ),
        ({"adapter": "merged"}, "float32", ON_CPUS, None),
        ({"adapter": "lora"}, "float32", ON_CPUS, None),
        ({"adapter": "lora"}, "bfloat16", ON_GPUS, None),
        ({"adapter": "unmerged"}, "bfloat16", ON_CPUS, None),
        ({"adapter": "unmerged", "engine": "transformers"}, "bfloat16", ON_GPUS, None),
        ({"adapter": "auto"}, "bfloat16", ON_CPUS, None),
        ({"adapter": "auto"}, "float16", ON_CPUS, None),
        ({"adapter": "auto"}, "float16", ON_GPUS, None),
        ({"adapter": "auto"}, "bfloat16", ON_GPUS, None),
    ],
)
def test_a_mode_that_is_not_exact_is_refused_with_the_one_that_is(
    rollout: dict[str, Any], dtype: str, cluster: dict[str, Any], remedy: str | None
) -> None:
    config = parse_config({"rollout": rollout, "dtype": dtype, "cluster": cluster})
    if remedy is None:
        return check_engine(config)
    with pytest.raises(
        ConfigError, match=rf"^rollout\.adapter={rollout['adapter']}.*{re.escape(remedy)}"
    ):
        check_engine(config)
    if on_gpu := cluster.get("gpus_per_rollout_worker"):
        with pytest.raises(ConfigError, match=re.escape(remedy)):
            check_mode(config, bool(on_gpu))


@pytest.mark.parametrize(("gpu", "adapter"), [(True, "lora"), (False, "unmerged")])
def test_the_mode_for_several_policies_at_once_is_one_that_vllm_takes(
    gpu: bool, adapter: str
) -> None:
    config = parse_config({"rollout": {"engine": "transformers", "concurrency": 2}})
    advice = rf"set rollout\.engine=vllm with rollout\.adapter={adapter} "
    with pytest.raises(ConfigError, match=advice):
        check_mode(config, gpu, dtype="float32")
    followed = {"engine": "vllm", "adapter": adapter, "concurrency": 2}
    check_mode(parse_config({"rollout": followed}), gpu, dtype="float32")


def test_a_mode_is_judged_by_the_dtype_that_the_cluster_resolves() -> None:
    """GPUs without bfloat16 make dtype=auto float32, in which merged weights are exact."""
    config = parse_config({"rollout": {"adapter": "merged"}})
    check_mode(config, gpu=True, dtype="float32")
    with pytest.raises(ConfigError, match=r"merged with dtype=bfloat16 .*rollout\.adapter=lora"):
        check_mode(config, gpu=True, dtype="bfloat16")


def test_no_vllm_names_the_extra_and_the_fallback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ConfigError,
        match=(
            r"not installed:"
            r" .*raywarp\[gpu\].*raywarp\[cpu\].*local\.sh.*rollout\.engine=transformers"
        ),
    ):
        check_engine(parse_config({}))
    check_engine(parse_config({"rollout": {"engine": "transformers"}}))


@pytest.mark.parametrize(
    ("rollout", "key"),
    [({"adapter": "lora"}, "rollout.adapter"), ({"tensor_parallel_size": 2}, "rollout.engine")],
)
def test_what_transformers_cannot_do(rollout: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError, match=key.replace(".", r"\.")):
        check_engine(parse_config({"rollout": {"engine": "transformers", **rollout}}))


def test_a_draw_inverts_the_distribution_function() -> None:
    """Probabilities .5, 0, .25, .25 at temperature 2: the logits are twice the log-probs."""
    logits = 2 * torch.tensor([[math.log(0.5), -math.inf, math.log(0.25), math.log(0.25)]]).expand(
        6, 4
    )
    tokens, logprobs = draw(
        logits, 2.0, torch.tensor([0.0, 0.49, 0.51, 0.74, 0.76, 1 - 1e-16], dtype=torch.float64)
    )
    assert tokens.tolist() == [0, 0, 2, 2, 3, 3]
    torch.testing.assert_close(logprobs.exp(), torch.tensor([0.5, 0.5, 0.25, 0.25, 0.25, 0.25]))


def test_random_numbers_depend_on_the_own_seed_alone() -> None:
    together = uniform_numbers([5, 6, 7], 4)
    assert torch.equal(together[1:2], uniform_numbers([6], 4))
    assert len(set(together.flatten().tolist())) == 12
    assert together.min() >= 0
    assert together.max() < 1


def test_a_vllm_that_cannot_be_imported_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Installed, but broken: found out when the engine starts."""
    from raywarp.rollout.engine import EngineSettings
    from raywarp.rollout.worker import start_engine

    (tmp_path / "vllm.py").write_text(
        "raise ImportError('libcuda.so.1: cannot open shared object file')"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in [name for name in __import__("sys").modules if name.partition(".")[0] == "vllm"]:
        monkeypatch.delitem(__import__("sys").modules, name)
    settings = EngineSettings("nowhere", "float32", 16, 8, parse_config({}).rollout, gpu=False)
    with pytest.raises(ConfigError, match=r"libcuda.*raywarp\[cpu\].*rollout\.engine=transformers"):
        start_engine(settings)


def test_a_model_that_vllm_refuses_in_float16_is_told_what_would_do() -> None:
    """vLLM 0.32 refuses Gemma 2 and 3, for example."""
    settings = EngineSettings("some/model", "float16", 64, 8, parse_config({}).rollout, gpu=False)
    error = ValueError("The model type 'gemma2' does not support float16.")
    told = str(vllm_models.refusal(error, settings, "unmerged"))
    assert "dtype=float16 (ValueError: The model type 'gemma2' does not support float16.)" in told
    assert told.endswith("set dtype=bfloat16, dtype=float32 or rollout.engine=transformers")


@pytest.mark.parametrize(
    ("mode", "gpu", "advised"),
    [("unmerged", False, False), ("merged", False, True), ("lora", True, False)],
)
def test_another_adapter_mode_is_advised_where_it_is_another(
    mode: str, gpu: bool, advised: bool
) -> None:
    rollout = parse_config({"rollout": {"adapter": mode}, "dtype": "float32"}).rollout
    settings = EngineSettings("some/model", "float32", 64, 8, rollout, gpu=gpu)
    told = str(vllm_models.refusal(KeyError("lm_head"), settings, mode))
    assert ("rollout.adapter=auto" in told) == advised
