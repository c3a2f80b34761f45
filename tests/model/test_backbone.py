"""Tests of models whose head is taken off and whose completions share a prompt.

Not all models allow this. In each case, log-probs must be the model's own.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from architectures import FAMILIES, save_model, trainer
from conftest import plain_logits
from tiny_models import WORDS

from raywarp.config.policies import LoraConfig
from raywarp.data.text import Completion
from raywarp.model import attention
from raywarp.model.adapted import AdaptedModel
from raywarp.model.attention_choice import set_attention
from raywarp.model.batches import Batch, collate, micro_batches

VOCABULARY = 3 + len(WORDS)
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "eos_token_id": 2,
}
GPT2 = {
    "vocab_size": VOCABULARY,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "initializer_range": 0.3,
}
LLAMA_LIKE = {
    **SMALL,
    "intermediate_size": 48,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.3,
    "pad_token_id": 2,
}


def batch_of(*responses: int) -> Batch:
    """Completions of the given lengths for one prompt of four tokens, and one for another of
    two.
    """
    g = torch.Generator().manual_seed(1)
    completions = [
        Completion(tuple(torch.randint(3, 28, (n,), generator=g).tolist()), (-1.0,) * n, "", True)
        for n in responses
    ]
    return collate([[1, 7, 8, 9]] * (len(responses) - 1) + [[1, 5]], completions)


@pytest.mark.parametrize(
    ("name", "settings", "shares"),
    [
        ("Llama", LLAMA_LIKE, True),
        ("GPT2", GPT2, True),
        ("Cohere", {**LLAMA_LIKE, "logit_scale": 0.3}, True),
        ("Granite", {**LLAMA_LIKE, "logits_scaling": 4.0}, True),
        ("Gemma2", {**LLAMA_LIKE, "final_logit_softcapping": 2.0, "attn_logit_softcapping": 3.0, "sliding_window": 4}, False),  # noqa: E501
        ("Bloom", SMALL, False),  # builds its position bias from a two-dimensional mask
    ],
)  # fmt: skip
def test_logprobs_and_gradients_are_the_models_own(
    tmp_path: Path, name: str, settings: dict[str, Any], shares: bool
) -> None:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**settings)
    plain = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation="eager"
    ).eval()
    plain.save_pretrained(tmp_path)
    model = AdaptedModel(str(tmp_path), LoraConfig(rank=2), torch.float32, torch.device("cpu"))
    assert model._head.weight is not None
    assert (model.pairs_per_token is not None) == shares
    batch = batch_of(5, 2, 7, 1, 6)
    expected = plain_logits(plain, batch)
    torch.testing.assert_close(model.logits(batch, []), expected, rtol=1e-4, atol=1e-4)

    logprobs = (expected / 0.7).log_softmax(-1).gather(-1, batch.responses.unsqueeze(-1)).squeeze(
        -1
    ) * batch.mask
    (part,) = micro_batches(batch, pairs_per_token=model.pairs_per_token)
    assert (len(part.input_ids) == 2) == shares
    states = model.states(part, [])
    found = model.logprobs(part, states, 0.7)
    torch.testing.assert_close(found, logprobs[part.completions], rtol=1e-4, atol=1e-4)
    free = states.clone().requires_grad_()
    naive = (model._head.logits(free) / 0.7).log_softmax(-1).gather(-1, part.tokens[:, None])[:, 0]
    (wanted,) = torch.autograd.grad(naive.square().sum(), free)
    (got,) = torch.autograd.grad(model.logprobs(part, free, 0.7).square().sum(), free)
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-5)


REAL = {**LLAMA_LIKE, "max_position_embeddings": 8192}
DEEPSEEK = {
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 2,
}


@pytest.mark.parametrize(
    ("name", "settings", "kernel", "shares"),
    [
        ("Llama", REAL, attention.NAME, True),
        ("Mistral", {**REAL, "sliding_window": 4096}, attention.NAME, False),
        ("Mistral", {**REAL, "sliding_window": None}, attention.NAME, True),
        (
            "Gemma2",
            {**REAL, "attn_logit_softcapping": 1e6, "sliding_window": 4096},
            "eager",
            False,
        ),  # too weak to be measured
        (
            "Llama4Text",
            {**REAL, "attention_chunk_size": 8192, "moe_layers": [], "intermediate_size_mlp": 48},
            attention.NAME,
            False,
        ),
        (
            "DeepseekV32",
            {
                **REAL,
                **DEEPSEEK,
                "num_key_value_heads": 4,
                "index_topk": 2048,
                "index_n_heads": 2,
                "n_group": 1,
                "topk_group": 1,
            },
            "sdpa",
            False,
        ),
        (
            "Llama",
            {**REAL, "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            attention.NAME,
            False,
        ),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_limits_beyond_any_probe_are_decided_by_the_configuration(
    tmp_path: Path,
    name: str,
    settings: dict[str, Any],
    kernel: str,
    shares: bool,
    dtype: torch.dtype,
) -> None:
    """As real models have them: no row is shared where a layer is local, and a model that knows
    attentions by name keeps torch's.
    """
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**settings)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    model = AdaptedModel(str(tmp_path), LoraConfig(rank=2), dtype, torch.device("cpu"))
    assert model._base.config._attn_implementation == kernel
    assert (model.pairs_per_token is not None) == shares


def test_a_head_of_another_kind_takes_the_plain_way(tmp_path: Path, tiny_llama: Path) -> None:
    """An adapted lm_head is no plain product: the whole model gives the logits then, with the same
    results.
    """
    plain = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    model = AdaptedModel(
        str(tiny_llama),
        LoraConfig(rank=2, target_modules=["lm_head", "q_proj"]),
        torch.float32,
        torch.device("cpu"),
    )
    assert model._head.weight is None
    batch = batch_of(5, 2, 7)
    torch.testing.assert_close(model.logits(batch, []), plain_logits(plain, batch))
    model.add_policy("policy_1", 0)
    (part,) = micro_batches(batch, pairs_per_token=model.pairs_per_token)
    model.logprobs(part, model.states(part, ["policy_1"], "policy_1"), 1.0).sum().backward()
    assert all(
        t.grad is not None and (t.grad.abs().max() > 0) == n.endswith(".B")
        for n, t in model.tensors("policy_1").items()
    )


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_short_rows_attend_as_torch_does(causal: bool, dtype: torch.dtype) -> None:
    """Outputs and gradients of grouped queries, with a mask of our own and without."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(3, heads, 11, 8, generator=g).to(dtype).requires_grad_() for heads in (6, 2, 2)
    )
    visible = torch.rand(3, 1, 11, 11, generator=g).gt(0.5) | torch.eye(11, dtype=torch.bool)
    mask = (
        None
        if causal
        else torch.zeros(visible.shape, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)
    )
    expected = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, mask, is_causal=causal, scale=0.3, enable_gqa=True
    ).transpose(1, 2)
    found, _ = attention.attend(torch.nn.Identity(), q, k, v, mask, scaling=0.3, dropout=0.0)
    near = {"rtol": 1e-6, "atol": 1e-6} if dtype == torch.float64 else {"rtol": 0.02, "atol": 0.02}
    torch.testing.assert_close(found, expected, **near)
    weight = torch.randn(expected.shape, generator=g).to(dtype)
    for ours, theirs in zip(
        *(torch.autograd.grad((y * weight).sum(), (q, k, v)) for y in (found, expected)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, **near)


def test_long_rows_are_torchs(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = AdaptedModel(str(tiny_llama), LoraConfig(rank=2), torch.float32, torch.device("cpu"))
    assert model._base.config._attn_implementation == attention.NAME
    batch = batch_of(5, 2, 7)
    short = model.logits(batch, [])
    monkeypatch.setattr(attention, "SHORT", 0)
    monkeypatch.setattr(attention, "_Attention", None)
    torch.testing.assert_close(model.logits(batch, []), short)


@torch.no_grad()
def test_blocks_hide_what_the_dense_mask_hides(tiny_llama: Path) -> None:
    """FlexAttention's way for completions that share a row, which does not train on a CPU."""
    model = AdaptedModel(str(tiny_llama), LoraConfig(rank=2), torch.float32, torch.device("cpu"))
    (part,) = micro_batches(batch_of(7, 4, 9), pairs_per_token=1e9)
    assert part.segments is not None
    found = []
    with torch.compiler.set_stance("force_eager"):
        for name in (attention.NAME, attention.SHARED_ROWS):
            set_attention(model._base, name)
            found.append(model.states(part, []))
        config = model._base.config
        assert not attention.blocks_train(config, torch.float32, torch.device("cpu"))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
    (apart,) = micro_batches(batch_of(7, 4, 9))
    assert apart.segments is None
    separate = model.states(apart, [])
    torch.testing.assert_close(
        model._head.logits(found[1]).sum(), model._head.logits(separate).sum(), rtol=1e-4, atol=1e-3
    )


def test_states_of_another_precision_than_the_head_take_the_plain_way(tmp_path: Path) -> None:
    """Mamba keeps float32 states beside a bfloat16 head."""
    save_model(FAMILIES["Mamba"], tmp_path)
    assert trainer(tmp_path, FAMILIES["Mamba"], torch.bfloat16)._head.weight is None
