"""Tests of one policy on a tiny Llama: its gradients, its anchor, its EMA, and its resumption.

A resumed run must be the same run.
"""

import math
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import plain_logits
from tiny_models import WORDS

from raywarp.algorithm import losses
from raywarp.algorithm.averaging import liti
from raywarp.algorithm.deltas import zeros_like
from raywarp.algorithm.factors import dense
from raywarp.algorithm.finite import NotFiniteError
from raywarp.config.load import parse_config
from raywarp.config.policies import LoraConfig
from raywarp.config.schema import Config
from raywarp.data.text import Completion
from raywarp.model import rng
from raywarp.model.adapted import INIT, AdaptedModel
from raywarp.model.batches import Batch, collate, micro_batches
from raywarp.model.checkpoint import load_state, state_of
from raywarp.model.policy import Policy
from raywarp.run.policy_files import Checkpoint, PolicyFiles
from raywarp.storage.location import Storage
from raywarp.storage.sealed import DamagedError

CPU = torch.device("cpu")


def config(**warp: object) -> Config:
    return parse_config(
        {
            "lora": {"rank": 2, "alpha": 4},
            "optim": {"lr": 0.02, "batch_size": 4, "warmup_steps": 1},
            "rollout": {"completions_per_prompt": 2, "max_new_tokens": 5, "temperature": 0.8},
            "warp": {"ema_rate": 0.1, "kl_coef": 0.2, **warp},
        }
    )


def load(folder: Path, **lora: object) -> AdaptedModel:
    return AdaptedModel(
        str(folder), LoraConfig(**{"rank": 2, "alpha": 4.0, **lora}), torch.float32, CPU
    )  # type: ignore[arg-type]


@pytest.fixture
def model(tiny_llama: Path) -> Iterator[AdaptedModel]:
    return load(tiny_llama)


def some_completions(
    seed: int, count: int = 4, length: int = 5
) -> tuple[list[list[int]], list[Completion]]:
    g = torch.Generator().manual_seed(seed)
    prompts, completions = [], []
    for n in range(count):
        prompts.append(torch.randint(3, len(WORDS), (2 + n % 2,), generator=g).tolist())
        tokens = torch.randint(3, len(WORDS), (length - n % 3,), generator=g).tolist()
        completions.append(Completion(tuple(tokens), (-3.0,) * len(tokens), "", n % 2 == 0))
    return prompts, completions


def on_policy(
    model: AdaptedModel, adapters: list[str], seed: int
) -> tuple[Batch, list[Completion]]:
    """A batch whose sampler log-probs are the model's own."""
    prompts, completions = some_completions(seed)
    batch = collate(prompts, completions)
    own = losses.token_logprobs(model.logits(batch, adapters), batch.responses, 0.8)
    completions = [
        Completion(c.token_ids, tuple(own[n, : len(c.token_ids)].tolist()), c.text, c.finished)
        for n, c in enumerate(completions)
    ]
    return collate(prompts, completions), completions


def step(
    policy: Policy, seed: int, rewards: tuple[float, ...] = (1.0, -1.0, 0.5, 2.0)
) -> dict[str, float]:
    batch, completions = on_policy(policy.model, [INIT, policy.name], seed)
    return policy.update(batch, torch.tensor(rewards), completions, with_sft_kl=True)


def snapshot(model: AdaptedModel, names: list[str]) -> dict[str, torch.Tensor]:
    tensors = {f"base/{n}": t.clone() for n, t in model.base_parameters()}
    return tensors | {
        f"{a}/{n}": t.detach().clone() for a in names for n, t in model.tensors(a).items()
    }


def changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}


def test_only_this_policy_and_its_ema_ever_change(model: AdaptedModel) -> None:
    """After step 1 every B, after step 2 every A too (∇A = 0 while B = 0), and no other bit: base,
    init, the other policy.
    """
    first, second = Policy(model, config(), 1, 1), Policy(model, config(), 1, 2)
    names = [INIT, "policy_1", "ema_1", "policy_2", "ema_2"]
    start = snapshot(model, names)
    step(first, 1)
    mine = {f"{kind}/{n}" for kind in ("policy_1", "ema_1") for n in model.tensors("policy_1")}
    assert changed(start, snapshot(model, names)) == {n for n in mine if n.endswith(".B")}
    step(first, 2)
    assert changed(start, snapshot(model, names)) == mine
    step(second, 3)
    assert not any(
        "base/" in n or n.startswith(INIT) for n in changed(start, snapshot(model, names))
    )


def test_a_frozen_A_stays_and_is_shared(tiny_llama: Path) -> None:
    settings = parse_config(
        config().model_dump() | {"lora": {"rank": 2, "alpha": 4, "init": "frozen"}}
    )
    model = load(tiny_llama, init="frozen")
    policies = [Policy(model, settings, i, m) for i, m in ((1, 1), (2, 2))]
    start = snapshot(model, ["policy_1"])
    for seed in range(3):
        step(policies[0], seed)
    assert {n.rsplit(".", 1)[1] for n in changed(start, snapshot(model, ["policy_1"]))} == {"B"}
    for name, tensor in model.tensors("policy_1").items():
        assert not name.endswith(".A") or torch.equal(tensor, model.tensors("policy_2")[name])


@pytest.mark.parametrize(
    ("kind", "same_policy", "same_iteration"),
    [("independent", False, False), ("shared", True, False)],
)
def test_initial_A(tiny_llama: Path, kind: str, same_policy: bool, same_iteration: bool) -> None:
    settings = parse_config(config().model_dump() | {"lora": {"rank": 2, "alpha": 4, "init": kind}})
    model = load(tiny_llama, init=kind)
    a = {
        im: Policy(model, settings, *im).task_vector().factors["model.layers.0.mlp.up_proj"].A
        for im in ((1, 1), (1, 2), (2, 1))
    }
    assert torch.equal(a[1, 1], a[1, 2]) == same_policy
    assert torch.equal(a[1, 1], a[2, 1]) == same_iteration


def test_the_anchor_is_the_ema_and_not_the_sft_model(model: AdaptedModel) -> None:
    policy = Policy(model, config(), 1, 1)
    for seed in range(3):
        step(policy, seed)
    batch, _ = on_policy(model, [INIT, "policy_1"], 9)
    anchor, sft, own = (
        model.logits(batch, names) for names in ([INIT, "ema_1"], [], [INIT, "policy_1"])
    )
    assert not torch.allclose(anchor, sft, atol=1e-4)
    assert not torch.allclose(anchor, own, atol=1e-4)
    (whole,) = micro_batches(batch)
    measured = policy._measure(whole, train=False, with_sft_kl=False)[1]
    expected = losses.token_logprobs(anchor, batch.responses, 0.8) * batch.mask
    torch.testing.assert_close(measured, expected[whole.completions])
    model.tensors("ema_1")["model.layers.0.mlp.up_proj.B"].data += 0.5
    assert not torch.allclose(model.logits(batch, [INIT, "ema_1"]), anchor, atol=1e-4)
    assert torch.equal(model.logits(batch, [INIT, "policy_1"]), own)


def test_no_adapters_is_the_plain_model(model: AdaptedModel, tiny_llama: Path) -> None:
    from transformers import AutoModelForCausalLM

    Policy(model, config(), 1, 1)
    batch, _ = on_policy(model, [], 1)
    plain = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    torch.testing.assert_close(model.logits(batch, []), plain_logits(plain, batch))


def test_log_ratio_of_first_step_is_zero_and_ema_follows(model: AdaptedModel) -> None:
    policy = Policy(model, config(), 1, 1)
    first = step(policy, 1)
    assert first["kl_anchor"] == pytest.approx(0, abs=1e-5)
    assert first["kl_sft"] == pytest.approx(0, abs=1e-5)
    assert first["sampler_gap"] == pytest.approx(0, abs=1e-5)
    for name, ema in model.tensors("ema_1").items():
        if name.endswith(".B"):
            torch.testing.assert_close(ema, 0.1 * model.tensors("policy_1")[name])
    assert step(policy, 2)["kl_anchor"] != 0


@pytest.mark.parametrize(("rate", "like"), [(0.0, "start"), (1.0, "policy_1")])
def test_ema_rate_0_and_1(model: AdaptedModel, rate: float, like: str) -> None:
    policy = Policy(model, config(ema_rate=rate), 1, 1)
    start = snapshot(model, ["ema_1"])
    for seed in range(2):
        step(policy, seed)
    for name, ema in model.tensors("ema_1").items():
        assert torch.equal(
            ema, start[f"ema_1/{name}"] if like == "start" else model.tensors(like)[name]
        )


def test_a_new_policy_starts_afresh(model: AdaptedModel) -> None:
    """Adapter, EMA and optimiser are reset for every policy and iteration."""
    old = Policy(model, config(), 1, 1)
    step(old, 1)
    old.close()
    new = Policy(model, config(), 2, 1)
    assert not new.optimiser.state
    assert all(dense(f).abs().max() == 0 for f in new.task_vector().factors.values())
    assert all(
        torch.equal(t, model.tensors("policy_1")[n]) for n, t in model.tensors("ema_1").items()
    )


def test_micro_batches_give_the_same_step(tiny_llama: Path) -> None:
    """Same gradients, one EMA step per optimiser step, whatever the micro-batches."""
    results = []
    # everything at once, a completion at a time, a prompt's completions at a time
    for tokens in (
        4096,
        1,
        20,
    ):
        settings = config()
        settings = settings.model_copy(
            update={
                "optim": settings.optim.model_copy(update={"max_tokens_per_microbatch": tokens})
            }
        )
        model = load(tiny_llama)
        policy = Policy(model, settings, 1, 1)
        metrics = [step(policy, seed) for seed in range(2)]
        results.append((metrics[-1], snapshot(model, ["policy_1", "ema_1"])))
    for metrics, tensors in results[1:]:
        assert metrics == pytest.approx(results[0][0], rel=1e-3, abs=1e-5)
        for name, tensor in tensors.items():
            torch.testing.assert_close(tensor, results[0][1][name], rtol=1e-3, atol=1e-5)


def test_padding_does_not_matter(model: AdaptedModel) -> None:
    """A completion alone, and among longer ones: the same log-probs."""
    policy = Policy(model, config(), 1, 1)
    step(policy, 1)
    prompts, completions = some_completions(5)
    together = collate(prompts, completions)
    all_logprobs = losses.token_logprobs(
        model.logits(together, [INIT, "policy_1"]), together.responses, 0.8
    )
    for n, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        alone = collate([prompt], [completion])
        logprobs = losses.token_logprobs(
            model.logits(alone, [INIT, "policy_1"]), alone.responses, 0.8
        )
        torch.testing.assert_close(
            logprobs[0], all_logprobs[n, : len(completion.token_ids)], rtol=1e-4, atol=1e-4
        )


def test_gpt2_without_its_dropout(tiny_gpt2: Path) -> None:
    """GPT-2 ships dropout 0.1; two passes agree bit for bit, with a gradient and without."""
    model = load(tiny_gpt2)
    Policy(model, config(), 1, 1)
    batch, _ = on_policy(model, [INIT, "policy_1"], 1)
    assert torch.equal(
        model.logits(batch, [INIT, "policy_1"], train="policy_1").detach(),
        model.logits(batch, [INIT, "policy_1"]),
    )
    assert model.zero_delta().fan_in_fan_out


def test_resume_equals_uninterrupted(tiny_llama: Path) -> None:
    model = load(tiny_llama)
    policy = Policy(model, config(), 1, 1)
    for seed in range(4):
        step(policy, seed)
    expected = snapshot(model, ["policy_1", "ema_1"])

    first = Policy(load(tiny_llama), config(), 1, 1)
    for seed in range(2):
        step(first, seed)
    saved = state_of(first)
    second = Policy(load(tiny_llama), config(), 1, 1)
    load_state(second, saved)
    assert second.step == 2
    for seed in range(2, 4):
        step(second, seed)
    assert not changed(expected, snapshot(second.model, ["policy_1", "ema_1"]))


def test_a_state_that_is_not_this_policys_changes_nothing(tiny_llama: Path) -> None:
    policy = Policy(load(tiny_llama), config(steps=3), 1, 1)
    step(policy, 0)
    saved = state_of(policy)
    other = Policy(load(tiny_llama), config(steps=3), 1, 1)
    before = state_of(other)
    last = max(name for name in saved if name.startswith("policy/"))
    for state, problem in (
        (
            {name: tensor for name, tensor in saved.items() if name != last},
            f"1 tensors, the first is {last}",
        ),
        (saved | {"more": torch.zeros(1)}, "1 tensors, the first is more"),
        (saved | {last: saved[last][:1]}, rf"{last} is torch.float32 \(1, "),
        (saved | {last: saved[last].double()}, f"{last} is torch.float64"),
        (saved | {"step": torch.tensor(0)}, "of step 0, and the policy takes 3"),
        (saved | {"step": torch.tensor(4)}, "of step 4, and the policy takes 3"),
    ):
        with pytest.raises(DamagedError, match=problem):
            load_state(other, state)
        assert all(torch.equal(before[name], tensor) for name, tensor in state_of(other).items())
    load_state(other, saved)
    assert all(torch.equal(saved[name], tensor) for name, tensor in state_of(other).items())


def test_checkpoints_come_back_newest_first_and_the_older_go(
    tiny_llama: Path, tmp_path: Path
) -> None:
    policy, files = (
        Policy(load(tiny_llama), config(steps=9), 1, 1),
        PolicyFiles(Storage(tmp_path), "k"),
    )
    states = []
    for seed in range(4):
        step(policy, seed)
        states.append(state_of(policy))
        rows = [{"step": n, "reward": 0.1 * n} for n in range(policy.step)]
        files.save_checkpoint(Checkpoint(states[-1], {"key": "k", "step": policy.step}, rows, rows))
    assert files.checkpoints() == [f"policies/k/checkpoint-00000{n}" for n in (3, 4)]
    for name, state in zip(files.checkpoints(), states[2:], strict=True):
        checkpoint = files.load_checkpoint(name)
        assert checkpoint is not None
        assert checkpoint.state.keys() == state.keys()
        assert all(torch.equal(checkpoint.state[tensor], value) for tensor, value in state.items())
        assert checkpoint.metrics[-1] == {
            "step": checkpoint.step - 1,
            "reward": 0.1 * (checkpoint.step - 1),
        }
    assert not list(tmp_path.rglob("*.p*kl*"))
    files.save_result(policy.task_vector(), rows, rows)
    assert files.checkpoints() == []
    assert [path.name for path in sorted((tmp_path / "policies" / "k").iterdir())] == sorted(
        [
            "adapter_config.json",
            "adapter_model.safetensors",
            "manifest.json",
            "metrics.jsonl",
            "samples.jsonl",
        ]
    )


def draws() -> list[float]:
    return [
        random.random(),
        random.gauss(),
        float(np.random.rand()),
        float(np.random.randn()),
        *torch.rand(2).tolist(),
    ]


def test_a_policys_random_numbers_are_its_own() -> None:
    """They go on where they were, whatever is drawn in between, also from a file; and nobody else's
    change.
    """
    states = rng.seeded(5, CPU)
    random.seed(1)
    outside = random.getstate()
    with rng.using(states, CPU):
        first = draws()
    saved = {name: tensor.clone() for name, tensor in states.items()}
    with rng.using(states, CPU):
        second = draws()
    assert random.getstate() == outside
    draws()
    with rng.using(saved, CPU):
        assert draws() == second != first
    with rng.using(rng.seeded(5, CPU), CPU):
        assert draws() == first


def test_init_adapter_of_any_rank_is_what_its_change_says(
    model: AdaptedModel, tiny_llama: Path
) -> None:
    """Next iteration's init, LITI of a trained policy, gives the logits of the model with that
    change in its weights.
    """
    from transformers import AutoModelForCausalLM

    policy = Policy(model, config(), 1, 1)
    for seed in range(3):
        step(policy, seed)
    vector = policy.task_vector()
    init = liti(zeros_like(vector), vector, 0.4)
    policy.close()
    model.set_init(init)
    batch, _ = on_policy(model, [], 1)
    plain = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    for module, f in vector.factors.items():
        plain.get_submodule(module).weight.data += 0.4 * dense(f).float()
    torch.testing.assert_close(
        model.logits(batch, [INIT]), plain_logits(plain, batch), rtol=1e-4, atol=1e-4
    )
    model.set_init(zeros_like(init))
    torch.testing.assert_close(model.logits(batch, [INIT]), model.logits(batch, []))


@pytest.mark.parametrize("wrong", [math.inf, -math.inf])
def test_a_step_that_is_not_finite_is_not_taken(model: AdaptedModel, wrong: float) -> None:
    policy = Policy(model, config(), 1, 1)
    step(policy, 0)
    before = snapshot(model, [policy.name, policy.ema_name])
    with pytest.raises(NotFiniteError, match="the reward is") as caught:
        step(policy, 1, (1.0, -1.0, wrong, 2.0))
    assert (caught.value.completions, caught.value.is_reward) == ((2,), True)
    assert not changed(before, snapshot(model, [policy.name, policy.ema_name]))
    assert policy.step == 1
    next(iter(model.tensors(policy.name).values())).data.fill_(math.nan)
    with pytest.raises(NotFiniteError, match="the log-prob"):
        step(policy, 1)


def test_a_completion_without_a_reward_gives_no_gradient(tiny_llama: Path) -> None:
    """Of two prompts of two, one completion of the first has none: only the second prompt counts,
    as where the first one's two rewards are equal.
    """
    found = []
    for rewards in ((1.0, math.nan, 0.5, 2.0), (3.0, 3.0, 0.5, 2.0)):
        policy = Policy(load(tiny_llama), config(kl_coef=0.0), 1, 1)
        metrics = step(policy, 0, rewards)
        found.append((metrics["grad_norm"], dict(policy.snapshot())))
        assert metrics["flat_groups"] == 1
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    for name, tensor in found[0][1].items():
        torch.testing.assert_close(tensor, found[1][1][name])
