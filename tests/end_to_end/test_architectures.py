"""Tests of the trainer against the model's own eager code, for every supported family.

The families are those of the table in docs/architectures.md.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from architectures import (
    FAMILIES,
    Family,
    compare,
    mixed_batch,
    resumes_exactly,
    save_model,
    trainer,
)

from raywarp.config.policies import LoraConfig
from raywarp.config.schema import ConfigError
from raywarp.model.adapted import AdaptedModel
from raywarp.planning.model_shapes import model_shapes

RIGHT = [family for family in FAMILIES.values() if not family.refused]
REFUSED = [family for family in FAMILIES.values() if family.refused]


@pytest.mark.parametrize("family", RIGHT, ids=lambda family: family.name)
def test_the_trainer_is_the_model(family: Family, tmp_path: Path) -> None:
    """Log-probs with an adapter and without, and gradients; and planning counts the same
    modules.
    """
    save_model(family, tmp_path)
    model = trainer(tmp_path, family)
    found = compare(model, tmp_path, mixed_batch(family.lengths))
    assert found.is_right, found
    shapes = model_shapes(
        family.build(), LoraConfig(rank=2, target_modules=family.targets), rows=2, length=12
    )
    assert shapes.adapted == {
        name: tuple(layer.weight.shape) for name, layer in model._layers.items()
    }
    assert shapes.left == model.targets.left
    assert shapes.saved_bytes > 0


@pytest.mark.parametrize("family", REFUSED, ids=lambda family: family.name)
def test_what_is_not_right_is_refused(family: Family, tmp_path: Path) -> None:
    save_model(family, tmp_path)
    with pytest.raises(ConfigError, match=family.refused):
        AdaptedModel(str(tmp_path), LoraConfig(rank=2), torch.float32, torch.device("cpu"))


@pytest.mark.parametrize("family", RIGHT, ids=lambda family: family.name)
def test_a_resumed_policy_goes_on_as_it_would_have(family: Family, tmp_path: Path) -> None:
    """Bit for bit, also where some adapters never have a gradient (DeepSeek-V3.2's indexer)."""
    save_model(family, tmp_path)
    assert resumes_exactly(tmp_path, family)


def test_vllm_is_the_trainer() -> None:
    """Six families: fused and reordered rows, experts, soft caps, Conv1D; before, with, between and
    after adapters. One it cannot run.
    """
    families = ["Llama", "GPT-NeoX", "Qwen3-MoE", "Gemma-2", "Phi-3", "GPT-2", "GPT-Neo"]
    assert set(families) <= FAMILIES.keys()
    bench = Path(__file__).parents[1] / "bench" / "architectures.py"
    command = [
        sys.executable,
        str(bench),
        "--jobs",
        "1",
        "--columns",
        "vLLM, unmerged",
        "--families",
        *families,
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert json.loads(done.stdout.splitlines()[-1]) == {
        "right": 6,
        "refused": 1,
        "wrong_cells": [],
    }, done.stdout + done.stderr
