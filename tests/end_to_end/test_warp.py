"""Tests of the whole of WARP with a tiny Llama, Ray actors and the vLLM engine; I = 2, M = 3."""

import json
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from conftest import left_behind, traces
from peft import PeftModel
from tiny_run import tiny_config
from transformers import AutoModelForCausalLM

from raywarp.adapters.peft import load_peft
from raywarp.algorithm.deltas import subtract
from raywarp.algorithm.factors import dense
from raywarp.config.schema import Config
from raywarp.rewards.reward import RewardError
from raywarp.rollout.transport import digest
from raywarp.run.folder import Run
from raywarp.storage import sealed
from raywarp.warp import train


def settings(project: Path, tiny_llama: Path, out: str, **changes: Any) -> Config:
    """Three policies on two actors, sampled by vLLM, with a control score; `changes` by section."""
    own: dict[str, Any] = {
        "control": {"function": "raywarp.embedded:vader"},
        "warp": {"policies": 3},
        "optim": {"batch_size": 16},
        "rollout": {"engine": "vllm", "max_new_tokens": 6},
        "cluster": {"policy_actors": 2},
        "front": {"prompts": 4, "completions_per_prompt": 8},
    }
    for section, values in changes.items():
        own[section] = {**own.get(section, {}), **values}
    return tiny_config(project, tiny_llama, project / out, **own)


@pytest.fixture(scope="module")
def finished(ray_cluster: Any, project: Path, tiny_llama: Path) -> Run:
    return train(settings(project, tiny_llama, "run"))


def policies_of(run: Run, iteration: int) -> list[str]:
    names: list[str] = json.loads(
        (run.folder / "iterations" / str(iteration) / "policies.json").read_text()
    )
    return names


def test_the_folder_holds_what_the_readme_says(finished: Run) -> None:
    names = {path.name for path in finished.folder.iterdir()}
    assert {
        "config.yaml",
        "metrics.jsonl",
        "policies",
        "iterations",
        "front.json",
        "front.png",
        "adapter",
    } <= names
    assert yaml.safe_load((finished.folder / "config.yaml").read_text())["warp"]["policies"] == 3
    for iteration in (1, 2):
        assert len(policies_of(finished, iteration)) == 3
        assert all(
            (finished.folder / name / "adapter_model.safetensors").is_file()
            for name in policies_of(finished, iteration)
        )


def test_metrics_have_each_step_once(finished: Run) -> None:
    rows = finished.metrics()
    steps = sorted((row["iteration"], row["policy"], row["step"]) for row in rows)
    assert steps == [(i, m, t) for i in (1, 2) for m in (1, 2, 3) for t in range(6)]
    shares = [row[name] for row in rows for name in ("trainer_busy", "pool_busy")]
    assert all(0 < share <= 1 for share in shares)
    assert [timing["steps"] for timing in finished.timing()] == [18, 18]
    assert all("bound: " in timing["bound"] for timing in finished.timing())
    needed = {
        "reward",
        "kl_anchor",
        "entropy",
        "length",
        "eos_rate",
        "grad_norm",
        "sampler_gap",
        "rollout_seconds",
        "update_seconds",
    }
    assert all(needed <= row.keys() for row in rows)
    assert all(("kl_sft" in row) == (row["step"] % 3 == 0) for row in rows)
    # trainer and sampler agree, through every swap of adapters
    assert max(row["sampler_gap"] for row in rows) < 1e-3
    assert all(row["kl_anchor"] == pytest.approx(0, abs=1e-4) for row in rows if row["step"] == 0)


def test_training_and_merging_raise_the_reward(finished: Run) -> None:
    points = {point["name"]: point for point in finished.front()["points"]}
    assert list(points) == ["sft", "policy 1", "policy 2", "policy 3", "lerp", "liti 0.5", "slerp"]
    assert (
        points["slerp"]["reward"]
        > points["sft"]["reward"] + points["slerp"]["reward_ci"] + points["sft"]["reward_ci"]
    )
    assert 0 == points["sft"]["kl"] < points["liti 0.5"]["kl"] < points["slerp"]["kl"]
    assert [points[name]["eta"] for name in ("sft", "liti 0.5", "slerp", "lerp", "policy 1")] == [
        0,
        0.5,
        1,
        None,
        None,
    ]
    assert all(isinstance(point["control"], float) for point in points.values())


def test_merges_and_inits_are_the_algorithms(finished: Run) -> None:
    """merged = init + slerp(θ_m − init) per block and init' = (1−η)·init + η·merged, recomputed
    densely from the folders.
    """
    eta, previous = 0.5, None
    for iteration in (1, 2):
        folder = finished.folder / "iterations" / str(iteration)
        init, merged = load_peft(folder / "init"), load_peft(folder / "merged")
        vectors = [
            subtract(load_peft(finished.folder / name), init)
            for name in policies_of(finished, iteration)
        ]
        for modules in init.blocks().values():
            deltas = [torch.cat([dense(v.factors[m]).flatten() for m in modules]) for v in vectors]
            mean = dense_mean(deltas)
            found = torch.cat(
                [(dense(merged.factors[m]) - dense(init.factors[m])).flatten() for m in modules]
            )
            torch.testing.assert_close(found, mean, rtol=1e-5, atol=1e-6)
        if previous is None:
            assert all(dense(f).abs().max() == 0 for f in init.factors.values())
        else:
            for module, f in init.factors.items():
                expected = (1 - eta) * dense(previous[0].factors[module]) + eta * dense(
                    previous[1].factors[module]
                )
                torch.testing.assert_close(dense(f), expected, rtol=1e-5, atol=1e-6)
        previous = (init, merged)


def dense_mean(deltas: list[torch.Tensor]) -> torch.Tensor:
    """slerp_m = slerp(slerp_{m−1}, δ_m, 1/m), on plain vectors."""
    mean = deltas[0]
    for m, delta in enumerate(deltas[1:], start=2):
        angle = torch.acos(mean @ delta / (mean.norm() * delta.norm()))
        mean = (torch.sin((1 - 1 / m) * angle) * mean + torch.sin(angle / m) * delta) / torch.sin(
            angle
        )
    return mean


def test_the_chosen_adapter_loads_with_peft_and_is_the_dense_model(
    finished: Run, tiny_llama: Path
) -> None:
    ids = torch.arange(3, 20)[None]
    loaded = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny_llama), str(finished.folder / "adapter")
    ).eval()
    plain = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    merged = load_peft(finished.folder / "iterations" / "2" / "merged")
    for module, f in merged.factors.items():
        plain.get_submodule(module).weight.data += 0.5 * dense(f).float()
    torch.testing.assert_close(loaded(ids).logits, plain(ids).logits, rtol=1e-4, atol=1e-4)


def test_a_failing_reward_keeps_what_was_done_and_the_same_command_continues(
    finished: Run, project: Path, tiny_llama: Path
) -> None:
    """NaN in the middle of iteration 1, then the rest: adapters bit-equal to the run that nothing
    disturbed, each step once.
    """
    config = settings(project, tiny_llama, "broken_run", warp={"iterations": 1})
    (project / "broken").write_text("11")
    with pytest.raises(
        RewardError, match=r"(?s)count_good:score returned nan.*prompt: '.*completion: '"
    ):
        train(config)
    (project / "broken").unlink()
    run = Run(Path(config.out))
    kept = run.metrics()
    assert 0 < len(kept) < 18
    assert list(run.folder.glob("policies/*/checkpoint-*/manifest.json"))
    train(config)
    assert sorted((row["policy"], row["step"]) for row in run.metrics()) == [
        (m, t) for m in (1, 2, 3) for t in range(6)
    ]
    assert [row for row in run.metrics() if row in kept] == sorted(kept, key=run.metrics().index)
    for ours, theirs in zip(policies_of(run, 1), policies_of(finished, 1), strict=True):
        assert ours == theirs  # the same key
        assert digest(load_peft(run.folder / ours)) == digest(load_peft(finished.folder / theirs))


def test_a_killed_engine_is_started_again_and_the_adapters_are_the_same(
    finished: Run, project: Path, tiny_llama: Path
) -> None:
    """SIGKILL for the rollout worker's process after a few steps: its batch is generated again, and
    nothing is left behind at the end.
    """
    config = settings(project, tiny_llama, "killed_run", warp={"iterations": 1})
    run, killed, before = Run(Path(config.out)), [], traces()

    def kill_after_three_steps() -> None:
        while len(run.metrics()) < 3:
            time.sleep(0.02)
        for process in psutil.Process().children(recursive=True):
            if process.name().startswith("ray::RolloutW"):
                process.kill()
                killed.append(process.pid)

    killer = threading.Thread(target=kill_after_three_steps, daemon=True)
    killer.start()
    train(config)
    assert len(killed) == 1
    assert [row["restarts"] for row in run.timing()] == [1]
    for ours, theirs in zip(policies_of(run, 1), policies_of(finished, 1), strict=True):
        assert ours == theirs
        assert digest(load_peft(run.folder / ours)) == digest(load_peft(finished.folder / theirs))
    assert not left_behind(before)


def test_lora_mode_through_two_iterations_and_the_front(
    ray_cluster: Any, project: Path, tiny_llama: Path
) -> None:
    """Init and policy as one LoRA, the front's points side by side: the sampler follows the
    trainer.
    """
    warp, front = {"policies": 2, "steps": 2}, {"prompts": 4, "completions_per_prompt": 4}
    config = settings(
        project,
        tiny_llama,
        "lora_run",
        warp=warp,
        rollout={"adapter": "lora"},
        front=front,
        cluster={"policy_actors": 1},
    )
    run = train(config)
    rows = run.metrics()
    last = [(row["iteration"], row["policy"]) for row in rows if row["step"] == 1]
    # whichever policy of an iteration is first
    assert sorted(last) == [
        (1, 1),
        (1, 2),
        (2, 1),
        (2, 2),
    ]
    assert [iteration for iteration, _ in last] == [1, 1, 2, 2]
    assert max(row["sampler_gap"] for row in rows) < 1e-3
    assert load_peft(run.folder / "iterations" / "2" / "init").rank == 4
    assert [point["name"] for point in run.front()["points"]] == [
        "sft",
        "policy 1",
        "policy 2",
        "lerp",
        "liti 0.5",
        "slerp",
    ]
    assert all((point["kl"] > 0) == (point["name"] != "sft") for point in run.front()["points"])


def test_what_is_stored_is_not_trained_again(
    finished: Run, project: Path, tiny_llama: Path
) -> None:
    """One policy lost, one damaged: only these two are trained again, to the same bits, and the
    merge stays what it was.
    """
    config = settings(project, tiny_llama, "run")
    lost, damaged = policies_of(finished, 2)[1:]
    before = {name: digest(load_peft(finished.folder / name)) for name in (lost, damaged)}
    metrics = finished.metrics()
    sealed.remove(finished.folder / lost)
    weights = finished.folder / damaged / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    kept = finished.folder / policies_of(finished, 1)[0] / "manifest.json"
    time_of_kept = kept.stat().st_mtime_ns
    train(config)
    assert {name: digest(load_peft(finished.folder / name)) for name in (lost, damaged)} == before
    assert kept.stat().st_mtime_ns == time_of_kept
    assert len(finished.metrics()) == len(metrics)
