"""Tests of the GGUF file of an adapter, read by the gguf package, and of what it refuses."""

from pathlib import Path
from typing import Any

import architectures
import pytest
import torch
from gguf import GGUFReader
from test_bake import peft_adapter, refused
from tiny_models import save_tiny_gpt2

from raywarp.adapters.peft import load_peft
from raywarp.algorithm.factors import dense
from raywarp.baking.gguf_lora import interleaved, write_gguf

# Name of the linear layer in GGUF → in transformers.
PARTS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def read(file: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The metadata, and ΔW of each weight as llama.cpp adds it: alpha / rank · B·A."""
    reader = GGUFReader(file)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {tensor.name: torch.tensor(tensor.data).double() for tensor in reader.tensors}
    changes = {}
    for name in {name.rpartition(".lora_")[0] for name in tensors}:
        A, B = tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]
        changes[name] = fields["adapter.lora.alpha"] / B.shape[1] * B @ A
    return fields, changes


def halves_first(rows: torch.Tensor, size: int) -> torch.Tensor:
    """Rows of heads whose rotated pairs are neighbours, in transformers' order, head by head."""
    heads = [torch.cat([head[0::2], head[1::2]]) for head in rows.split(size)]
    return torch.cat(heads)


@pytest.mark.parametrize("family", ["Llama", "Qwen3", "Gemma-2"])
def test_the_file_holds_the_adapters_change(tmp_path: Path, family: str) -> None:
    base = architectures.save_model(architectures.FAMILIES[family], tmp_path / "base")
    patterns = {"rank_pattern": {"v_proj": 5}, "alpha_pattern": {"v_proj": 3}}
    own = peft_adapter(base, tmp_path / "adapter", **patterns)
    fields, changes = read(write_gguf(own, tmp_path / "out", liti_rate=0.5))
    name = {"Llama": "llama", "Qwen3": "qwen3", "Gemma-2": "gemma2"}[family]
    assert fields["general.architecture"] == name
    assert fields["general.type"] == "adapter"
    assert fields["adapter.type"] == "lora"
    wanted = load_peft(own).factors
    assert len(changes) == len(wanted)
    for key, change in changes.items():
        _, layer, part, kind = key.split(".")
        assert kind == "weight"
        if family == "Llama" and part in ("attn_q", "attn_k"):
            change = halves_first(change, 32)
        expected = 0.5 * dense(wanted[f"model.layers.{layer}.{PARTS[part]}"])
        torch.testing.assert_close(change, expected, rtol=1e-6, atol=1e-7)


def test_a_heads_halves_are_interleaved_row_by_row() -> None:
    rows = torch.arange(8.0).view(-1, 1)  # two heads of four
    assert interleaved(rows, 2).flatten().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert torch.equal(interleaved(rows, None), rows)


def test_layouts_that_are_not_known_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = save_tiny_gpt2(tmp_path / "gpt2")
    own = peft_adapter(base, tmp_path / "adapter")
    assert "is GPT2LMHeadModel" in refused(capsys, own, "--out", tmp_path / "out", "--gguf")
    tied = architectures.save_model(architectures.FAMILIES["Gemma-2"], tmp_path / "gemma")
    head = peft_adapter(tied, tmp_path / "head", target_modules=["lm_head"])
    said = refused(capsys, head, "--out", tmp_path / "out", "--gguf")
    assert "is the embedding, too" in said
    said = refused(capsys, head, "--out", tmp_path / "out", "--gguf", "--dtype", "bfloat16")
    assert "float32 or float16" in said
    assert not (tmp_path / "out").exists()
