"""Tests of a run on a base in 4 bits, sampled by vLLM, from its first step to a baked model."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from four_bits import replaced
from peft import PeftModel
from tiny_run import tiny_config
from transformers import AutoModelForCausalLM

from raywarp.baking.bake import bake
from raywarp.config.schema import Config
from raywarp.run.folder import Run
from raywarp.warp import train

TOKENS = torch.tensor([[1, 5, 9, 4, 12, 7]])


@pytest.fixture(scope="module")
def finished(ray_cluster: Any, project: Path, tiny_llama: Path) -> Run:
    return train(settings(project, tiny_llama))


def settings(project: Path, model: Path, **changes: Any) -> Config:
    return tiny_config(
        project,
        model,
        project / "four-bits",
        base={"quantize": "nf4"},
        warp={"iterations": 1, "policies": 1, "steps": 3},
        rollout={"engine": "vllm"},
        **changes,
    )


def logprobs(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(TOKENS).logits.double().log_softmax(-1)
    return found


def test_what_is_sampled_is_what_is_trained(finished: Run) -> None:
    """The proof by effect passed before the first step, and each step's log-probs agree."""
    rows = finished.metrics()
    assert rows[0]["adapter_effect"] == pytest.approx(1, abs=1e-3)
    assert max(row["sampler_gap"] for row in rows) < 1e-3


def test_its_adapter_says_which_base_it_needs(
    finished: Run, tiny_llama: Path, tmp_path: Path
) -> None:
    """Baked, it is PEFT's sum of the adapter and bitsandbytes' dequantised base."""
    folder = finished.folder / "adapter"
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_quantize"] == "nf4"
    text = (folder / "README.md").read_text()
    assert 'BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"' in text
    assert "linear layers in nf4" in text
    bake(folder, tmp_path / "baked")
    base = AutoModelForCausalLM.from_pretrained(replaced(tiny_llama, tmp_path / "plain"))
    expected = logprobs(PeftModel.from_pretrained(base, str(folder)))
    found = logprobs(AutoModelForCausalLM.from_pretrained(tmp_path / "baked"))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert not torch.allclose(logprobs(AutoModelForCausalLM.from_pretrained(tiny_llama)), found)


def test_its_adapters_still_say_so_after_the_same_command(
    finished: Run, project: Path, tiny_llama: Path
) -> None:
    """Another point of the finished run is chosen, so its adapter is written anew."""
    again = train(settings(project, tiny_llama, front={"choose": {"eta": 0.5}}))
    assert again.folder == finished.folder
    for folder in ("adapter", "iterations/1/init", "iterations/1/merged"):
        config = json.loads((again.folder / folder / "adapter_config.json").read_text())
        assert config["base_quantize"] == "nf4", folder
