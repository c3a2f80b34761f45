"""Check raywarp on one GPU, in at most eight minutes, without a hub.

    .venv/bin/python tests/gpu/check.py                     # everything
    .venv/bin/python tests/gpu/check.py --parts trainer exact
    .venv/bin/python tests/gpu/check.py --dtype float16     # in place of bfloat16
    .venv/bin/python tests/gpu/check.py --device cpu        # its twin on tiny shapes

Each part is a process of its own with a limit, so that a fault of one is no fault of the others:

- trainer: optimiser steps of random models in the shapes of 0.6 B, 1.5 B and 8 B. Tokens per
  second, model FLOPs over the card's peak (MFU) and over the speed of torch's product of large
  matrices, peak memory against the plan's. In float16 the loss scale, too.
- exact: the trainer's log-probs, with and without an adapter, against transformers' eager code in
  float32 with the adapter added to its weights.
- nf4: the same of a base in 4 bits, whose weights bitsandbytes dequantises; the cost of its steps.
- sampler: vLLM runs the trainer's adapters, by effect (raywarp.rollout.proof), before and after
  swaps; seconds of a swap, tokens per second of one adapter and of four at once.
- run: a whole tiny run with Ray, a policy and a rollout worker on the same card, in turns.

trainer and exact need torch, transformers and raywarp, nf4 also bitsandbytes; the others need vLLM
and Ray. A part whose package is missing is skipped. Prints a table and, as the last line, JSON.
Exits with 1 where a part fails.
"""

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE.parents[1])]

from check_models import SHAPES, logprobs_of, round_by_bitsandbytes, save_model  # noqa: E402

# Seconds of each part on a GPU, and the packages that it needs.
PARTS = {
    "trainer": (180, ()),
    "exact": (50, ()),
    "nf4": (50, ("bitsandbytes",)),
    "sampler": (120, ("ray", "vllm")),
    "run": (80, ("ray", "vllm")),
}
# FLOP/s of dense products in 16 bits, by a part of the card's name (NVIDIA's data sheets).
PEAKS = {
    **{"H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "B200": 2250e12, "A100": 312e12},
    **{"L40S": 362e12, "L4": 121e12, "A10": 125e12, "4090": 165e12},
}
RANK = 16
PROMPTS, GROUP, PROMPT_TOKENS, NEW_TOKENS, STEPS = 8, 4, 128, 256, 3


def main() -> int:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--dtype", choices=["bfloat16", "float16"], default="bfloat16")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), help="of the part trainer")
    parser.add_argument("--part", choices=list(PARTS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    where = (options.device, options.dtype)
    shapes = options.shapes or (["tiny"] if options.device == "cpu" else ["0.6B", "1.5B", "8B"])
    if options.part:
        work: Callable[..., dict[str, Any]] = globals()[f"part_{options.part}"]
        found = work(*where, *([shapes] if options.part == "trainer" else []))
        print(json.dumps(found))
        return 0
    results = {part: run_part(part, *where, shapes) for part in options.parts}
    for part, found in results.items():
        print(f"\n{part}: {found.pop('outcome')}, {found.pop('seconds'):.0f} s")
        for name, value in found.items():
            print(f"  {name:42}{value if isinstance(value, str) else format(value, '.4g')}")
    ok = {part: not found.get("error") for part, found in results.items()}
    about = {"device": device_name(options.device), "dtype": options.dtype}
    print(json.dumps({**about, "ok": ok, "figures": results}))
    return 0 if all(ok.values()) else 1


def run_part(part: str, device: str, dtype: str, shapes: Sequence[str]) -> dict[str, Any]:
    """Return a part's figures, with `outcome`, `seconds`, and `error` where it failed."""
    limit, needed = PARTS[part]
    if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
        return {"outcome": f"skipped, {missing[0]} is not installed", "seconds": 0.0}
    command = [sys.executable, str(Path(__file__)), "--device", device, "--dtype", dtype]
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="raywarp-check-", ignore_cleanup_errors=True) as folder:
        threads = {"OMP_NUM_THREADS": "1"} if device == "cpu" else {}
        environment = {**os.environ, **threads, "TMPDIR": folder, "HF_HUB_OFFLINE": "1"}
        try:
            done = subprocess.run(
                [*command, "--part", part, "--shapes", *shapes],
                capture_output=True,
                text=True,
                env=environment,
                timeout=limit * (1 if device == "cuda" else 3),
            )
        except subprocess.TimeoutExpired:
            return {"outcome": "FAILED", "seconds": time.monotonic() - start, "error": "too slow"}
    seconds = time.monotonic() - start
    if done.returncode:
        return {"outcome": "FAILED", "seconds": seconds, "error": done.stderr[-2000:]}
    return {"outcome": "ok", "seconds": seconds, **json.loads(done.stdout.splitlines()[-1])}


def device_name(device: str) -> str:
    if device == "cpu":
        return "cpu"
    import torch

    return torch.cuda.get_device_name()


def loaded(source: str, device: str, dtype: str, quantize: str = "none") -> Any:
    """Return the trainer's model."""
    import torch

    from raywarp.config.policies import LoraConfig
    from raywarp.model.adapted import AdaptedModel

    lora = LoraConfig(rank=RANK, alpha=float(RANK), target_modules="all-linear")
    return AdaptedModel(
        source, lora, getattr(torch, dtype), torch.device(device), quantize=quantize
    )


def part_trainer(device: str, dtype: str, shapes: Sequence[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    speed = product_speed(device, dtype)
    found["TFLOP/s of a large product"] = speed / 1e12
    for shape in shapes:
        with tempfile.TemporaryDirectory() as folder:
            source = save_model(Path(folder), shape, device)
            found |= {
                f"{shape}: {name}": value
                for name, value in trainer_of(source, device, dtype, speed).items()
            }
    return found


def trainer_of(
    source: str, device: str, dtype: str, speed: float, quantize: str = "none"
) -> dict[str, Any]:
    """Return what optimiser steps of one policy cost."""
    import torch
    from transformers import AutoConfig

    from raywarp.config.load import load_config
    from raywarp.data.text import Completion
    from raywarp.model.batches import collate
    from raywarp.model.policy import Policy
    from raywarp.planning.memory import policy_process
    from raywarp.planning.model_shapes import model_shapes

    prompt, new = (PROMPT_TOKENS, NEW_TOKENS) if device == "cuda" else (8, 8)
    tree = {"model": source, "warp": {"policies": 1}, "optim": {"batch_size": 32}}
    config = load_config({**tree, "base": {"quantize": quantize}})
    model = loaded(source, device, dtype, quantize)
    policy = Policy(model, config, 1, 1)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(3, model.vocabulary, (PROMPTS, prompt), generator=generator).tolist()
    prompts = [row for row in rows for _ in range(GROUP)]
    drawn = torch.randint(3, model.vocabulary, (len(prompts), new), generator=generator).tolist()
    completions = [Completion(tuple(row), (-1.0,) * new, "", False) for row in drawn]
    rewards = torch.randn(len(prompts), generator=generator)
    batch, seconds = collate(prompts, completions), []
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for _ in range(STEPS + 1):
        start = time.perf_counter()
        metrics = policy.update(batch, rewards, completions, with_sft_kl=False)
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    step = statistics.median(seconds[1:])
    shapes = model_shapes(AutoConfig.from_pretrained(source), config.lora)
    tokens = PROMPTS * (prompt + GROUP * (new - 1))
    adapted = sum(d_out * d_in for d_out, d_in in shapes.adapted.values())
    adapter = shapes.adapter_numbers(RANK)
    head = PROMPTS * GROUP * new * shapes.vocabulary * shapes.hidden
    flops = 2 * tokens * (3 * (adapted + adapter) + adapter) + 6 * head  # as tests/bench/step.py
    found: dict[str, Any] = {
        "attention": model._base.config._attn_implementation,
        "seconds of a step": step,
        "tokens/s, prompts and completions": tokens / step,
        "share of the product's speed": flops / step / speed,
    }
    if dtype == "float16":
        found["loss scale of the last step"] = metrics["loss_scale"]
    if device == "cuda":
        plan = policy_process(shapes, config, dtype, 1, PROMPTS * GROUP * new, gpu=True)
        planned = sum(plan.values()) - plan["Python, torch, Ray"]
        found["peak memory, GiB"] = torch.cuda.max_memory_allocated() / 2**30
        found["planned memory, GiB"] = planned / 2**30
        if peak := next((own for name, own in PEAKS.items() if name in device_name(device)), None):
            found["MFU"] = flops / step / peak
    return found


def product_speed(device: str, dtype: str) -> float:
    """Return the FLOP/s of torch's product of two square matrices."""
    import torch

    size = 8192 if device == "cuda" else 512
    left, right = torch.randn(2, size, size, device=device, dtype=getattr(torch, dtype))
    seconds = []
    for _ in range(10):
        start = time.perf_counter()
        left @ right
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(seconds[1:])


def part_exact(device: str, narrow: str, quantize: str = "none") -> dict[str, Any]:
    """Compare the trainer with another implementation, transformers' eager code."""
    import torch
    from transformers import AutoModelForCausalLM

    from raywarp.algorithm.factors import dense
    from raywarp.rollout.effect import effect
    from raywarp.rollout.effect_probe import make_probe, reference

    found: dict[str, Any] = {}
    shape = "0.6B" if device == "cuda" else "tiny"
    with tempfile.TemporaryDirectory() as folder:
        source = save_model(Path(folder), shape, device, layers=4)
        for dtype, most in (("float32", 2e-3), (narrow, None)):
            model = loaded(source, device, dtype, quantize)
            probe = make_probe([], model.vocabulary, 200, 1024, 0)
            ours = reference(model, probe, 0, 4096)
            eager = AutoModelForCausalLM.from_pretrained(
                source, dtype=torch.float32, attn_implementation="eager"
            ).to(device)
            if quantize == "nf4":
                round_by_bitsandbytes(eager)
            before = logprobs_of(eager, probe)
            for name, factors in ours.policy.factors.items():
                change = dense(factors).to(device, torch.float32)
                eager.get_submodule(name).weight.data += change
            seen = effect(ours.none, ours.alone, before, logprobs_of(eager, probe))
            found |= {
                f"{dtype}: slope": seen.slope,
                f"{dtype}: its standard error": seen.error,
                f"{dtype}: gap, nats per token": seen.engine_gap,
                f"{dtype}: gap with the adapter": seen.adapted_gap,
            }
            if fault := seen.fault():
                raise SystemExit(f"{dtype}: {fault}")
            if most and max(seen.engine_gap, seen.adapted_gap) > most:
                raise SystemExit(f"{dtype}: {seen.engine_gap:.2g} nats per token, at most {most:g}")
    return found


def part_nf4(device: str, dtype: str) -> dict[str, Any]:
    """Compare a base in 4 bits with its dequantised weights, and train on it."""
    found = part_exact(device, dtype, "nf4")
    shape = "0.6B" if device == "cuda" else "tiny"
    with tempfile.TemporaryDirectory() as folder:
        source = save_model(Path(folder), shape, device)
        return found | trainer_of(source, device, dtype, product_speed(device, dtype), "nf4")


def part_sampler(device: str, dtype: str) -> dict[str, Any]:
    """Prove vLLM by effect, swap, and generate."""
    from tiny_models import save_tokenizer

    from raywarp.algorithm.deltas import scale
    from raywarp.config.load import load_config
    from raywarp.rollout.effect import Sampler
    from raywarp.rollout.effect_probe import make_probe, reference, synthetic
    from raywarp.rollout.engine import EngineSettings
    from raywarp.rollout.proof import prove
    from raywarp.rollout.protocol import Adapter, AdapterPart, Request
    from raywarp.rollout.worker import RolloutWorker
    from raywarp.training.actors import VLLM_CPU_ENV, VLLM_ENV

    os.environ.update({**VLLM_ENV, **({} if device == "cuda" else VLLM_CPU_ENV)})
    shape, gpu = ("0.6B", True) if device == "cuda" else ("tiny", False)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        source = save_model(Path(folder), shape, device, layers=None if gpu else 2)
        save_tokenizer(Path(folder))
        rollout = load_config(
            {"rollout": {"gpu_memory_utilization": 0.4, "kv_cache_gib": 0.25, "ignore_eos": True}}
        ).rollout
        worker = RolloutWorker(EngineSettings(source, dtype, 512, 2 * RANK, rollout, gpu))
        start = time.perf_counter()
        mode = worker.start()["numerics"]["adapter"]
        found |= {"seconds of the engine's start": time.perf_counter() - start, "adapter": mode}
        model = loaded(source, device, dtype)

        def ask(tokens: int) -> Any:
            return reference(model, make_probe([], model.vocabulary, 400, tokens, 0), 0, 4096)

        sampler = Sampler(source, "vllm", mode, dtype)
        for when in ("at the start", "after the swaps"):
            proof = prove(sampler, ask, lambda requests: [worker.logprobs(requests).found])
            assert proof.found
            found[f"slope {when}"] = proof.found.slope
            if not proof.found.is_judged:
                raise SystemExit(f"the slope {when} is not precise: {proof.found.described()}")
            adapters = [
                Adapter(policy=AdapterPart.put(scale(synthetic(model, seed), 0.01)))
                for seed in range(4)
            ]
            rows, new = (64, rollout.max_new_tokens) if gpu else (8, 8)
            prompts = [[1] + [3 + n] * 15 for n in range(rows)]
            asked = [Request(prompts, list(range(rows)), adapter) for adapter in adapters]
            swaps = []
            for request in [asked[0], *asked]:
                start = time.perf_counter()
                worker.generate([request])
                swaps.append(time.perf_counter() - start)
            start = time.perf_counter()
            worker.generate([asked[0]])
            again = time.perf_counter() - start
            start = time.perf_counter()
            worker.generate(asked)
            together = time.perf_counter() - start
        found |= {
            "seconds of a swap": max(0.0, statistics.median(swaps[2:]) - again),
            "tokens/s, one adapter": rows * new / again,
            "tokens/s, four adapters in one call": 4 * rows * new / together,
        }
        worker.shutdown()
    return found


def part_run(device: str, dtype: str) -> dict[str, Any]:
    """Run everything once, on a tiny model. On CPUs, float32 stands for bfloat16."""
    from tiny_models import save_tiny_llama
    from tiny_run import make_project, tiny_config

    from raywarp.run.display import Display
    from raywarp.warp import train

    with tempfile.TemporaryDirectory() as folder:
        project = Path(folder) / "project"
        project.mkdir()
        make_project(project)
        sys.path.insert(0, str(project))
        os.chdir(project)
        gpu = {"gpus_per_policy": 0.4, "gpus_per_rollout_worker": 0.4}
        turns = {"sleep": True} if device == "cuda" else {}
        config = tiny_config(
            project,
            save_tiny_llama(Path(folder) / "model"),
            Path(folder) / "run",
            dtype=dtype if device == "cuda" or dtype == "float16" else "float32",
            rollout={"engine": "vllm", "kv_cache_gib": 0.1, "gpu_memory_utilization": 0.3, **turns},
            cluster=gpu if device == "cuda" else {},
        )
        run = train(config, Display(quiet=True))
        rows = run.metrics()
        front = run.front()["points"]
    return {
        "steps": float(len(rows)),
        "reward, SFT": front[0]["reward"],
        "reward, SLERP": front[-1]["reward"],
        "largest sampler_gap": max(row["sampler_gap"] for row in rows),
        "adapter_effect": rows[0].get("adapter_effect", float("nan")),
    }


if __name__ == "__main__":
    sys.exit(main())
