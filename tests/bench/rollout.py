"""Measure the rollout worker on the embedded model: start, swaps, speed and sampler–trainer gap.

    .venv/bin/python tests/bench/rollout.py

The measures are seconds from start to first token, seconds per swap, tokens per second, and the
gap. There is one Ray actor with the real engine. A batch is 32 completions of 24 tokens for 8
prompts. Each batch is from a new version of a rank-16 adapter on an init of rank 32, as in a second
iteration. The gap is the mean |Δ log-prob| per token between sampler and trainer at the same dtype.
Values are medians of the batches after the first. The last line is JSON.
"""

import argparse
import json
import logging
import os
import statistics
import time
from typing import Any

os.environ.update(RAY_USAGE_STATS_ENABLED="0", RAY_AUTH_MODE="token", HF_HUB_OFFLINE="1")

import ray
import torch

from raywarp.algorithm import losses
from raywarp.algorithm.deltas import AdapterDelta, add
from raywarp.algorithm.factors import Factors
from raywarp.config.load import parse_config
from raywarp.config.schema import SMOLLM2
from raywarp.data.prompts import resolve_model
from raywarp.model.adapted import AdaptedModel
from raywarp.model.batches import collate
from raywarp.rollout.protocol import Adapter, AdapterPart, Request, join, submit
from raywarp.training.session import Session

PROMPTS, GROUP, TOKENS = 8, 4, 24
UNMERGED = [("vllm", "unmerged"), ("transformers", "unmerged")]
# those that are exact
MODES = {
    "bfloat16": UNMERGED,
    "float32": [*UNMERGED, ("vllm", "merged"), ("vllm", "lora")],
}


def changed(delta: AdapterDelta, seed: int) -> AdapterDelta:
    """The adapter with a B as large as some tens of steps make it."""
    g = torch.Generator().manual_seed(seed)
    return delta.map(lambda _, f: Factors(torch.randn(f.B.shape, generator=g) * 3e-3, f.A))


def measure(
    model: str, trainer: AdaptedModel, engine: str, adapter: str, dtype: str, batches: int
) -> dict[str, Any]:
    config = parse_config(
        {
            "dtype": dtype,
            "reward": {"function": "raywarp.embedded:vader"},
            "optim": {"batch_size": PROMPTS * GROUP},
            "rollout": {"engine": engine, "adapter": adapter, "max_new_tokens": TOKENS},
        }
    )
    generator = torch.Generator().manual_seed(0)
    prompts = [
        torch.randint(1000, 20000, (6,), generator=generator).tolist()
        for _ in range(PROMPTS)
        for _ in range(GROUP)
    ]
    start, rows = time.perf_counter(), []
    with Session(config, model, 8, policies=False) as session:
        vectors = [changed(trainer.delta("policy"), n) for n in range(batches)]
        init = add(changed(vectors[0], 100), changed(vectors[0], 101))
        part = AdapterPart.put(init)
        for number, vector in enumerate(vectors):
            asked = Adapter(part, AdapterPart.put(vector))
            ((ref,),) = submit(session.pool, [Request(prompts, list(range(len(prompts))), asked)])
            rollout = ray.get(ref)
            completions = join([rollout], asked)
            if not number:
                first = time.perf_counter() - start
            tokens = sum(len(c.token_ids) for c in completions)
            rows.append(
                (
                    rollout.swap_seconds,
                    tokens / (rollout.seconds - rollout.swap_seconds),
                    rollout.seconds,
                )
            )
    trainer.set_init(add(init, vectors[-1]))
    batch = collate(prompts, completions)
    own = losses.token_logprobs(
        trainer.logits(batch, ["init"]), batch.responses, config.rollout.temperature
    )
    gap = float(losses.sampler_gap(own, batch.sampler_logprobs, batch.mask))
    swap, speed, seconds = (statistics.median(column) for column in zip(*rows[1:], strict=True))
    row = {
        "engine": engine,
        "adapter": adapter,
        "dtype": dtype,
        "start_to_first_batch_seconds": first,
        "first_swap_seconds": rows[0][0],
    }
    return {
        **row,
        "swap_seconds": swap,
        "tokens_per_second": speed,
        "batch_seconds": seconds,
        "sampler_gap": gap,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--only", nargs="+", default=[], help="for example vllm-unmerged-bfloat16")
    options = parser.parse_args()
    model = resolve_model(SMOLLM2)
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    rows = []
    for dtype in ("bfloat16", "float32"):
        lora = parse_config({}).lora
        trainer = AdaptedModel(model, lora, getattr(torch, dtype), torch.device("cpu"))
        trainer.add_policy("policy", 0)
        for engine, adapter in MODES[dtype]:
            if options.only and f"{engine}-{adapter}-{dtype}" not in options.only:
                continue
            rows.append(row := measure(model, trainer, engine, adapter, dtype, options.batches))
            print(
                "  ".join(
                    f"{name} {value:.4g}" if isinstance(value, float) else value
                    for name, value in row.items()
                ),
                flush=True,
            )
    ray.shutdown()
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
