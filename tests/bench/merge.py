"""Measure the cost of an exact merge beside reading and writing the files, and beside other merges.

Adapters with the shapes of a Llama-3-8B (32 blocks, all-linear, rank 16, float32, random factors)
are merged, for M = 2 and M = 5. The command is `raywarp merge slerp … --liti 0.3`. The other sides
take turns with it. Each is a process of its own that imports its libraries before the clock starts:

- io: the same adapters read and written by the safetensors library (load_file, save_file) and
  nothing else.
- raw: their bytes through one 8 MB buffer with read() and write(), the least that a program can do.
- dense: SLERP of the same adapters with every ΔW formed in float32, a block at a time. Nothing is
  written (28 GB would have to be). Timed on the first 8 blocks, times 4.
- on a base cut down to 2 blocks of a Llama-3.2-1B: PEFT's add_weighted_adapter (svd and cat), and
  mergekit's nuslerp in an environment of its own. PEFT's is that call alone, with the model already
  loaded. mergekit's is of the two models that the adapters make of the base; their making is not
  counted.

    .venv/bin/python tests/bench/merge.py [--repeats 7]
    .venv/bin/python tests/bench/merge.py --quick     # ours, io and raw; 30 s

Values are medians; ratios are of medians of runs in turn. largest_block_mb is the largest block's
factors in all adapters that were merged.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from environment import python_with

RANK = 16
LLAMA_8B = {"hidden": 4096, "key_value": 1024, "inner": 14336, "blocks": 32}
DENSE_BLOCKS = 8
LLAMA_1B = {"hidden": 2048, "key_value": 512, "inner": 8192, "blocks": 2}


def sizes(shape: dict[str, int]) -> dict[str, tuple[int, int]]:
    """Module → (d_out, d_in) of one block."""
    hidden, key_value, inner = shape["hidden"], shape["key_value"], shape["inner"]
    attention = {
        "q_proj": (hidden, hidden),
        "k_proj": (key_value, hidden),
        "v_proj": (key_value, hidden),
        "o_proj": (hidden, hidden),
    }
    mlp = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
    return {f"self_attn.{name}": size for name, size in attention.items()} | {
        f"mlp.{name}": size for name, size in mlp.items()
    }


def write_adapter(folder: Path, shape: dict[str, int], seed: int) -> None:
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for block in range(shape["blocks"]):
        for name, (d_out, d_in) in sizes(shape).items():
            prefix = f"base_model.model.model.layers.{block}.{name}"
            tensors[f"{prefix}.lora_A.weight"] = (
                torch.randn(RANK, d_in, generator=generator) / d_in**0.5
            )
            tensors[f"{prefix}.lora_B.weight"] = torch.randn(d_out, RANK, generator=generator) / 100
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    targets = [name.rsplit(".", 1)[1] for name in sizes(shape)]
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": RANK,
        "target_modules": targets,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))


def write_model(folder: Path, shape: dict[str, int], adapter: Path | None = None) -> None:
    """The cut-down base, or the base with an adapter merged into its weights."""
    import torch
    from peft import PeftModel
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    torch.manual_seed(0)
    heads = shape["hidden"] // 64
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=shape["hidden"],
        intermediate_size=shape["inner"],
        num_hidden_layers=shape["blocks"],
        num_attention_heads=heads,
        num_key_value_heads=shape["key_value"] // 64,
    )
    model: Any = LlamaForCausalLM(config)
    if adapter:
        model = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    model.save_pretrained(folder)


def side_ours(adapters: Sequence[str], out: Path) -> float:
    from raywarp.cli import commands

    # which the command imports when it runs, with torch and the rest
    import_module("raywarp.adapters.merge_report")
    return clock(
        lambda: commands.main(["merge", "slerp", *adapters, "--liti", "0.3", "--out", str(out)])
    )


def side_io(adapters: Sequence[str], out: Path) -> float:
    from safetensors.torch import load_file, save_file

    def copy() -> None:
        for n, adapter in enumerate(adapters):
            save_file(load_file(f"{adapter}/adapter_model.safetensors"), out / f"{n}.safetensors")

    out.mkdir()
    return clock(copy)


def side_raw(adapters: Sequence[str], out: Path) -> float:
    buffer = bytearray(8 << 20)

    def copy() -> None:
        with (out / "all").open("wb", buffering=0) as target:
            for adapter in adapters:
                with open(f"{adapter}/adapter_model.safetensors", "rb", buffering=0) as source:
                    while count := source.readinto(buffer):
                        target.write(memoryview(buffer)[:count])

    out.mkdir()
    return clock(copy)


def side_dense(adapters: Sequence[str], out: Path) -> float:
    import torch
    from safetensors import safe_open

    def merge() -> None:
        files = [safe_open(f"{adapter}/adapter_model.safetensors", "pt") for adapter in adapters]
        names = {key.rsplit(".lora_", 1)[0] for key in files[0].keys()}  # noqa: SIM118 (not a dict)
        for block in range(DENSE_BLOCKS):
            modules = [name for name in names if f".layers.{block}." in name]
            merged: list[Any] = []
            for m, file in enumerate(files):
                change = [
                    file.get_tensor(f"{name}.lora_B.weight")
                    @ file.get_tensor(f"{name}.lora_A.weight")
                    for name in modules
                ]
                if m == 0:
                    merged = change
                    continue
                dot = sum(
                    float((x * y).sum(dtype=torch.float64))
                    for x, y in zip(merged, change, strict=True)
                )
                norms = [
                    sum(float(x.norm()) ** 2 for x in side) ** 0.5 for side in (merged, change)
                ]
                angle = torch.acos(torch.tensor(dot / (norms[0] * norms[1])))
                stay, go = (
                    float(torch.sin(part * angle) / torch.sin(angle))
                    for part in (1 - 1 / (m + 1), 1 / (m + 1))
                )
                merged = [
                    x.mul_(stay).add_(y, alpha=go) for x, y in zip(merged, change, strict=True)
                ]
            for x in merged:
                x.mul_(0.3)

    return clock(merge)


def side_peft(adapters: Sequence[str], out: Path, how: str) -> float:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(str(out.parent / "base")),
        adapters[0],
        adapter_name="0",
    )
    model.load_adapter(adapters[1], "1")
    return clock(
        lambda: model.add_weighted_adapter(["0", "1"], [0.5, 0.5], "merged", combination_type=how)
    )


MERGEKIT = """
import json, sys, time
from mergekit.config import MergeConfiguration
from mergekit.merge import MergeOptions, run_merge
folder, out = sys.argv[1:]
models = [{"model": f"{folder}/model{n}", "parameters": {"weight": 0.5}} for n in (0, 1)]
config = MergeConfiguration.model_validate(
    {"merge_method": "nuslerp", "base_model": f"{folder}/base", "models": models, "dtype": "float32"}
)
start = time.perf_counter()
run_merge(config, out, options=MergeOptions(copy_tokenizer=False, quiet=True))
print(json.dumps({"seconds": time.perf_counter() - start}))
"""  # noqa: E501


def peak_mb() -> float:
    """Of this process since it began; getrusage would count its parent's, too, which was this
    program before it.
    """
    (line,) = (
        line
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmHWM:")
    )
    return int(line.split()[1]) / 1024


def clock(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


SIDES: dict[str, Callable[[Sequence[str], Path], float]] = {
    "ours": side_ours,
    "io": side_io,
    "raw": side_raw,
    "dense": side_dense,
    "peft_svd": lambda adapters, out: side_peft(adapters, out, "svd"),
    "peft_cat": lambda adapters, out: side_peft(adapters, out, "cat"),
}


def measure(command: Sequence[str], out: Path) -> dict[str, float]:
    """One side's run in a process of its own, on an empty output folder and a disk at rest."""
    subprocess.run(["rm", "-rf", str(out)], check=True)
    os.sync()
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def in_turn(
    sides: dict[str, Sequence[str]], out: Path, repeats: int
) -> dict[str, dict[str, float]]:
    """Side → medians of its runs; the sides take turns."""
    runs: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    for _ in range(repeats):
        for side, command in sides.items():
            runs[side].append(measure(command, out))
    return {
        side: {key: statistics.median(run[key] for run in own) for key in own[0]}
        for side, own in runs.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--repeats",
        type=int,
        default=7,
        help="runs of each fast side [7]; slow sides run once or twice",
    )
    parser.add_argument("--quick", action="store_true", help="leave the slow sides out")
    parser.add_argument("--side", choices=list(SIDES), help=argparse.SUPPRESS)
    parser.add_argument("rest", nargs="*", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        *adapters, out = options.rest
        seconds = SIDES[options.side](adapters, Path(out))
        print(json.dumps({"seconds": seconds, "peak_mb": peak_mb()}))
        return
    with tempfile.TemporaryDirectory(prefix="raywarp-bench-") as folder:
        print(json.dumps(compare(Path(folder), options.repeats, options.quick)))


def compare(folder: Path, repeats: int, quick: bool) -> dict[str, Any]:
    out = folder / "out"

    def command(side: str, adapters: Sequence[Path]) -> list[str]:
        return [sys.executable, __file__, "--side", side, *map(str, adapters), str(out)]

    print(f"writing adapters into {folder} ...", flush=True)
    large = [folder / f"large{n}" for n in range(5)]
    for n, adapter in enumerate(large):
        write_adapter(adapter, LLAMA_8B, seed=n)
    numbers = sum(RANK * (d_out + d_in) for d_out, d_in in sizes(LLAMA_8B).values())
    result: dict[str, Any] = {"adapter_mb": round(numbers * 4 * LLAMA_8B["blocks"] / 2**20, 1)}
    for count in (2, 5):
        fast = in_turn(
            {side: command(side, large[:count]) for side in ("ours", "io", "raw")}, out, repeats
        )
        ours = fast["ours"]["seconds"]
        own = {
            "seconds": ours,
            "io_seconds": fast["io"]["seconds"],
            "raw_io_seconds": fast["raw"]["seconds"],
            "time_over_io": ours / fast["io"]["seconds"],
            "time_over_raw_io": ours / fast["raw"]["seconds"],
            "peak_mb": fast["ours"]["peak_mb"],
            "largest_block_mb": numbers * 4 * count / 2**20,
        }
        if not quick:
            dense = in_turn({"dense": command("dense", large[:count])}, out, 2)["dense"]
            dense["seconds"] *= LLAMA_8B["blocks"] / DENSE_BLOCKS
            again = measure(command("ours", large[:count]), out)
            own |= {
                "dense_seconds": dense["seconds"],
                "speedup_over_dense": dense["seconds"] / max(ours, again["seconds"]),
                "peak_mb_dense": dense["peak_mb"],
            }
        result[f"m{count}"] = {key: round(value, 3) for key, value in own.items()}
        print(f"Llama-3-8B shapes, M = {count}:", flush=True)
        for key, value in own.items():
            print(f"  {key:20s} {value:10.3f}", flush=True)
    each = (result["m2"], result["m5"])
    result |= {
        "time_over_io": max(own["time_over_io"] for own in each),
        "peak_mb": max(own["peak_mb"] for own in each),
        "largest_block_mb": result["m5"]["largest_block_mb"],
    }
    if quick:
        return result
    result["speedup_over_dense"] = min(own["speedup_over_dense"] for own in each)
    return result | compare_cut_down(folder, out, command)


def compare_cut_down(
    folder: Path, out: Path, command: Callable[[str, Sequence[Path]], list[str]]
) -> dict[str, float]:
    """Compare with PEFT and mergekit, on a base of 2 blocks."""
    print("the base of 2 Llama-3.2-1B blocks ...", flush=True)
    small = [folder / f"small{n}" for n in range(2)]
    write_model(folder / "base", LLAMA_1B)
    for n, adapter in enumerate(small):
        write_adapter(adapter, LLAMA_1B, seed=n)
        write_model(folder / f"model{n}", LLAMA_1B, adapter)
    mergekit = [
        str(python_with("mergekit", ["mergekit==0.1.5"])),
        "-c",
        MERGEKIT,
        str(folder),
        str(out),
    ]
    cut = in_turn(
        {
            "ours": command("ours", small),
            "peft_cat": command("peft_cat", small),
            "mergekit": mergekit,
        },
        out,
        3,
    )
    cut |= in_turn({"peft_svd": command("peft_svd", small)}, out, 1)
    for side, own in cut.items():
        print(
            f"  {side:20s} {own['seconds']:10.3f} s, {own['seconds'] / cut['ours']['seconds']:.1f}"
            " times ours",
            flush=True,
        )
    ours = cut.pop("ours")["seconds"]
    return {f"speedup_over_{side}": round(own["seconds"] / ours, 2) for side, own in cut.items()}


if __name__ == "__main__":
    main()
