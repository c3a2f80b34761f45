"""The recipes on the quickstart's reward, at equal compute: the reward at some KLs.

    .venv/bin/raywarp quickstart out=runs/quickstart      # once: trains the reward model
    .venv/bin/python tests/bench/recipes.py --reward runs/quickstart/reward --out runs/recipes \\
        --seeds 2 --only warp --only anchored front.every=0 front.ceiling_completions=0

All take the same number of policy steps. Their fronts are read at the same KLs, on the same
held-out prompts. Seeds differ in everything random.
"""

import argparse
import itertools
import json
import math
import statistics
from pathlib import Path
from typing import Any

import raywarp
from raywarp.cli.quickstart import QUICKSTART
from raywarp.config.load import load_config
from raywarp.run.folder import Run

KLS = (1.0, 2.0, 4.0)
STEPS = 56  # policy steps of each run, as many as the quickstart's
VARIANTS: dict[str, list[str]] = {
    "warp": ["recipe=warp", "warp.steps=14"],
    "anchored": ["recipe=anchored", f"warp.steps={STEPS}"],
    "anchored, constant": ["recipe=anchored", f"warp.steps={STEPS}", "optim.schedule=constant"],
    "anchored, mean of 4": [
        "recipe=anchored",
        f"warp.steps={STEPS}",
        "optim.schedule=constant",
        "warp.average_last=4",
        "checkpoint_every=7",
    ],
}


def base(anchored: bool) -> dict[str, Any]:
    """The quickstart's configuration, without what a recipe sets itself."""
    warp = {key: QUICKSTART["warp"][key] for key in ("kl_coef",)}
    if not anchored:
        warp = dict(QUICKSTART["warp"])
    return {**QUICKSTART, "warp": warp}


def reward_at(run: Run, kl: float) -> float:
    """The front's reward at a KL, linear in √KL between its points; NaN beyond its end."""
    line = sorted((p["kl"], p["reward"]) for p in run.front()["points"] if p["eta"] is not None)
    for (k0, r0), (k1, r1) in itertools.pairwise(line):
        if k0 <= kl <= k1:
            share = (math.sqrt(kl) - math.sqrt(k0)) / (math.sqrt(k1) - math.sqrt(k0))
            return float(r0 + share * (r1 - r0))
    return math.nan


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--reward", required=True, help="the quickstart's reward model")
    parser.add_argument("--out", type=Path, default=Path("runs/recipes"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--only", action="append", choices=list(VARIANTS))
    parser.add_argument("overrides", nargs="*", help="key=value")
    options = parser.parse_args()
    names: list[str] = options.only or list(VARIANTS)
    found: dict[str, dict[float, list[float]]] = {name: {kl: [] for kl in KLS} for name in names}
    for seed in range(options.seeds):
        for name in names:  # in turn, so that all meet the same machine
            own = [
                *VARIANTS[name],
                f"reward.model={options.reward}",
                f"seed={seed}",
                f"front.prompts={options.prompts}",
                "front.etas=[0,0.15,0.3,0.45,0.6,0.8,1]",
                f"out={options.out / name.replace(', ', '-').replace(' ', '-')}-{seed}",
            ]
            config = load_config(base(name != "warp"), [*own, *options.overrides])
            run = raywarp.train(config)
            for kl in KLS:
                found[name][kl].append(reward_at(run, kl))
    print(f"reward at KL {', '.join(f'{kl:g}' for kl in KLS)} nats, mean (deviation) over seeds")
    for name, by_kl in found.items():
        cells = [f"{statistics.fmean(own):.2f} ({_deviation(own):.2f})" for own in by_kl.values()]
        print(f"{name:22} {'   '.join(cells)}")
    print(
        json.dumps({name: {str(kl): own for kl, own in by.items()} for name, by in found.items()})
    )


def _deviation(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


if __name__ == "__main__":
    main()
