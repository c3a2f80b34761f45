"""Tests of reading and writing PEFT's files as PEFT and vLLM do.

Files in which ΔW is not plain B·A are refused by name.
"""

import json
from pathlib import Path

import pytest
import torch
from conftest import assert_same_change, random_delta
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from raywarp.adapters.peft import AdapterFile, AdapterWriter, load_peft, save_peft
from raywarp.adapters.peft_config import ADAPTER_CONFIG_FILE, ADAPTER_FILE
from raywarp.algorithm.deltas import concatenate, zeros_like
from raywarp.algorithm.factors import AdapterError, Factors, dense
from raywarp.rollout.transport import digest


def peft_reference(folder: Path, model: Path, **config: object) -> dict[str, torch.Tensor]:
    """A PEFT adapter with random factors, saved by PEFT; returns PEFT's own ΔW per module."""
    torch.manual_seed(1)
    lora = LoraConfig(target_modules="all-linear", init_lora_weights=False, **config)  # type: ignore[arg-type]
    peft = get_peft_model(AutoModelForCausalLM.from_pretrained(model), lora)
    peft.save_pretrained(str(folder))
    modules = dict(peft.base_model.model.named_modules())
    return {
        n: m.get_delta_weight("default")
        for n, m in modules.items()
        if hasattr(m, "get_delta_weight")
    }


@pytest.mark.parametrize(
    "config",
    [
        {"r": 4, "lora_alpha": 16},
        {"r": 4, "lora_alpha": 6, "use_rslora": True},
        {
            "r": 4,
            "lora_alpha": 8,
            "rank_pattern": {"q_proj": 2},
            "alpha_pattern": {"q_proj": 3, "up_proj": 5},
        },
    ],
)
def test_reading_peft_gives_pefts_own_change(
    tmp_path: Path, tiny_llama: Path, config: dict[str, object]
) -> None:
    expected = peft_reference(tmp_path, tiny_llama, **config)
    delta = load_peft(tmp_path)
    assert delta.factors.keys() == expected.keys()
    for module, f in delta.factors.items():
        torch.testing.assert_close(
            dense(f).float(), expected[module].detach(), rtol=1e-5, atol=1e-6
        )


def test_reading_conv1d(tmp_path: Path, tiny_gpt2: Path) -> None:
    """GPT-2 stores weights transposed; PEFT transposes ΔW to match, the factors themselves stay
    (d_out, r) and (r, d_in).
    """
    expected = peft_reference(tmp_path, tiny_gpt2, r=4, lora_alpha=8, fan_in_fan_out=True)
    delta = load_peft(tmp_path)
    assert delta.fan_in_fan_out
    for module, f in delta.factors.items():
        torch.testing.assert_close(
            dense(f).T.float(), expected[module].detach(), rtol=1e-5, atol=1e-6
        )


def test_written_adapters_give_the_dense_models_logits(tmp_path: Path, tiny_llama: Path) -> None:
    """A merge with unequal ranks, written, loaded by PEFT, against W + ΔW in the weights
    themselves.
    """
    peft_reference(tmp_path / "a", tiny_llama, r=4, lora_alpha=8)
    delta = load_peft(tmp_path / "a")
    kept = {"q_proj": 2, "o_proj": 0}
    ranks = {
        module: next((r for name, r in kept.items() if name in module), 4)
        for module in delta.factors
    }
    uneven = delta.map(lambda m, f: Factors(f.B[:, : ranks[m]], f.A[: ranks[m]]))
    save_peft(concatenate([uneven, delta], [0.5, 0.25]), tmp_path / "merged")
    ids = torch.arange(3, 13)[None]
    loaded = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny_llama), str(tmp_path / "merged")
    ).eval()
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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_narrow_and_wide_files(tmp_path: Path, dtype: torch.dtype) -> None:
    """Numbers of a file are taken as they are: 16 bits become float32 without loss, float64
    stays.
    """
    x = random_delta(1)
    save_peft(x, tmp_path, dtype)
    stored = load_file(tmp_path / ADAPTER_FILE)
    assert {t.dtype for t in stored.values()} == {dtype}
    for module, f in load_peft(tmp_path).factors.items():
        assert (
            f.B.dtype == f.A.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        )
        assert torch.equal(f.A, x.factors[module].A.to(dtype).to(f.A.dtype))


def test_layers_come_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    one = random_delta(1).factors["model.layers.0.attn.q"]
    tensors = {}
    for layer in (10, 9, 0):
        tensors |= {
            f"base_model.model.model.layers.{layer}.q.lora_{n}.weight": t.clone()
            for n, t in (("A", one.A), ("B", one.B))
        }
    save_file(tensors, tmp_path / ADAPTER_FILE)
    (tmp_path / ADAPTER_CONFIG_FILE).write_text(
        json.dumps({"r": 3, "lora_alpha": 3, "target_modules": ["q"]})
    )
    assert list(AdapterFile(tmp_path).shapes) == [f"model.layers.{layer}.q" for layer in (0, 9, 10)]


def test_what_a_config_says_besides_rank_is_kept(tmp_path: Path) -> None:
    save_peft(random_delta(1), tmp_path / "a")
    config = json.loads((tmp_path / "a" / ADAPTER_CONFIG_FILE).read_text())
    more = {
        "layers_to_transform": [0, 1],
        "layers_pattern": "layers",
        "target_modules": r".*\.(q|up)",
        "task_type": None,
        "revision": "main",
    }
    (tmp_path / "a" / ADAPTER_CONFIG_FILE).write_text(json.dumps(config | more))
    save_peft(load_peft(tmp_path / "a"), tmp_path / "b")
    written = json.loads((tmp_path / "b" / ADAPTER_CONFIG_FILE).read_text())
    assert {key: written[key] for key in more} == more


def test_a_module_may_turn_out_smaller_than_announced(tmp_path: Path) -> None:
    x = random_delta(1).map(lambda _, f: Factors(f.B.float(), f.A.float()))
    largest = {module: (f.B.shape[0], 50, f.A.shape[1]) for module, f in x.factors.items()}
    with AdapterWriter(tmp_path, x, largest, torch.float32) as writer:
        for module, f in x.factors.items():
            writer.write(module, f)
    assert digest(load_peft(tmp_path)) == digest(x)
    assert len(load_file(tmp_path / ADAPTER_FILE)) == 8  # the safetensors library reads it too


def test_a_hub_id_is_found_in_the_hubs_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub's own cache layout, offline: what a download leaves behind."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    repo = tmp_path / "models--someone--an-adapter"
    save_peft(random_delta(1), repo / "snapshots" / ("a" * 40))
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("a" * 40)
    (repo / "refs" / "v2").write_text("a" * 40)
    for name in ("someone/an-adapter", "someone/an-adapter@v2"):
        assert_same_change(load_peft(name), random_delta(1))
    with pytest.raises(
        AdapterError, match="someone/other is no folder here, and the hub did not give it"
    ):
        load_peft("someone/other")


REFUSED_CONFIGS = {
    "use_dora": (True, "DoRA"),
    "lora_bias": (True, "bias"),
    "modules_to_save": (["lm_head"], "modules_to_save"),
    "trainable_token_indices": ([1], "trained tokens"),
    "target_parameters": (["experts.w"], "target_parameters"),
    "layer_replication": ([[0, 2]], "replicated"),
    "alora_invocation_tokens": ([1, 2], "activated LoRA"),
    "use_qalora": (True, "QALoRA"),
    "use_bdlora": ({"nblocks": 2}, "block-diagonal"),
    "bias": ("all", "biases"),
    "peft_type": ("LOHA", "LOHA"),
    "init_lora_weights": ("pissa_niter_4", "pissa_niter_4, which changes the base weights"),
    "r": (0, "the rank r must be a positive integer, not 0"),
    "lora_alpha": ("16", "the alpha lora_alpha must be a number, not '16'"),
    "rank_pattern": ({"q": 7}, "has rank 3, and adapter_config.json says 7"),
    "alpha_pattern": ([1], "alpha_pattern must map module names"),
}


@pytest.mark.parametrize("key", REFUSED_CONFIGS)
def test_configs_that_are_refused(tmp_path: Path, key: str) -> None:
    save_peft(random_delta(1, ranks=(3, 3, 3, 3)), tmp_path)
    config = json.loads((tmp_path / ADAPTER_CONFIG_FILE).read_text())
    value, reason = REFUSED_CONFIGS[key]
    (tmp_path / ADAPTER_CONFIG_FILE).write_text(json.dumps(config | {key: value}))
    with pytest.raises(AdapterError, match=reason) as refused:
        load_peft(tmp_path)
    assert str(tmp_path) in str(refused.value)


@pytest.mark.parametrize("start", [True, False, None, "gaussian", "eva", "orthogonal"])
def test_starts_that_leave_the_base_alone_are_read(tmp_path: Path, start: object) -> None:
    save_peft(random_delta(1), tmp_path)
    config = json.loads((tmp_path / ADAPTER_CONFIG_FILE).read_text())
    (tmp_path / ADAPTER_CONFIG_FILE).write_text(json.dumps(config | {"init_lora_weights": start}))
    assert_same_change(load_peft(tmp_path), random_delta(1))


@pytest.mark.parametrize(
    ("name", "shape", "reason"),
    [
        ("embed.lora_embedding_A", (1,), "an embedding's adapter"),
        ("model.layers.0.attn.q.lora_magnitude_vector", (6,), "DoRA"),
        ("model.layers.0.attn.q.lora_B.bias", (6,), "bias"),
        ("lm_head.weight", (2, 2), "not a factor of a linear layer"),
        (
            "conv.lora_A.weight",
            (1, 2, 3, 3),
            "no matching pair of lora_A and lora_B: lora_B is missing",
        ),
    ],
)
def test_tensors_that_are_refused(
    tmp_path: Path, name: str, shape: tuple[int, ...], reason: str
) -> None:
    save_peft(random_delta(1), tmp_path)
    save_file(
        load_file(tmp_path / ADAPTER_FILE) | {f"base_model.model.{name}": torch.zeros(shape)},
        tmp_path / ADAPTER_FILE,
    )
    with pytest.raises(AdapterError, match=reason) as refused:
        load_peft(tmp_path)
    assert name.split(".lora_")[0] in str(refused.value)


def test_files_that_are_refused(tmp_path: Path) -> None:
    save_peft(random_delta(1), tmp_path)
    tensors, whole = load_file(tmp_path / ADAPTER_FILE), (tmp_path / ADAPTER_FILE).read_bytes()
    half = {
        k: v
        for k, v in tensors.items()
        if k != "base_model.model.model.layers.0.attn.q.lora_B.weight"
    }
    save_file(half, tmp_path / ADAPTER_FILE)
    with pytest.raises(
        AdapterError,
        match=(
            r"model\.layers\.0\.attn\.q has no matching pair of lora_A and lora_B: lora_B is"
            r" missing"
        ),
    ):
        load_peft(tmp_path)
    save_file({k: v.to(torch.int8) for k, v in tensors.items()}, tmp_path / ADAPTER_FILE)
    with pytest.raises(AdapterError, match=r"lora_A\.weight is I8; only F64, F32, F16, BF16"):
        load_peft(tmp_path)
    (tmp_path / ADAPTER_FILE).write_bytes(whole[:-10])
    with pytest.raises(
        AdapterError,
        match=(
            r"truncated: base_model\.model\.model\.layers\.1\.mlp\.up\.lora_B\.weight lacks 10 of"
            r" its 224 bytes"
        ),
    ):
        load_peft(tmp_path)
    (tmp_path / ADAPTER_CONFIG_FILE).write_text("[]")
    with pytest.raises(AdapterError, match="must hold an object, not a list"):
        load_peft(tmp_path)
    (tmp_path / ADAPTER_CONFIG_FILE).write_text("{")
    with pytest.raises(AdapterError, match="not valid JSON"):
        load_peft(tmp_path)
    (tmp_path / ADAPTER_FILE).unlink()
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(AdapterError, match="pickle, which may run code; save it as safetensors"):
        load_peft(tmp_path)
    for missing in (tmp_path / "nowhere", "nowhere", "./no/where", "/no/where"):
        with pytest.raises(AdapterError, match="not a PEFT adapter"):
            load_peft(missing)
    with pytest.raises(AdapterError, match="is a file; name the folder"):
        load_peft(tmp_path / ADAPTER_CONFIG_FILE)
