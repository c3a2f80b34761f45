"""Tests of what is refused of a base before anything starts, and of when keys change."""

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, FalconConfig

from raywarp.cli.commands import main
from raywarp.config.load import parse_config
from raywarp.config.schema import ConfigError
from raywarp.data.quantised_models import refuse_quantised_model
from raywarp.planning.base_weights import base_fingerprint, check_base

NF4 = {"base": {"quantize": "nf4"}}


@pytest.mark.parametrize(
    ("quantised", "reasons"),
    [
        ({"quant_method": "gptq", "bits": 4}, ["(gptq)", "base.quantize=nf4"]),
        ({"quant_method": "awq"}, ["(awq)"]),
        (
            {
                "quant_method": "bitsandbytes",
                "load_in_4bit": True,
                "bnb_4bit_quant_type": "nf4",
            },
            ["(bitsandbytes, nf4)", "the model that it was made from"],
        ),
        ({"quant_method": "fp8"}, ["(fp8)", "FineGrainedFP8Config(dequantize=True)"]),
        ({"quant_method": "mxfp4"}, ["(mxfp4)", "Mxfp4Config(dequantize=True)"]),
        (
            {"quant_method": "compressed-tensors", "config_groups": {}, "format": "int-quantized"},
            ["(compressed-tensors)", "CompressedTensorsConfig(dequantize=True)"],
        ),
        ("gptq", ["(gptq)", "base.quantize=nf4"]),
        ([], ["(an unnamed method)"]),
        ({}, ["(an unnamed method)"]),
    ],
)
def test_a_base_that_is_quantised_is_refused_by_its_method(
    quantised: Any,
    reasons: list[str],
    tiny_llama: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_llama, base)
    settings = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**settings, "quantization_config": quantised}))
    said = refusal(base, tmp_path, capsys)
    for reason in (f"model={base} is quantised", *reasons):
        assert reason in said


def refusal(base: Path, place: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """What `train` says of a base; `plan` says the same, and neither starts anything."""
    config = place / "config.yaml"
    config.write_text(f"model: {base}\nreward: {{function: 'raywarp.embedded:vader'}}\n")
    said = []
    for command in (["train", str(config)], ["plan", str(config), "--offline"]):
        assert main([*command, f"out={place / 'out'}"]) == 2
        said.append(capsys.readouterr().err)
        assert said[-1].count("\n") == 1
    assert said[0] == said[1]
    assert not (place / "out").exists()
    return said[0]


@pytest.mark.parametrize("name", ["hf_quant_config.json", "quantize_config.json"])
def test_a_file_beside_the_weights_says_that_they_are_quantised(
    name: str, tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_llama, base)
    (base / name).write_text('{"quantization": {"quant_algo": "FP8"}}')
    said = refusal(base, tmp_path, capsys)
    assert f"model={base} is quantised ({name}), and trainer and sampler" in said


DOWN = "model.layers.1.mlp.down_proj"
STORED = {
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8,
    "U8": torch.uint8,
    "I32": torch.int32,
}


@pytest.mark.parametrize("stored", STORED)
def test_weights_of_another_form_are_refused_without_a_word_about_them(
    stored: str, tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """transformers would drop the scale, and train another model."""
    base = tmp_path / "base"
    shutil.copytree(tiny_llama, base)
    tensors = load_file(base / "model.safetensors")
    tensors[f"{DOWN}.weight"] = tensors[f"{DOWN}.weight"].to(STORED[stored])
    tensors[f"{DOWN}.weight_scale"] = torch.tensor(0.5)
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    said = refusal(base, tmp_path, capsys)
    assert f"model={base} is quantised ({DOWN}.weight is {stored}), and trainer" in said


def test_buffers_of_integers_are_no_quantised_weights(tiny_llama: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_llama, base)
    tensors = load_file(base / "model.safetensors")
    tensors["model.position_ids"] = torch.arange(8)[None]
    tensors["model.layers.0.attn.bias"] = torch.ones(1, 1, 8, 8, dtype=torch.uint8).tril()
    tensors["model.layers.1.attn.bias"] = torch.ones(1, 1, 8, 8, dtype=torch.bool).tril()
    tensors["model.layers.1.counts.weight"] = torch.arange(8)
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    refuse_quantised_model(str(base), "model")


def test_nf4_needs_bitsandbytes(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = AutoConfig.from_pretrained(tiny_llama)
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else real(name)
    )
    check_base(parse_config({}), str(tiny_llama), settings)
    with pytest.raises(ConfigError, match=r"pip install 'raywarp\[nf4\]'"):
        check_base(parse_config(NF4), str(tiny_llama), settings)


def test_weights_that_vllm_could_not_be_given_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_llama, base)
    settings = AutoConfig.from_pretrained(base)
    check_base(parse_config(NF4), str(base), settings)
    tensors = load_file(base / "model.safetensors")
    down = "model.layers.1.mlp.down_proj.weight"
    tensors[down] = tensors[down].view(2, -1)
    save_file(tensors, base / "model.safetensors")
    with pytest.raises(ConfigError, match=r"model\.layers\.1\.mlp\.down_proj as one tensor"):
        check_base(parse_config(NF4), str(base), settings)
    check_base(parse_config({**NF4, "rollout": {"engine": "transformers"}}), str(base), settings)


def test_a_model_without_such_layers_is_refused() -> None:
    """Falcon's are a subclass, which transformers does not quantise either."""
    settings = FalconConfig(num_hidden_layers=1, vocab_size=8, hidden_size=8, num_attention_heads=2)
    with pytest.raises(ConfigError, match=r"\(falcon\) has no linear layer"):
        check_base(parse_config(NF4), "nowhere", settings)


def test_only_a_quantised_base_changes_a_fingerprint() -> None:
    assert base_fingerprint(parse_config({}), "abc") == "abc"
    assert base_fingerprint(parse_config({"base": {"quantize": "none"}}), "abc") == "abc"
    assert base_fingerprint(parse_config(NF4), "abc") != "abc"
