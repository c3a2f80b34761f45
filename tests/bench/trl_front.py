"""Train two adapters with TRL 1.16's RLOOTrainer, and measure their front with `raywarp front`.

    python tests/bench/trl_front.py runs/trl-front             # some 8 minutes on two quiet cores
    python tests/bench/trl_front.py runs/trl-front --steps 5   # for trying it out

Both adapters are of SmolLM2-135M-Instruct, with VADER as the reward and other seeds. TRL has a
Python of its own. What it saves goes to raywarp as it lies; the front, the page, the card and the
chosen adapter come from one command. The last line is JSON: reward and KL of each point.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from environment import python_with

from raywarp.cli import main as raywarp
from raywarp.cli.quickstart import QUICKSTART
from raywarp.cluster.device import CPU_ENV
from raywarp.config.load import load_config
from raywarp.config.schema import SMOLLM2
from raywarp.planning.inputs import prepare_prompts

HERE = Path(__file__).parent
REWARD = "raywarp.embedded:vader"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=40)
    options = parser.parse_args()
    adapters = [train(options.out / f"seed-{seed}", seed, options.steps) for seed in (1, 2)]
    config = QUICKSTART["prompts"]
    keys = [f"prompts.max_words={config['max_words']}", "rollout.max_new_tokens=12"]
    out = options.out / "front"
    words = ["front", *adapters, *keys, "--out", str(out), "--lambdas", "0.25,0.5,0.75"]
    asked = ["--model", SMOLLM2, "--prompts", config["dataset"], "--reward", REWARD]
    if raywarp([*words, *asked]):
        sys.exit(1)
    points = json.loads((out / "front.json").read_text())["points"]
    print(json.dumps({p["name"]: {"reward": p["reward"], "kl": p["kl"]} for p in points}))


def train(folder: Path, seed: int, steps: int) -> str:
    """Train a policy with TRL, unless it is there, and return its adapter's folder."""
    adapter = folder / "adapter"
    if not (adapter / "adapter_config.json").is_file():
        python = python_with("trl", ["trl==1.16.0"])
        script = str(HERE / "trl_rloo.py")
        told = json.dumps(settings(folder, seed, steps))
        subprocess.run([str(python), script, told], check=True, env=os.environ | CPU_ENV)
    return str(adapter)


def settings(folder: Path, seed: int, steps: int) -> dict[str, Any]:
    """What trl_rloo.py takes: the quickstart's prompts, 6 of them a step with 4 completions."""
    keys = ("model", "prompts", "out")
    model, _, prompts = prepare_prompts(load_config({key: QUICKSTART[key] for key in keys}))
    return {
        "threads": 2,
        "model": model,
        "prompts": [prompt.text for prompt in prompts.train],
        "folder": str(folder / "work"),
        "save": str(folder / "adapter"),
        "steps": steps,
        "prompts_per_step": 6,
        "completions_per_prompt": 4,
        "new_tokens": 12,
        "temperature": 1.0,
        "dtype": "bfloat16",
        "forced": False,
        "free_running": True,
        "options": {
            "seed": seed,
            "gradient_checkpointing": False,
            "logging_strategy": "no",
            "bf16": False,
            "model_init_kwargs": {"dtype": "bfloat16"},
        },
    }


if __name__ == "__main__":
    main()
