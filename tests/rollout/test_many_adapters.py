"""Tests vLLM's own LoRA managers, without a model, with the adapters that a call may have."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from raywarp.training.actors import VLLM_CPU_ENV, VLLM_ENV

SCRIPT = """
from types import SimpleNamespace as Some
import torch
from vllm.config.lora import LoRAConfig
from vllm.lora.model_manager import AdapterLRUCache, LRUCacheLoRAModelManager
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager
from raywarp.algorithm.deltas import AdapterDelta
from raywarp.algorithm.factors import Factors
from raywarp.config.schema import RolloutConfig
from raywarp.rollout.engine import EngineSettings
from raywarp.rollout.loaders import LoraLoader
from raywarp.rollout.protocol import Adapter, AdapterPart
from raywarp.rollout.vllm.models import arguments, hold_lora

RANK, COUNT = 65, 5

class NoLayers(LRUCacheLoRAModelManager):
    def __init__(self, lora_config):
        self.lora_config, self.model = lora_config, torch.nn.Module()
        self.modules, self.packed_modules, self._is_moe = {}, {}, False
        self.supported_lora_modules, self.packed_modules_mapping = ["up_proj"], {}
        self._enable_mixed_moe_lora_format = self._enable_moe_shared_loras = False
        self.lora_index_to_id = [None] * self.lora_slots
        self._registered_adapters = AdapterLRUCache(self.capacity, self.deactivate_adapter)
        self._active_adapters = AdapterLRUCache(self.lora_slots, self._deactivate_adapter)

class Part(AdapterPart):
    def fetch(self):
        return self.ref

def adapter(n):
    factors = Factors(torch.full((2, RANK), float(n)), torch.full((RANK, 3), float(n)))
    return Adapter(policy=Part(f"version {n}", RANK, AdapterDelta({"model.up_proj": factors})))

settings = EngineSettings("none", "float32", 64, RANK, RolloutConfig(engine="vllm"), gpu=True)
given = arguments(settings, "lora", "none")
names = ("max_loras", "max_cpu_loras", "max_lora_rank")
config = LoRAConfig(lora_dtype=torch.float32, **{name: given[name] for name in names})
model = Some(get_vocab_size=lambda: 8, is_encoder_decoder=False)
model.hf_config = Some(get_text_config=lambda: Some())
limits = Some(max_num_seqs=8, max_num_batched_tokens=64)
gpu = torch.device("meta")
theirs = Some(scheduler_config=limits, model_config=model, lora_config=config)
manager = LRUCacheWorkerLoRAManager(theirs, gpu, {})
manager._adapter_manager = NoLayers(config)
worker = Some(model_runner=Some(lora_manager=manager))
engine = Some(
    collective_rpc=lambda hold, args: [hold(worker, *args)],
    llm_engine=Some(remove_lora=manager.remove_adapter),
)
loader = LoraLoader(engine, lambda modules: {name: name for name in modules}, hold_lora)
adapters = [adapter(n) for n in range(1, COUNT + 1)]
loader.load(adapters)
found = []
for one in adapters:  # the passes of an engine with one slot
    manager._apply_adapters({loader.request(one)})
    held = manager._adapter_manager.get_adapter(loader.request(one).lora_int_id)
    found.append(held.loras["model.up_proj"])
print("SLOTS", given["max_loras"], "FOUND", [int(lora.lora_a.max()) for lora in found])
print("WHERE", {str(lora.lora_b.device) for lora in found})
loader.load(adapters[-1:])
print("LEFT", manager.list_adapters())
"""


@pytest.mark.slow
def test_one_call_may_have_any_number_of_adapters(tmp_path: Path) -> None:
    """With one slot, as for large ranks, they wait in the host's memory. An adapter that vLLM threw
    out it would look for in files. What no call uses is removed.
    """
    own = {"HOME": str(tmp_path), "VLLM_CACHE_ROOT": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env=os.environ | VLLM_ENV | VLLM_CPU_ENV | own,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert "SLOTS 1 FOUND [1, 2, 3, 4, 5]" in done.stdout
    assert "WHERE {'cpu'}" in done.stdout
    assert "LEFT {5}" in done.stdout
