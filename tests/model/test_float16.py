"""Tests of a policy on a float16 base: its gradients, its loss scale, and what does not fit.

float16 has three more bits than bfloat16, and ends at 65,504.
"""

import math
from pathlib import Path

import pytest
import torch
from test_policy import changed, on_policy, snapshot
from test_update import config, gradients, prepared, some_batch
from tiny_models import save_tiny_llama
from torch import Tensor
from transformers import LlamaForCausalLM

from raywarp.algorithm import loss_scale
from raywarp.algorithm.deltas import scale
from raywarp.algorithm.finite import NotFiniteError
from raywarp.config.policies import LoraConfig
from raywarp.config.schema import ConfigError
from raywarp.model.adapted import INIT, AdaptedModel, completion_kls
from raywarp.model.checkpoint import load_state, state_of
from raywarp.model.head import LogitHead, chunked_logprobs
from raywarp.model.policy import Policy
from raywarp.rollout.effect import differences, root_mean_square, slope
from raywarp.rollout.effect_probe import logprobs, make_probe, score, synthetic

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama whose weights are the same numbers in each precision."""
    return resaved(save_tiny_llama(tmp_path_factory.mktemp("model") / "narrow"))


def resaved(folder: Path, **larger: float) -> Path:
    """Save the model in bfloat16, with the weights of the named modules multiplied."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        for part, factor in larger.items():
            if part in name:
                parameter.data *= factor
    model.save_pretrained(folder)
    return folder


def load(folder: Path, dtype: torch.dtype = torch.float16) -> AdaptedModel:
    return AdaptedModel(str(folder), LoraConfig(rank=2, alpha=4.0), dtype, CPU)


def begun(folder: Path, scale: float | None = None) -> Policy:
    policy = Policy(load(folder), config(), 1, 1)
    assert policy.loss_scale is not None
    assert policy.loss_scale.value == loss_scale.START == 65536
    if scale:
        policy.loss_scale.value = scale
    return policy


def step(policy: Policy, seed: int, unit: float = 1.0) -> dict[str, float]:
    """A step whose gradient has the reward's unit."""
    batch, completions = on_policy(policy.model, [INIT, policy.name], seed)
    rewards = unit * torch.tensor([1.0, -1.0, 0.5, 2.0])
    return policy.update(batch, rewards, completions, with_sft_kl=True)


def errors(found: dict[str, Tensor], exact: dict[str, Tensor]) -> list[float]:
    return [float((found[name] - exact[name]).norm() / exact[name].norm()) for name in exact]


def test_gradients_are_finer_than_those_of_bfloat16(narrow: Path) -> None:
    """Of each factor, against float32's. Three bits are a factor of eight."""
    exact = gradients(prepared(narrow, config(), torch.float32))
    half, brain = (
        gradients(prepared(narrow, config(), dtype)) for dtype in (torch.float16, torch.bfloat16)
    )
    assert max(errors(half, exact)) < 0.02
    assert sum(errors(half, exact)) < sum(errors(brain, exact)) / 4
    for name, gradient in exact.items():
        cosine = torch.nn.functional.cosine_similarity(half[name].flatten(), gradient.flatten(), 0)
        assert cosine > 0.9999, name


def test_improbable_tokens_count_in_a_logprobs_derivative() -> None:
    """60,000 tokens have 1.7e-8 each, which float16 would round to 0, and 1e-3 together. Expected:
    Σ_v (1[v = y] − p_v)·W_v / τ.
    """
    torch.manual_seed(0)
    temperature, count = 0.7, 60_000
    weight, states = torch.rand(count + 1, 8), torch.zeros(3, 8).half()
    weight[:, 0], states[:, 0] = 0.0, 1.0
    weight[count] = temperature * math.log(1e3 * count) * torch.eye(8)[0]
    weight, tokens = weight.half(), torch.tensor([count] * 3)
    found = chunked_logprobs(states.requires_grad_(), LogitHead(weight), tokens, temperature)
    (gradient,) = torch.autograd.grad(found, states, torch.full((3,), 2.0**14))
    wide = weight.double()
    probabilities = (states.detach().double() @ wide.T / temperature).softmax(-1)
    assert 0 < probabilities[0, 0] < 2**-25
    expected = 2.0**14 * (wide[tokens] - probabilities @ wide) / temperature
    assert float((gradient - expected).norm() / expected.norm()) < 5e-3
    torch.testing.assert_close(gradient[:, 1:].double(), expected[:, 1:], rtol=0.02, atol=0)


def test_a_step_that_overflows_is_calculated_again(narrow: Path) -> None:
    """Rewards of 3e6 overflow at 2¹⁶. The step is the one of a policy with the smaller scale from
    the start, to the bit.
    """
    policy, unit = begun(narrow), 3e6
    step(policy, 0)
    found = step(policy, 1, unit)
    assert policy.loss_scale
    scale = policy.loss_scale.value
    assert found["loss_scale"] == scale < 2**14
    assert policy.step == 2

    other = begun(narrow)
    step(other, 0)
    assert other.loss_scale
    other.loss_scale.value = scale
    assert step(other, 1, unit) == found
    names = [policy.name, policy.ema_name]
    assert not changed(snapshot(policy.model, names), snapshot(other.model, names))
    assert all(torch.equal(policy.rng[name], other.rng[name]) for name in policy.rng)


def test_the_scale_changes_rounding_only(narrow: Path) -> None:
    """A power of two changes no digit of a number that stays normal."""
    exact = gradients(prepared(narrow, config(), torch.float32))
    low, high = (prepared(narrow, config(), torch.float16) for _ in range(2))
    assert low.loss_scale
    low.loss_scale.value = 2.0**8
    assert max(errors(gradients(low), exact)) < 0.02
    assert max(errors(gradients(high), gradients_of(low))) < 1e-3


def gradients_of(policy: Policy) -> dict[str, Tensor]:
    """What `gradients` returned."""
    return {
        name: policy.optimiser.state[tensor]["exp_avg"] / 0.1
        for name, tensor in policy.model.tensors(policy.name).items()
    }


def test_the_scale_doubles_after_clean_steps(narrow: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_scale, "CLEAN_STEPS", 2)
    policy = begun(narrow, 2.0**10)
    assert [step(policy, seed)["loss_scale"] for seed in range(5)] == [
        *(2.0**10, 2.0**10),
        *(2.0**11, 2.0**11),
        2.0**12,
    ]
    largest = loss_scale.LossScale(loss_scale.LARGEST, 1)
    largest.fits()
    assert largest == loss_scale.LossScale(loss_scale.LARGEST, 0)


def test_a_resumed_policy_has_its_scale(narrow: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted after a halving, and one clean step before the scale doubles."""
    monkeypatch.setattr(loss_scale, "CLEAN_STEPS", 3)

    def steps(policy: Policy, seeds: range) -> list[dict[str, float]]:
        return [step(policy, seed, 3e6 if seed == 0 else 1.0) for seed in seeds]

    whole, first, second = (begun(narrow) for _ in range(3))
    rows = steps(whole, range(6))
    assert len({row["loss_scale"] for row in rows}) == 2
    steps(first, range(2))
    load_state(second, state_of(first))
    assert second.loss_scale == first.loss_scale
    assert steps(second, range(2, 6)) == rows[2:]
    names = [whole.name, whole.ema_name]
    assert not changed(snapshot(whole.model, names), snapshot(second.model, names))


def test_other_precisions_have_no_scale(narrow: Path) -> None:
    policy = Policy(load(narrow, torch.bfloat16), config(), 1, 1)
    assert "loss_scale" not in step(policy, 0)
    assert not [name for name in state_of(policy) if "scale" in name or "clean" in name]


def test_a_gradient_that_fits_no_scale_is_told(narrow: Path) -> None:
    policy = begun(narrow)
    before = snapshot(policy.model, [policy.name])
    with pytest.raises(NotFiniteError, match=r"gradient's norm is .*dtype=bfloat16 or dtype=float"):
        step(policy, 0, 1e30)
    assert policy.loss_scale
    assert (policy.loss_scale.value, policy.step) == (loss_scale.SMALLEST, 0)
    assert not changed(before, snapshot(policy.model, [policy.name]))


def test_a_model_that_overflows_is_refused(tmp_path: Path) -> None:
    """Hidden numbers above 65,504, which bfloat16 holds."""
    large = resaved(save_tiny_llama(tmp_path / "large"), up_proj=1000, gate_proj=1000)
    with pytest.raises(ConfigError, match=r"dtype=float16: numbers of model=.*large exceed 65,504"):
        load(large)
    load(large, torch.bfloat16)


def test_an_adapter_that_overflows_is_told(narrow: Path) -> None:
    """In the proof, a measurement and a step. The model alone does fit."""
    policy = begun(narrow)
    model = policy.model
    for tensor in model.tensors(policy.name).values():
        tensor.data.fill_(100.0)
    batch, completions = some_batch()
    with pytest.raises(ConfigError, match="exceed 65,504"):
        logprobs(model, make_probe([], model.vocabulary, 20, 32, 0), [policy.name])
    with pytest.raises(ConfigError, match="exceed 65,504"):
        completion_kls(model, batch, config(), [policy.name])
    with pytest.raises(NotFiniteError, match=r"log-prob is nan \(dtype=float16 overflows above"):
        policy.update(batch, torch.ones(8), completions, with_sft_kl=False)


def test_a_small_adapters_effect_is_finer_than_in_bfloat16(narrow: Path) -> None:
    """An adapter of log-ratios of a few hundredths of a nat, as at η = 0.1. The slope of the
    trainer's own log-ratios on its float32 ones.
    """
    found = {}
    for dtype in (torch.float16, torch.bfloat16):
        model = load(narrow, dtype)
        probe = make_probe([], model.vocabulary, 60, 400, 0)
        model.set_init(scale(synthetic(model, 1), 0.004))
        none, small = score(model, probe, []), score(model, probe, [INIT])
        exact = differences(small.exact, none.exact)
        assert 0.01 < root_mean_square(exact) < 0.1
        found[dtype] = slope(exact, exact, differences(small.own, none.own))
    (value, error), (_, coarse) = found.values()
    assert abs(value - 1) < 3 * error
    assert error < 0.02
    assert error < coarse / 4
