"""Measure whether the sampler samples what the trainer holds, and what that costs.

    .venv/bin/python tests/bench/fidelity.py

Small adapters are included: the adapters are η times the merge of a finished run on the embedded
model. This is the quickstart, which is run first if it is not there. At each η completions are
sampled from vLLM. Log-ratios (adapter over SFT, nats per token) are taken three times: of the
sampler's own log-probs, of the trainer's in the same precision, and of a float32 model. The last
are the instrument of every slope, since bfloat16's noise biases a plain regression.

KLs are over the whole vocabulary. The sampler's comes from the logits of vLLM's own passes, the
second is the reported one. The third is independent: the texts' own mean log-ratio in float32.
Standard errors are jackknifed over completions.

Seconds are medians of turns. A turn is 32 completions of 24 tokens, from another adapter of rank 16
each time, unmerged and merged in a process each. (Merged in bfloat16 rounds; it is here for its
speed alone.) The last line is JSON. `--dtypes float16` measures float16, which is slow on CPUs.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.update(
    HF_HUB_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
    OMP_NUM_THREADS=str(os.cpu_count()),
    GOMP_SPINCOUNT="20000",
)
os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_LOGGING_LEVEL="ERROR",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
)
os.environ.update(
    TORCHDYNAMO_DISABLE="1",
    MALLOC_MMAP_THRESHOLD_=str(8 << 30),
    MALLOC_TRIM_THRESHOLD_=str(8 << 30),
)

import torch
from torch import Tensor

from raywarp.adapters.peft import load_peft
from raywarp.algorithm.deltas import AdapterDelta, scale
from raywarp.algorithm.factors import Factors
from raywarp.cluster.turns import finish
from raywarp.config.load import load_config
from raywarp.config.schema import Config
from raywarp.data.models import read_tokenizer
from raywarp.data.prompts import load_prompts, resolve_model
from raywarp.model.adapted import INIT, AdaptedModel
from raywarp.model.batches import Batch, collate
from raywarp.rollout.engine import EngineSettings
from raywarp.rollout.protocol import SFT, Adapter, Request
from raywarp.rollout.worker import start_engine

THREADS = os.cpu_count() or 1
ETAS = (1.0, 0.5, 0.2, 0.1)
PROMPTS, TOKENS = 96, 24
GENERATED = 32


class Part:
    """An adapter on its way to an engine, without Ray."""

    def __init__(self, version: str, delta: AdapterDelta):
        self.version, self.delta, self.rank = version, delta, delta.rank

    def fetch(self) -> AdapterDelta:
        return self.delta


def adapter(version: str, delta: AdapterDelta) -> Adapter:
    return Adapter(policy=Part(version, delta))  # type: ignore[arg-type]


def finished_run(folder: Path) -> tuple[Config, Path]:
    """The run's configuration and folder, after a quickstart where there is none."""
    if not (folder / "front.json").is_file():
        subprocess.run(
            [sys.executable, "-m", "raywarp.cli", "quickstart", f"out={folder}"], check=True
        )
    return load_config(folder / "config.yaml"), folder


def engine_for(model: str, dtype: str, mode: str, rank: int) -> Any:
    rollout = load_config(
        {
            "rollout": {
                "adapter": mode,
                "max_new_tokens": TOKENS,
                "temperature": 1.0,
                "ignore_eos": True,
            }
        }
    ).rollout
    torch.set_num_threads(THREADS)
    return start_engine(EngineSettings(model, dtype, 96, rank, rollout, gpu=False))


class Sampler:
    """A vLLM engine, and the logits of its passes."""

    def __init__(self, model: str, dtype: str, rank: int):
        self.engine = engine_for(model, dtype, "unmerged", rank)
        runner = self.engine.llm.llm_engine.model_executor.driver_worker.worker.model_runner
        self._seen: list[Tensor] = []
        compute = runner.model.compute_logits

        def compute_logits(*arguments: Any, **named: Any) -> Any:
            logits = compute(*arguments, **named)
            self._seen.append(logits)
            return logits

        runner.model.compute_logits = compute_logits

    def complete(self, prompts: Sequence[Sequence[int]], wanted: Adapter) -> Any:
        self.engine.loader.load([wanted])
        return finish(self.engine.sample([Request(prompts, list(range(len(prompts))), wanted)]))[0]

    def logprobs(self, prompts: Sequence[Sequence[int]], batch: Batch, wanted: Adapter) -> Tensor:
        """(N, T, V) float32 log-probs at the response tokens, each sequence in a pass of its
        own.
        """
        from vllm import SamplingParams, TokensPrompt

        self.engine.loader.load([wanted])
        extra = self.engine._slot(Request((), (), wanted))
        rows = []
        for prompt, response in zip(prompts, batch.responses.tolist(), strict=True):
            self._seen.clear()
            settings = SamplingParams(max_tokens=1, prompt_logprobs=0, extra_args=extra)
            self.engine.llm.generate(
                [TokensPrompt(prompt_token_ids=[*prompt, *response])], [settings], use_tqdm=False
            )
            (logits,) = [
                seen for seen in self._seen if len(seen) == len(prompt) + len(response) - 1
            ]
            rows.append(logits[len(prompt) - 1 :].float().log_softmax(-1))
        return torch.stack(rows)


def trainer_logprobs(model: AdaptedModel, batch: Batch, delta: AdapterDelta | None) -> Tensor:
    """(N, T, V) float32 log-probs of the trainer at the response tokens."""
    if delta is not None:
        model.set_init(delta)
    rows = []
    for n in range(0, len(batch), 8):
        part = Batch(
            batch.prompts[n : n + 8],
            batch.responses[n : n + 8],
            batch.mask[n : n + 8],
            batch.sampler_logprobs[n : n + 8],
        )
        with torch.no_grad():
            rows.append(
                model.logits(part, [INIT] if delta is not None else []).float().log_softmax(-1)
            )
    return torch.cat(rows)


def chosen(logprobs: Tensor, batch: Batch) -> Tensor:
    """(N, T) of the response tokens."""
    return logprobs.gather(-1, batch.responses[..., None])[..., 0]


def kl(policy: Tensor, sft: Tensor) -> Tensor:
    """(N,) nats per completion."""
    return (policy.exp() * (policy - sft)).sum(-1).sum(-1)


def jackknife(statistic: Callable[[Tensor], float], count: int) -> tuple[float, float]:
    """A statistic of all completions, and its standard error from leaving each out."""
    everything = torch.arange(count)
    left_out = [statistic(everything[everything != n]) for n in range(count)]
    mean = sum(left_out) / count
    return (
        statistic(everything),
        ((count - 1) / count * sum((value - mean) ** 2 for value in left_out)) ** 0.5,
    )


def slope(instrument: Tensor, y: Tensor, x: Tensor) -> tuple[float, float]:
    """Of y on x, both noisy, by an instrument whose noise is another's; all (N, T)."""
    over, under = (instrument * y).sum(1), (instrument * x).sum(1)
    return jackknife(lambda rows: float(over[rows].sum() / under[rows].sum()), len(instrument))


def measure(
    model: str, dtype: str, merged: AdapterDelta, prompts: Sequence[Sequence[int]], lora: Any
) -> list[dict[str, Any]]:
    trainer, exact = (
        AdaptedModel(model, lora, kind, torch.device("cpu"))
        for kind in (getattr(torch, dtype), torch.float32)
    )
    sampler, rows = Sampler(model, dtype, merged.rank), []
    for eta in ETAS:
        delta = scale(merged, eta)
        wanted = adapter(f"eta {eta}", delta)
        batch = collate(prompts, sampler.complete(prompts, wanted))
        theirs, theirs_sft = (sampler.logprobs(prompts, batch, one) for one in (wanted, SFT))
        ours, ours_sft = (trainer_logprobs(trainer, batch, one) for one in (delta, None))
        truth = chosen(trainer_logprobs(exact, batch, delta), batch) - chosen(
            trainer_logprobs(exact, batch, None), batch
        )
        sampled = batch.sampler_logprobs - chosen(theirs_sft, batch)
        trained = chosen(ours, batch) - chosen(ours_sft, batch)
        kl_sampled, kl_reported = kl(theirs, theirs_sft), kl(ours, ours_sft)
        ratio = jackknife(
            lambda rows, a=kl_sampled, b=kl_reported: float(a[rows].sum() / b[rows].sum()),
            len(batch),
        )
        own = truth.sum(1)
        rows.append(
            {
                "dtype": dtype,
                "eta": eta,
                "slope": slope(truth, sampled, trained),
                "sampler_slope": slope(truth, sampled, truth),
                "trainer_slope": slope(truth, trained, truth),
                "gap": float((batch.sampler_logprobs - chosen(ours, batch)).abs().mean()),
                "kl_reported": float(kl_reported.mean()),
                "kl_ratio": ratio,
                "kl_of_texts": (float(own.mean()), float(own.std() / len(own) ** 0.5)),
            }
        )
        print(row_text(rows[-1]), flush=True)
    sampler.engine.close()
    return rows


def row_text(row: dict[str, Any]) -> str:
    texts = [f"{row['dtype']:9} η {row['eta']:<4}"]
    for name in ("slope", "sampler_slope", "trainer_slope", "kl_ratio", "kl_of_texts"):
        texts.append(f"{name} {row[name][0]:.3f} ± {row[name][1]:.3f}")
    return "  ".join([*texts, f"kl_reported {row['kl_reported']:.3f}", f"gap {row['gap']:.4f}"])


def serve(
    pipe: Any,
    model: str,
    dtype: str,
    mode: str,
    like: AdapterDelta,
    prompts: Sequence[Sequence[int]],
) -> None:
    """A process with an engine: one turn for each number that it is sent."""
    engine, seeds = engine_for(model, dtype, mode, like.rank), list(range(len(prompts)))
    pipe.send("ready")
    while (turn := pipe.recv()) is not None:
        generator = torch.Generator().manual_seed(turn)
        changed = like.map(
            lambda _, f, g=generator: Factors(f.B + 1e-3 * torch.randn(f.B.shape, generator=g), f.A)
        )
        wanted, start = adapter(f"turn {turn}", changed), time.perf_counter()
        engine.loader.load([wanted])
        swapped = time.perf_counter()
        finish(engine.sample([Request(prompts, seeds, wanted)]))
        pipe.send((swapped - start, time.perf_counter() - swapped))
    engine.close()


def turns(
    model: str, dtype: str, policy: AdapterDelta, prompts: Sequence[Sequence[int]], count: int
) -> dict[str, dict[str, float]]:
    """Median seconds of a swap and of a generation, unmerged and merged in turns."""
    context, pipes, seconds = multiprocessing.get_context("spawn"), {}, dict[str, list[Any]]()
    for mode in ("unmerged", "merged"):
        ours, theirs = context.Pipe()
        process = context.Process(target=serve, args=(theirs, model, dtype, mode, policy, prompts))
        process.start()
        ours.recv()
        pipes[mode], seconds[mode] = (ours, process), []
    for turn in range(count + 1):
        for mode, (pipe, _) in pipes.items():
            pipe.send(turn)
            answer = pipe.recv()
            if turn:  # the first one compiles and finds rows
                seconds[mode].append(answer)
    for pipe, process in pipes.values():
        pipe.send(None)
        process.join()
    ratio = statistics.median(
        a[1] / b[1] for a, b in zip(seconds["unmerged"], seconds["merged"], strict=True)
    )
    found = {
        mode: {"swap": _median(rows, 0), "generation": _median(rows, 1)}
        for mode, rows in seconds.items()
    }
    return {**found, "ratio": {"generation": ratio}}


def _median(rows: Sequence[tuple[float, float]], column: int) -> float:
    return statistics.median(row[column] for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--run",
        type=Path,
        default=Path("runs/quickstart"),
        help="a finished run on the embedded model",
    )
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--turns", type=int, default=9)
    options = parser.parse_args()
    config, run = finished_run(options.run)
    torch.set_num_threads(THREADS)
    model = str(resolve_model(config.model))
    tokenizer = read_tokenizer(model, False, "model")
    splits = load_prompts(config.prompts, tokenizer, config.seed, 64)
    prompts = [list(prompt.token_ids) for prompt in splits.held_out[:PROMPTS]]
    merged = load_peft(run / "iterations" / str(config.warp.iterations) / "merged")
    norm = sum(float((f.B @ f.A).square().sum()) for f in merged.factors.values()) ** 0.5
    print(
        f"the merge of {run}: rank {merged.rank}, ‖ΔW‖ {norm:.2f}; {len(prompts)} completions of"
        f" {TOKENS} tokens",
        flush=True,
    )
    rows, speed = [], {}
    for dtype in options.dtypes:
        rows += measure(model, dtype, merged, prompts, config.lora)
        policy = scale(merged, 0.5).map(
            lambda _, f: Factors(f.B[:, :16].contiguous(), f.A[:16].contiguous())
        )
        speed[dtype] = found = turns(model, dtype, policy, prompts[:GENERATED], options.turns)
        for mode in ("unmerged", "merged"):
            print(
                f"{dtype:9} {mode:8}  generation {found[mode]['generation']:.2f} s  swap"
                f" {found[mode]['swap']:.3f} s",
                flush=True,
            )
        print(
            f"{dtype:9} generation, unmerged over merged: {found['ratio']['generation']:.3f}",
            flush=True,
        )
    first = {row["eta"]: row for row in rows if row["dtype"] == options.dtypes[0]}
    summary = {
        "slope_02": first[0.2]["slope"][0],
        "slope_02_error": first[0.2]["slope"][1],
        "slope_01": first[0.1]["slope"][0],
        "slope_01_error": first[0.1]["slope"][1],
        "trainer_slope_01": first[0.1]["trainer_slope"][0],
        "trainer_slope_01_error": first[0.1]["trainer_slope"][1],
        "kl_ratio_02": first[0.2]["kl_ratio"][0],
        "kl_ratio_02_error": first[0.2]["kl_ratio"][1],
        "generation_ratio": speed[options.dtypes[0]]["ratio"]["generation"],
        "swap_seconds": speed[options.dtypes[0]]["unmerged"]["swap"],
        "rows": rows,
        "seconds": speed,
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
