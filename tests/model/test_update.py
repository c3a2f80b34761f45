"""Tests of the update's gradients against the plain formula, and of what it must not allocate.

The plain formula takes the full logits of transformers' own model with W + s·B·A in its weights. It
packs nothing, splits nothing into chunks, and recomputes nothing.

N completions, T the longest, V vocabulary.
"""

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import WORDS, save_tiny_llama
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from raywarp.algorithm import losses
from raywarp.algorithm.advantages import advantages
from raywarp.algorithm.deltas import AdapterDelta
from raywarp.algorithm.factors import Factors
from raywarp.config.load import parse_config
from raywarp.config.policies import LoraConfig
from raywarp.config.schema import Config
from raywarp.data.text import Completion
from raywarp.model import head
from raywarp.model.adapted import INIT, AdaptedModel
from raywarp.model.batches import Batch, collate, micro_batches
from raywarp.model.linear import AdaptedLinear
from raywarp.model.policy import Policy

TEMPERATURE, KL_COEF = 0.8, 0.3
REWARDS = torch.tensor([1.0, -1.0, 0.5, 2.0, 0.0, 1.5, -0.5, 1.0])


def config(advantage: str = "rloo", tokens: int = 4096) -> Config:
    return parse_config(
        {
            "lora": {"rank": 2, "alpha": 4},
            "optim": {
                "lr": 0.01,
                "batch_size": 8,
                "warmup_steps": 1,
                "grad_clip": 1e9,
                "max_tokens_per_microbatch": tokens,
            },
            "rollout": {
                "completions_per_prompt": 4,
                "max_new_tokens": 9,
                "temperature": TEMPERATURE,
            },
            "warp": {"ema_rate": 0.1, "kl_coef": KL_COEF, "advantage": advantage},
        }
    )


def some_batch() -> tuple[Batch, list[Completion]]:
    """Two prompts of unequal length with four completions each, of 1 to 9 tokens."""
    g = torch.Generator().manual_seed(3)
    prompts = [p for p in ([5, 6], [7, 8, 9, 10, 11]) for _ in range(4)]
    completions = []
    for n in range(len(prompts)):
        tokens = torch.randint(3, len(WORDS), (1 + (5 * n) % 9,), generator=g).tolist()
        completions.append(Completion(tuple(tokens), (-2.5,) * len(tokens), "", n % 2 == 0))
    return collate(prompts, completions), completions


def prepared(
    folder: Path, settings: Config, dtype: torch.dtype, checkpointing: bool = False
) -> Policy:
    """A policy in the middle of its training: init, policy and EMA all away from zero and from each
    other.
    """
    model = AdaptedModel(
        str(folder),
        LoraConfig(rank=2, alpha=4.0),
        dtype,
        torch.device("cpu"),
        gradient_checkpointing=checkpointing,
    )
    g = torch.Generator().manual_seed(0)
    model.set_init(
        model.zero_delta().map(
            lambda _, f: Factors(_normal(f.B.shape[0], 3, g), _normal(3, f.A.shape[1], g))
        )
    )
    policy = Policy(model, settings, 1, 1)
    policy.step = 1
    for adapter in (policy.name, policy.ema_name):
        for tensor in model.tensors(adapter).values():
            tensor.data += _normal(*tensor.shape, g)
    return policy


def _normal(rows: int, columns: int, g: torch.Generator) -> torch.Tensor:
    return torch.randn(rows, columns, generator=g) * 0.1


def gradients(policy: Policy) -> dict[str, torch.Tensor]:
    """What one update fed to AdamW: its first moment is (1 − β₁)·gradient after one step."""
    batch, completions = some_batch()
    policy.update(batch, REWARDS, completions, with_sft_kl=False)
    return {
        name: policy.optimiser.state[tensor]["exp_avg"] / 0.1
        for name, tensor in policy.model.tensors(policy.name).items()
    }


def plain_gradients(folder: Path, policy: Policy, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The formula of losses.py written out with full logits, one completion at a time."""
    plain: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    trained = {
        name: tensor.detach().to(dtype).clone().requires_grad_()
        for name, tensor in policy.model.tensors(policy.name).items()
    }
    batch, _ = some_batch()
    own = plain_logprobs(plain, batch, [policy.model.delta(INIT)], trained, 2.0)
    with torch.no_grad():
        anchor = plain_logprobs(
            plain, batch, [policy.model.delta(INIT), policy.model.delta(policy.ema_name)]
        )
    log_ratio = ((own - anchor) * batch.mask).sum(-1).detach()
    gain = advantages(REWARDS.to(dtype) - KL_COEF * log_ratio, policy.config.warp.advantage, 4)
    weights = (own.detach() - batch.sampler_logprobs).exp().clamp(max=2.0)
    loss = -(gain * (weights * own * batch.mask).sum(-1)).sum() / len(batch)
    return dict(zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True))


def plain_logprobs(
    plain: Any,
    batch: Batch,
    deltas: list[AdapterDelta],
    trained: dict[str, torch.Tensor] | None = None,
    scale: float = 1.0,
) -> torch.Tensor:
    weights = {}
    for module in deltas[0].factors:
        layer = plain.get_submodule(module)
        change = sum(
            d.factors[module].B.to(layer.weight.dtype) @ d.factors[module].A.to(layer.weight.dtype)
            for d in deltas
        )
        if trained:
            change = change + scale * trained[f"{module}.B"] @ trained[f"{module}.A"]
        weights[f"{module}.weight"] = layer.weight + (
            change.T if isinstance(layer, Conv1D) else change
        )
    rows = []
    for n, prompt in enumerate(batch.prompts):
        length = int(batch.mask[n].sum())
        response = batch.responses[n, :length]
        ids = torch.tensor([[*prompt, *response.tolist()]])
        logits = torch.func.functional_call(plain, weights, (ids,)).logits[0, len(prompt) - 1 : -1]
        chosen = (logits / TEMPERATURE).log_softmax(-1).gather(-1, response[:, None])[:, 0]
        rows.append(torch.nn.functional.pad(chosen, (0, batch.mask.shape[1] - length)))
    return torch.stack(rows)


def assert_gradients_equal(
    found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float
) -> None:
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0, name
        error = (found[name].double() - gradient.double()).norm() / gradient.double().norm()
        assert error < tolerance, (name, float(error))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("tokens", [4096, 40, 12, 1])
def test_gradients_are_the_plain_formulas(
    tiny_llama: Path,
    tiny_gpt2: Path,
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    tokens: int,
) -> None:
    """Whatever the micro-batches (everything, a prompt, some of a prompt's completions, one) and
    with three logits rows at a time.
    """
    monkeypatch.setattr(head, "CHUNK_BYTES", 3 * 4 * (3 + len(WORDS)))
    for folder in (tiny_llama, tiny_gpt2):
        policy = prepared(folder, config(tokens=tokens), dtype)
        expected = plain_gradients(folder, policy, dtype)
        assert_gradients_equal(
            gradients(policy), expected, 1e-6 if dtype == torch.float64 else 2e-5
        )


@pytest.mark.parametrize("advantage", ["rloo", "mean", "none"])
@pytest.mark.parametrize("tokens", [4096, 40])
def test_baselines_across_micro_batches(tiny_llama: Path, advantage: str, tokens: int) -> None:
    """The batch's mean needs every completion before any gradient; the prompt's mean does not."""
    policy = prepared(tiny_llama, config(advantage, tokens), torch.float64)
    expected = plain_gradients(tiny_llama, policy, torch.float64)
    assert_gradients_equal(gradients(policy), expected, 1e-6)


def test_gradient_checkpointing_changes_nothing(tiny_llama: Path, tiny_gpt2: Path) -> None:
    for folder in (tiny_llama, tiny_gpt2):
        kept = gradients(prepared(folder, config(), torch.float32))
        again = gradients(prepared(folder, config(), torch.float32, checkpointing=True))
        assert all(torch.equal(kept[name], again[name]) for name in kept)


def test_gradient_checkpointing_keeps_less(tiny_llama: Path) -> None:
    """Bytes that a trained pass keeps for its backward, the weights aside."""
    sizes = []
    for checkpointing in (False, True):
        policy = prepared(tiny_llama, config(), torch.float32, checkpointing)
        (part,) = micro_batches(some_batch()[0])
        saved: dict[int, int] = {}

        def keep(tensor: torch.Tensor, saved: dict[int, int] = saved) -> torch.Tensor:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        weights = {
            tensor.untyped_storage().data_ptr() for _, tensor in policy.model.base_parameters()
        }
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            policy.model.states(part, [INIT, policy.name], policy.name)
        sizes.append(sum(size for pointer, size in saved.items() if pointer not in weights))
    assert sizes[1] < sizes[0] / 4


def test_a_frozen_A_saves_no_inputs(tiny_llama: Path) -> None:
    """With B alone trained, a layer keeps r numbers per token of its input's d_in."""
    model = AdaptedModel(
        str(tiny_llama),
        LoraConfig(rank=2, alpha=4.0, init="frozen"),
        torch.float32,
        torch.device("cpu"),
    )
    model.add_policy("policy_1", 0)
    layer = next(m for m in model._base.modules() if isinstance(m, AdaptedLinear))
    layer.activate(["policy_1"], "policy_1")
    layer.adapters["policy_1"].B.requires_grad_()
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor
    ):
        layer(torch.randn(7, layer.weight.shape[1], requires_grad=True))
    assert sorted(tuple(t.shape) for t in saved if t is not layer.weight) == [(7, 2)]


class Largest(TorchDispatchMode):
    """Rows of the largest tensor over the vocabulary that any operation returned, the head's weight
    aside.
    """

    def __init__(self, weight: torch.Tensor):
        super().__init__()
        self.weight, self.vocabulary, self.rows = (
            weight.untyped_storage().data_ptr(),
            weight.shape[0],
            0,
        )

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            over_vocabulary = isinstance(tensor, torch.Tensor) and tensor.shape[-1:] == (
                self.vocabulary,
            )
            if over_vocabulary and tensor.untyped_storage().data_ptr() != self.weight:
                self.rows = max(self.rows, tensor.numel() // self.vocabulary)
        return result


def test_the_logits_of_all_tokens_are_never_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An update with KL to SFT: three rows of logits at a time, forward and backward; the plain way
    has them all.
    """
    vocabulary = 3 + len(WORDS)  # no other axis of the tiny model is this long
    monkeypatch.setattr(head, "CHUNK_BYTES", 3 * 4 * vocabulary)
    policy = prepared(save_tiny_llama(tmp_path), config(), torch.float32)
    batch, completions = some_batch()
    weight = policy.model._head.weight
    assert weight is not None
    with Largest(weight) as largest:
        policy.update(batch, REWARDS, completions, with_sft_kl=True)
    assert largest.rows == 3
    with Largest(weight) as largest:
        losses.token_logprobs(policy.model.logits(batch, [INIT]), batch.responses, TEMPERATURE)
    assert largest.rows >= batch.mask.sum()


def live_bytes() -> int:
    """Of all distinct storages of tensors in this process."""
    gc.collect()
    storages = {}
    for item in gc.get_objects():
        if issubclass(type(item), torch.Tensor) and item.device.type == "cpu":
            storages[item.untyped_storage().data_ptr()] = item.untyped_storage().nbytes()
    return sum(storages.values())


def test_one_base_and_adapters_of_their_own_size(tiny_llama: Path) -> None:
    """The base once; a policy adds adapter, EMA and random generators; training adds AdamW's two
    moments and the stack that takes part.
    """
    before = live_bytes()
    model = AdaptedModel(
        str(tiny_llama), LoraConfig(rank=2, alpha=4.0), torch.float32, torch.device("cpu")
    )
    base = sum(tensor.numel() * 4 for _, tensor in model.base_parameters())
    loaded = live_bytes() - before
    assert base <= loaded < 1.05 * base  # and the rotary frequencies
    policies = [Policy(model, config(), 1, m) for m in (1, 2)]
    adapter = sum(tensor.numel() * 4 for tensor in model.tensors("policy_1").values())
    loaded += sum(tensor.nbytes for policy in policies for tensor in policy.rng.values())
    assert live_bytes() - before - loaded == 4 * adapter
    batch, completions = some_batch()
    for policy in policies:
        policy.update(batch, REWARDS, completions, with_sft_kl=True)
    slack = 4096  # step counters, the batch itself
    assert live_bytes() - before - loaded <= 4 * adapter + 2 * 2 * adapter + adapter + slack
    for policy in policies:
        policy.close()
    del policy, policies
    assert live_bytes() - before - loaded <= slack


class Count(TorchDispatchMode):
    """Counts the kernels of a pass, without views."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        views = ("view", "split", "slice", "squeeze", "detach", "aten.t.", "expand", "select")
        self.kernels += not any(word in str(function) for word in views)
        return function(*args, **(kwargs or {}))


def test_a_gpu_gets_few_large_kernels() -> None:
    """65,536 tokens of Llama 3's vocabulary; on the meta device, which is no CPU."""
    vocabulary, hidden, tokens, step = 128_256, 4096, 4096, 65_536
    weight = torch.empty(vocabulary, hidden, dtype=torch.bfloat16, device="meta")
    states = torch.empty(tokens, hidden, dtype=torch.bfloat16, device="meta", requires_grad=True)
    chosen = torch.zeros(tokens, dtype=torch.long, device="meta")
    with Count() as count:
        head.chunked_logprobs(states, head.LogitHead(weight), chosen, 1.0)
    assert count.kernels * step // tokens < 3_000


@pytest.mark.parametrize("rows", [1, 3, 7, 100])
def test_the_size_of_a_product_changes_rounding_only(
    monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(50, 16, generator=generator)
    states = torch.randn(23, 16, generator=generator, requires_grad=True)
    tokens = torch.randint(50, (23,), generator=generator)
    plain = (states @ weight.T / 0.7).log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
    (expected,) = torch.autograd.grad(plain.square().sum(), states)
    monkeypatch.setattr(head, "CHUNK_BYTES", rows * 4 * 50)
    monkeypatch.setattr(head, "SLICE_BYTES", rows * 4 * 50)
    found = head.chunked_logprobs(states, head.LogitHead(weight), tokens, 0.7)
    torch.testing.assert_close(found, plain)
    (gradient,) = torch.autograd.grad(found.square().sum(), states)
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=2e-4)
