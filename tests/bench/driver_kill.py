"""Kill the driver at random moments of short runs.

Is the store readable, and does every run end as if nothing had happened?

    .venv/bin/python tests/bench/driver_kill.py --kills 50 --embedded 4

The driver is `raywarp train`, in a process of its own, and the signal is SIGKILL. Each run is
killed a few times and then left to end. Half of the moments are uniform over the time that the rest
of the run takes from its next step on. The other half are uniform over all of it, from the start of
the process. The cluster belongs to this script and lives on. `--embedded` kills are of drivers
with a Ray of their own, whose processes have to be gone within 30 seconds.

After each kill everything in the store is read. Each manifest that is there must hold, and each
checkpoint must load. At the end of each run its adapters are compared with the undisturbed run's.
Its metrics.jsonl must have each step once.

The last line is JSON.
"""

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from killing import (
    Command,
    Patience,
    adapters,
    descendants,
    make_project,
    missing_lines,
    own_home,
    set_pace,
    survivors,
)
from ray.cluster_utils import Cluster

from raywarp.run.folder import Run
from raywarp.run.policy_files import PolicyFiles
from raywarp.storage.sealed import MANIFEST, DamagedError, check_sealed

ITERATIONS, POLICIES, STEPS = 2, 2, 8
KILLS_PER_RUN = 5


def wait(command: Command, until: Callable[[], bool], seconds: float = 300) -> bool:
    """Whether the condition came true before the command's end."""
    patience = Patience(seconds)
    while command.process.poll() is None:
        if until():
            return True
        assert patience.lasts(), command.tail()
    return False


def unreadable(run: Run) -> list[str]:
    """What is in the store and is not what was written; a second look a moment later tells damage
    from what is just being written.
    """
    found = _unreadable(run)
    if found:
        time.sleep(3)
        found = _unreadable(run)
    return found


def _unreadable(run: Run) -> list[str]:
    problems = []
    for manifest in run.folder.rglob(MANIFEST):
        if any(part.startswith(".") for part in manifest.relative_to(run.folder).parts):
            continue
        try:
            check_sealed(manifest.parent)
        except DamagedError as error:
            problems.append(str(error))
    for folder in run.folder.glob("policies/*"):
        files = PolicyFiles(run.store, folder.name)
        for name in files.checkpoints():
            try:
                files.load_checkpoint(name)
            except DamagedError as error:
                problems.append(str(error))
    run.metrics(), run.events(), run.timing()
    return problems


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument(
        "--embedded", type=int, default=4, help="of these, kills of drivers with a Ray of their own"
    )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    chance, begun = random.Random(options.seed), time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="rw"))
    own_home(folder)
    project = make_project(
        folder / "project",
        warp={"iterations": ITERATIONS, "policies": POLICIES, "steps": STEPS},
        checkpoint_every=2,
    )
    set_pace(project, 0.02)
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False}
    )
    found: dict[str, Any] = {
        "kills": 0,
        "runs": 0,
        "equal": 0,
        "lost_metric_lines": 0,
        "unreadable": 0,
        "slow_orphans": 0,
    }
    phases: dict[str, int] = {}
    try:
        begin = time.monotonic()
        undisturbed = Command(project, "undisturbed", address=cluster.address)
        assert wait(undisturbed, lambda: bool(undisturbed.steps())), undisturbed.tail()
        first = time.monotonic() - begin
        assert undisturbed.end() == 0, undisturbed.tail()
        total = time.monotonic() - begin
        wanted = adapters(undisturbed.run)
        print(f"undisturbed: {total:.1f} s, the first step after {first:.1f} s", flush=True)
        while found["kills"] < options.kills:
            embedded = found["kills"] >= options.kills - options.embedded
            address = "local" if embedded else cluster.address
            out = f"run-{found['runs']}"
            for _ in range(min(1 if embedded else KILLS_PER_RUN, options.kills - found["kills"])):
                command = Command(project, out, address=address)
                if not survives_until_a_moment(command, chance, first, total):
                    break
                children = descendants(command)
                phase, rows = phase_of(command.run), command.steps()
                command.stop()
                found["kills"] += 1
                phases[phase] = phases.get(phase, 0) + 1
                problems = unreadable(command.run)
                found["unreadable"] += len(problems)
                if embedded:
                    found["slow_orphans"] += len(survivors(children, 30))
                print(
                    f"{found['kills']:3} {out} {'embedded ' if embedded else ''}{phase}, {rows}"
                    " rows",
                    *problems,
                    flush=True,
                )
            command = Command(project, out, address=address)
            assert command.end() == 0, command.tail()
            found["runs"] += 1
            equal = adapters(command.run) == wanted
            found["equal"] += equal
            found["lost_metric_lines"] += missing_lines(command.run, ITERATIONS, POLICIES, STEPS)
            print(
                f"    {out} ended {'equal' if equal else 'DIFFERENT'},"
                f" {time.monotonic() - begun:.0f} s",
                flush=True,
            )
            shutil.rmtree(command.run.folder)
    finally:
        cluster.shutdown()
        shutil.rmtree(folder, ignore_errors=True)
    print(
        json.dumps(
            {**found, "phases": phases, "run_seconds": total, "seconds": time.monotonic() - begun}
        )
    )


def survives_until_a_moment(
    command: Command, chance: random.Random, first: float, total: float
) -> bool:
    """Wait until a random moment; False where the command came to its end before.

    first, total: seconds that it takes to its first step, and to its end.
    """
    known = command.steps()
    rest = (total - first) * (1 - known / (ITERATIONS * POLICIES * STEPS))
    moment = chance.uniform(0, first + rest)
    if chance.random() < 0.5:
        if not wait(command, lambda: command.steps() > known):
            return False
        moment = chance.uniform(0, rest)
    deadline = time.monotonic() + moment
    return wait(command, lambda: time.monotonic() > deadline)


def phase_of(run: Run) -> str:
    """Where the driver is."""
    rows, told = len(run.metrics()), [row["event"] for row in run.events()]
    if (run.folder / "front.json").exists():
        return "ending"
    if not told or told[-1] == "finished":
        return "starting"
    return (
        "evaluating"
        if rows == ITERATIONS * POLICIES * STEPS
        else "training"
        if rows
        else "before the first step"
    )


if __name__ == "__main__":
    main()
