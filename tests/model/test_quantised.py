"""Tests of a base in 4 bits: its weights are bitsandbytes', and it trains as these weights do."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from four_bits import of_bitsandbytes, replaced
from tiny_models import save_tiny_gpt2, save_tiny_llama, save_tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from raywarp.config.load import parse_config
from raywarp.config.policies import LoraConfig
from raywarp.data.text import Completion
from raywarp.model.adapted import INIT, AdaptedModel
from raywarp.model.batches import MicroBatch, collate, micro_batches
from raywarp.model.checkpoint import load_state, state_of
from raywarp.model.policy import Policy
from raywarp.model.quantised import QuantisedLinear, rounded
from raywarp.model.targets import quantisable

CPU = torch.device("cpu")


@pytest.fixture(params=["llama", "rows of 40 and 36", "gpt2"])
def base(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A model in float32; rows of 40 and 36 numbers share blocks of 64, and the last is shorter."""
    if request.param == "gpt2":
        return save_tiny_gpt2(tmp_path / "base")
    sizes = (64, 96) if request.param == "llama" else (40, 36)
    return save_tiny_llama(tmp_path / "base", 0, *sizes)


def test_its_weights_are_those_of_bitsandbytes(base: Path) -> None:
    theirs = of_bitsandbytes(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    assert quantisable(model) == list(theirs)
    for name, weight in theirs.items():
        layer = model.get_submodule(name)
        transposed = isinstance(layer, Conv1D)
        ours = rounded(layer.weight, transposed)
        assert torch.equal(ours.T if transposed else ours, weight), name
        held = QuantisedLinear(layer)
        assert torch.equal(held.weight, weight.float()), name
        assert held.codes.numel() == -(-weight.numel() // 2)
        assert held.scales.numel() == -(-weight.numel() // 64)


UNDER_BFLOAT16 = """
import sys, torch
from raywarp.model.quantised import rounded
torch.set_default_dtype(torch.bfloat16)
weight = torch.load(sys.argv[1])
with torch.device("meta"):
    found = rounded(weight)
assert torch.get_default_dtype() == torch.bfloat16
torch.save(found, sys.argv[1])
"""


def test_torchs_default_dtype_and_device_change_no_code(tmp_path: Path) -> None:
    """vLLM loads a model under its dtype and on its GPU; bitsandbytes makes its tables once."""
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    torch.save(weight, tmp_path / "w.pt")
    subprocess.run([sys.executable, "-c", UNDER_BFLOAT16, str(tmp_path / "w.pt")], check=True)
    assert torch.equal(torch.load(tmp_path / "w.pt"), rounded(weight))


def passes(model: AdaptedModel) -> tuple[MicroBatch, Tensor, list[Tensor]]:
    """Log-probs with an init and a policy, and the policy's gradients."""
    start = model.zero_delta()
    model.add_policy("p", seed=1)
    for name, tensor in model.tensors("p").items():
        if name.endswith("B"):
            tensor.data.normal_(0, 0.3, generator=torch.Generator().manual_seed(2))
    assert set(start.factors) == {name.rpartition(".")[0] for name in model.tensors("p")}
    texts = [(3, 4, 5, 6), (7, 8, 9)]
    batch = collate([(1, 3, 5), (1, 4)], [Completion(t, (-1.0,) * len(t), "", True) for t in texts])
    (part,) = micro_batches(batch)
    logprobs = model.logprobs(part, model.states(part, [INIT, "p"], "p"), 1.0)
    logprobs.sum().backward()
    return part, logprobs.detach(), [t.grad for t in model.trainable("p") if t.grad is not None]


@pytest.mark.parametrize("targets", ["all-linear", "few"])
def test_it_trains_as_a_model_with_those_weights_does(
    base: Path, tmp_path: Path, targets: str
) -> None:
    """Layers without an adapter are in 4 bits, too."""
    few = ["c_attn"] if "gpt2" in (base / "config.json").read_text() else ["q_proj", "down_proj"]
    lora = LoraConfig(rank=2, target_modules="all-linear" if targets == "all-linear" else few)
    plain = AdaptedModel(str(replaced(base, tmp_path / "plain")), lora, torch.float32, CPU)
    ours = AdaptedModel(str(base), lora, torch.float32, CPU, quantize="nf4")
    assert ours.pairs_per_token == plain.pairs_per_token
    assert ours.weight_norms() == pytest.approx(plain.weight_norms(), rel=1e-6)
    assert ours.zero_delta().fan_in_fan_out == plain.zero_delta().fan_in_fan_out
    _, expected, gradients = passes(plain)
    _, found, own = passes(ours)
    assert len(own) == len(gradients) > 0
    # GPT-2's own layout sums in another order.
    error = 1e-5 if few == ["c_attn"] else 0
    for a, b in zip([found, *own], [expected, *gradients], strict=True):
        torch.testing.assert_close(a, b, atol=error, rtol=error)
    unrounded = AdaptedModel(str(base), lora, torch.float32, CPU)
    assert not torch.allclose(passes(unrounded)[1], expected, atol=1e-3)


def test_float32_passes_of_a_bfloat16_base_have_the_same_weights(
    base: Path, tmp_path: Path
) -> None:
    """Embeddings and norms of the bfloat16 model are rounded, so its file is, too."""
    lora = LoraConfig(rank=2)
    narrow = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    narrow.save_pretrained(tmp_path / "narrow")
    save_tokenizer(tmp_path / "narrow")
    wide = AdaptedModel(str(tmp_path / "narrow"), lora, torch.float32, CPU, quantize="nf4")
    part, _, _ = passes(wide)
    ours = AdaptedModel(str(tmp_path / "narrow"), lora, torch.bfloat16, CPU, quantize="nf4")
    passes(ours)
    ours.set_init(ours.zero_delta())
    exact = ours.exact_logprobs(part, ["p"])
    torch.testing.assert_close(exact, wide.exact_logprobs(part, ["p"]), atol=1e-5, rtol=0)
    layers = [m for m in ours._base.modules() if isinstance(m, QuantisedLinear)]
    assert {layer.weight.dtype for layer in layers} == {torch.bfloat16}


def test_no_pass_keeps_a_dequantised_weight(tmp_path: Path) -> None:
    base = save_tiny_llama(tmp_path / "base")
    for targets in ("all-linear", ["q_proj"]):
        model = AdaptedModel(
            str(base),
            LoraConfig(rank=2, target_modules=targets),
            torch.float32,
            CPU,
            quantize="nf4",
        )
        kept: list[tuple[int, ...]] = []

        def keep(tensor: Tensor, kept: list[tuple[int, ...]] = kept) -> Tensor:
            kept.append(tuple(tensor.shape))
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            passes(model)
        weights = {m.shape for m in model._base.modules() if isinstance(m, QuantisedLinear)}
        assert len(weights) == 4
        assert not weights & {shape for pair in kept for shape in (pair, pair[::-1])}


def test_a_policy_that_is_resumed_has_the_same_bits(tmp_path: Path) -> None:
    base = save_tiny_llama(tmp_path / "base", hidden=40, inner=36)
    config = parse_config(
        {
            "base": {"quantize": "nf4"},
            "lora": {"rank": 2},
            "optim": {"lr": 0.02, "batch_size": 4, "warmup_steps": 1},
            "rollout": {"completions_per_prompt": 2, "max_new_tokens": 5},
        }
    )

    def policy() -> Policy:
        model = AdaptedModel(str(base), config.lora, torch.float32, CPU, quantize="nf4")
        return Policy(model, config, 1, 1)

    def step(policy: Policy, seed: int) -> None:
        tokens = torch.randint(3, 20, (4, 5), generator=torch.Generator().manual_seed(seed))
        texts = [Completion(tuple(row), (-3.0,) * 5, "", True) for row in tokens.tolist()]
        batch = collate([(1, 4, 5)] * 4, texts)
        policy.update(batch, torch.tensor([1.0, -1.0, 0.5, 2.0]), texts, with_sft_kl=True)

    whole, first, second = policy(), policy(), policy()
    for seed in range(4):
        step(whole, seed)
    for seed in range(2):
        step(first, seed)
    load_state(second, state_of(first))
    for seed in range(2, 4):
        step(second, seed)
    expected, found = state_of(whole), state_of(second)
    assert expected.keys() == found.keys()
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())
    assert whole.task_vector().peft == {"base_quantize": "nf4"}
