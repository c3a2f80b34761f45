"""Tests of plans for clusters that are named, and of what a policy step costs there."""

import re
from pathlib import Path
from typing import Any

import pytest

from raywarp.cli.commands import main
from raywarp.config.load import load_config
from raywarp.config.schema import ConfigError
from raywarp.planning.machines import GPUS, named_cluster
from raywarp.planning.plan import plan

EXAMPLE = Path(__file__).parents[2] / "cluster" / "configs" / "llama-8b.yaml"


@pytest.mark.parametrize(
    ("text", "nodes"),
    [
        ("H100", [(1, "H100")]),
        ("8xH100", [(8, "H100")]),
        ("2x8xh100", [(8, "H100"), (8, "H100")]),
        ("1x4xa100-40GB", [(4, "A100-40")]),
        ("2xNVIDIA-L40S , 1x16xCPU", [(2, "L40S"), (0, "")]),
    ],
)
def test_a_cluster_is_named(text: str, nodes: list[tuple[int, str]]) -> None:
    found = named_cluster(text)
    assert [node.get("GPU", 0) for node in found.nodes.whole] == [count for count, _ in nodes]
    for report, (count, name) in zip(found.reports, nodes, strict=True):
        assert report.gpu_memory == ((GPUS[name].bytes,) * count if name else ())


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("2x8xH1000", "no GPU H1000 is known; did you mean H100?"),
        ("8", "8 names no nodes"),
        ("", "nothing names no nodes"),
        ("0x8xH100", "has no GPUs"),
        ("2x8xH100,", "nothing names no nodes"),
        ("2*8*H100", "names no nodes"),
        ("½xH100", "names no nodes"),
    ],
)
def test_what_names_no_cluster_is_refused(
    text: str, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(EXAMPLE), "--offline", "--cluster", text]) == 2
    message = capsys.readouterr().err
    assert reason in message
    assert message.count("\n") == 1


def planned(cluster: str, **changes: Any) -> Any:
    overrides = [f"{key.replace('__', '.')}={value}" for key, value in changes.items()]
    return plan(load_config(EXAMPLE, overrides), offline=True, cluster=cluster)


def test_the_8b_example_is_judged_by_nodes_and_gpus() -> None:
    assert planned("8xH100").fits
    assert not planned("7xH100").fits
    pairs = {"rollout__tensor_parallel_size": 2, "cluster__gpus_per_reward_worker": 0}
    assert planned("5x2xH100", **pairs).fits
    pairs |= {"rollout__workers": 4, "cluster__policy_actors": 1}
    (problem, remedy) = planned("3x3xH100", **pairs).problems
    assert "no node has room for all of" in problem
    assert remedy.startswith("it would fit with")
    assert any("the largest GPU has 22.0 GiB" in text for text in planned("8xL4").warnings)
    with pytest.raises(ConfigError, match="dtype=bfloat16: the cluster has a GPU, T4"):
        planned("8xT4")
    (problem,) = planned("8xT4", dtype="float32").problems[:1]
    assert "weights alone" in problem


def test_a_steps_cost_is_that_of_its_passes() -> None:
    """128 completions of 512 + 512 tokens by Llama-3.1-8B (8.03e9 numbers; a token's keys and
    values are 2 x 32 layers x 8 heads x 128 numbers) on H100s of 989 TFLOP/s and 3.35 TB/s.
    """
    numbers, tokens = 8.03e9, 128 * 1024
    update = 4 * 2 * numbers * tokens / (0.4 * 989e12)
    held = 2 * numbers + 2 * 128 * (512 + 256) * 2 * 32 * 8 * 128
    rollout = held * 512 / (0.6 * 3.35e12)
    reward = 2 * 1.24e9 * tokens / (0.4 * 989e12)
    (line,) = [note for note in planned("8xH100").notes if "GPU-seconds of H100" in note]
    told = [float(number) for number in re.findall(r"(?<=[a-z] )[\d.]+", line)][:4]
    assert told == pytest.approx([rollout + update + reward, rollout, update, reward], rel=0.02)
    (hour,) = [note for note in planned("8xH100").notes if note.startswith("an hour")]
    (steps,) = re.findall(r"at most (\d+) policy steps", hour)
    assert int(steps) == pytest.approx(8 * 3600 / told[0], rel=0.01)
    assert not [
        note for note in planned("4x16xCPU", cluster__gpus_per_policy=0).notes if "cost" in note
    ]


def phases(cluster: str, dtype: str) -> dict[str, float]:
    """GPU-seconds of a policy step by phase."""
    (line,) = [note for note in planned(cluster, dtype=dtype).notes if "GPU-seconds of" in note]
    return {name: float(told) for name, told in re.findall(r"([a-z]+) ([\d.e+]+)[,)]", line)}


def test_each_dtype_has_its_own_speed() -> None:
    """An A100 has 312 TFLOP/s in 16 bits and 19.5 in float32; a T4 65 and 8.1, and no bfloat16, so
    reward models take float32 there. Reward models do not follow `dtype`.
    """
    wide, narrow = phases("8xA100", "float32"), phases("8xA100", "bfloat16")
    assert wide["update"] / narrow["update"] == pytest.approx(312 / 19.5, rel=0.01)
    assert wide["reward"] == narrow["reward"]
    small, half = phases("8xT4", "float32"), phases("8xT4", "float16")
    assert small["update"] / half["update"] == pytest.approx(65 / 8.1, rel=0.01)
    assert half["reward"] == small["reward"]
    assert half["reward"] / narrow["reward"] == pytest.approx(312 / 8.1, rel=0.01)


def test_a_share_of_a_gpu_cannot_be_split_by_tensor_parallelism() -> None:
    with pytest.raises(ConfigError, match="tensor_parallel_size"):
        planned("8xH100", rollout__tensor_parallel_size=2, cluster__gpus_per_rollout_worker=0.5)


def test_on_a_gpu_in_turns_each_phase_has_its_own_sum() -> None:
    """While the engine samples, a policy holds what it keeps between steps. While the policy
    trains, 1.5 GiB are counted for the engine.
    """
    one = Path(__file__).parents[2] / "cluster" / "configs" / "one-gpu.yaml"

    def of(share: float, sleep: bool, tokens: int) -> Any:
        changes = [
            "model=Qwen/Qwen3-8B",
            f"rollout.gpu_memory_utilization={share}",
            f"rollout.sleep={sleep}",
            f"optim.max_tokens_per_microbatch={tokens}",
        ]
        return plan(load_config(one, changes), offline=True, cluster="A100")

    apart, turns = of(0.6, False, 60_000), of(0.6, True, 60_000)
    assert any("40% of the largest GPU has 32.0 GiB" in text for text in apart.warnings)
    assert turns.warnings == []
    (policy,) = (p for p in turns.processes if p.on_gpu and p.need.key == "policy")
    kept = ("base weights", "init adapter", "policy adapters", "EMA adapters", "gradients")
    kept += ("optimiser moments", "Python, torch, Ray")
    rests, works = sum(policy.components[name] for name in kept) / 2**30, policy.bytes / 2**30
    (text,) = of(0.8, True, 60_000).warnings
    assert f"sampling may need {rests + 64:.1f} GiB and training {works + 1.5:.1f} GiB" in text
    assert "it has 80.0 GiB" in text
    host = next(p for p in turns.processes if p.need.key == "rollout_worker" and not p.on_gpu)
    asleep = host.components["base weights, while it sleeps"]
    assert asleep == policy.components["base weights"]
