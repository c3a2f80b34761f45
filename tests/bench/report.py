"""Measure what the report page of a large run costs: its size, and seconds to build and to show it.

    .venv/bin/python tests/bench/report.py --iterations 5 --policies 5 --steps 400 --samples 2000

The run's folder is made up: I iterations of M policies of T steps (10,000 in all by default), and S
prompts with a text of every point. It also has a kept text per step, the geometry of 32 blocks,
spans of all actors, and faults. Building is `raywarp report` as a user calls it, the start of
Python included, and `build` is the same without it. Opening is in Chromium: from the navigation to
the load event, and until the front is drawn (medians, new profiles).

The last line is JSON.
"""

import argparse
import json
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from raywarp.config.load import load_config
from raywarp.report.page import build
from raywarp.run.folder import Run
from raywarp.storage import sealed

SENTENCE = "the film is was good bad great awful and plot acting of in story very not movie dull"
WORDS = SENTENCE.split()
REPEATS = 5


def text(g: random.Random, words: int) -> str:
    return " ".join(g.choices(WORDS, k=words))


def make_run(folder: Path, iterations: int, policies: int, steps: int, samples: int) -> None:
    """A run's folder with everything that the page reads."""
    g, start = random.Random(0), 1.7e9
    run = Run(folder)
    overrides = [
        f"warp.iterations={iterations}",
        f"warp.policies={policies}",
        f"warp.steps={steps}",
        f"out={folder}",
    ]
    run.save_config(load_config(None, [*overrides, "control={function: raywarp.embedded:vader}"]))
    rows: list[dict[str, Any]] = []
    for iteration in range(1, iterations + 1):
        for policy in range(1, policies + 1):
            key = f"{iteration:08d}{policy:08d}"
            own = [
                step_row(
                    g,
                    iteration,
                    policy,
                    key,
                    step,
                    start + (iteration * steps + step) * 4.0 + policy,
                )
                for step in range(steps)
            ]
            rows += own
            with run.store.writing(f"policies/{key}") as target:
                kept = [
                    {
                        "step": n,
                        "prompt": text(g, 8),
                        "completion": text(g, 24),
                        "reward": g.gauss(0, 1),
                    }
                    for n in range(steps)
                ]
                sealed.write_jsonl(target / "samples.jsonl", kept)
        place = folder / "iterations" / str(iteration)
        place.mkdir(parents=True)
        pairs = policies * (policies - 1) // 2
        blocks = {
            f"model.layers.{n}": {
                "norms": [g.uniform(0.8, 1.2) for _ in range(policies)],
                "angles": [g.gauss(89, 3) for _ in range(pairs)],
            }
            for n in range(32)
        }
        sealed.write_json(place / "geometry.json", blocks)
        run.save_timing(
            iteration,
            {"seconds": steps * 4.0, "steps": steps * policies, "bound": "rollouts bound"},
        )
    sealed.write_jsonl(
        folder / "metrics.jsonl", sorted(rows, key=lambda row: row["spans"]["reward worker"])
    )
    for n in range(200):
        run.add_event(
            "fault",
            what=f"policy actor {1 + n % policies}",
            cause="killed",
            message=text(g, 12),
            iteration=1,
            policy=1,
            step=n,
        )
    names = [
        "sft",
        *(f"policy {m}" for m in range(1, policies + 1)),
        "lerp",
        "liti 0.25",
        "liti 0.5",
        "liti 0.75",
        "slerp",
    ]
    etas = {"sft": 0.0, "liti 0.25": 0.25, "liti 0.5": 0.5, "liti 0.75": 0.75, "slerp": 1.0}
    points = [front_point(g, name, etas.get(name), n) for n, name in enumerate(names)]
    rows = []
    for _ in range(samples):
        values = {
            kind: {name: g.gauss(0, 1) for name in names} for kind in ("rewards", "kl", "control")
        }
        rows.append({"prompt": text(g, 8), **{name: text(g, 24) for name in names}, **values})
    sealed.write_json(folder / "samples.json", rows)
    sealed.write_record(folder / "front.json", {"chosen": "liti 0.5", "points": points})


def step_row(
    g: random.Random, iteration: int, policy: int, key: str, step: int, now: float
) -> dict[str, Any]:
    spans = {
        f"policy actor {policy}": [[now, now + 0.05], [now + 2, now + 3]],
        "rollout worker 1": [[now + 0.1, now + 0.9]],
        "reward worker": [[now + 0.9, now + 1.1]],
    }
    names = (
        "reward",
        "reward_std",
        "kl_anchor",
        "entropy",
        "length",
        "eos_rate",
        "grad_norm",
        "sampler_gap",
        "tokens",
        "rollout_seconds",
    )
    more = (
        "swap_seconds",
        "wait_seconds",
        "request_seconds",
        "update_seconds",
        "pool_busy",
        "trainer_busy",
    )
    row = {
        "iteration": iteration,
        "policy": policy,
        "key": key,
        "step": step,
        **{name: g.gauss(1, 0.3) for name in (*names, *more)},
    }
    return {**row, **({"kl_sft": step / 50} if step % 5 == 0 else {}), "spans": spans}


def front_point(g: random.Random, name: str, eta: float | None, n: int) -> dict[str, Any]:
    values = {
        "reward": n / 5 + g.gauss(0, 0.1),
        "reward_ci": 0.1,
        "kl": n * 1.5,
        "kl_ci": 0.4,
        "control": n / 20,
        "control_ci": 0.05,
    }
    return {"name": name, "eta": eta, **values, "distinct_2": 0.9, "length": 24.0, "eos_rate": 0.1}


def seconds_to_open(page: Path) -> dict[str, float]:
    """Medians over REPEATS cold starts of Chromium."""
    from selenium import webdriver

    loads, drawn = [], []
    for _ in range(REPEATS):
        with tempfile.TemporaryDirectory(prefix="raywarp-bench-") as profile:
            options = webdriver.ChromeOptions()
            options.binary_location = shutil.which("chromium") or ""
            for argument in (
                "--headless=new",
                "--no-sandbox",
                "--disable-gpu",
                f"--user-data-dir={profile}",
            ):
                options.add_argument(argument)
            driver = webdriver.Chrome(
                options=options, service=webdriver.ChromeService(shutil.which("chromedriver"))
            )
            driver.get("about:blank")
            start = time.perf_counter()
            driver.get(page.as_uri())
            loads.append(
                driver.execute_script(
                    "return performance.getEntriesByType('navigation')[0].loadEventEnd / 1000"
                )
            )
            while not driver.execute_script(
                "return document.querySelector('#front-chart svg path') !== null"
            ):
                time.sleep(0.01)
            drawn.append(time.perf_counter() - start)
            driver.quit()
    return {
        "load_seconds": statistics.median(loads),
        "front_drawn_seconds": statistics.median(drawn),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--iterations", type=int, default=5)
    parser.add_argument("--policies", type=int, default=5)
    parser.add_argument(
        "--steps", type=int, default=400, help="per policy; 25 policies of 400 are 10,000"
    )
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--keep", type=Path, help="folder that gets the run and its page")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="raywarp-bench-") as temporary:
        folder = (options.keep or Path(temporary)) / "run"
        make_run(folder, options.iterations, options.policies, options.steps, options.samples)
        commands, cpus, builds = [], [], []
        for _ in range(REPEATS):
            start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
            subprocess.run(
                [sys.executable, "-m", "raywarp.cli", "report", str(folder)],
                check=True,
                stdout=subprocess.DEVNULL,
            )
            commands.append(time.perf_counter() - start)
            cpus.append(sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2]) - sum(before[:2]))
            start = time.perf_counter()
            page = build([str(folder)])
            builds.append(time.perf_counter() - start)
        found = {
            "steps": options.iterations * options.policies * options.steps,
            "samples": options.samples,
            "metrics_mb": (folder / "metrics.jsonl").stat().st_size / 1e6,
            "page_mb": len(page) / 1e6,
            "command_seconds": statistics.median(commands),
            "command_cpu_seconds": statistics.median(cpus),
            "build_seconds": statistics.median(builds),
            **seconds_to_open(folder / "report.html"),
        }
    for name, value in found.items():
        print(
            f"{name.replace('_', ' '):>22}  {value:,.2f}"
            if isinstance(value, float)
            else f"{name.replace('_', ' '):>22}  {value:,}"
        )
    print(json.dumps({name: round(value, 3) for name, value in found.items()}))


if __name__ == "__main__":
    main()
