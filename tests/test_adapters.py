import json
from pathlib import Path

import pytest
import torch
from conftest import random_delta
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from raywarp.adapters import (
    ADAPTER_FILE,
    CONFIG_FILE,
    AdapterDelta,
    AdapterError,
    Factors,
    add,
    block_of,
    compress,
    concatenate,
    dense,
    digest,
    inner,
    load_peft,
    save_peft,
    scale,
    subtract,
    trailing,
    zeros_like,
)


def assert_same_change(x: AdapterDelta, y: AdapterDelta, tolerance: float = 1e-10) -> None:
    assert x.factors.keys() == y.factors.keys()
    for module, f in x.factors.items():
        torch.testing.assert_close(dense(f), dense(y.factors[module]), rtol=tolerance, atol=tolerance)


def test_blocks() -> None:
    assert block_of("model.layers.12.self_attn.q_proj") == "model.layers.12"
    assert block_of("transformer.h.3.attn.c_attn") == "transformer.h.3"
    assert block_of("model.layers.2.mlp.experts.7.w1") == "model.layers.2"
    assert block_of("lm_head") == "lm_head"


def test_algebra_is_exact_in_the_change() -> None:
    x, y = random_delta(1), random_delta(2, ranks=(1, 4, 2, 5))
    for module, f in concatenate([x, y], [0.3, -2.0]).factors.items():
        expected = 0.3 * dense(x.factors[module]) - 2 * dense(y.factors[module])
        torch.testing.assert_close(dense(f), expected)
        assert f.rank == x.factors[module].rank + y.factors[module].rank
    for module, f in x.factors.items():
        g = y.factors[module]
        assert inner(f, g) == pytest.approx(float((dense(f) * dense(g)).sum()), rel=1e-12)
        torch.testing.assert_close(dense(scale(x, 0.5).factors[module]), 0.5 * dense(f))
    assert_same_change(subtract(add(x, y), y), x)
    assert zeros_like(x).rank == 0


def test_coefficients_per_block() -> None:
    x, y = random_delta(1), random_delta(2)
    mixed = concatenate([x, y], {"model.layers.0": [1, 0], "model.layers.1": [0, 2]})
    for module, f in mixed.factors.items():
        expected = dense(x.factors[module]) if module.startswith("model.layers.0") else 2 * dense(y.factors[module])
        torch.testing.assert_close(dense(f), expected)


def test_compression_is_lossless_and_finds_the_true_rank() -> None:
    x = random_delta(1, ranks=(2, 2, 2, 2))
    doubled = concatenate([x, x, x], [1.0, 2.0, -0.5])
    small = compress(doubled)
    assert [f.rank for f in small.factors.values()] == [2, 2, 2, 2]
    assert_same_change(small, scale(x, 2.5))
    assert compress(subtract(x, x)).rank == 0
    assert compress(zeros_like(x)).rank == 0


def test_compression_stops_at_the_size_of_the_weight() -> None:
    many = add(*(random_delta(s, ranks=(4, 4, 4, 4)) for s in range(4)))
    small = compress(many)
    assert [f.rank for f in small.factors.values()] == [5, 4, 5, 4]  # min(d_out, d_in), below 16 = 4 x 4
    assert_same_change(small, many)


def test_trailing_takes_back_the_last_summand_bit_for_bit() -> None:
    x, y = random_delta(1), random_delta(2, ranks=(2, 2, 2, 2))
    for module, f in trailing(add(x, y), 2).factors.items():
        assert torch.equal(f.A, y.factors[module].A)
        assert torch.equal(f.B, y.factors[module].B)


def test_different_modules_or_sizes_are_refused() -> None:
    x = random_delta(1)
    fewer = AdapterDelta({m: f for m, f in x.factors.items() if "mlp" not in m})
    with pytest.raises(AdapterError, match=r"different modules: only one of them has model\.layers\.0\.mlp\.up"):
        add(x, fewer)
    with pytest.raises(AdapterError, match="not of one base model"):
        add(x, x.map(lambda _, f: Factors(f.B, torch.zeros(f.rank, 9))))


def test_digest_is_of_the_content() -> None:
    x = random_delta(1)
    assert digest(x) == digest(random_delta(1))
    assert digest(x) != digest(random_delta(2))
    assert digest(x) != digest(scale(x, 1 + 1e-15))


def peft_reference(folder: Path, model: Path, **config: object) -> dict[str, torch.Tensor]:
    """A PEFT adapter with random factors, saved by PEFT; returns PEFT's own ΔW per module."""
    torch.manual_seed(1)
    lora = LoraConfig(target_modules="all-linear", init_lora_weights=False, **config)  # type: ignore[arg-type]
    peft = get_peft_model(AutoModelForCausalLM.from_pretrained(model), lora)
    peft.save_pretrained(str(folder))
    modules = dict(peft.base_model.model.named_modules())
    return {n: m.get_delta_weight("default") for n, m in modules.items() if hasattr(m, "get_delta_weight")}


@pytest.mark.parametrize(
    "config",
    [
        {"r": 4, "lora_alpha": 16},
        {"r": 4, "lora_alpha": 6, "use_rslora": True},
        {"r": 4, "lora_alpha": 8, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 3, "up_proj": 5}},
    ],
)
def test_reading_peft_gives_pefts_own_change(tmp_path: Path, tiny_llama: Path, config: dict[str, object]) -> None:
    expected = peft_reference(tmp_path, tiny_llama, **config)
    delta = load_peft(tmp_path)
    assert delta.factors.keys() == expected.keys()
    for module, f in delta.factors.items():
        torch.testing.assert_close(dense(f).float(), expected[module].detach(), rtol=1e-5, atol=1e-6)


def test_reading_conv1d(tmp_path: Path, tiny_gpt2: Path) -> None:
    """GPT-2 stores weights transposed; PEFT transposes ΔW to match, the factors themselves stay (d_out, r) and (r, d_in)."""
    expected = peft_reference(tmp_path, tiny_gpt2, r=4, lora_alpha=8, fan_in_fan_out=True)
    delta = load_peft(tmp_path)
    assert delta.fan_in_fan_out
    for module, f in delta.factors.items():
        torch.testing.assert_close(dense(f).T.float(), expected[module].detach(), rtol=1e-5, atol=1e-6)


def test_written_adapters_give_the_dense_models_logits(tmp_path: Path, tiny_llama: Path) -> None:
    """A merge with unequal ranks, written, loaded by PEFT, against W + ΔW in the weights themselves."""
    peft_reference(tmp_path / "a", tiny_llama, r=4, lora_alpha=8)
    delta = load_peft(tmp_path / "a")
    kept = {"q_proj": 2, "o_proj": 0}
    ranks = {module: next((r for name, r in kept.items() if name in module), 4) for module in delta.factors}
    uneven = delta.map(lambda m, f: Factors(f.B[:, : ranks[m]], f.A[: ranks[m]]))
    save_peft(concatenate([uneven, delta], [0.5, 0.25]), tmp_path / "merged")
    ids = torch.arange(3, 13)[None]
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama), str(tmp_path / "merged")).eval()
    model = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    base = model(ids).logits
    for module, f in concatenate([uneven, delta], [0.5, 0.25]).factors.items():
        model.get_submodule(module).weight.data += dense(f).float()
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(base, model(ids).logits, atol=1e-2)


def test_round_trip_and_the_zero_adapter(tmp_path: Path) -> None:
    x = random_delta(1).map(lambda _, f: Factors(f.B.float(), f.A.float()))
    save_peft(x, tmp_path / "x")
    assert digest(load_peft(tmp_path / "x")) == digest(x)
    save_peft(zeros_like(x), tmp_path / "zero")
    assert_same_change(load_peft(tmp_path / "zero"), zeros_like(x))


def test_refusals_name_file_and_reason(tmp_path: Path) -> None:
    save_peft(random_delta(1), tmp_path)
    config = json.loads((tmp_path / CONFIG_FILE).read_text())
    for key, value in (("use_dora", True), ("lora_bias", True), ("modules_to_save", ["lm_head"]), ("bias", "all"), ("peft_type", "LOHA")):
        (tmp_path / CONFIG_FILE).write_text(json.dumps(config | {key: value}))
        with pytest.raises(AdapterError, match=key if key not in ("bias", "peft_type") else "biases|LOHA"):
            load_peft(tmp_path)
    (tmp_path / CONFIG_FILE).write_text(json.dumps(config))
    tensors = load_file(tmp_path / ADAPTER_FILE)
    save_file(tensors | {"base_model.model.embed.lora_embedding_A": torch.zeros(1)}, tmp_path / ADAPTER_FILE)
    with pytest.raises(AdapterError, match="lora_embedding_A"):
        load_peft(tmp_path)
    half = {k: v for k, v in tensors.items() if k != "base_model.model.model.layers.0.attn.q.lora_B.weight"}
    save_file(half, tmp_path / ADAPTER_FILE)
    with pytest.raises(AdapterError, match=r"model\.layers\.0\.attn\.q has no matching pair"):
        load_peft(tmp_path)
    (tmp_path / ADAPTER_FILE).write_bytes((tmp_path / ADAPTER_FILE).read_bytes()[:-10])
    with pytest.raises(AdapterError, match="cannot read"):
        load_peft(tmp_path)
    (tmp_path / ADAPTER_FILE).unlink()
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(AdapterError, match="pickle"):
        load_peft(tmp_path)
    with pytest.raises(AdapterError, match="not a PEFT adapter"):
        load_peft(tmp_path / "nowhere")
