"""Tests of the memory of GPUs, also of those that several processes share, and of the remedies."""

from pathlib import Path
from typing import Any

import pytest

from raywarp.cluster.resources import Need, Plan
from raywarp.config.load import load_config
from raywarp.planning.plan import plan

ONE = Path(__file__).parents[2] / "cluster" / "configs" / "one-gpu.yaml"
GIB = 2**30


def planned(cluster: str, *overrides: str) -> Any:
    return plan(load_config(ONE, list(overrides)), offline=True, cluster=cluster)


def on_gpu(found: Any, key: str) -> Any:
    (own,) = (p for p in found.processes if p.on_gpu and p.need.key == key)
    return own


@pytest.mark.parametrize(
    ("needs", "together"),
    [
        (((1, 4), (1, 3), (0, 1)), {(1, 0, 0), (0, 1, 0)}),
        (((0.5, 1), (0.5, 1), (0, 1)), {(1, 1, 0)}),
        (((0.6, 1), (0.6, 1), (0, 1)), {(1, 0, 0), (0, 1, 0)}),
        (((0.25, 4), (1, 1), (0, 1)), {(4, 0, 0), (0, 1, 0)}),
        (((0.5, 1), (0.25, 2), (0, 1)), {(1, 2, 0)}),
        (((0.4, 1), (0.4, 1), (0.2, 1)), {(1, 1, 1)}),
        (((0.5, 2), (0.5, 2), (0, 1)), {(2, 0, 0), (1, 1, 0), (0, 2, 0)}),
        (((0, 2), (2, 1), (0, 1)), {(0, 1, 0)}),
        (((0, 2), (0, 1), (0, 1)), {(0, 0, 0)}),
    ],
)
def test_processes_share_a_gpu_where_their_shares_fit(
    needs: tuple[tuple[float, int], ...], together: set[tuple[int, ...]]
) -> None:
    policy, rollout, reward = (Need("", gpus, 1, count) for gpus, count in needs)
    found = Plan(policy, rollout, reward, None, "float32")
    assert set(found.together) == together
    assert found.shares_gpus == any(a and b for a, b, _ in together)


def test_policies_beside_each_other_are_summed() -> None:
    """Four of 15.3 GiB of weights on a card of 40 GiB; the engine has the other card."""
    found = planned(
        "2xA100-40",
        "model=Qwen/Qwen3-8B",
        "warp.policies=4",
        "cluster.gpus_per_policy=0.25",
        "cluster.gpus_per_rollout_worker=1",
    )
    assert on_gpu(found, "policy").share == pytest.approx(1 / 4)
    (problem,) = found.problems
    assert "a policy needs 15.3 GiB (weights alone), 25% of the largest GPU has 10.0" in problem
    assert planned("2xA100-40", "cluster.gpus_per_policy=0.25", "warp.policies=4").fits


def test_engines_on_one_card_are_summed() -> None:
    """Each takes half of 24 GiB, and a policy lies beside them."""
    found = planned("RTX4090", "rollout.workers=2", "cluster.gpus_per_rollout_worker=0.25")
    (text,) = found.warnings
    total = on_gpu(found, "policy").bytes / GIB + 24
    assert f"1 x policy and 2 x rollout worker on one GPU may need {total:.1f} GiB" in text
    assert "it has 24.0 GiB: lower rollout.gpu_memory_utilization" in text
    less = ["rollout.workers=2", "rollout.gpu_memory_utilization=0.4"]
    assert planned("RTX4090", *less, "cluster.gpus_per_rollout_worker=0.25").warnings == []
    assert planned("3xRTX4090", "rollout.workers=2").warnings == []


@pytest.mark.parametrize("sleep", ["true", "false"])
def test_a_reward_model_on_the_same_card_is_counted(sleep: str) -> None:
    """Mistral-7B has 7.1e9 numbers of 16 bits, without its head: 13.2 GiB."""
    shares = ["cluster.gpus_per_policy=0.4", "cluster.gpus_per_rollout_worker=0.4"]
    shares += [f"rollout.sleep={sleep}", "rollout.gpu_memory_utilization=0.8"]
    assert planned("RTX4090", *shares).warnings == []
    model = "rewards=[{name: m, model: mistralai/Mistral-7B-Instruct-v0.3}]"
    found = planned("RTX4090", *shares, model, "cluster.gpus_per_reward_worker=0.2")
    (text,) = found.warnings
    reward, policy = on_gpu(found, "reward_worker").bytes, on_gpu(found, "policy")
    assert reward / GIB == pytest.approx(13.2, abs=0.1)
    if sleep == "true":
        sampling = policy.resting + reward + 0.8 * 24 * GIB
        assert f"sampling may need {sampling / GIB:.1f} GiB" in text
    else:
        total = policy.bytes + reward + 0.8 * 24 * GIB
        assert f"1 x reward worker on one GPU may need {total / GIB:.1f} GiB" in text


def test_a_policy_that_shares_no_card_has_all_of_it() -> None:
    """20 GiB of a card of 24, and an engine on the other card."""
    apart = ["cluster.gpus_per_policy=0.6", "cluster.gpus_per_rollout_worker=0.6"]
    found = planned("2xRTX4090", *apart, "model=Qwen/Qwen3-8B", "rollout.gpu_memory_utilization=.9")
    assert on_gpu(found, "policy").share == 1
    assert found.fits
    assert found.warnings == []


def remedies(texts: list[str], process: str) -> list[str]:
    (text,) = (text for text in texts if text.startswith(f"a {process} needs"))
    return text.rpartition(" GiB: ")[2].split(", or ")


def test_only_what_helps_is_advised() -> None:
    """A policy of 61 GiB and an engine of 61 GiB, which checkpoint already, on cards of 24 GiB."""
    whole = ["cluster.gpus_per_policy=1", "cluster.gpus_per_rollout_worker=1"]
    found = planned("2xRTX4090", "model=Qwen/Qwen3-32B", *whole)
    policy, engine = (remedies(found.problems, name) for name in ("policy", "rollout worker"))
    assert policy == ["set base.quantize=nf4", "take a smaller model"]
    assert engine == ["set rollout.tensor_parallel_size", "take a smaller model"]
    wide = planned("2xRTX4090", "model=Qwen/Qwen3-32B", "dtype=float32", *whole)
    assert "set dtype=bfloat16 or float16" in remedies(wide.problems, "policy")
    eight = planned("RTX4090", "model=Qwen/Qwen3-8B")
    policy, engine = (remedies(eight.problems, name) for name in ("policy", "rollout worker"))
    assert policy[:2] == ["lower rollout.gpu_memory_utilization", "set base.quantize=nf4"]
    assert engine == ["raise rollout.gpu_memory_utilization", "take a smaller model"]
    (_, engine) = (remedies(eight.warnings, name) for name in ("policy", "rollout worker"))
    assert engine[:2] == ["raise rollout.gpu_memory_utilization", "lower rollout.chunk_size"]
    four = ["model=Qwen/Qwen3-8B", "warp.policies=4", "cluster.gpus_per_policy=0.25"]
    crowded = planned("2xA100-40", *four, "cluster.gpus_per_rollout_worker=1")
    assert remedies(crowded.problems, "policy")[0] == "raise cluster.gpus_per_policy"
    engines = ["rollout.workers=2", "rollout.gpu_memory_utilization=0.6"]
    (text,) = planned("2xRTX4090", *engines, "cluster.gpus_per_policy=1").warnings
    assert text.endswith("it has 24.0 GiB: lower rollout.gpu_memory_utilization")
    tokens = ["optim.max_tokens_per_microbatch=200000", "optim.gradient_checkpointing=false"]
    tight = planned("2xA100", "model=Qwen/Qwen3-8B", *tokens, *whole)
    ways = ["lower optim.max_tokens_per_microbatch", "set optim.gradient_checkpointing=true"]
    assert remedies(tight.warnings, "policy")[:2] == ways
