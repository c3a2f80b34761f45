"""Tests of what makes one recipe another: anchors, schedules, a KL target, averaged checkpoints.

Each is compared with plain formulas on dense weights.
"""

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from test_policy import changed, config, load, on_policy, snapshot, step

from raywarp.algorithm import losses
from raywarp.algorithm.deltas import zeros_like
from raywarp.algorithm.factors import Factors, dense
from raywarp.algorithm.schedule import adapted, rate_factor
from raywarp.config.schema import Config
from raywarp.model.adapted import INIT, AdaptedModel
from raywarp.model.batches import micro_batches
from raywarp.model.checkpoint import load_state, state_of
from raywarp.model.policy import BEST, Policy
from raywarp.storage.sealed import DamagedError


def with_section(base: Config, section: str, **values: object) -> Config:
    own = getattr(base, section).model_copy(update=values)
    return base.model_copy(update={section: own})


def averaging(count: int, **warp: object) -> Config:
    """A configuration that averages so many checkpoints, one every two steps."""
    every = config(**warp).model_copy(update={"checkpoint_every": 2})
    return with_section(every, "warp", average_last=count)


def started_away_from_sft(folder: Path, **lora: object) -> AdaptedModel:
    """A base with an init that is not the SFT model, as of an iteration after the first."""
    model, g = load(folder, **lora), torch.Generator().manual_seed(5)
    zero = model.zero_delta()

    def random(_: str, f: Factors) -> Factors:
        B = torch.randn(len(f.B), 1, generator=g)
        return Factors(B, torch.randn(1, f.A.shape[1], generator=g) * 0.1)

    model.set_init(zero.map(random))
    return model


@pytest.mark.parametrize("elastic", [False, True], ids=["", "elastic"])
@pytest.mark.parametrize("anchor", ["ema", "init", "sft"])
def test_the_anchor_is_the_named_model(tiny_llama: Path, anchor: str, elastic: bool) -> None:
    """With Elastic Reset an EMA moves beside every anchor."""
    model = started_away_from_sft(tiny_llama)
    warp: dict[str, Any] = {"anchor": anchor, "ema_rate": _rate(anchor)}
    if elastic:
        warp |= {"ema_rate": 0.1, "policies": 1, "elastic_reset": True}
    policy = Policy(model, config(**warp), 2, 1)
    for seed in range(3):
        step(policy, seed)
    batch, _ = on_policy(model, [INIT, policy.name], 9)
    (whole,) = micro_batches(batch)
    measured = policy._measure(whole, train=False, with_sft_kl=False)[1]
    logits = {
        "ema": model.logits(batch, [INIT, policy.ema_name]),
        "init": model.logits(batch, [INIT]),
        "sft": model.logits(batch, []),
    }
    expected = {
        name: (losses.token_logprobs(own, batch.responses, 0.8) * batch.mask)[whole.completions]
        for name, own in logits.items()
    }
    torch.testing.assert_close(measured, expected.pop(anchor))
    if anchor == "init" and not elastic:
        del expected["ema"]  # at rate 0 it stays there
    assert all((measured - other).abs().max() > 1e-3 for other in expected.values())


def _rate(anchor: str) -> float | None:
    return 0.1 if anchor == "ema" else None


def test_the_kl_to_an_sft_anchor_counts_from_the_first_step_on(tiny_llama: Path) -> None:
    """The policy then starts away from its anchor, and kl_anchor estimates kl_sft."""
    model = started_away_from_sft(tiny_llama)
    row = step(Policy(model, config(anchor="sft", ema_rate=None), 2, 1), 1)
    assert abs(row["kl_anchor"]) > 0.1
    assert row["kl_sft"] > 0.1


def test_in_the_first_iteration_an_sft_anchor_is_the_init(tiny_llama: Path) -> None:
    ends = []
    for anchor in ("init", "sft"):
        policy = Policy(load(tiny_llama), config(anchor=anchor, ema_rate=None), 1, 1)
        for seed in range(3):
            step(policy, seed)
        ends.append(snapshot(policy.model, [policy.name]))
    assert not changed(*ends)


def test_schedules_are_the_formulas_and_fall_to_zero() -> None:
    steps, warmup = 10, 3
    for schedule, formula in {
        "constant": lambda done: 1.0,
        "linear": lambda done: 1 - done,
        "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2,
    }.items():
        rates = [rate_factor(schedule, warmup, step, steps) for step in range(steps)]
        assert rates[:warmup] == pytest.approx([1 / 3, 2 / 3, 1])
        after = [formula((step - warmup) / (steps - warmup)) for step in range(warmup, steps)]
        assert rates[warmup:] == pytest.approx(after)
        assert rate_factor(schedule, 0, 0, 1) == 1
        assert rate_factor(schedule, 99, 4, 9) == 5 / 99


def test_the_optimiser_steps_at_the_scheduled_rate(tiny_llama: Path) -> None:
    """AdamW's first step moves each number by its rate, so that the rate can be read off."""
    moved = {}
    for schedule in ("constant", "cosine"):
        settings = with_section(config(steps=2), "optim", schedule=schedule, warmup_steps=0)
        policy = Policy(load(tiny_llama), settings, 1, 1)
        policy.step = 1  # the last of two: a cosine has fallen to one half
        before = snapshot(policy.model, [policy.name])
        step(policy, 1)
        after = snapshot(policy.model, [policy.name])
        moved[schedule] = max(float((after[n] - before[n]).abs().max()) for n in before)
    assert moved["constant"] == pytest.approx(0.02, rel=1e-3)
    assert moved["cosine"] == pytest.approx(0.01, rel=1e-3)


def test_the_coefficient_follows_the_error_of_the_kl() -> None:
    assert adapted(0.2, 3.0, None) == 0.2
    assert adapted(0.2, 1.0, 1.0) == 0.2
    assert adapted(0.2, 1.5, 1.0) == pytest.approx(0.2 * 1.05)
    assert adapted(0.2, 9.0, 1.0) == pytest.approx(0.2 * 1.1)
    assert adapted(0.2, -5.0, 1.0) == pytest.approx(0.2 * 0.9)


def test_a_kl_target_is_met_where_a_fixed_coefficient_misses_it() -> None:
    """A model of the loop: the KL that settles for β is 1/β, at a distance of some steps."""
    kl, beta = 5.0, 0.2
    for _ in range(200):
        kl += 0.3 * (1 / beta - kl)
        beta = adapted(beta, kl, 2.0)
    assert kl == pytest.approx(2.0, rel=0.05)


def test_a_policy_with_a_kl_target_tells_and_keeps_its_coefficient(tiny_llama: Path) -> None:
    settings = config(kl_target=0.5)
    policy = Policy(load(tiny_llama), settings, 1, 1)
    rows = [step(policy, seed) for seed in range(4)]
    assert rows[0]["kl_coef"] == 0.2
    for row, then in itertools.pairwise(rows):
        assert then["kl_coef"] == pytest.approx(adapted(row["kl_coef"], row["kl_anchor"], 0.5))
    other = Policy(load(tiny_llama), settings, 1, 1)
    load_state(other, state_of(policy))
    assert other.kl_coef == policy.kl_coef != 0.2
    assert "kl_coef" not in step(Policy(load(tiny_llama), config(), 1, 1), 0)


@pytest.mark.parametrize("init", ["independent", "frozen"])
def test_the_result_is_the_mean_of_the_last_checkpoints_in_dense_weights(
    tiny_llama: Path, init: str
) -> None:
    settings = with_section(averaging(3, steps=7), "lora", init=init)
    model = load(tiny_llama, init=init)
    policy, states = Policy(model, settings, 1, 1), {}
    for seed in range(7):
        step(policy, seed)
        states[policy.step] = policy.task_vector()
    result = policy.result()
    for module, factors in result.factors.items():
        expected = torch.stack([dense(states[n].factors[module]) for n in (4, 6, 7)]).mean(0)
        torch.testing.assert_close(dense(factors), expected, atol=1e-6, rtol=1e-5)
        assert factors.rank == settings.policy_rank == (2 if init == "frozen" else 6)
    factors_apart = sum(states[n].factors[module].B for n in (4, 6, 7)) / 3
    assert init == "frozen" or not torch.allclose(factors_apart, result.factors[module].B[:, :2])


def test_resumed_between_averaged_checkpoints_it_ends_the_same(tiny_llama: Path) -> None:
    settings = averaging(2, steps=6, kl_target=0.5)
    whole = Policy(load(tiny_llama), settings, 1, 1)
    for seed in range(6):
        step(whole, seed)
    first = Policy(load(tiny_llama), settings, 1, 1)
    for seed in range(5):
        step(first, seed)
    second = Policy(load(tiny_llama), settings, 1, 1)
    load_state(second, state_of(first))
    step(second, 5)
    for ours, theirs in zip(
        second.result().factors.values(), whole.result().factors.values(), strict=True
    ):
        assert torch.equal(ours.B, theirs.B)
        assert torch.equal(ours.A, theirs.A)


def test_a_state_without_the_states_it_should_have_kept_is_refused(tiny_llama: Path) -> None:
    settings = averaging(2, steps=6)
    policy = Policy(load(tiny_llama), settings, 1, 1)
    for seed in range(4):
        step(policy, seed)
    saved = state_of(policy)
    other = Policy(load(tiny_llama), settings, 1, 1)
    for lacking in ("kept/recent/000000002/", "kept/recent/000000004/ema/"):
        state = {name: tensor for name, tensor in saved.items() if not name.startswith(lacking)}
        with pytest.raises(DamagedError, match="the first is kept/recent"):
            load_state(other, state)


def test_with_a_stop_rule_the_result_is_the_best_state(tiny_llama: Path) -> None:
    settings = with_section(config(steps=4), "stop", plateau=1)
    policy = Policy(load(tiny_llama), settings, 1, 1)
    step(policy, 0)
    policy.kept[BEST] = policy.snapshot()
    best, ema = policy.task_vector(), policy.ema()
    saved = None
    for seed in range(1, 3):
        step(policy, seed)
        saved = state_of(policy)
    other = Policy(load(tiny_llama), settings, 1, 1)
    assert saved is not None
    load_state(other, saved)
    for found in (policy, other):
        result = found.result()
        assert all(
            torch.equal(result.factors[m].B, best.factors[m].B)
            and torch.equal(found.ema().factors[m].B, ema.factors[m].B)
            for m in best.factors
        )
    assert zeros_like(best).factors.keys() == best.factors.keys()
