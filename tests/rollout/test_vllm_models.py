"""Tests what vLLM is told of a model's class against what it finds out by itself."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from raywarp.training.actors import VLLM_CPU_ENV, VLLM_ENV

SCRIPT = """
import sys
from vllm.model_executor.models import ModelRegistry
from raywarp.config.schema import RolloutConfig
from raywarp.rollout.engine import EngineSettings
from raywarp.rollout.vllm.models import inspect_here

lazy = ModelRegistry.models["LlamaForCausalLM"]
rollout = RolloutConfig(engine="vllm")
inspect_here(EngineSettings(sys.argv[1], "float32", 64, 2, rollout, gpu=False))
here = ModelRegistry.models["LlamaForCausalLM"]
print("RESULT", here is not lazy, here.inspect_model_cls() == lazy.inspect_model_cls())
"""


@pytest.mark.slow
def test_a_class_inspected_here_is_as_vllm_finds_it(tiny_llama: Path, tmp_path: Path) -> None:
    """vLLM's own way is a process that imports all of vLLM, and notes at home what it saw."""
    own = {"HOME": str(tmp_path), "VLLM_CACHE_ROOT": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tiny_llama)],
        env=os.environ | VLLM_ENV | VLLM_CPU_ENV | own,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert "RESULT True True" in done.stdout, done.stdout + done.stderr[-3000:]
    assert list(tmp_path.glob("modelinfos/*LlamaForCausalLM.json"))
