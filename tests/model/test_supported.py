"""Tests that models which a sampler would run as another model are refused by name.

The message says what would do, before anything starts.
"""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from architectures import FAMILIES, LIMIT, save_model
from tiny_run import make_project, tiny_config

from raywarp.config.schema import ConfigError, RolloutConfig
from raywarp.model.supported import refuse_unsupported
from raywarp.planning.inputs import prepare

VLLM, TRANSFORMERS = RolloutConfig(engine="vllm"), RolloutConfig(engine="transformers")
SHORTER = "lower prompts.max_tokens and rollout.max_new_tokens until they are at most 32 together"


@pytest.mark.parametrize(
    ("name", "rollout", "longest", "message"),
    [
        (
            "Falcon, alibi",
            TRANSFORMERS,
            8,
            r"model=mine \(falcon\) with alibi=true.*take a Falcon with rotary embeddings",
        ),
        (
            "Phi-3, longrope",
            VLLM,
            LIMIT + 1,
            rf"more than 32 tokens, and this run's have up to 33.*{SHORTER}",
        ),
        ("Llama, dynamic NTK", TRANSFORMERS, LIMIT + 1, SHORTER),
        ("Phi-MoE", VLLM, LIMIT + 1, SHORTER),
        ("Doge", TRANSFORMERS, LIMIT + 1, rf"keeps the 32 keys with the largest scores.*{SHORTER}"),
        (
            "Doge",
            VLLM,
            LIMIT,
            r"has other log-probs in vLLM 0\.32.*set rollout\.engine=transformers",
        ),
        (
            "Cohere-2",
            VLLM,
            LIMIT + 1,
            rf"has a window of 32 tokens.*{SHORTER}, or set rollout.engine=transformers",
        ),
    ],
)
def test_refused(name: str, rollout: RolloutConfig, longest: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        refuse_unsupported("mine", FAMILIES[name].build(), rollout, longest)


@pytest.mark.parametrize(
    ("name", "rollout", "longest"),
    [
        ("Llama", VLLM, 100_000),
        ("Falcon, rotary", VLLM, 100),
        ("Phi-3, longrope", VLLM, LIMIT),
        ("Llama, dynamic NTK", TRANSFORMERS, LIMIT),
        ("Cohere-2", TRANSFORMERS, 100),
        ("Doge", TRANSFORMERS, LIMIT),
        ("DeepSeek-V3.2", TRANSFORMERS, 100),
        ("Gemma-3, wrapper", TRANSFORMERS, 100),
        ("Gemma-3, text", VLLM, 100),
    ],
)
def test_not_refused(name: str, rollout: RolloutConfig, longest: int) -> None:
    refuse_unsupported("mine", FAMILIES[name].build(), rollout, longest)


@pytest.mark.skipif(
    importlib.util.find_spec("torchvision") is not None,
    reason="vLLM inspects wrappers where torchvision is installed",
)
@pytest.mark.parametrize("name", ["Gemma-3, wrapper", "Qwen3.5, wrapper"])
def test_wrappers_need_torchvision_in_vllm(name: str) -> None:
    with pytest.raises(
        ConfigError, match="torchvision, which is not installed.*set rollout.engine=transformers"
    ):
        refuse_unsupported("mine", FAMILIES[name].build(), VLLM, 10)


def test_a_run_ends_before_it_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the lengths of its own prompts: 3 tokens with the first, and as many as max_new_tokens
    allows.
    """
    (tmp_path / "model").mkdir()
    model = save_model(FAMILIES["Phi-3, longrope"], tmp_path / "model")
    monkeypatch.chdir(make_project(tmp_path))
    rollout: dict[str, Any] = {"max_new_tokens": LIMIT - 4}
    assert prepare(tiny_config(tmp_path, model, "run", rollout=rollout)).longest_prompt == 4
    with pytest.raises(ConfigError, match="this run's have up to 33"):
        prepare(tiny_config(tmp_path, model, "run", rollout={"max_new_tokens": LIMIT - 3}))
