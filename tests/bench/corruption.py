"""Damage every file of a run's folder, one at a time, and run the same command again.

    .venv/bin/python tests/bench/corruption.py [--every N] [--only TEXT]
        [--stages finished,failed,reward,training]

Each file is halved, emptied, deleted, and gets one bit flipped. There are four folders: a finished
WARP run, a run that failed in its second iteration, a reward model, and one whose training failed.

A case is `recovered` if the command ends with the bytes of the undisturbed run, and says what was
damaged. It is also `recovered` if a run refuses its damaged reward model with a message that says
what to do. It is `silent` if it says nothing, and `wrong` if it ends with other bytes. A
`traceback` is any error that the command line does not explain.

Some damage may go unnoticed. A flipped bit in a line of events.jsonl may, if it leaves the line
readable, because nothing vouches for that file. So may damage to files that nothing reads: Ray
Train's marker of its storage, and a checkpoint that its snapshot does not name yet. The last line
is JSON.
"""

import argparse
import contextlib
import io
import json
import logging
import os
import shutil
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import ray
import ray.train
from rich.console import Console
from rich.table import Table
from test_reward_training import FILLER, _kill_worker_after_checkpoint, make_config
from tiny_models import build_bert, save_tiny_llama
from tiny_run import DAMAGE, Listener, files_of, make_project, tiny_config

from raywarp.cli.commands import _exit_code
from raywarp.config.schema import Config
from raywarp.planning.inputs import resolved
from raywarp.rewards.training import train_reward
from raywarp.warp import train

RESULTS = (
    "adapter_",
    "geometry",
    "samples.json",
    "policies.json",
    "model.safetensors",
    "config.json",
    "tokenizer",
)
# lines that name the folder of a run that nothing disturbed, too
ORDINARY = (
    "front:",
    "chosen:",
    "raywarp report ",
)


@dataclass(frozen=True)
class Stage:
    """A folder to damage, the same command for a copy of it, and what that must end with."""

    folder: Path
    command: Callable[[Path], str]
    expected: Path


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--every", type=int, default=1, help="only every Nth case")
    parser.add_argument("--stages", default="finished,failed,reward,training")
    parser.add_argument("--only", default="", help="only files whose path contains this")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="rw", ignore_cleanup_errors=True) as temporary:
        work = Path(temporary)
        os.chdir(make_project(work))
        os.environ["PYTHONPATH"] = os.pathsep.join(
            [str(Path(__file__).resolve().parents[2]), str(work), os.environ.get("PYTHONPATH", "")]
        )
        ray.init(
            address="local",
            num_cpus=4,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
        outcomes: list[tuple[str, str, str, str, str]] = []
        for name, make in {
            "finished": finished,
            "failed": failed,
            "reward": reward,
            "training": training,
        }.items():
            if name in options.stages.split(","):
                outcomes += run_cases(name, make(work), work, options.every, options.only)
        ray.shutdown()
    show(outcomes)


def run_cases(
    name: str, stage: Stage, work: Path, every: int, only: str
) -> Iterator[tuple[str, str, str, str, str]]:
    files = {
        path: [way for way in DAMAGE if way == "deleted" or path.stat().st_size]
        for path in files_of(stage.folder)
    }
    cases = [
        (path.relative_to(stage.folder), way)
        for path, ways in files.items()
        for way in ways
        if only in str(path)
    ]
    for file, way in cases[::every]:
        copy = work / "case"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(stage.folder, copy)
        DAMAGE[way](copy / file)
        start = time.monotonic()
        outcome, said = judge(stage, copy)
        place = "/".join("<key>" if len(part) == 16 else part for part in file.parts)
        print(
            f"{name:9} {place:60} {way:8} {outcome:10} {time.monotonic() - start:4.0f} s  {said}",
            flush=True,
        )
        yield name, place, way, outcome, said


def judge(stage: Stage, copy: Path) -> tuple[str, str]:
    """The outcome, and the line that told of the damage."""
    try:
        said = stage.command(copy)
    except Exception as error:
        if _exit_code(error) is None:
            traceback.print_exc()
            return "traceback", repr(error)
        return "refused", str(error)
    for path in files_of(stage.expected):
        name = path.relative_to(stage.expected)
        if path.name.startswith(RESULTS) and (copy / name).read_bytes() != path.read_bytes():
            return "wrong", str(name)
    line = next(
        (
            line
            for line in said.splitlines()
            if str(copy) in line and not any(own in line for own in ORDINARY)
        ),
        "",
    )
    return "recovered" if line else "silent", " ".join(line.replace(str(copy), "").split())


def warp(config: Callable[[Path], Config]) -> Callable[[Path], str]:
    def command(folder: Path) -> str:
        train(config(folder), heard := Listener())
        return heard.text()

    return command


def finished(work: Path) -> Stage:
    command = warp(lambda folder: tiny_config(work, model_of(work), folder))
    folder = work / "finished"
    if not folder.exists():
        command(folder)
    return Stage(folder, command, folder)


def failed(work: Path) -> Stage:
    whole = finished(work)
    (work / "broken").write_text("21")
    with contextlib.suppress(Exception):
        whole.command(work / "failed")
    (work / "broken").unlink()
    return Stage(work / "failed", whole.command, whole.folder)


def model_of(work: Path) -> Path:
    return work / "llama" if (work / "llama").exists() else save_tiny_llama(work / "llama")


def reward(work: Path) -> Stage:
    """The stage's own command trains a damaged model again; a run that uses it must have refused it
    before.
    """
    whole = trained(work)

    def command(folder: Path) -> str:
        config = tiny_config(
            work, model_of(work), work / "unused", reward={"function": None, "model": str(folder)}
        )
        refused = ""
        try:
            resolved(config)
        except ValueError as error:
            refused = str(error)
        said = whole.command(folder)
        if "trained again" in said and not refused:
            raise AssertionError("a run would have used a damaged reward model")
        return said

    return Stage(whole.folder, command, whole.folder)


def training(work: Path) -> Stage:
    """A training that stopped after its first checkpoints."""
    whole = trained(work)
    killer = threading.Thread(target=_kill_worker_after_checkpoint, args=(work / "stopped",))
    killer.start()
    with contextlib.suppress(ray.train.TrainingFailedError):
        whole.command(work / "stopped")
    killer.join()
    return Stage(work / "stopped", whole.command, whole.folder)


def trained(work: Path) -> Stage:
    pairs, backbone = work / "pairs.jsonl", work / "bert"
    if not pairs.exists():
        rows = [
            {"chosen": f"{a} good {b} {c}", "rejected": f"{b} bad {c} {a}"}
            for a in FILLER
            for b in FILLER
            for c in FILLER
        ]
        pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
        backbone.mkdir()
        build_bert(backbone, labels=2)

    def command(folder: Path) -> str:
        with contextlib.redirect_stdout(io.StringIO()) as said:
            train_reward(make_config(folder, backbone, pairs, steps=20))
        return said.getvalue()

    if not (work / "trained").exists():
        command(work / "trained")
    return Stage(work / "trained", command, work / "trained")


def show(outcomes: list[tuple[str, str, str, str, str]]) -> None:
    table = Table("stage", "file", *DAMAGE)
    for stage, file in dict.fromkeys((stage, file) for stage, file, *_ in outcomes):
        row = {
            way: Counter(o for s, f, w, o, _ in outcomes if (s, f, w) == (stage, file, way))
            for way in DAMAGE
        }
        table.add_row(
            stage,
            file,
            *(
                ", ".join(f"{n} {outcome}" for outcome, n in counts.items())
                for counts in row.values()
            ),
        )
    Console(width=160).print(table)
    totals = Counter(outcome for *_, outcome, _ in outcomes)
    counts = {name: totals[name] for name in ("recovered", "silent", "refused", "wrong")} | {
        "tracebacks": totals["traceback"]
    }
    print(json.dumps({"cases": len(outcomes), **counts}))


if __name__ == "__main__":
    main()
