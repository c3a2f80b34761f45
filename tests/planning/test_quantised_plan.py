"""Tests of the memory of a base in 4 bits, by sums of their own and by what a model holds."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from raywarp.cli.commands import main
from raywarp.config.load import load_config, parse_config
from raywarp.model.adapted import AdaptedModel
from raywarp.model.quantised import QuantisedLinear
from raywarp.planning import memory
from raywarp.planning.forecast import ProcessMemory
from raywarp.planning.model_shapes import model_shapes
from raywarp.planning.plan import plan

ROOT = Path(__file__).parents[2]
ONE, EIGHT = (ROOT / "cluster" / "configs" / name for name in ("one-gpu.yaml", "llama-8b.yaml"))
PAGE = ROOT / "docs" / "benchmarks.md"
TWO_GPUS_EACH = ["rollout.workers=1", "rollout.tensor_parallel_size=2"]


@pytest.mark.parametrize("kind", ["tiny_llama", "tiny_gpt2"])
def test_the_parts_are_the_tensors(kind: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(kind)
    config = parse_config({"base": {"quantize": "nf4"}})
    model = AdaptedModel(
        str(folder), config.lora, torch.float32, torch.device("cpu"), quantize="nf4"
    )
    shapes = model_shapes(AutoConfig.from_pretrained(folder), config.lora, "float32")
    parts = memory.policy_process(shapes, config, "float32", policies=1, response_tokens=0)
    layers = [m for m in model._base.modules() if isinstance(m, QuantisedLinear)]
    held = sum(layer.codes.nbytes + layer.scales.nbytes for layer in layers)
    assert parts["base weights in 4 bits"] == held
    assert parts["base weights that stay"] == sum(t.nbytes for _, t in model.base_parameters())
    largest = max(layer.weight.numel() for layer in layers)
    assert parts["a layer, dequantised"] == largest * (2 + 4)  # bfloat16, then float32
    assert "base weights" not in parts


def planned(file: Path, model: str, quantize: str, cluster: str, *more: str) -> Any:
    keys = [f"model=Qwen/Qwen3-{model}", f"base.quantize={quantize}", *more]
    return plan(load_config(file, keys), offline=True, cluster=cluster)


def on_gpu(found: Any, process: str) -> ProcessMemory:
    (own,) = (p for p in found.processes if p.on_gpu and p.need.key == process)
    return own


# A layer's matrices: q, k, v, o, then gate, up and down.
EIGHT_B = 36 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 12288)
THIRTY_TWO_B = 64 * (2 * 5120 * 8192 + 2 * 5120 * 1024 + 3 * 5120 * 25600)


@pytest.mark.parametrize(
    ("model", "matrices", "others"),
    [
        # An embedding and a head, norms of each layer and of its queries and keys, and the last.
        ("8B", EIGHT_B, 2 * 151936 * 4096 + 36 * (2 * 4096 + 2 * 128) + 4096),
        ("32B", THIRTY_TWO_B, 2 * 151936 * 5120 + 64 * (2 * 5120 + 2 * 128) + 5120),
    ],
)
def test_a_policys_base_is_its_matrices_in_4_bits_and_the_rest_in_16(
    model: str, matrices: int, others: int
) -> None:
    plain = on_gpu(planned(EIGHT, model, "none", "8xA100", *TWO_GPUS_EACH), "policy")
    found = planned(EIGHT, model, "nf4", "8xA100", *TWO_GPUS_EACH)
    policy = on_gpu(found, "policy")
    assert plain.components["base weights"] == 2 * (matrices + others)
    assert policy.components["base weights in 4 bits"] == matrices // 2 + matrices // 64 * 4
    assert policy.components["base weights that stay"] == 2 * others
    transient = policy.components["a layer, dequantised"]
    saved = 2 * matrices - matrices * 4.5 / 8
    assert plain.bytes - policy.bytes == saved - transient
    # An engine has 16 bits of each number; here two GPUs share them.
    assert on_gpu(found, "rollout_worker").components["base weights"] == matrices + others


def test_32_b_on_8_cards_fits_with_nf4_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert planned(EIGHT, "32B", "none", "8xA100", *TWO_GPUS_EACH).warnings
    found = planned(EIGHT, "32B", "nf4", "8xA100", *TWO_GPUS_EACH)
    assert found.fits
    assert not found.warnings
    command = ["plan", str(EIGHT), "--offline", "--cluster", "8xA100", "model=Qwen/Qwen3-32B"]
    assert main([*command, *TWO_GPUS_EACH]) == 0
    assert "by this estimate it does not fit: see the warnings" in capsys.readouterr().out
    assert main([*command, *TWO_GPUS_EACH, "base.quantize=nf4"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert said.endswith("it fits")
    assert "a policy actor holds 95% of 32.76e9 numbers in 4.5 bits each" in said


def test_a_policy_beside_a_rollout_worker_has_what_that_leaves() -> None:
    """24 GiB, of which vLLM takes 70 %."""
    keys = ["rollout.gpu_memory_utilization=0.7"]
    found = planned(ONE, "0.6B", "none", "RTX4090", *keys)
    assert on_gpu(found, "policy").share == pytest.approx(0.3)
    quarters = [*keys, "warp.policies=2", "cluster.gpus_per_policy=0.25"]
    assert on_gpu(planned(ONE, "0.6B", "none", "RTX4090", *quarters), "policy").share == (
        pytest.approx(0.15)
    )
    (problem,) = (
        text for text in planned(ONE, "8B", "nf4", "RTX4090", *keys).warnings if "policy" in text
    )
    assert "30% of the largest GPU has 7.2 GiB: lower rollout.gpu_memory_utilization" in problem


def test_the_pages_table_is_what_the_plan_says() -> None:
    """Four of its rows, with and without nf4, on all three kinds of cards."""
    rows = re.findall(
        r"^\| ((?:8 × )?\d+) GB \| ([\d.]+) B \| (\w+) \| ([\d.]+) of ([\d.]+)"
        r" \| ([\d.]+) of ([\d.]+) \| (fits|does not fit) \|$",
        PAGE.read_text(),
        re.MULTILINE,
    )
    assert len(rows) == 18
    for card, size, quantize, *told in rows[1::5]:
        eight = card.startswith("8 ×")
        cluster = "8xA100" if eight else {"24": "RTX4090", "80": "A100"}[card]
        own = (EIGHT, TWO_GPUS_EACH) if eight else (ONE, [])
        found = planned(own[0], f"{size}B", quantize, cluster, *own[1])
        numbers = [
            f"{size / 2**30:.1f}"
            for process in ("policy", "rollout_worker")
            for p in [on_gpu(found, process)]
            for size in (p.bytes, p.share * found.reports[0].gpu_memory[0])
        ]
        fits = found.fits and not found.tight(found.reports)
        assert told == [*numbers, "fits" if fits else "does not fit"], (card, size, quantize)
