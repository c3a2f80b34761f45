"""Tests of runs that start from an SFT adapter.

They are compared with a run on a model into whose weights the adapter was merged beforehand: the
same SFT model, without any of the code under test.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tiny_run import tiny_config
from transformers import AutoModelForCausalLM

from raywarp.adapters.peft import load_peft, save_peft
from raywarp.algorithm.deltas import AdapterDelta, subtract
from raywarp.algorithm.factors import Factors, dense
from raywarp.config.schema import Config
from raywarp.run.folder import Run
from raywarp.warp import train

# The policies adapt q and v; the SFT adapter q and down.
POLICY_MODULES = ["q_proj", "v_proj"]
SFT_SIZES = {"self_attn.q_proj": (64, 64), "mlp.down_proj": (64, 96)}
TOKENS = torch.tensor([[1, 5, 9, 4, 12, 7]])


def sft_adapter(model: Path) -> AdapterDelta:
    generator = torch.Generator().manual_seed(3)
    factors = {
        f"model.layers.{layer}.{module}": Factors(
            torch.randn(d_out, 3, generator=generator) * 0.15,
            torch.randn(3, d_in, generator=generator) * 0.15,
        )
        for layer in (0, 1)
        for module, (d_out, d_in) in SFT_SIZES.items()
    }
    return AdapterDelta(factors, ("q_proj", "down_proj"), str(model))


def config_of(project: Path, model: Path, out: str, **changes: Any) -> Config:
    lora = {"target_modules": POLICY_MODULES}
    front = {"every": 3, "tracked_prompts": 2}
    # Large batches, so that no gradient is zero: Adam would enlarge its rounding.
    optim = {"batch_size": 24, "lr": 0.01}
    sections = {"lora": lora, "warp": {"steps": 3}, "optim": optim, "front": front, **changes}
    return tiny_config(project, model, project / out, **sections)


@pytest.fixture(scope="module")
def folders(project: Path, tiny_llama: Path) -> tuple[Path, Path]:
    """The SFT adapter, and a model with it merged into its weights."""
    delta = sft_adapter(tiny_llama)
    save_peft(delta, project / "sft")
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    for name, f in delta.factors.items():
        model.get_submodule(name).weight.data += dense(f).float()
    model.save_pretrained(project / "merged")
    for path in tiny_llama.glob("*token*"):
        (project / "merged" / path.name).write_bytes(path.read_bytes())
    return project / "sft", project / "merged"


@pytest.fixture(scope="module")
def runs(
    ray_cluster: Any, project: Path, tiny_llama: Path, folders: tuple[Path, Path]
) -> tuple[Run, Run]:
    """From the SFT adapter, and on the merged model."""
    sft, merged = folders
    return (
        train(config_of(project, tiny_llama, "from-adapter", sft_adapter=str(sft))),
        train(config_of(project, merged, "on-merged")),
    )


def front(run: Run) -> Any:
    return json.loads((run.folder / "front.json").read_text())["points"]


def logits(model: Path, adapter: Path) -> torch.Tensor:
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        found: torch.Tensor = PeftModel.from_pretrained(base, adapter)(TOKENS).logits
    return found


def test_training_and_front_are_those_of_the_merged_model(runs: tuple[Run, Run]) -> None:
    """The reward of every step is the same, and KL and log-probs agree to rounding."""
    ours, theirs = runs
    for mine, other in zip(ours.metrics(), theirs.metrics(), strict=True):
        assert other["grad_norm"] > 1e-3
        assert mine["reward"] == other["reward"]
        for name in ("kl_anchor", "entropy", "grad_norm"):
            assert mine[name] == pytest.approx(other[name], rel=1e-3, abs=1e-4), name
    for mine, other in zip(front(ours), front(theirs), strict=True):
        assert mine["reward"] == other["reward"]
        assert mine["kl"] == pytest.approx(other["kl"], rel=1e-3, abs=1e-5)
    assert front(ours)[0]["kl"] == 0
    assert max(point["kl"] for point in front(ours)) > 0.01


def test_results_are_adapters_of_the_base(
    runs: tuple[Run, Run], folders: tuple[Path, Path], tiny_llama: Path
) -> None:
    """Loaded by PEFT on the base, they are the SFT model's; adapter-of-sft on the SFT model."""
    (ours, theirs), (sft, merged) = runs, folders
    policies = json.loads((ours.folder / "iterations/2/policies.json").read_text())
    same = json.loads((theirs.folder / "iterations/2/policies.json").read_text())
    pairs = {
        "adapter": "adapter",
        "iterations/1/merged": "iterations/1/merged",
        "iterations/2/init": "iterations/2/init",
        **dict(zip(policies, same, strict=True)),
    }
    for mine, other in pairs.items():
        found, expected = (
            logits(tiny_llama, ours.folder / mine),
            logits(merged, theirs.folder / other),
        )
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    of_sft = logits(merged, ours.folder / "adapter-of-sft")
    torch.testing.assert_close(
        of_sft, logits(tiny_llama, ours.folder / "adapter"), rtol=0, atol=1e-4
    )
    changed = subtract(load_peft(ours.folder / "iterations/1/init"), whole(sft, ours))
    assert max(float(dense(f).norm()) for f in changed.factors.values()) < 1e-6


def whole(sft: Path, run: Run) -> AdapterDelta:
    """The SFT adapter over all modules of the run's adapters."""
    like, own = load_peft(run.folder / "adapter"), load_peft(sft).factors
    return like.map(lambda m, f: own.get(m, Factors(f.B[:, :0], f.A[:0])))


def test_a_finished_run_starts_nothing(
    runs: tuple[Run, Run],
    project: Path,
    tiny_llama: Path,
    folders: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        "raywarp.training.session.Session._start", lambda self: pytest.fail("actors would start")
    )
    ours, _ = runs
    before = (ours.folder / "front.json").read_bytes()
    train(config_of(project, tiny_llama, "from-adapter", sft_adapter=str(folders[0])))
    assert (ours.folder / "front.json").read_bytes() == before


def test_vllm_samples_from_the_sft_adapter(
    ray_cluster: Any, project: Path, tiny_llama: Path, folders: tuple[Path, Path]
) -> None:
    """The proof before the first step compares it with the trainer, which has the SFT adapter."""
    vllm = {"rollout": {"engine": "vllm", "max_new_tokens": 6}}
    run = train(
        config_of(
            project,
            tiny_llama,
            "vllm",
            sft_adapter=str(folders[0]),
            warp={"steps": 1, "iterations": 1},
            **vllm,
        )
    )
    assert run.metrics()[0]["engine_gap"] < 0.01
    assert run.metrics()[0]["sampler_gap"] < 0.01
    assert front(run)[0]["kl"] == 0
