"""Tests of the weights that an engine runs where the trainer holds 4 bits."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from raywarp.cluster.turns import finish
from raywarp.config.load import parse_config
from raywarp.config.policies import LoraConfig
from raywarp.model.adapted import AdaptedModel
from raywarp.model.quantised import QuantisedLinear
from raywarp.model.targets import quantisable
from raywarp.rollout.effect_probe import make_probe, score
from raywarp.rollout.engine import EngineSettings
from raywarp.rollout.proof import requests
from raywarp.rollout.protocol import SFT
from raywarp.rollout.quantised_files import as_held, loader_arguments, quantised_tensors
from raywarp.rollout.transformers_engine import TransformersEngine

CPU = torch.device("cpu")


@pytest.mark.parametrize("kind", ["tiny_llama", "tiny_gpt2"])
def test_the_files_hold_the_trainers_weights(kind: str, request: pytest.FixtureRequest) -> None:
    base: Path = request.getfixturevalue(kind)
    tensors = load_file(base / "model.safetensors")
    quantised = quantised_tensors(str(base), False)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    layers = {name: QuantisedLinear(model.get_submodule(name)) for name in quantisable(model)}
    assert len(quantised) == len(layers) > 0
    for name, layer in layers.items():
        (stored,) = (own for own in quantised if f"{name}.weight".endswith(own))
        found = as_held(quantised, stored, tensors[stored])
        assert torch.equal(found.T if quantised[stored] else found, layer.weight.bfloat16())
        assert quantised[stored] == (kind == "tiny_gpt2")
    for name in tensors.keys() - quantised.keys():
        assert as_held(quantised, name, tensors[name]) is tensors[name]
        assert any(word in name for word in ("embed", "wte", "wpe", "norm", "ln_", "head", "bias"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("kind", ["tiny_llama", "tiny_gpt2"])
def test_in_every_dtype_all_run_what_the_files_hold(
    kind: str, dtype: str, request: pytest.FixtureRequest
) -> None:
    """The stored weights are float32. By way of float16, some become another bfloat16."""
    base: Path = request.getfixturevalue(kind)
    tensors = load_file(base / "model.safetensors")
    quantised = quantised_tensors(str(base), False)
    held = {
        name.removesuffix(".weight"): as_held(quantised, name, tensors[name]) for name in quantised
    }
    rollout = parse_config({"rollout": {"engine": "transformers"}}).rollout
    trainer = AdaptedModel(
        str(base), LoraConfig(rank=2), getattr(torch, dtype), CPU, quantize="nf4"
    )
    engine = TransformersEngine(
        EngineSettings(str(base), dtype, 64, 2, rollout, gpu=False, quantize="nf4")
    )
    for name in quantisable(engine.model):
        (stored,) = (own for own in held if name.endswith(own))
        sampled = engine.model.get_submodule(name).weight
        assert sampled.dtype == getattr(torch, dtype)
        assert torch.equal(sampled, held[stored].to(sampled.dtype)), name
        trained = trainer._base.get_submodule(name).weight
        assert torch.equal(trained, sampled.T if quantised[f"{stored}.weight"] else sampled), name


@pytest.mark.parametrize("adapter", ["unmerged", "merged"])
@pytest.mark.parametrize("kind", ["tiny_llama", "tiny_gpt2"])
def test_the_transformers_engine_runs_the_trainers_policy(
    kind: str, adapter: str, request: pytest.FixtureRequest
) -> None:
    base = str(request.getfixturevalue(kind))
    rollout = parse_config({"rollout": {"engine": "transformers", "adapter": adapter}}).rollout
    model = AdaptedModel(base, LoraConfig(rank=2), torch.float32, CPU, quantize="nf4")
    probe = make_probe([], model.vocabulary, 60, 200, 0)
    ours = score(model, probe, []).own
    for quantize, right in (("nf4", True), ("none", False)):
        engine = TransformersEngine(
            EngineSettings(base, "float32", 64, 2, rollout, gpu=False, quantize=quantize)
        )
        (answers,) = finish(engine.logprobs(requests(probe, [SFT])))
        gap = max(abs(a - b) for a, b in zip(probe.scored(answers), ours, strict=True))
        assert (gap < 1e-4) == right


def test_vllm_gets_its_loader_only_where_something_is_quantised() -> None:
    assert loader_arguments({}, has_worker=False) == {}
    found = loader_arguments({"a.weight": False}, has_worker=True)
    assert found["model_loader_extra_config"] == {"quantised": {"a.weight": False}}
    assert "worker_extension_cls" not in found
    assert "worker_extension_cls" in loader_arguments({"a.weight": False}, has_worker=False)
