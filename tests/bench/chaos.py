"""Kill the processes of WARP on the tiny model one after another: does it end the same?

The next one is killed when every policy has advanced.

    .venv/bin/python tests/bench/chaos.py --faults 32 --seed 0

`raywarp train` runs as a user runs it, in a process of its own. The Ray cluster has three nodes and
belongs to this script: a head, and two nodes with two CPUs each, all on this machine. There are two
policies with an actor each, one rollout worker and one reward worker. The seven kinds of fault:

    policy actor, rollout worker, reward worker   SIGKILL of the process
    engine                                        out of memory, raised in the engine's next pass
    node                                          SIGKILL of a node's raylet, which takes its actors
                                                  along; a new node joins
    driver                                        SIGKILL of `raywarp train`, which is then started
                                                  again
    job stop                                      SIGTERM of `raywarp train`, SIGKILL after 3 s as
                                                  Ray does it, then started again

Ray finds a lost node by missed heartbeats. They come every 0.5 s here, so that the time this takes
(15 s by default) does not blur the rest. A fault's seconds run from the signal until every policy
has got beyond where it had been. Its repeated steps are those that a policy did again. The rewards
wait a second each, so that a run is long enough in time and its policies progress alike.

At the end, the adapters are compared with those of the same run without a fault. Missing or double
lines of metrics.jsonl are counted. So are processes and segments in /dev/shm that are still there.
With --engine vllm a batch is the same call in all cases, so the adapters should be equal as well.

The last line is JSON.
"""

import argparse
import contextlib
import json
import logging
import os
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
import uuid
from collections import defaultdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ.update(
    {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "token"}
    | {
        f"RAY_health_check_{name}": value
        for name, value in (
            ("period_ms", "500"),
            ("initial_delay_ms", "1000"),
            ("timeout_ms", "5000"),
        )
    }
)

import psutil
import ray
from killing import (
    Command,
    adapter_folders,
    adapters,
    kill,
    make_project,
    missing_lines,
    own_home,
    processes,
    set_pace,
    survivors,
)
from ray.cluster_utils import Cluster
from ray.exceptions import RayError

ITERATIONS, POLICIES, STEPS, PACE = 3, 2, 250, 1.0
ACTORS = ("policy actor", "rollout worker", "reward worker")
KINDS = (*ACTORS, "engine", "node", "driver", "job stop")
WEIGHTS = (7, 6, 6, 4, 5, 4, 4)  # a driver takes longest to come back
STOP_SECONDS = 3.0
MARK = "RAYWARP_CHAOS"


def run_out_of_memory(worker: Any) -> None:
    """Let a worker's engine raise in its next pass, as torch does where a GPU is full."""
    import torch

    def fail(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    llm = getattr(worker.engine, "llm", None)
    if llm is None:
        worker.engine._pass = fail
    else:
        llm.llm_engine.step = fail


class Nodes:
    """The cluster: a head without CPUs, where the driver lives, and two nodes for the actors."""

    def __init__(self) -> None:
        self.cluster = Cluster(
            initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False}
        )
        self.nodes = [self.cluster.add_node(num_cpus=2) for _ in range(2)]
        ray.init(address=self.cluster.address, log_to_driver=False, logging_level=logging.ERROR)

    def lose_one(self, chance: random.Random) -> str:
        """SIGKILL for a node; another takes its place."""
        node = self.nodes.pop(chance.randrange(len(self.nodes)))
        self.cluster.remove_node(node, allow_graceful=False)
        self.nodes.append(self.cluster.add_node(num_cpus=2))
        return str(node.node_id[:8])


class Chaos:
    """One run, and what was done to it."""

    def __init__(self, project: Path, out: str, overrides: list[str], nodes: Nodes):
        self.project, self.out, self.overrides, self.nodes = project, out, overrides, nodes
        self.command = self.start()
        self.done: list[dict[str, Any]] = []
        self.segments: set[str] = set()
        self.exit_codes: list[int] = []

    def start(self) -> Command:
        return Command(self.project, self.out, *self.overrides, address=self.nodes.cluster.address)

    def reached(self) -> dict[tuple[int, int], int]:
        """(iteration, policy) → finished steps."""
        steps: dict[tuple[int, int], int] = defaultdict(int)
        for row in self.command.run.metrics():
            place = (row["iteration"], row["policy"])
            steps[place] = max(steps[place], row["step"] + 1)
        return steps

    def wait_for_progress(self, before: dict[tuple[int, int], int], seconds: float = 180) -> None:
        """Until every policy that was under way is further than then, or at its end."""
        current = max((iteration for iteration, _ in before), default=1)
        places = [(current, m) for m in range(1, POLICIES + 1)]

        def all_on() -> bool:
            time.sleep(0.25)
            now = self.reached()
            return all(now[place] > before[place] or now[place] == STEPS for place in places)

        self.command.wait_until(all_on, seconds)

    def inject(self, kind: str, chance: random.Random) -> None:
        before, events, start = self.reached(), len(self.command.run.events()), time.monotonic()
        self.segments |= segments(marked())
        victim = self._strike(kind, chance)
        self.wait_for_progress(before)
        seconds = time.monotonic() - start
        repeated = 0
        for event in self.command.run.events()[events:]:
            if event["event"] == "continued":
                repeated += event["steps_repeated"]
            elif event["event"] == "resumed":
                repeated += max(before[event["iteration"], event["policy"]] - event["step"], 0)
        self.done.append({"kind": kind, "seconds": seconds, "repeated": repeated})
        where = ", ".join(f"{i}/{m}: {step}" for (i, m), step in sorted(before.items())[-POLICIES:])
        print(
            f"{len(self.done):3} {kind:15} {victim:12} at {where:20} {seconds:6.1f} s, {repeated}"
            " steps again",
            flush=True,
        )

    def _strike(self, kind: str, chance: random.Random) -> str:
        if kind == "node":
            return self.nodes.lose_one(chance)
        if kind in ACTORS:
            process = self.command.wait_until(lambda: processes(kind, psutil.Process()))
            victim = chance.choice(process)
            kill(victim)
            return str(victim.pid)
        if kind == "engine":
            return self.command.wait_until(break_an_engine)
        if kind == "driver":
            self.command.stop()
        else:
            self.command.process.send_signal(signal.SIGTERM)
            with contextlib.suppress(Exception):
                self.command.process.wait(STOP_SECONDS)
            self.command.stop()
        victim_pid, code = self.command.process.pid, self.command.process.returncode
        self.exit_codes += [code] if kind == "job stop" else []
        self.command = self.start()
        return f"{victim_pid} ({code})"


def break_an_engine() -> str:
    """Break a rollout worker's engine. Return the worker's name, or nothing if there is none."""
    for actor in ray.util.list_named_actors(all_namespaces=True):
        if "rollout" in actor["name"]:
            with contextlib.suppress(RayError, ValueError):
                worker = ray.get_actor(**actor)
                ray.get(worker.__ray_call__.remote(run_out_of_memory), timeout=10)
                return str(actor["name"]).removeprefix("raywarp-")
    return ""


def marked() -> list[psutil.Process]:
    """Every process that comes from this script, wherever it hangs now."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if (
                process.pid != os.getpid()
                and process.environ().get(MARK) == os.environ[MARK]
                and process.status() != psutil.STATUS_ZOMBIE
            ):
                found.append(process)
    return found


def segments(owners: list[psutil.Process]) -> set[str]:
    """Names in /dev/shm that these processes have mapped."""
    names = set()
    for process in owners:
        with contextlib.suppress(OSError):
            lines = Path(f"/proc/{process.pid}/maps").read_text().splitlines()
            names |= {
                line.partition("/dev/shm/")[2]
                for line in lines
                if "/dev/shm/" in line and not line.endswith("(deleted)")
            }
    return names


def plan(count: int, chance: random.Random) -> list[str]:
    """That many kinds, each at least once, in random order."""
    rest = chance.choices(KINDS, WEIGHTS, k=max(count - len(KINDS), 0))
    kinds = [*KINDS, *rest][:count]
    chance.shuffle(kinds)
    return kinds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--faults", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--engine", choices=["transformers", "vllm"], default="transformers")
    options = parser.parse_args()
    os.environ[MARK] = uuid.uuid4().hex
    chance, start = random.Random(options.seed), time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="rw"))
    own_home(folder)
    temporary = adapter_folders()
    project = make_project(
        folder / "project", warp={"iterations": ITERATIONS, "policies": POLICIES, "steps": STEPS}
    )
    overrides = [
        f"rollout.engine={options.engine}",
        "rollout.kv_cache_gib=0.1",
        "cluster.cpus_per_policy=1",
        "cluster.cpus_per_rollout_worker=1",
    ]
    nodes = Nodes()
    try:
        undisturbed = Command(project, "undisturbed", *overrides, address=nodes.cluster.address)
        assert undisturbed.end(1200) == 0, undisturbed.tail()
        print(
            f"undisturbed: {undisturbed.steps()} steps, {time.monotonic() - start:.0f} s with the"
            " cluster's start",
            flush=True,
        )
        set_pace(project, PACE)
        chaos = Chaos(project, "chaos", overrides, nodes)
        chaos.wait_for_progress(chaos.reached())
        for kind in plan(options.faults, chance):
            chaos.inject(kind, chance)
        set_pace(project, 0)
        code = chaos.command.end(1200)
        assert code == 0, chaos.command.tail()
        found = summary(chaos, undisturbed)
    finally:
        for process in marked():  # a driver that is still there, if this script failed
            if "raywarp.cli" in " ".join(process.cmdline()):
                kill(process)
        ray.shutdown()
        nodes.cluster.shutdown()
    left = survivors([process.pid for process in marked()])
    found |= {
        "leaked_processes": len(left),
        "leaked_shm": len([name for name in chaos.segments if (Path("/dev/shm") / name).exists()]),
        "leaked_folders": len(adapter_folders() - temporary),
        "seconds": time.monotonic() - start,
    }
    shutil.rmtree(folder, ignore_errors=True)
    print(json.dumps(found))


def summary(chaos: Chaos, undisturbed: Command) -> dict[str, Any]:
    by_kind: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for fault in chaos.done:
        by_kind[fault["kind"]].append(fault)
    events = chaos.command.run.events()
    print("kind             faults  seconds lost (median, most)  steps again (median, most)")
    rows = {}
    for kind in KINDS:
        if faults := by_kind[kind]:
            seconds, again = [f["seconds"] for f in faults], [f["repeated"] for f in faults]
            rows[kind] = {
                "faults": len(faults),
                "seconds": statistics.median(seconds),
                "steps_repeated": sum(again),
            }
            figures = (
                f"{statistics.median(seconds):14.1f} {max(seconds):7.1f}"
                f" {statistics.median(again):17} {max(again):6}"
            )
            print(f"{kind:16} {len(faults):6} {figures}")
    told = sum(event["event"] in ("fault", "stopped") for event in events)
    print(
        f"events.jsonl tells of {told} faults and stops,"
        f" {sum(event['event'] == 'recovered' for event in events)} recoveries"
    )
    return {
        "faults": len(chaos.done),
        "survived": len(chaos.done),
        "kinds": rows,
        "told": told,
        "steps_repeated": sum(fault["repeated"] for fault in chaos.done),
        "stops_in_time": sum(code == 143 for code in chaos.exit_codes),
        "adapters_equal": adapters(chaos.command.run) == adapters(undisturbed.run),
        "lost_metric_lines": missing_lines(chaos.command.run, ITERATIONS, POLICIES, STEPS),
    }


if __name__ == "__main__":
    main()
