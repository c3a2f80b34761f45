"""Measure how wrong the usual ways to average LoRA adapters are, and what the exact way costs.

Two adapters have independent factors on a SmolLM2-135M-shaped stack: 30 blocks, 7 matrices each,
rank 16. Three averages are compared with the exact mean in ΔW: the mean of A and of B apart, PEFT's
add_weighted_adapter(linear), and SVD back to rank r. The time of the exact factored SLERP is
compared with that of forming every ΔW. Both sides run in turn; the last line is JSON.

Then peft_features.py averages adapters with PEFT's features, under an old and a new PEFT. Each is
installed by itself into a folder of its own.

    .venv/bin/python tests/bench/averaging.py
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from raywarp.algorithm.averaging import lerp, slerp
from raywarp.algorithm.deltas import AdapterDelta
from raywarp.algorithm.factors import Factors, dense

RANK, BLOCKS, REPEATS = 16, 30, 5
PEFT_VERSIONS = ("0.12.0", "0.21.2")
SIZES = {
    "q": (576, 576),
    "k": (192, 576),
    "v": (192, 576),
    "o": (576, 576),
    "gate": (1536, 576),
    "up": (1536, 576),
    "down": (576, 1536),
}


def adapter(seed: int) -> AdapterDelta:
    generator = torch.Generator().manual_seed(seed)
    factors = {
        f"model.layers.{block}.{name}": Factors(
            torch.randn(out, RANK, generator=generator) / 100,
            torch.randn(RANK, width, generator=generator) / width**0.5,
        )
        for block in range(BLOCKS)
        for name, (out, width) in SIZES.items()
    }
    return AdapterDelta(factors)


def relative_error(found: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> float:
    """‖found − exact‖ / ‖exact‖ over all modules."""
    wrong = sum(float((found[m] - exact[m]).pow(2).sum()) for m in exact)
    return float((wrong / sum(float(w.pow(2).sum()) for w in exact.values())) ** 0.5)


def kept_norm(exact: dict[str, torch.Tensor]) -> float:
    """What is left of the norm after SVD back to rank r."""
    kept = sum(float(torch.linalg.svdvals(w)[:RANK].pow(2).sum()) for w in exact.values())
    return float((kept / sum(float(w.pow(2).sum()) for w in exact.values())) ** 0.5)


def factors_apart(x: AdapterDelta, y: AdapterDelta) -> dict[str, torch.Tensor]:
    return {
        m: dense(Factors((f.B + y.factors[m].B) / 2, (f.A + y.factors[m].A) / 2))
        for m, f in x.factors.items()
    }


def peft_linear(x: AdapterDelta, y: AdapterDelta) -> dict[str, torch.Tensor]:
    """PEFT's own merge of the first block, by PEFT."""
    modules = {
        name: torch.nn.Linear(width, out, bias=False) for name, (out, width) in SIZES.items()
    }
    model = get_peft_model(
        torch.nn.ModuleDict(modules),
        LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(SIZES)),
        adapter_name="x",
    )
    model.add_adapter("y", LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(SIZES)))
    own: Any = model.base_model.model
    layers = {name: own[name] for name in SIZES}
    for name, layer in layers.items():
        for label, delta in (("x", x), ("y", y)):
            layer.lora_A[label].weight.data, layer.lora_B[label].weight.data = (
                delta.factors[f"model.layers.0.{name}"].A,
                delta.factors[f"model.layers.0.{name}"].B,
            )
    model.add_weighted_adapter(["x", "y"], [0.5, 0.5], "merged", combination_type="linear")
    return {
        f"model.layers.0.{name}": layer.get_delta_weight("merged").detach().double()
        for name, layer in layers.items()
    }


def dense_slerp(x: AdapterDelta, y: AdapterDelta) -> None:
    """SLERP with every ΔW formed, one angle per block."""
    for modules in x.blocks().values():
        a, b = ([f.factors[m].B @ f.factors[m].A for m in modules] for f in (x, y))
        dot = sum(float((p * q).sum()) for p, q in zip(a, b, strict=True))
        norms = [sum(float(p.pow(2).sum()) for p in side) ** 0.5 for side in (a, b)]
        angle = torch.acos(torch.tensor(dot / (norms[0] * norms[1])))
        weight = float(torch.sin(angle / 2) / torch.sin(angle))
        _ = [weight * p + weight * q for p, q in zip(a, b, strict=True)]


def seconds(
    function: Callable[[AdapterDelta, AdapterDelta], object], x: AdapterDelta, y: AdapterDelta
) -> float:
    start = time.perf_counter()
    function(x, y)
    return time.perf_counter() - start


def features(version: str) -> dict[str, Any]:
    """Return what peft_features.py measures under a version of PEFT."""
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", folder]
        subprocess.run([*pip, f"peft=={version}"], check=True)
        paths = [folder, *filter(None, [os.environ.get("PYTHONPATH")])]
        script = Path(__file__).with_name("peft_features.py")
        done = subprocess.run(
            [sys.executable, str(script)],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    x, y = adapter(1), adapter(2)
    exact = {m: dense(f) for m, f in lerp([x, y]).factors.items()}
    truth = {m: (dense(f) + dense(y.factors[m])) / 2 for m, f in x.factors.items()}
    first_block = {m: w for m, w in truth.items() if m.startswith("model.layers.0.")}
    timings = [
        (seconds(lambda a, b: slerp([a, b]), x, y), seconds(dense_slerp, x, y))
        for _ in range(REPEATS)
    ]
    result = {
        "error_exact": relative_error(exact, truth),
        "error_factors_apart": relative_error(factors_apart(x, y), truth),
        "error_peft_linear": relative_error(peft_linear(x, y), first_block),
        "kept_norm_svd_to_rank_r": kept_norm(first_block),
        "factored_seconds": statistics.median(t for t, _ in timings),
        "dense_seconds": statistics.median(t for _, t in timings),
        "speedup_over_dense": statistics.median(d / f for f, d in timings),
    }
    for name, value in result.items():
        print(f"{name:28s} {value:.3g}")
    of_peft = {version: features(version) for version in PEFT_VERSIONS}
    print(json.dumps({**result, "peft": of_peft}))


if __name__ == "__main__":
    main()
