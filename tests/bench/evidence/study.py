"""The paper's claims with LoRA, on human ratings, at equal compute: trains, measures, judges,
draws. What is done is not done again.

    .venv/bin/python tests/bench/evidence --seeds 3 --hours 3                  # the first tier: H3,
                                                                               H5, H11, H12
    .venv/bin/python tests/bench/evidence --claim H3 --seeds 1 --results runs/evidence-again    #
                                                                                                one
                                                                                                claim,
                                                                                                one
                                                                                                seed,
                                                                                                from
                                                                                                nothing:
                                                                               # less than an hour
                                                                               on two cores
    .venv/bin/python tests/bench/evidence --redraw                             # verdicts and
                                                                               figures from the
                                                                               committed numbers
    .venv/bin/python tests/bench/evidence --select                             # learning rate, on a
                                                                               seed that is not
                                                                               reported
    .venv/bin/python tests/bench/evidence --task present-tense --claim H3      # the second task,
                                                                               with numbers of its
                                                                               own
    .venv/bin/python tests/bench/evidence --task smollm2-control --claim H3    # the first one,
                                                                               scored by a control
                                                                               of another backbone

Policies lie in runs/evidence, under their keys; the numbers of every point (per prompt, no texts),
verdicts and figures lie in results/ beside this file, and tests/bench/evidence.json says in short
what came out. Killed or out of its hours, the same command continues. What is committed there is
not measured again: other --results, a folder that is made, begin from nothing.
"""

import argparse
import json
import os
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from bench.evidence import claims, figures
from bench.evidence.claims import CLAIMS, FIRST_TIER
from bench.evidence.curves import CURVES, SFT, Curve, Trained
from bench.evidence.results import Measured, OtherSettingsError, Results
from bench.evidence.settings import (
    ARMS,
    SELECTION_FILE,
    TASKS,
    TINY,
    Arm,
    Settings,
    arm_config,
    reward_configs,
    seed_folder,
    selected,
    tiny_project,
)
from rich.console import Console

from raywarp.adapters.peft import save_peft
from raywarp.algorithm.deltas import AdapterDelta
from raywarp.algorithm.factors import Factors
from raywarp.cluster.runtime import start_ray
from raywarp.config.schema import Config
from raywarp.data import embedded
from raywarp.identity import derive_seed
from raywarp.planning.inputs import prepare_prompts, resolved
from raywarp.reward_stage import prepare_stage, reward
from raywarp.rewards import score
from raywarp.run.display import Bars, Display
from raywarp.run.folder import Run, read_mark
from raywarp.run.front import Scored, distinct_2
from raywarp.run.policy_files import Checkpoint, PolicyFiles
from raywarp.storage import sealed
from raywarp.storage.location import Storage
from raywarp.training.evaluation import submit_points
from raywarp.training.session import Session
from raywarp.warp import train

HERE = Path(__file__).parent
SELECTION_SEED = 0  # its numbers are in no claim
AT_ONCE = 2  # points under way: one is generated while another is scored


class OutOfTime(Exception):
    """The study's hours are over; what was done is kept."""


class Clock:
    def __init__(self, hours: float | None):
        self.start = time.monotonic()
        self.end = None if hours is None else self.start + hours * 3600

    def over(self) -> bool:
        return self.end is not None and time.monotonic() > self.end

    def check(self) -> None:
        """Raises OutOfTime if it is over."""
        if self.over():
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
        self.settings, self.arm, self.place, self.clock = settings, arm, place, clock

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
        files = PolicyFiles(self.place, key)
        for step in self.arm.kept_steps(self.settings):
            kept, name = f"kept/{key}/step-{step}", f"policies/{key}/checkpoint-{step:06d}"
            if (
                name in files.checkpoints()
                and not self.place.has(kept)
                and (checkpoint := files.load_checkpoint(name))
            ):
                with self.place.writing(kept) as folder:
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
    """Some claims at some seeds.

    Args:
        folder: runs and policies. results: numbers per prompt.
    """

    def __init__(self, settings: Settings, folder: Path, results: Results, clock: Clock):
        self.settings, self.folder, self.results, self.clock = settings, folder, results, clock
        self.place = Storage(folder / "store")

    def run(self, seeds: Sequence[int], wanted: Sequence[str]) -> None:
        """Seed by seed, and claim by claim within; raises OutOfTime."""
        for seed in seeds:
            for claim in wanted:
                self.measure(seed, CLAIMS[claim].curves, claim)

    def measure(self, seed: int, curves: Sequence[Curve], why: str) -> None:
        """Train what the curves' missing points need, and measure these."""
        missing = [
            (curve, value)
            for curve in curves
            for value in curve.values
            if curve.point(value) not in self.results.seed(seed).points
        ]
        if SFT not in self.results.seed(seed).points:
            missing.insert(0, (None, 0.0))
        if not missing:
            return
        self.results.check_sampler(seed)
        self.clock.say(f"seed {seed}, {why}: {len(missing)} points to measure")
        for arm in dict.fromkeys(curve.arm if curve else "warp" for curve, _ in missing):
            self.train(seed, ARMS[arm])
        trained = Trained(
            self.settings, lambda arm: self.arm_run(seed, ARMS[arm]), self.folder / "store" / "kept"
        )
        for arm in dict.fromkeys(curve.arm for curve, _ in missing if curve):
            self.results.seed(seed).facts[arm] = trained.facts(arm)
        self.evaluate(seed, missing, trained)

    def arm_run(self, seed: int, arm: Arm) -> Run:
        config = self.config(seed, arm)
        return Run(Path(config.out), self.place)

    def config(self, seed: int, arm: Arm) -> Config:
        return arm_config(self.settings, arm, seed, self.folder)

    def train(self, seed: int, arm: Arm) -> None:
        """The arm's run, unless it is finished; before the first one the reward models."""
        run = self.arm_run(seed, arm)
        if (run.folder / "front.json").is_file():
            if mark := read_mark(Storage(run.folder)):
                raise OtherSettingsError(
                    f"{run.folder} cannot be used: {mark.reason}; choose another --out, or"
                    " delete it"
                )
            return
        self.clock.check()
        for config in reward_configs(self.settings, seed, self.folder):
            if score.check_trained(Path(config.out)) is None:
                summary = reward(config, standardise=False, inputs=prepare_stage(config))
                self.clock.say(
                    f"seed {seed}: {Path(config.out).name} model, pairwise accuracy"
                    f" {summary.accuracy:.3f}"
                )
        start = time.monotonic()
        train(
            self.config(seed, arm),
            Keeper(
                run.folder.with_name(f"{run.folder.name}.log"),
                self.settings,
                arm,
                self.place,
                self.clock,
            ),
        )
        self.clock.say(f"seed {seed}: arm {arm.name} trained in {time.monotonic() - start:.0f} s")

    def evaluate(
        self, seed: int, points: Sequence[tuple[Curve | None, float]], trained: Trained
    ) -> None:
        """Measure the points one after another, and keep each as soon as it is there."""
        config = self.config(seed, ARMS["warp"]).model_copy(
            update={"out": str(seed_folder(self.folder, seed) / "evaluation")}
        )
        config = config.model_copy(
            update={"cluster": config.cluster.model_copy(update={"policy_actors": 1})}
        )
        model, _, splits = prepare_prompts(config)
        prompts = splits.held_out[: self.settings.prompts]
        sampling = [derive_seed(seed, "evaluation", n) for n in range(len(prompts))]
        start_ray()
        under_way: deque[tuple[str, Any, float]] = deque()
        with Session(resolved(config), model, splits.longest) as session:
            for curve, value in [*points, *[(None, -1.0)] * AT_ONCE]:
                if value >= 0 and not self.clock.over():
                    delta = curve.adapter(trained, value) if curve else None
                    (pending,) = submit_points(session, [delta], prompts, sampling)
                    under_way.append(
                        (curve.point(value) if curve else SFT, pending, time.monotonic())
                    )
                if under_way and (len(under_way) == AT_ONCE or value < 0 or self.clock.over()):
                    name, pending, start = under_way.popleft()
                    scored = pending.wait()
                    self.results.add(
                        seed, name, self.measured(scored, [prompt.text for prompt in prompts])
                    )
                    sealed.write_json(
                        seed_folder(self.folder, seed) / "texts" / f"{name}.json", scored.texts
                    )
                    self.say_point(seed, name, time.monotonic() - start)
        self.clock.check()

    def measured(self, scored: Scored, prompts: Sequence[str]) -> Measured:
        columns = {
            "reward": scored.rewards,
            "control": scored.control,
            "vader": embedded.vader(prompts, scored.texts),
            "kl": scored.kl,
        }
        columns |= {"length": scored.lengths, "finished": scored.finished}
        return Measured(
            **{name: np.array(values, dtype=float) for name, values in columns.items()},
            distinct_2=distinct_2(scored.texts),
        )

    def say_point(self, seed: int, name: str, seconds: float) -> None:
        point = self.results.seed(seed).points[name]
        numbers = (
            f"reward {point.reward.mean():+.2f}, KL {point.kl.mean():.2f}, control"
            f" {point.control.mean():+.2f}"
        )
        numbers += (
            f", VADER {point.vader.mean():+.2f}, distinct-2 {point.distinct_2:.2f},"
            f" {point.length.mean():.1f} tokens"
        )
        self.clock.say(f"seed {seed}: {name}: {numbers} ({seconds:.0f} s)")


LEARNING_RATES = (5e-4, 8e-4, 1.2e-3, 2e-3)
ENOUGH_KL = 5.0  # nats: what a policy should reach, on the mean


def select(
    settings: Settings,
    folder: Path,
    results_folder: Path,
    clock: Clock,
    rates: Sequence[float] = LEARNING_RATES,
) -> None:
    """The least learning rate whose two policies reach a mean KL of ENOUGH_KL nats, on a seed of
    its own; if none does, that with the largest.
    """
    rows = []
    for rate in rates:
        tried = replace(settings, lr=rate, prompts=min(settings.prompts, 200))
        study = Study(
            tried, folder, Results(folder / "selection" / f"lr-{rate:g}", tried.as_json()), clock
        )
        ends = [(CURVES[name], 1.0) for name in ("policy-1", "policy-2", "slerp")]
        study.measure(
            SELECTION_SEED,
            [replace(curve, values=(value,)) for curve, value in ends],
            f"learning rate {rate:g}",
        )
        own = study.results.seed(SELECTION_SEED)
        row: dict[str, Any] = {"lr": rate}
        for name in (SFT, *(curve.point(value) for curve, value in ends)):
            point = own.points[name]
            row[name] = {
                column: round(float(getattr(point, column).mean()), 3)
                for column in ("reward", "kl", "control", "vader")
            }
            row[name]["distinct_2"] = round(point.distinct_2, 3)
        blocks = own.facts["warp"]["geometry"].values()
        row["median_angle"] = round(
            float(np.median([angle for block in blocks for angle in block["angles"]])), 2
        )
        row["policy_kl"] = round(float(np.mean([row[f"policy-{m}@1"]["kl"] for m in (1, 2)])), 3)
        rows.append(row)
        clock.say(json.dumps(row))
        if row["policy_kl"] >= ENOUGH_KL:
            break
    chosen = max(rows, key=lambda row: row["policy_kl"])
    rule = (
        f"the least learning rate at which the policies' mean KL reaches {ENOUGH_KL:g} nats; seed"
        f" {SELECTION_SEED}, 200 prompts"
    )
    sealed.write_json(
        results_folder / SELECTION_FILE, {"lr": chosen["lr"], "rule": rule, "tried": rows}
    )
    clock.say(f"learning rate {chosen['lr']:g}: {results_folder / SELECTION_FILE}")


def report(results: Results, settings: Settings, where: Path, summary: Path) -> None:
    """evidence.json and a figure for every claim that has points, from the results alone."""
    of_seeds = claims.samples(settings, results)
    entries: dict[str, Any] = {}
    for name, claim in CLAIMS.items():
        judged = claims.judge(claim, of_seeds)
        if not any(effect.per_seed for effect in judged.effects.values()):
            continue
        seeds = max(of_seeds)
        task = f" --task {settings.task}" if settings.task in TASKS[1:] else ""
        command = (
            f".venv/bin/python tests/bench/evidence{task} --claim {name} --seeds {seeds} --results"
            " runs/evidence-again"
        )
        entries[name] = judged.as_json(command, claims.facts_of(claim, results))
        figures.draw(judged, of_seeds, where / f"{name}.png")
        first = entries[name]
        print(
            f"{name}: {first['verdict']}: {first['effect']} {first['interval']} over"
            f" {first['seeds']} seeds; {claim.text}"
        )
        for part, row in first["parts"].items():
            print(f"    {part}: {row['effect']} {row['interval']} {row.get('verdict', '')}")
    sealed.write_json(summary, {"settings": settings.as_json(), **entries})
    sealed.write_text(where / "README.md", page(entries, results.are_earlier))
    print(f"{summary}, figures in {where}")


EARLIER = (
    "**Warning: sampled from rounded weights.** An earlier version of raywarp measured these"
    " numbers; [docs/results.md](../../../../docs/results.md) says what is likely to change."
)


def page(entries: dict[str, Any], are_earlier: bool = False) -> str:
    """All figures and comparisons, in Markdown.

    Args:
        are_earlier: some were sampled by an earlier version.
    """
    lines = ["# The claims, on this project's own numbers", ""]
    lines += [
        (
            "Effects are differences between fronts at equal KL unless they say otherwise, with 95"
            " % intervals; written by `--redraw`."
        ),
        "",
        *([EARLIER, ""] if are_earlier else []),
    ]
    for name, entry in entries.items():
        lines += [
            f"## {name}: {entry['verdict']}",
            "",
            f"{entry['claim']} Redone by `{entry['command']}`.",
            "",
            f"![{name}]({name}.png)",
            "",
        ]
        lines += [
            "| comparison | effect | 95 % interval | per seed | unit |",
            "|---|---|---|---|---|",
        ]
        for part, row in entry["parts"].items():
            verdict = f" (**{row['verdict']}**)" if "verdict" in row else ""
            cells = [
                _short(row["effect"]),
                " to ".join(map(_short, row["interval"])),
                ", ".join(map(_short, row["per_seed"])),
                row["unit"],
            ]
            lines.append(f"| {part}{verdict} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def _short(number: float | None) -> str:
    return "–" if number is None else f"{number:+.3f}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="evidence", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--claim",
        nargs="+",
        choices=list(CLAIMS),
        default=list(FIRST_TIER),
        help="default: the first tier",
    )
    parser.add_argument("--seeds", type=int, default=3, help="seeds 1 to N")
    parser.add_argument(
        "--hours", type=float, help="stop after so long; the same command continues"
    )
    parser.add_argument(
        "--redraw",
        action="store_true",
        help="verdicts and figures from the results; nothing is trained or measured",
    )
    parser.add_argument(
        "--select",
        action="store_true",
        help="choose the learning rate on a seed of its own, before anything else",
    )
    parser.add_argument(
        "--task",
        choices=TASKS,
        default=TASKS[0],
        help=(
            "the second one has a reward by function, the third one the first one's reward and"
            " another control; their rate is the first one's unless selected"
        ),
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="runs and policies; default: runs/evidence, and the task's name but for the first",
    )
    parser.add_argument(
        "--results",
        type=Path,
        help="numbers and figures; default: results beside this file, likewise",
    )
    parser.add_argument(
        "--tiny",
        action="store_true",
        help="a tiny model for seconds, for tests; wants --out and --results",
    )
    options = parser.parse_args(arguments)
    suffix = "" if options.task == TASKS[0] else f"-{options.task}"
    options.out = options.out or Path(f"runs/evidence{suffix}")
    if options.tiny and options.results in (None, HERE / "results"):
        parser.error("--tiny wants a --results of its own")
    options.results = options.results or HERE / f"results{suffix}"
    _environment(options.out, options.tiny)
    settings = (
        TINY
        if options.tiny
        else selected(Settings(task=options.task), options.results, HERE / "results")
    )
    clock = Clock(options.hours)
    try:
        results = Results(options.results, settings.as_json())
    except OtherSettingsError as error:
        parser.error(str(error))
    summary = (
        HERE.parent / "evidence.json"
        if options.results == HERE / "results"
        else options.results / "evidence.json"
    )
    try:
        if options.select:
            select(settings, options.out, options.results, clock)
            return 0
        if not options.redraw:
            Study(settings, options.out, results, clock).run(
                range(1, options.seeds + 1), options.claim
            )
    except OtherSettingsError as error:
        parser.error(str(error))
    except OutOfTime:
        clock.say("the hours are over; the same command continues")
    except KeyboardInterrupt as stopped:
        clock.say(str(stopped) or "stopped; the same command continues")
    report(results, settings, options.results, summary)
    return 0


def _environment(out: Path, tiny: bool) -> None:
    """For the actors, which find the second task's reward here; of a tiny study in its project."""
    place = str(tiny_project(out) if tiny else HERE.parents[1])
    sys.path.insert(0, place)
    os.environ["PYTHONPATH"] = os.pathsep.join([place, os.environ.get("PYTHONPATH", "")])
