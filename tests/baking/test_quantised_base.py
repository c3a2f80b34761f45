"""Tests of what is done with adapters of a base in 4 bits: baked, merged, loaded by PEFT."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from four_bits import of_bitsandbytes, replaced
from safetensors.torch import load_file
from tiny_models import save_tiny_gpt2, save_tiny_llama
from transformers import AutoModelForCausalLM

from raywarp.adapters.merging import merge
from raywarp.adapters.notes import usage
from raywarp.adapters.peft import load_peft, save_peft
from raywarp.adapters.recipe import Recipe
from raywarp.algorithm.deltas import AdapterDelta
from raywarp.algorithm.factors import AdapterError
from raywarp.baking.adapter_kls import TEXTS, text_kls
from raywarp.baking.bake import bake
from raywarp.config.load import parse_config
from raywarp.config.policies import LoraConfig
from raywarp.config.schema import ConfigError
from raywarp.model.adapted import AdaptedModel
from raywarp.planning.sft_adapter import check_start

IDS = torch.tensor([[1, 5, 9, 4, 7, 12, 3, 8]])


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """On CPUs, bitsandbytes' own layer fails where a row is no multiple of 64 numbers."""
    folder = tmp_path_factory.mktemp("base") / "base"
    return (
        save_tiny_llama(folder, inner=128) if request.param == "llama" else save_tiny_gpt2(folder)
    )


@pytest.fixture(scope="module")
def adapter(base: Path) -> Path:
    return saved(base, "nf4")


def saved(base: Path, quantize: str) -> Path:
    """A policy of the trainer's on two of the layers, as it is saved."""
    names = ["c_attn"] if "gpt2" in (base / "config.json").read_text() else ["q_proj", "up_proj"]
    lora = LoraConfig(rank=2, target_modules=names)
    model = AdaptedModel(str(base), lora, torch.float32, torch.device("cpu"), quantize=quantize)
    model.add_policy("p", seed=0)
    for name, tensor in model.tensors("p").items():
        if name.endswith("B"):
            tensor.data.normal_(0, 0.3, generator=torch.Generator().manual_seed(1))
    save_peft(model.delta("p"), folder := base.parent / f"adapter-{quantize}")
    return folder


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(IDS, use_cache=False).logits.double()


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def test_a_baked_model_is_the_dequantised_base_and_the_change(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    bake(adapter, tmp_path / "zero", liti_rate=0.0)
    rounded = load(tmp_path / "zero")
    theirs = of_bitsandbytes(base)
    for name, weight in theirs.items():
        own = rounded.get_submodule(name).weight
        assert torch.equal(own.T if "Conv1D" in str(rounded.get_submodule(name)) else own, weight)
    before, after = (load_file(f / "model.safetensors") for f in (base, tmp_path / "zero"))
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert len(changed) == len(theirs)

    baked = bake(adapter, tmp_path / "out")
    assert "in nf4, dequantised" in (tmp_path / "out" / "README.md").read_text()
    assert baked.quantize == "nf4"
    plain = replaced(base, tmp_path / "plain")
    config = json.loads((adapter / "adapter_config.json").read_text())
    del config["base_quantize"]
    (adapter.parent / "said").mkdir(exist_ok=True)
    (adapter.parent / "said" / "adapter_config.json").write_text(json.dumps(config))
    weights = (adapter / "adapter_model.safetensors").read_bytes()
    (adapter.parent / "said" / "adapter_model.safetensors").write_bytes(weights)
    bake(adapter.parent / "said", tmp_path / "twice", base=str(plain), allow_different_base=True)
    torch.testing.assert_close(
        logits(load(tmp_path / "out")), logits(load(tmp_path / "twice")), atol=1e-5, rtol=0
    )


def test_peft_loads_it_on_the_base_that_its_notes_name(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    """In bfloat16, so as near as that rounds; the base as it was is further away."""
    code = "\n".join(usage(load_peft(adapter))[1:-1]).replace("this folder", str(adapter))
    assert "four_bits" in code
    found: dict[str, Any] = {}
    exec(code, found)
    bake(adapter, tmp_path / "baked")
    expected = logits(load(tmp_path / "baked")).log_softmax(-1)
    narrow = (logits(found["model"].eval()).log_softmax(-1) - expected).abs().mean()
    bake(adapter, tmp_path / "zero", liti_rate=0.0)
    without = (logits(load(tmp_path / "zero")).log_softmax(-1) - expected).abs().mean()
    assert narrow < 0.05 < without


def test_adapters_of_other_weights_are_not_averaged(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    other = saved(base, "none")
    with pytest.raises(AdapterError, match=r"base\.quantize=nf4 and .* with base\.quantize=none"):
        merge(Recipe("lerp", [str(adapter), str(other)]), tmp_path / "out")
    merge(Recipe("lerp", [str(adapter), str(adapter)]), tmp_path / "same")
    merged = json.loads((tmp_path / "same" / "adapter_config.json").read_text())
    assert merged["base_quantize"] == "nf4"
    assert "base_quantize" not in json.loads((other / "adapter_config.json").read_text())


def test_kls_of_texts_are_those_on_the_dequantised_base(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    delta = load_peft(adapter)
    plain = AdapterDelta(delta.factors, delta.target_modules, delta.base_model)
    ours = text_kls(str(base), [delta], TEXTS[:2], None)
    assert ours == text_kls(str(replaced(base, tmp_path / "plain")), [plain], TEXTS[:2], None)


def test_a_run_on_other_weights_than_its_sft_adapters_is_refused(base: Path, adapter: Path) -> None:
    settings = AutoModelForCausalLM.from_pretrained(base).config
    tree = {"model": str(base), "sft_adapter": str(adapter)}
    with pytest.raises(ConfigError, match=r"set base\.quantize=nf4"):
        check_start(parse_config(tree), str(base), settings)
    assert check_start(parse_config({**tree, "base": {"quantize": "nf4"}}), str(base), settings)
