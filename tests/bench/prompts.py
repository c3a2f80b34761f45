"""Many prompts: how long a driver takes to read them, and how much memory it needs.

    python tests/bench/prompts.py [--rows 1000000]

A run of one step on a JSONL file of conversations with a system turn and two more columns. The
tokenizer and its chat template are SmolLM2's, the model a tiny Llama. The last line is JSON: the
driver's peak of resident memory (mapped files included) and of anonymous memory, in GiB; the same
of its tokenising processes; seconds and rows per second until the prompts are read; and the lines
of progress.
"""

import argparse
import json
import os
import random
import re
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
GIB = 2**30
WORDS = ["the", "film", "was", "never", "good", "at", "telling", "people", "what", "they", "wanted"]
REWARD = (
    "def score(prompts, completions, **columns):\n    return [float(len(c)) for c in completions]\n"
)


def write_rows(path: Path, count: int) -> None:
    draw = random.Random(0)
    with path.open("w") as file:
        for n in range(count):
            text = " ".join(draw.choices(WORDS, k=draw.randint(10, 50)))
            talk = [
                {"role": "system", "content": "Answer in one sentence."},
                {"role": "user", "content": f"{text} {n}"},
            ]
            row = {"prompt": talk, "reference": f"answer {n % 1000}", "id": n}
            file.write(json.dumps(row) + "\n")


def save_model(folder: Path) -> None:
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from raywarp.config.schema import SMOLLM2
    from raywarp.data.embedded import resolve

    tokenizer = AutoTokenizer.from_pretrained(resolve(SMOLLM2))
    tokenizer.save_pretrained(folder)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 512}
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    LlamaForCausalLM(
        LlamaConfig(vocab_size=len(tokenizer), **sizes, **heads, **ends)
    ).save_pretrained(folder)


def settings(folder: Path) -> dict[str, Any]:
    return {
        "model": str(folder / "model"),
        "dtype": "float32",
        "out": str(folder / "run"),
        "prompts": {
            "dataset": str(folder / "rows.jsonl"),
            "column": "prompt",
            "template": "chat",
            "held_out_fraction": 0.01,
        },
        "reward": {"function": "length:score"},
        "lora": {"rank": 2},
        "warp": {"iterations": 1, "policies": 1, "steps": 1},
        "optim": {"batch_size": 8},
        "rollout": {"engine": "transformers", "max_new_tokens": 4},
        "cluster": {"policy_actors": 1, "threads": 1},
        "front": {
            "prompts": 8,
            "completions_per_prompt": 1,
            "etas": [1],
            "choose": {"eta": 1},
            "every": 0,
            "ceiling_completions": 0,
        },
    }


def memory() -> tuple[int, int]:
    """Return this process's resident and anonymous bytes."""
    text = Path("/proc/self/status").read_text()
    found = [
        re.search(rf"^{name}:\s+(\d+) kB", text, re.MULTILINE) for name in ("VmRSS", "RssAnon")
    ]
    resident, anonymous = (int(one[1]) * 1024 if one else 0 for one in found)
    return resident, anonymous


def drive(folder: Path) -> None:
    """Run as the driver does, and print what it needed."""
    from raywarp.config.load import parse_config
    from raywarp.planning import inputs
    from raywarp.run.display import Display
    from raywarp.warp import iterations

    peaks, done = [0, 0], threading.Event()

    def watch() -> None:
        while not done.wait(0.1):
            peaks[:] = map(max, peaks, memory())

    threading.Thread(target=watch, daemon=True).start()
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    config, display, lines = parse_config(settings(folder)), Display(), list[str]()

    def say(line: str) -> None:
        lines.append(line)
        print(line, flush=True)

    before, start = memory()[0], time.monotonic()
    prepared = inputs.prepare(config, say)
    seconds, read = time.monotonic() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in iterations(config, prepared, display):
        pass
    done.set()
    count = len(prepared.prompts.train) + len(prepared.prompts.held_out)
    print(
        json.dumps(
            {
                "prompts": count,
                "before_gib": round(before / GIB, 3),
                "read_seconds": round(seconds, 1),
                "read_rows_per_second": round(count / seconds),
                "read_peak_gib": round(read * 1024 / GIB, 3),
                "run_seconds": round(time.monotonic() - start, 1),
                "peak_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 3),
                "anonymous_peak_gib": round(peaks[1] / GIB, 3),
                "process_peak_gib": round(
                    resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20, 3
                ),
                "progress_lines": len(lines),
                "last_line": lines[-1] if lines else None,
            }
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--drive", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.drive:
        return drive(arguments.drive)
    with tempfile.TemporaryDirectory(prefix="rwprompts") as name:
        folder = Path(name)
        write_rows(folder / "rows.jsonl", arguments.rows)
        (folder / "length.py").write_text(REWARD)
        save_model(folder / "model")
        environment = {
            "HF_DATASETS_CACHE": str(folder / "cache"),
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        }
        subprocess.run(
            [sys.executable, __file__, "--drive", name], check=True, env=os.environ | environment
        )


if __name__ == "__main__":
    main()
