"""What averaging buys with LoRA, on human ratings, at equal KL and equal compute: trains, measures,
judges, draws. What is done is not done again.

    .venv/bin/python tests/bench/evidence --seeds 5 --hours 3          # P1 to P5 and P8
    .venv/bin/python tests/bench/evidence --claim P6 --seeds 3
    .venv/bin/python tests/bench/evidence --task two-rewards --seeds 3 # P7
    .venv/bin/python tests/bench/evidence --claim P1 --seeds 1 --results runs/evidence-again
                                                                       # one claim, one seed, from
                                                                       # nothing, on two cores
    .venv/bin/python tests/bench/evidence --redraw                     # from the committed numbers
    .venv/bin/python tests/bench/evidence --select                     # a learning rate, on a seed
                                                                       # that is in no claim

Policies lie in runs/evidence, under their keys. The numbers of every point (per prompt, no texts)
lie in numbers/ beside this file, and tests/bench/evidence.json says what came out. Killed or out of
its hours, the same command continues. An arm whose numbers are there is not trained again, on no
machine. Other --results, a folder that is made, begin from nothing.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.evidence.claims import ARMS_OF, CEILING, FIRST_TIER, NAMES, OF_BOTH
from bench.evidence.curves import CURVES, END, SFT, Curve, Trained
from bench.evidence.measuring import Measurer, Wanted
from bench.evidence.report import PAGE, SUMMARY, report
from bench.evidence.results import OtherSettingsError, Results
from bench.evidence.settings import (
    ARMS,
    BOTH,
    TASKS,
    TINY,
    TINY_BOTH,
    Arm,
    Settings,
    arm_config,
    reward_configs,
    seed_folder,
    tiny_project,
)
from rich.console import Console

from raywarp.adapters.peft import save_peft
from raywarp.algorithm.deltas import AdapterDelta, scale
from raywarp.algorithm.factors import Factors
from raywarp.cluster.runtime import start_ray
from raywarp.config.schema import Config
from raywarp.planning.inputs import prepare_prompts, resolved
from raywarp.reward_stage import prepare_stage, reward
from raywarp.rewards import score
from raywarp.run.display import Bars, Display
from raywarp.run.folder import Run, read_mark
from raywarp.run.policy_files import Checkpoint, PolicyFiles
from raywarp.storage import sealed
from raywarp.storage.location import Storage
from raywarp.training.session import Session
from raywarp.warp import train

HERE = Path(__file__).parent
NUMBERS = HERE / "numbers"
SELECTION_SEED = 0  # its numbers are in no claim
NEAR = 0.97  # a target beyond this share of the end's KL is left to the end
AT_ONCE = 5  # points that share the engine's calls
TEXTS = 200  # on which the sampler is proven


class OutOfTime(Exception):
    """The study's hours are over; what was done is kept."""


class Clock:
    def __init__(self, hours: float | None):
        self.start = time.monotonic()
        self.end = None if hours is None else self.start + hours * 3600

    def check(self) -> None:
        """Raises OutOfTime if it is over."""
        if self.end is not None and time.monotonic() > self.end:
            raise OutOfTime

    def say(self, text: str) -> None:
        print(f"[{(time.monotonic() - self.start) / 60:6.1f} min] {text}", flush=True)


class Keeper(Display):
    """What a run says goes to a file. At the arm's kept steps each policy of iteration 1 is kept,
    out of its checkpoint: as kept/<key>/step-<n> in the store. When the time is over the run ends,
    after a checkpoint.
    """

    def __init__(self, log: Path, settings: Settings, arm: Arm, place: Storage, clock: Clock):
        log.parent.mkdir(parents=True, exist_ok=True)
        self.file = log.open("a")
        super().__init__(Console(file=self.file, width=200))
        self.kept, self.clock = place, clock
        self.steps = [round(settings.steps * part) for part in arm.kept]

    @contextmanager
    def iteration(self, number: int, *rest: Any) -> Iterator[Bars]:
        with super().iteration(number, *rest) as bars:
            told = bars.update

            def update(event: dict[str, Any]) -> None:
                told(event)
                if number == 1:
                    self.keep(event["key"])
                self.file.flush()
                self.clock.check()

            bars.update = update  # type: ignore[method-assign]
            yield bars

    def keep(self, key: str) -> None:
        files = PolicyFiles(self.kept, key)
        for step in self.steps:
            kept, name = f"kept/{key}/step-{step}", f"policies/{key}/checkpoint-{step:06d}"
            if (
                name in files.checkpoints()
                and not self.kept.has(kept)
                and (checkpoint := files.load_checkpoint(name))
            ):
                with self.kept.writing(kept) as folder:
                    save_peft(policy_of(checkpoint), folder)


def policy_of(checkpoint: Checkpoint) -> AdapterDelta:
    """The policy in a checkpoint, as a change of its init; alpha is the rank in all arms, so the
    scaling is 1.
    """
    state = {
        name.removeprefix("policy/"): tensor
        for name, tensor in checkpoint.state.items()
        if name.startswith("policy/")
    }
    modules = [name.removesuffix(".A") for name in state if name.endswith(".A")]
    return AdapterDelta(
        {module: Factors(state[f"{module}.B"], state[f"{module}.A"]) for module in modules}
    )


class Study:
    """Some arms at some seeds.

    Args:
        folder: runs and policies. results: numbers per prompt. where: of evidence.json. commit:
            whether git gets both after each arm.
    """

    def __init__(
        self,
        settings: Settings,
        folder: Path,
        results: Results,
        clock: Clock,
        where: Path | None = None,
        commit: bool = False,
    ):
        self.settings, self.folder, self.results, self.clock = settings, folder, results, clock
        self.place, self.where = Storage(folder / "store"), where or results.folder
        self.commits = commit

    def run(self, seeds: Sequence[int], claims: Sequence[str]) -> None:
        """Seed by seed, and arm by arm within; raises OutOfTime."""
        arms = dict.fromkeys(arm for claim in claims for arm in ARMS_OF[claim])
        for seed in seeds:
            for arm in arms:
                self.finish(seed, [curve for curve in CURVES.values() if curve.arm == arm])
            if CEILING in claims:
                self.ceiling(seed)

    def finish(self, seed: int, curves: Sequence[Curve]) -> None:
        """Train the arm of these curves and measure them, as far as their numbers are missing."""
        own, arm = self.results.seed(seed), curves[0].arm
        missing = [c for c in curves if c.name not in own.facts.get(arm, {}).get("curves", [])]
        if not missing:
            return
        self.results.check_sampler(seed)
        self.train(seed, ARMS[arm])
        trained = Trained(
            self.settings, lambda arm: self.arm_run(seed, ARMS[arm]), self.folder / "store" / "kept"
        )
        start = time.monotonic()
        with self.measuring(seed) as measurer:
            self.measure(seed, missing, trained, measurer)
        own.facts[arm] = {**trained.facts(arm), "curves": [curve.name for curve in curves]}
        self.keep(seed, f"the numbers of {arm}")
        self.clock.say(f"seed {seed}: arm {arm} measured in {time.monotonic() - start:.0f} s")

    def measure(
        self, seed: int, curves: Sequence[Curve], trained: Trained, measurer: Measurer
    ) -> None:
        """First the ends of lines and what lies on trainings, then what is placed by the ends."""
        found = self.results.seed(seed).points
        first = [] if SFT in found else [Wanted(SFT, None, 0.0)]
        for curve in curves:
            first += (
                [Wanted(curve.point(END), trained.end(curve), 1.0)]
                if curve.is_line
                else [
                    Wanted(curve.point(part), curve.make(trained, part), part)
                    for part in curve.parts
                ]
            )
        self.points(seed, first, measurer)
        second = [
            Wanted(curve.point(kl), scale(trained.end(curve), eta), eta)
            for curve in curves
            if curve.is_line and not curve.alone
            for kl, eta in self.placed(float(found[curve.point(END)].kl.mean()))
        ]
        self.points(seed, second, measurer)

    def placed(self, end: float) -> list[tuple[float, float]]:
        """(KL, η) of the points of a line whose end has this KL, which grows about as η²."""
        return [(kl, (kl / end) ** 0.5) for kl in self.settings.targets if kl < NEAR * end]

    def points(self, seed: int, wanted: Sequence[Wanted], measurer: Measurer) -> None:
        """Measure those that are missing, and keep each as soon as it is there."""
        missing = [p for p in wanted if p.name not in self.results.seed(seed).points]
        for n in range(0, len(missing), AT_ONCE):
            self.clock.check()
            for name, measured, texts in measurer.points(missing[n : n + AT_ONCE]):
                self.results.add(seed, name, measured)
                texts_file = seed_folder(self.folder, seed) / "texts" / f"{name}.json"
                sealed.write_json(texts_file, texts)
                self.say_point(seed, name)

    def ceiling(self, seed: int) -> None:
        """Measure the seed's ceiling, unless it is there."""
        if self.results.seed(seed).ceiling is not None:
            return
        self.clock.check()
        start = time.monotonic()
        with self.measuring(seed) as measurer:
            self.results.add_ceiling(seed, measurer.ceiling())
        self.keep(seed, "the ceiling")
        self.clock.say(f"seed {seed}: ceiling measured in {time.monotonic() - start:.0f} s")

    def keep(self, seed: int, what: str) -> None:
        """Save a seed's numbers with what follows from all, and commit both where wanted."""
        self.results.save(seed)
        if self.commits:
            report(self.results, self.settings, self.where)
            files = [self.results.folder, self.where / SUMMARY, (self.where / PAGE).parent]
            message = f"evidence: add {what} of seed {seed}"
            for command in (["add"], ["commit", "--quiet", "-m", message]):
                subprocess.run(["git", *command, *map(str, files)], check=True)

    def arm_run(self, seed: int, arm: Arm) -> Run:
        config = self.config(seed, arm)
        return Run(Path(config.out), self.place)

    def config(self, seed: int, arm: Arm) -> Config:
        return arm_config(self.settings, arm, seed, self.folder)

    def rewards(self, seed: int) -> None:
        """The reward models of a seed, unless they are there."""
        for config in reward_configs(self.settings, seed, self.folder):
            if score.check_trained(Path(config.out)) is None:
                summary = reward(config, standardise=False, inputs=prepare_stage(config))
                self.clock.say(
                    f"seed {seed}: {Path(config.out).name} model, pairwise accuracy"
                    f" {summary.accuracy:.3f}"
                )

    def train(self, seed: int, arm: Arm) -> None:
        """The arm's run, unless it is finished."""
        run = self.arm_run(seed, arm)
        if (run.folder / "front.json").is_file():
            if mark := read_mark(Storage(run.folder)):
                raise OtherSettingsError(
                    f"{run.folder} cannot be used: {mark.reason}; choose another --out, or"
                    " delete it"
                )
            return
        self.clock.check()
        self.rewards(seed)
        start, log = time.monotonic(), run.folder.with_name(f"{run.folder.name}.log")
        train(self.config(seed, arm), Keeper(log, self.settings, arm, self.place, self.clock))
        self.clock.say(f"seed {seed}: arm {arm.name} trained in {time.monotonic() - start:.0f} s")

    @contextmanager
    def measuring(self, seed: int) -> Iterator[Measurer]:
        """A session of the seed's task, with room for the largest rank of any curve."""
        self.rewards(seed)
        config = arm_config(
            self.settings, replace(ARMS["warp"], policies=5), seed, self.folder
        ).model_copy(update={"out": str(seed_folder(self.folder, seed) / "evaluation")})
        model, _, splits = prepare_prompts(config)
        start_ray()
        texts = [prompt.token_ids for prompt in splits.train[:TEXTS]]
        with Session(resolved(config), model, splits.longest, texts=texts) as session:
            yield Measurer(self.settings, session, config, model, splits.held_out)

    def say_point(self, seed: int, name: str) -> None:
        point = self.results.seed(seed).points[name]
        self.clock.say(
            f"seed {seed}: {name}: reward {point.reward.mean():+.2f}, KL {point.kl.mean():.2f},"
            f" texts' log-ratio {point.log_ratio.mean():.2f}, slope {point.slope:.3f} ±"
            f" {point.slope_error:.3f}, control {point.control.mean():+.2f}, VADER"
            f" {point.vader.mean():+.2f}, distinct-2 {point.distinct_2:.2f},"
            f" ‖ΔW‖ {point.norm:.2f}, η {point.eta:.2f}"
        )


def select(settings: Settings, folder: Path, clock: Clock, rates: Sequence[float]) -> None:
    """Print where two policies and their merge end at some learning rates, as lines of JSON."""
    curves = [replace(CURVES[name], alone=True) for name in ("slerp", "policy-1", "policy-2")]
    for rate in rates:
        tried = replace(settings, lr=rate, prompts=min(settings.prompts, 200))
        results = Results(folder / "selection" / f"lr-{rate:g}", tried.as_json())
        study = Study(tried, folder, results, clock)
        study.finish(SELECTION_SEED, curves)
        ends = {
            name: {"reward": float(point.reward.mean()), "kl": float(point.kl.mean())}
            for name, point in results.seed(SELECTION_SEED).points.items()
        }
        print(json.dumps({"lr": rate, **ends}), flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="evidence", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--claim", nargs="+", choices=NAMES, help="default: those of the task, but for P6")
    add("--seeds", type=int, default=5, help="seeds 1 to N")
    add("--hours", type=float, help="stop after so long; the same command continues")
    add("--redraw", action="store_true", help="judge and draw; nothing is trained or measured")
    add("--select", nargs="*", type=float, help="learning rates to try, on a seed of its own")
    add("--commit", action="store_true", help="commit the numbers of each arm")
    add("--task", choices=TASKS, default=TASKS[0])
    add("--out", type=Path, help="runs and policies; default: runs/evidence, and the task's name")
    add("--results", type=Path, help="numbers; default: numbers beside this file, likewise")
    add("--tiny", action="store_true", help="a tiny model, for tests; wants --out and --results")
    options = parser.parse_args(arguments)
    both = options.task == BOTH
    claims = options.claim or ([OF_BOTH] if both else list(FIRST_TIER))
    if any((claim == OF_BOTH) != both for claim in claims):
        parser.error(f"{OF_BOTH} is the claim of --task {BOTH}, and the only one")
    suffix = "" if options.task == TASKS[0] else f"-{options.task}"
    out = options.out or Path(f"runs/evidence{suffix}")
    if options.tiny and options.results is None:
        parser.error("--tiny wants a --results of its own")
    folder = options.results or Path(f"{NUMBERS}{suffix}")
    where = HERE.parent if folder == NUMBERS else folder
    _environment(out, options.tiny)
    settings = Settings(task=options.task)
    if options.tiny:
        settings = replace(TINY, task=TINY_BOTH) if both else TINY
    clock = Clock(options.hours)
    try:
        if options.select is not None:
            select(settings, out, clock, options.select)
            return 0
        results = Results(folder, settings.as_json())
        if not options.redraw:
            study = Study(settings, out, results, clock, where, options.commit)
            study.run(range(1, options.seeds + 1), claims)
    except OtherSettingsError as error:
        parser.error(str(error))
    except OutOfTime:
        clock.say("the hours are over; the same command continues")
    except KeyboardInterrupt as stopped:
        clock.say(str(stopped) or "stopped; the same command continues")
    report(results, settings, where)
    return 0


def _environment(out: Path, tiny: bool) -> None:
    """For the actors, which find the second task's reward here; of a tiny study in its project."""
    place = str(tiny_project(out) if tiny else HERE.parents[1])
    sys.path.insert(0, place)
    os.environ["PYTHONPATH"] = os.pathsep.join([place, os.environ.get("PYTHONPATH", "")])
