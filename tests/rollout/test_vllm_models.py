"""Tests what vLLM is told of a model against what it finds out by itself."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from raywarp.training.actors import VLLM_CPU_ENV, VLLM_ENV

pytestmark = pytest.mark.slow

SCRIPT = """
import json, sys
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.models import ModelRegistry
from raywarp.config.schema import RolloutConfig
from raywarp.rollout.engine import EngineSettings
from raywarp.rollout.vllm.models import arguments, inspect_here

plain, two_forms = sys.argv[1:]
lazy = ModelRegistry.models["LlamaForCausalLM"]
rollout = RolloutConfig(engine="vllm")
inspect_here(EngineSettings(plain, "float32", 64, 2, rollout, gpu=False))
here = ModelRegistry.models["LlamaForCausalLM"]
found = {"inspected": here is not lazy and here.inspect_model_cls() == lazy.inspect_model_cls()}
settings = EngineSettings(two_forms, "float32", 64, 2, rollout, gpu=False)
given = arguments(settings, "merged", two_forms)
config = EngineArgs(**given).create_model_config()
found |= {"hidden": config.hf_text_config.hidden_size, "tokenizer": config.tokenizer_mode}
print("RESULT", json.dumps(found))
"""


@pytest.fixture(scope="module")
def told(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    home = tmp_path_factory.mktemp("home")
    own = {"HOME": str(home), "VLLM_CACHE_ROOT": str(home), "OMP_NUM_THREADS": "1"}
    two_forms = in_mistrals_form_too(tiny_llama, home / "model")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tiny_llama), str(two_forms)],
        env=os.environ | VLLM_ENV | VLLM_CPU_ENV | own,
        capture_output=True,
        text=True,
        timeout=300,
    )
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("RESULT")] or [
        pytest.fail(done.stdout + done.stderr[-3000:])
    ]
    noted = bool(list(home.glob("modelinfos/*LlamaForCausalLM.json")))
    return {**json.loads(line.removeprefix("RESULT")), "noted": noted}


def in_mistrals_form_too(model: Path, folder: Path) -> Path:
    """Copy a model, with the files beside it that Mistral publishes, of another size."""
    shutil.copytree(model, folder)
    other = {"dim": 32, "n_layers": 1, "head_dim": 8, "hidden_dim": 64, "n_heads": 4}
    other |= {"n_kv_heads": 4, "norm_eps": 1e-5, "vocab_size": 64}
    (folder / "params.json").write_text(json.dumps(other))
    shutil.copy(folder / "model.safetensors", folder / "consolidated.safetensors")
    (folder / "tekken.json").write_text("{}")
    return folder


def test_a_class_inspected_here_is_as_vllm_finds_it(told: dict[str, Any]) -> None:
    """vLLM's own way is a process that imports all of vLLM, and notes at home what it saw."""
    assert told["inspected"]
    assert told["noted"]


def test_the_trainers_files_are_read(told: dict[str, Any], tiny_llama: Path) -> None:
    """By itself vLLM 0.32 prefers Mistral's configuration and tokenizer where both are there."""
    config = json.loads((tiny_llama / "config.json").read_text())
    assert told["hidden"] == config["hidden_size"] != 32
    assert told["tokenizer"] == "hf"
