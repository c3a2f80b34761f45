"""CPU seconds that each process of a run spends on imports, here and in another checkout, in turn.

    .venv/bin/python tests/bench/imports.py --against ../raywarp-before

A process is measured whole, interpreter included: user and system time of `python -c "import …"`.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parents[2]
# Process → its modules; of names that mean the same in different versions, the first that is there.
PROCESSES: dict[str, list[tuple[str, ...]]] = {
    "raywarp --help": [("raywarp.cli.commands", "raywarp.cli")],
    "driver": [
        ("raywarp.warp",),
        ("raywarp.planning.model_shapes", "raywarp.model_shapes"),
    ],
    "policy actor": [
        ("raywarp.training.policy_actor", "raywarp.policy_actor"),
        ("raywarp.model.adapted", "raywarp.adapted_model"),
    ],
    "rollout worker, before its engine": [("raywarp.rollout.worker", "raywarp.rollout_worker")],
    "rollout worker with transformers": [
        ("raywarp.rollout.worker", "raywarp.rollout_worker"),
        ("raywarp.rollout.transformers_engine", "raywarp.transformers_engine"),
    ],
    "reward worker": [("raywarp.rewards.actor", "raywarp.reward_actor")],
    "report": [("raywarp.report.page", "raywarp.report_command")],
}


def has(checkout: Path, module: str) -> bool:
    path = checkout / module.replace(".", "/")
    return path.with_suffix(".py").is_file()


def cpu_seconds(checkout: Path, modules: list[tuple[str, ...]]) -> float:
    """User and system time of a new Python that imports the modules from a checkout."""
    there = [next(name for name in names if has(checkout, name)) for names in modules]
    code = f"import importlib; [importlib.import_module(name) for name in {there!r}]"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    subprocess.run([sys.executable, "-c", code], env=environment, cwd=checkout, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--against", type=Path, help="another checkout of raywarp")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    checkouts = {"here": HERE} | ({"there": options.against.resolve()} if options.against else {})
    found: dict[str, dict[str, float]] = {}
    for process, modules in PROCESSES.items():
        seconds: dict[str, list[float]] = {name: [] for name in checkouts}
        for repeat in range(options.repeats + 1):  # the first one fills the page cache
            for name, checkout in checkouts.items():
                measured = cpu_seconds(checkout, modules)
                if repeat:
                    seconds[name].append(measured)
        found[process] = {name: statistics.median(each) for name, each in seconds.items()}
        if "there" in found[process]:
            found[process]["ratio"] = found[process]["here"] / found[process]["there"]
        print(process, *(f"{name} {value:.2f}" for name, value in found[process].items()))
    print(
        json.dumps({name: {k: round(v, 3) for k, v in row.items()} for name, row in found.items()})
    )


if __name__ == "__main__":
    main()
