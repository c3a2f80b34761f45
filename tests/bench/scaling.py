"""Measure how a run's cost grows with policies and workers, and what a gather of adapters costs.

The workers are rollout workers, and the cost of a gather is the driver's.

    .venv/bin/python tests/bench/scaling.py --generate 0.5 --update 0.5

**Steps.** The cluster is simulated: Ray with logical GPUs on this machine. Session, placement,
PolicyActor.fine_tune, the pool, the rewards and the check of every swap are the real ones. So is
the transport of the adapters (of SmolLM2-135M at rank 16, 19 MB). Only the engine's generation and
the policy's update are replaced, by waits of the given lengths. A batch goes to one worker as a
whole (raywarp/rollout/protocol.py says why), so R workers serve R policies at a time. That keeps
the pool full as soon as M ≥ 2R, costs one swap per batch, and keeps the results the same for every
R.

Overhead per step is what a step of a lone policy (M = R = 1) takes beyond its two waits. It runs
from one step's end to the next (median). Shares are those of timing.json, first and last step
included.

**Sharing.** Four policies on one trainer and one engine, where a generation takes twice as long as
an update. With rollout.concurrency=4 the engine works on all policies' calls at once, and its time
does not grow with them, as on a GPU that few rows do not fill. Without, the trainer waits.

**Batching.** The real vLLM with SmolLM2-135M on this machine's cores, generation alone: four
policies' batches of 32 rows one after another, in one call, and as four calls at once, in turns.

**Gather.** This is the driver's part of an iteration: read the policies, SLERP, LITI, write. The
adapters have the shapes of an 8 B Llama (rank 16, all linear layers), for M = 2, 4, 8. It measures
seconds, and the peak of the process's memory beyond what it had.

The last line is JSON.
"""

import argparse
import json
import logging
import multiprocessing
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

os.environ.update(RAY_USAGE_STATS_ENABLED="0", RAY_AUTH_MODE="token")

import ray

from raywarp.adapters.peft import load_peft, save_peft
from raywarp.algorithm.averaging import liti, slerp
from raywarp.algorithm.deltas import AdapterDelta, add, scale, trailing, zeros_like
from raywarp.algorithm.factors import Factors
from raywarp.cluster.device import cpu_environment
from raywarp.cluster.turns import InTurns
from raywarp.config.load import parse_config
from raywarp.config.schema import Config
from raywarp.data import embedded
from raywarp.data.text import Completion, Prompt
from raywarp.model.batches import Batch
from raywarp.rollout.engine import EngineSettings
from raywarp.rollout.protocol import Adapter, AdapterPart, Request
from raywarp.rollout.transport import digest
from raywarp.rollout.worker import RolloutWorker
from raywarp.run.policy_files import Job
from raywarp.storage.location import Storage
from raywarp.training.actors import VLLM_CPU_ENV, VLLM_ENV, Kinds
from raywarp.training.policy_actor import PolicyActor
from raywarp.training.progress import Progress
from raywarp.training.session import Session

SMOLLM2 = (
    30,
    {"q_proj": (576, 576), "k_proj": (192, 576), "v_proj": (192, 576), "o_proj": (576, 576)},
    (1536, 576),
)
LLAMA_8B = (
    32,
    {
        "q_proj": (4096, 4096),
        "k_proj": (1024, 4096),
        "v_proj": (1024, 4096),
        "o_proj": (4096, 4096),
    },
    (14336, 4096),
)
RANK, BATCH = 16, 32
PROMPT, LENGTH = 5, 24  # tokens, as in the quickstart


def random_adapter(
    shapes: tuple[int, dict[str, tuple[int, int]], tuple[int, int]], rank: int, seed: int
) -> AdapterDelta:
    """Factors for all linear layers of a Llama."""
    layers, attention, (wide, narrow) = shapes
    sizes = {f"self_attn.{name}": size for name, size in attention.items()}
    sizes |= {
        "mlp.gate_proj": (wide, narrow),
        "mlp.up_proj": (wide, narrow),
        "mlp.down_proj": (narrow, wide),
    }
    g = torch.Generator().manual_seed(seed)
    return AdapterDelta(
        {
            f"model.layers.{n}.{name}": Factors(
                torch.randn(out, rank, generator=g), torch.randn(rank, inp, generator=g)
            )
            for n in range(layers)
            for name, (out, inp) in sizes.items()
        }
    )


class WaitingEngine:
    """Waits instead of generating; takes and hashes adapters as the real loaders do."""

    adapter_mode = "unmerged"

    def __init__(self, seconds: float):
        self.seconds, self.loader = seconds, self
        self.taken: dict[tuple[str, ...], list[AdapterDelta]] = {}

    def in_weights(self, adapter: Adapter) -> None:
        return None

    def load(self, adapters: Sequence[Adapter]) -> None:
        self.taken = {
            a.versions: self.taken.get(a.versions) or [part.fetch() for part in a.parts]
            for a in adapters
        }

    def digests(self, adapters: Sequence[Adapter]) -> list[tuple[str, ...]]:
        return [tuple(map(digest, self.taken[a.versions])) for a in adapters]

    def sample(self, requests: Sequence[Request]) -> InTurns[list[list[Completion]]]:
        end = time.perf_counter() + self.seconds
        while (left := end - time.perf_counter()) > 0:
            time.sleep(min(left, 0.005))
            yield
        completion = Completion((3,) * LENGTH, (-1.0,) * LENGTH, "a text of some words", True)
        return [[completion for _ in request.prompts] for request in requests]

    def capacity(self) -> int:
        return BATCH

    def close(self) -> None:
        pass


class NoModel:
    """The base model, which nobody here needs."""

    start = None

    def set_init(self, delta: AdapterDelta) -> None:
        pass


class WaitingPolicy:
    """Waits instead of updating."""

    def __init__(self, seconds: float, adapter: AdapterDelta, config: Config):
        self.seconds, self.adapter, self.config, self.step = seconds, adapter, config, 0
        self.model = NoModel()

    def task_vector(self) -> AdapterDelta:
        return self.adapter

    result = task_vector

    def update(
        self,
        batch: Batch,
        rewards: torch.Tensor,
        completions: Sequence[Completion],
        with_sft_kl: bool,
    ) -> dict[str, float]:
        time.sleep(self.seconds)
        self.step += 1
        return {}

    def close(self) -> None:
        pass


def waiting_kinds(generate: float, update: float) -> Kinds:
    class WaitingWorker(RolloutWorker):
        def _start_engine(self) -> Any:
            return WaitingEngine(generate)

    class WaitingActor(PolicyActor):
        def start(self) -> AdapterDelta:
            self.model: Any = NoModel()
            return zeros_like(random_adapter(SMOLLM2, RANK, 0))

        def _checkpoint(self, progress: Progress) -> None:
            pass

        def _new_policy(self, job: Job) -> Any:
            own = self.config.of_policy(job.index)
            return WaitingPolicy(update, random_adapter(SMOLLM2, RANK, job.index), own)

    return Kinds(worker=WaitingWorker, policy=WaitingActor)


def config_for(
    policies: int, workers: int, trainers: int, steps: int, concurrency: int = 1
) -> Config:
    return parse_config(
        {
            "reward": {"function": "raywarp.embedded:vader"},
            "warp": {"iterations": 1, "policies": policies, "steps": steps},
            "optim": {"batch_size": BATCH},
            "rollout": {
                "workers": workers,
                "max_new_tokens": LENGTH,
                "concurrency": concurrency,
            },
            "cluster": {
                "policy_actors": trainers,
                "cpus_per_policy": 0,
                "cpus_per_rollout_worker": 0,
            },
            "checkpoint_every": 10**6,
        }
    )


def run(
    policies: int,
    workers: int,
    trainers: int,
    steps: int,
    waits: Kinds,
    folder: Path,
    concurrency: int = 1,
) -> dict[str, Any]:
    """One iteration of fine-tuning; its timing.json row, and what a step took beyond the waits if
    nobody else could be in the way.
    """
    prompts = [Prompt(f"prompt {n}", (3, 4, n % 50), {}) for n in range(64)]
    place = f"{policies}-{workers}-{trainers}-{concurrency}"
    jobs = [Job(1, m, f"{place}-{m}", Storage(folder)) for m in range(1, policies + 1)]
    with Session(
        config_for(policies, workers, trainers, steps, concurrency),
        "none",
        3,
        kinds=waits,
        proves=False,
    ) as session:
        ends = [
            time.perf_counter()
            for event in session.fine_tune(jobs, session.zero, prompts)
            if event["event"] == "step"
        ]
    assert session.timing is not None
    assert len(ends) == policies * steps == session.timing.steps
    interval = statistics.median(after - before for before, after in pairwise(ends))
    return {
        "policies": policies,
        "workers": workers,
        "trainers": trainers,
        "concurrency": concurrency,
        "step_interval_seconds": interval,
        **session.timing.row(),
    }


def sharing(update: float, steps: int) -> dict[str, Any]:
    """Shares of the time that one trainer and one engine work for four policies, by concurrency."""
    waits, found = waiting_kinds(2 * update, update), {}
    for concurrency in (1, 4):
        with tempfile.TemporaryDirectory() as folder:
            row = run(4, 1, 1, steps, waits, Path(folder), concurrency)
        found[f"concurrency {concurrency}"] = {
            "trainer_busy": row["trainer_busy"],
            "pool_busy": row["pool_busy"],
            "steps_per_second": row["steps_per_second"],
        }
        print(
            f"4 policies, 1 trainer, 1 engine, generation {2 * update:g} s, update {update:g} s,"
            f" rollout.concurrency={concurrency}: trainer busy {row['trainer_busy']:.1%},"
            f" engine {row['pool_busy']:.1%}, {row['steps_per_second']:.2f} steps/s",
            flush=True,
        )
    return found


def batching(turns: int, dtype: str) -> dict[str, Any]:
    """Tokens per second of four policies' generation; run in a process of its own."""
    context = multiprocessing.get_context("spawn")
    cores = len(os.sched_getaffinity(0))
    os.environ.update({**VLLM_ENV, **VLLM_CPU_ENV, **cpu_environment(cores, crowded=False)})
    with context.Pool(1) as pool:
        return pool.apply(_batching, (turns, dtype))


def _batching(turns: int, dtype: str) -> dict[str, Any]:
    ray.init(
        address="local",
        num_cpus=1,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    rollout = parse_config(
        {"rollout": {"ignore_eos": True, "max_new_tokens": LENGTH, "concurrency": 4}}
    ).rollout
    model = embedded.resolve("embedded:smollm2-135m-instruct")
    worker = RolloutWorker(EngineSettings(model, dtype, 128, RANK, rollout, gpu=False))
    worker.start()
    requests = [
        Request(
            [[1, *range(100 * n + row, 100 * n + row + PROMPT - 1)] for row in range(BATCH)],
            range(BATCH * n, BATCH * (n + 1)),
            Adapter(policy=AdapterPart.put(small(random_adapter(SMOLLM2, RANK, n)))),
        )
        for n in range(4)
    ]
    ways: dict[str, Callable[[], list[Any]]] = {
        "32 at a time": lambda: [rollout for request in requests for rollout in ask([request])],
        "one call": lambda: ask(requests),
        "four calls at once": lambda: [rollout for (rollout,) in threads.map(ask, apart)],
    }

    def ask(asked: Sequence[Request]) -> list[Any]:
        return [rollout.completions for rollout in worker.generate(asked).found]

    seconds: dict[str, list[float]] = {way: [] for way in ways}
    apart, answers = [[request] for request in requests], {}
    with ThreadPoolExecutor(4) as threads:
        for turn in range(turns + 1):  # the first one warms up
            for name, way in ways.items():
                start = time.perf_counter()
                answers[name] = way()
                if turn:
                    seconds[name].append(time.perf_counter() - start)
    worker.shutdown()
    ray.shutdown()
    alone = answers["32 at a time"]
    found: dict[str, Any] = {"dtype": dtype}
    for name in ways:
        rate = 4 * BATCH * LENGTH / statistics.median(seconds[name])
        ratio = statistics.median(
            one / other for one, other in zip(seconds["32 at a time"], seconds[name], strict=True)
        )
        equal = sum(
            one == other
            for ones, others in zip(alone, answers[name], strict=True)
            for one, other in zip(ones, others, strict=True)
        )
        found[name] = {"tokens_per_second": rate, "ratio": ratio, "equal": equal / (4 * BATCH)}
        print(
            f"{dtype}, 4 × 32 rows, {name}: {rate:.0f} tokens/s, {ratio:.2f} times 32 at a time;"
            f" {equal} of {4 * BATCH} completions have the same bits",
            flush=True,
        )
    return found


def small(delta: AdapterDelta) -> AdapterDelta:
    """A change of about a hundredth of the weights."""
    return scale(delta, 1e-4)


def gather(policies: int, folder: Path) -> dict[str, float]:
    """What the driver does with an iteration's policies, in 8 B shapes; run in a process of its
    own.
    """
    for m in range(1, policies + 1):
        save_peft(random_adapter(LLAMA_8B, RANK, m), folder / str(m))
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(_gather, (policies, folder))


def _gather(policies: int, folder: Path) -> dict[str, float]:
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    vectors = [trailing(load_peft(folder / str(m)), RANK) for m in range(1, policies + 1)]
    read = time.perf_counter()
    init = zeros_like(vectors[0])
    merged = add(init, slerp(vectors))
    slerped = time.perf_counter()
    following = liti(init, merged, 0.3)
    averaged = time.perf_counter()
    save_peft(merged, folder / "merged")
    save_peft(following, folder / "init")
    written, after = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    adapter = sum(f.A.numel() + f.B.numel() for f in vectors[0].factors.values()) * 4
    return {
        "policies": policies,
        "adapter_mib": adapter / 2**20,
        "read_seconds": read - start,
        "slerp_seconds": slerped - read,
        "liti_seconds": averaged - slerped,
        "write_seconds": written - averaged,
        "peak_mib": (after - before) / 2**10,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--generate", type=float, default=0.5, help="seconds of a batch's generation"
    )
    parser.add_argument("--update", type=float, default=0.5, help="seconds of an update")
    parser.add_argument(
        "--steps",
        type=int,
        default=36,
        help="steps per policy (fewer where the pool is not made for the policies)",
    )
    parser.add_argument("--policies", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--turns", type=int, default=5, help="of the real vLLM's generation")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"], help="of it, too")
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=["steps", "sharing", "batching", "gather"],
        default=["steps", "sharing", "batching", "gather"],
    )
    options = parser.parse_args()
    found: dict[str, Any] = {"generate": options.generate, "update": options.update}
    if {"steps", "sharing"} & set(options.parts):
        ray.init(
            address="local",
            num_cpus=2,
            num_gpus=32,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
        if "steps" in options.parts:
            found |= stepping(options)
        if "sharing" in options.parts:
            found["sharing"] = sharing(options.update, options.steps)
        ray.shutdown()
    if "batching" in options.parts:
        found["batching"] = [batching(options.turns, dtype) for dtype in options.dtypes]
    if "gather" in options.parts:
        found["gathers"] = gathers()
    print(json.dumps(found))


def stepping(options: argparse.Namespace) -> dict[str, Any]:
    """The simulated cluster with each number of policies and workers."""
    settings = [(2, 1, 1), *((m, r, m) for m in options.policies for r in options.workers)]
    waits, rows = waiting_kinds(options.generate, options.update), []
    print(
        "policies workers trainers  steps/s  trainers  pool   step s = waits + swap + request +"
        " rest"
    )
    for m, r, trainers in settings:
        claimed = (m, r) == (1, 1) or m == 2 * r
        steps = options.steps if claimed else max(options.steps // 10, 3)
        with tempfile.TemporaryDirectory() as folder:
            row = run(m, r, trainers, steps, waits, Path(folder))
        rows.append(row)
        step, phases = m / row["steps_per_second"], row["phases"]
        parts = f"{step:6.3f}   {phases['swap_seconds']:.3f}   {phases['request_seconds']:.3f}"
        shares = f"{row['trainer_busy']:8.1%} {row['pool_busy']:7.1%}"
        print(
            f"{m:8} {r:7} {trainers:8} {row['steps_per_second']:8.3f} {shares}  {parts} "
            f" {row['bound']}",
            flush=True,
        )
    return {**summary(rows, options), "runs": rows}


def gathers() -> list[dict[str, float]]:
    """The driver's part of an iteration, for 2, 4 and 8 policies."""
    rows = []
    for m in (2, 4, 8):
        with tempfile.TemporaryDirectory() as folder:
            rows.append(found := gather(m, Path(folder)))
        seconds = " + ".join(
            f"{found[f'{name}_seconds']:.2f} s {name}"
            for name in ("read", "slerp", "liti", "write")
        )
        print(
            f"gather of {m} adapters of {found['adapter_mib']:.0f} MiB: {seconds};"
            f" {found['peak_mib']:.0f} MiB at the peak",
            flush=True,
        )
    return rows


def summary(rows: Sequence[dict[str, Any]], options: argparse.Namespace) -> dict[str, float]:
    """The figures that are claimed, as far as the chosen sizes show them."""
    by = {(row["policies"], row["workers"], row["trainers"]): row for row in rows}
    found = {
        "interleaved_trainer_busy": by[2, 1, 1]["trainer_busy"],
        "interleaved_pool_busy": by[2, 1, 1]["pool_busy"],
    }
    if (2, 1, 2) in by:
        found |= {
            "apart_trainer_busy": by[2, 1, 2]["trainer_busy"],
            "apart_pool_busy": by[2, 1, 2]["pool_busy"],
        }
        for m in (4, 8):
            if (m, m // 2, m) in by:
                found[f"linear_to_{m}"] = by[m, m // 2, m]["steps_per_second"] / (
                    by[2, 1, 2]["steps_per_second"] * m / 2
                )
    if (1, 1, 1) in by:
        step = by[1, 1, 1]["step_interval_seconds"]
        found |= {"overhead_seconds": step - options.generate - options.update}
        found["overhead_share"] = found["overhead_seconds"] / step
    return found


if __name__ == "__main__":
    main()
