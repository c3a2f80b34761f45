"""Compare a policy's optimiser step with that of TRL 1.16's RLOOTrainer, in turns.

Model, LoRA, prompts, lengths, dtype, threads and batch are the same.

    # everything, some 50 minutes on two cores
    python tests/bench/step.py
    # some of the cases (--help lists them)
    python tests/bench/step.py --cases bfloat16/forced
    # fewer steps, for trying it out
    python tests/bench/step.py --timed 5 --block 5 --cases m2

The model is SmolLM2-135M-Instruct, with LoRA rank 16 on all linear layers. A step has 8 prompts × 4
completions × 24 new tokens (forced: EOS does not end a completion; natural: it does). The reward is
VADER of prompt + completion. raywarp runs as in a real run: driver, vLLM rollout worker, reward
worker and policy actor are processes of their own. Its step is what passes between two "step"
events of Session.fine_tune: swap, generation, scoring, update, and the KL to SFT in every fifth.
TRL's step is what passes between its trainer's step callbacks. Both sides take turns, `--block`
steps each after one that is discarded. The seconds of a step are the median, since other programs'
bursts hit either side.

TRL tuned: no gradient checkpointing, no logging, bfloat16 weights without autocast, glibc told to
keep its memory. TRL eager: the same in bfloat16 with eager attention, which nothing tells a user to
choose (torch 2.13's fused attention is slow backward on CPUs). As shipped: its defaults, in a case
of its own, since memory does not hold more than three sides.

TRL's vLLM integration does not work on CPUs, so TRL generates with transformers. With
`use_vllm=True` the engine starts in the trainer's process. The first weight sync then ends in
vLLM's AttributeError: 'Parameter' object has no attribute 'weight_loader'. The cause is that vLLM
0.32 packs CPU weights after loading. Server mode wants CUDA.

Part m2: two policies of `--m2-steps` steps, from the start of the process to the merged adapter on
disk. Ray's own start (listed) is taken off. TRL's two runs go from process start to saved adapters.
They run one after the other with two threads, and both at once with one thread each.

limit_share: how near our update comes to the machine's speed of matrix products. It is the time
that the update's FLOPs (see update_flops) would take at that speed, over the update's seconds. The
speed is that of torch's product of two matrices of 2048 × 2048 in the run's precision. The product
is timed in the same run, after each of our turns, with the same number of threads. Speed and
seconds are medians.

`--alone` leaves TRL out: for limit_share, and to compare two versions of raywarp in turns.

The last line is JSON. Ratios above 1 are in raywarp's favour, except for rss_ratio: peak memory of
our trainer process over TRL's.
"""

import argparse
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
from environment import python_with
from transformers import AutoConfig

import raywarp
from raywarp.algorithm.averaging import slerp
from raywarp.algorithm.deltas import add, trailing
from raywarp.cli.quickstart import QUICKSTART
from raywarp.cluster.device import CPU_ENV
from raywarp.cluster.runtime import start_ray
from raywarp.config.load import load_config
from raywarp.config.schema import Config
from raywarp.planning.inputs import prepare_prompts
from raywarp.planning.model_shapes import model_shapes
from raywarp.run.policy_files import Job
from raywarp.storage import sealed
from raywarp.storage.location import Storage
from raywarp.training.session import Session

HERE = Path(__file__).parent
PROMPTS, COMPLETIONS, NEW_TOKENS, TEMPERATURE = 8, 4, 24, 0.9
TUNED = {"gradient_checkpointing": False, "logging_strategy": "no", "bf16": False}
CASES = [
    "bfloat16/forced",
    "bfloat16/forced/shipped",
    "bfloat16/natural",
    "float32/forced",
    "float32/natural",
    "m2",
]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES)
    parser.add_argument("--timed", type=int, default=20, help="timed steps of each side")
    parser.add_argument(
        "--block", type=int, default=5, help="timed steps before the other side has its turn"
    )
    parser.add_argument("--alone", action="store_true", help="without TRL")
    parser.add_argument("--m2-steps", type=int, default=20)
    parser.add_argument("--ours", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.ours:
        return ours(json.loads(options.ours))
    print(machine())
    result: dict[str, float | None] = dict.fromkeys(
        [
            "ratio_tuned_bf16",
            "ratio_tuned_fp32",
            "ratio_eager_bf16",
            "ratio_eager_fp32",
            "ratio_shipped_bf16",
            "rss_ratio",
            "limit_share",
            "m2_speedup_sequential",
            "m2_speedup_concurrent",
        ]
    )
    for case in options.cases:
        result |= two_policies(options.m2_steps) if case == "m2" else steps(case, options)
    print(
        json.dumps(
            {name: value if value is None else round(value, 3) for name, value in result.items()}
        )
    )


def machine() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in lines if "model name" in line), "?")
    features = torch.backends.cpu.get_cpu_capability() + (
        " with bfloat16" if torch.cpu._is_avx512_bf16_supported() else ""
    )
    memory = psutil.virtual_memory().total >> 30
    return (
        f"{os.cpu_count()} cores of {model} ({features}), {memory} GiB, torch {torch.__version__},"
        f" {platform.platform()}"
    )


def steps(case: str, options: argparse.Namespace) -> dict[str, float]:
    """Both sides in turns; prints a row for each, returns the ratios of this case."""
    dtype, length, *rivals = case.split("/")
    # three sides of float32 take more than 24 GiB
    rivals = rivals or ["tuned", "eager"][: 1 if dtype == "float32" else 2]
    rivals = [] if options.alone else rivals
    shared = {"dtype": dtype, "forced": length == "forced", "block": options.block + 1}
    print(
        f"\n{case}: seconds are medians of {options.timed} steps, memory is"
        f" MiB\n{'':14}{'tokens/s':>9}{'step':>7}  by phase"
    )
    with contextlib.ExitStack() as stack:
        sides = {
            name if name == "raywarp" else f"TRL {name}": stack.enter_context(Side(name, shared))
            for name in ("raywarp", *rivals)
        }
        products = []
        for _ in range(-(-options.timed // options.block)):
            for side in sides.values():
                side.run_block()
            products.append(product_speed(getattr(torch, dtype)))
        memory = {name: (side.trainer_rss(), side.pss()) for name, side in sides.items()}
    speed = {}
    for name, side in sides.items():
        seconds = statistics.median(row["seconds"] for row in side.rows)
        speed[name] = statistics.mean(row["tokens"] for row in side.rows) / seconds
        phases = sorted(
            {phase for row in side.rows for phase in row} - {"event", "seconds", "tokens"}
        )
        listed = ", ".join(
            f"{phase} {statistics.median(row.get(phase, 0) for row in side.rows):.2f}"
            for phase in phases
        )
        peak, everything = memory[name]
        print(
            f"{name:14}{speed[name]:9.0f}{seconds:7.2f}  {listed}; trainer's peak RSS {peak:.0f},"
            f" all PSS {everything:.0f}"
        )
    ratios = {name: speed["raywarp"] / value for name, value in speed.items() if name != "raywarp"}
    print(
        "".join(
            f"raywarp is {ratio:.2f} times as fast as {name}\n" for name, ratio in ratios.items()
        ),
        end="",
    )
    update, product = (
        statistics.median(row["update"] for row in sides["raywarp"].rows),
        statistics.median(products),
    )
    flops = update_flops(config(shared))
    share = flops / product / update
    print(
        f"update: {flops / 1e12:.3f} TFLOP at {product / 1e12:.3f} TFLOP/s are"
        f" {flops / product:.2f} s, {share:.2f} of its {update:.2f} s"
    )
    if length == "natural":
        return {}
    short = "bf16" if dtype == "bfloat16" else "fp32"
    result = {f"ratio_{name}_{short}": ratios[f"TRL {name}"] for name in rivals}
    if short == "bf16":
        result["limit_share"] = share
    if short == "bf16" and "TRL tuned" in memory:
        result["rss_ratio"] = memory["raywarp"][0] / memory["TRL tuned"][0]
    return result


def product_speed(dtype: torch.dtype, size: int = 2048, repeats: int = 9) -> float:
    """FLOP/s of torch's product of two square matrices."""
    left, right = torch.randn(2, size, size).to(dtype)
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        torch.nn.functional.linear(left, right)
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(seconds[1:])


def update_flops(chosen: Config) -> float:
    """FLOPs of the matrix products that an update without the KL to SFT cannot do without.

    n tokens: each prompt once, and each completion but for its last token. t response tokens. P
    numbers in the adapted weights, a in the adapter, V·D in the head. The anchor's and the policy's
    forward pass take 2·2·n·(P + a), the gradients of the activations 2·n·(P + a), those of the
    adapter 2·n·a, and the head 3·2·t·V·D: both forward passes, and the gradient of the states.
    Padding, attention's own products (3 % more) and whatever is no product count as nothing.
    """
    model, _, prompts = prepare_prompts(chosen)
    shapes = model_shapes(AutoConfig.from_pretrained(model), chosen.lora)
    prompt = statistics.mean(len(p.token_ids) for p in prompts.train)
    n = PROMPTS * (prompt + COMPLETIONS * (NEW_TOKENS - 1))
    P = sum(d_out * d_in for d_out, d_in in shapes.adapted.values())
    a = shapes.adapter_numbers(chosen.lora.rank)
    head = PROMPTS * COMPLETIONS * NEW_TOKENS * shapes.vocabulary * shapes.hidden
    return 2 * n * (3 * (P + a) + a) + 3 * 2 * head


class Side:
    """One contestant in a process of its own, which takes its steps when it is told to."""

    def __init__(
        self,
        name: str,
        shared: dict[str, Any],
        threads: int = 2,
        steps: int | None = None,
        save: str | None = None,
    ):
        self.name, self.block = name, shared["block"]
        self.rows: list[Any] = []
        self.folder = tempfile.TemporaryDirectory(
            prefix="raywarp-bench-", ignore_cleanup_errors=True
        )
        settings = {
            **shared,
            "threads": threads,
            "folder": self.folder.name,
            "steps": steps or 100_000,
            "save": save,
            "free_running": bool(steps),
        }
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {
            "HF_HUB_OFFLINE": "1"
        }
        if name == "raywarp":
            command = [sys.executable, str(HERE / "step.py"), "--ours", json.dumps(settings)]
            environment["PYTHONPATH"] = os.pathsep.join([str(HERE.parent.parent), str(HERE)])
        else:
            model, _, prompts = prepare_prompts(config(shared))
            trl = {
                "model": model,
                "prompts": [p.text for p in prompts.train],
                "prompts_per_step": PROMPTS,
                "options": trl_options(name, shared["dtype"]),
            }
            trl |= {
                "completions_per_prompt": COMPLETIONS,
                "new_tokens": NEW_TOKENS,
                "temperature": TEMPERATURE,
            }
            command = [
                str(python_with("trl", ["trl==1.16.0"])),
                str(HERE / "trl_rloo.py"),
                json.dumps(settings | trl),
            ]
            environment |= CPU_ENV if name != "shipped" else {}
        self.started = time.perf_counter()
        self.log = open(Path(self.folder.name) / "stderr", "w+")  # noqa: SIM115 (closed with the side)
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env=environment,
        )

    def __enter__(self) -> "Side":
        self.read("ready")
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.terminate()
            self.process.wait()
        self.log.close()
        self.folder.cleanup()

    def run_block(self) -> None:
        """`block` steps, of which the first is not counted."""
        rows = []
        for n in range(self.block):
            if n == 0 or self.name != "raywarp":
                self.tell()
            rows.append(self.read("step"))
        self.rows += rows[1:]

    def tell(self) -> None:
        assert self.process.stdin
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def read(self, event: str) -> dict[str, Any]:
        """The next event of this kind.

        Raises:
            RuntimeError: the process ended before; the message is the end of what it said.
        """
        assert self.process.stdout
        for line in self.process.stdout:
            if line.startswith('{"event"') and (row := json.loads(line))["event"] == event:
                return dict(row)
        self.log.seek(0)
        raise RuntimeError(f"{self.name} ended:\n{self.log.read()[-3000:]}")

    def trainer_rss(self) -> float:
        """Peak RSS in MiB of the process that trains."""
        for process in self.processes():
            if self.name != "raywarp" or "ray::PolicyActor" in " ".join(process.cmdline()):
                return (
                    int(
                        Path(f"/proc/{process.pid}/status")
                        .read_text()
                        .split("VmHWM:")[1]
                        .split()[0]
                    )
                    / 1024
                )
        raise RuntimeError("no policy actor among the processes")

    def pss(self) -> float:
        """MiB of all processes of this side, shared pages counted once."""
        total = 0
        for process in self.processes():
            with contextlib.suppress(OSError):
                total += int(
                    Path(f"/proc/{process.pid}/smaps_rollup")
                    .read_text()
                    .split("\nPss:")[1]
                    .split()[0]
                )
        return total / 1024

    def processes(self) -> list[psutil.Process]:
        root = psutil.Process(self.process.pid)
        return [root, *root.children(recursive=True)]


def trl_options(name: str, dtype: str) -> dict[str, Any]:
    if name == "shipped":
        return {}
    return TUNED | {
        "model_init_kwargs": {
            "dtype": dtype,
            **({"attn_implementation": "eager"} if name == "eager" else {}),
        }
    }


def config(settings: dict[str, Any], **changes: Any) -> Config:
    values = {
        "dtype": settings["dtype"],
        "optim.batch_size": PROMPTS * COMPLETIONS,
        "rollout.max_new_tokens": NEW_TOKENS,
        "rollout.ignore_eos": str(settings["forced"]).lower(),
        "reward.function": "raywarp.embedded:vader",
        "control": "null",
        "checkpoint_every": 1000,
        "kl_to_sft_every": 5,
        "warp.iterations": 1,
        **changes,
    }
    return load_config(QUICKSTART, [f"{key}={value}" for key, value in values.items()])


def ours(settings: dict[str, Any]) -> None:
    """Our side: waits for a line, then fine-tunes a new policy for a block of steps, again and
    again; or trains and merges two policies.
    """
    together = settings["free_running"]
    count = settings["steps"] if together else settings["block"]
    chosen = config(settings, **{"warp.steps": count, "warp.policies": 2 if together else 1})
    model, _, prompts = prepare_prompts(chosen)
    start = time.perf_counter()
    start_ray()
    say({"event": "ray", "seconds": time.perf_counter() - start})
    longest = max(len(p.token_ids) for p in prompts.train)
    with Session(chosen, model, longest) as session:
        say({"event": "ready"})
        if together:
            jobs = [Job(1, m, f"policy-{m}", Storage(settings["folder"])) for m in (1, 2)]
            for _ in session.fine_tune(jobs, session.zero, prompts.train):
                pass
            policies = [
                trailing(raywarp.load_peft(folder_of(job)), chosen.lora.rank) for job in jobs
            ]
            raywarp.save_peft(add(session.zero, slerp(policies)), Path(settings["save"]))
            return say({"event": "end"})
        for index, _ in enumerate(sys.stdin, start=1):
            for row in block_of_steps(
                session, Job(1, index, str(index), Storage(settings["folder"])), prompts.train
            ):
                say(row)


def block_of_steps(session: Session, job: Job, prompts: Any) -> Iterator[dict[str, Any]]:
    last = time.perf_counter()
    for event in session.fine_tune([job], session.zero, prompts):
        now = time.perf_counter()
        if event["event"] == "step":
            generation = event["rollout_seconds"] - event["swap_seconds"]
            phases = {
                "weights": event["swap_seconds"],
                "generation": generation,
                "update": event["update_seconds"],
            }
            yield {"event": "step", "seconds": now - last, "tokens": event["tokens"], **phases}
        last = now
    sealed.remove(folder_of(job))


def folder_of(job: Job) -> Path:
    return job.store.cache / "policies" / job.key


def two_policies(count: int) -> dict[str, float]:
    """Seconds from process start to the merged adapter, or to two trained ones."""
    shared = {"dtype": "bfloat16", "forced": True, "block": 0}
    with tempfile.TemporaryDirectory(prefix="raywarp-bench-") as folder:
        side = Side("raywarp", shared, steps=count, save=f"{folder}/merged")
        ray = side.read("ray")["seconds"]
        side.read("ready")
        ready = time.perf_counter() - side.started
        total = finish(side)
        mine = total - ray
        first, second = (
            finish(Side("tuned", shared, steps=count, save=f"{folder}/{m}")) for m in (1, 2)
        )
        both = [Side("tuned", shared, threads=1, steps=count, save=f"{folder}/{m}") for m in (1, 2)]
        concurrent = max(finish(side) for side in both)
    print(f"\ntwo policies of {count} steps, bfloat16, forced length")
    print(
        f"raywarp, M = 2, to the merged adapter: {mine:.1f} s (actors ready after"
        f" {ready - ray:.1f}), and {ray:.1f} s for Ray's own start"
    )
    print(
        f"TRL tuned, one after the other: {first:.1f} + {second:.1f} s; both at once:"
        f" {concurrent:.1f} s"
    )
    return {
        "m2_speedup_sequential": (first + second) / mine,
        "m2_speedup_concurrent": concurrent / mine,
    }


def finish(side: Side) -> float:
    side.read("end")
    seconds = time.perf_counter() - side.started
    side.__exit__()
    return seconds


def say(row: dict[str, Any]) -> None:
    print("\n" + json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
