"""Progress of a run on a console: a live line per policy in a terminal, plain lines elsewhere."""

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)

from raywarp.algorithm.deltas import AdapterDelta
from raywarp.algorithm.geometry import geometry
from raywarp.cluster import runtime
from raywarp.run import terminal
from raywarp.run.ceiling import Ceiling, ceiling_of, front_share, verdict
from raywarp.run.figures import ceiling_table, front_table, print_samples, steps_in_words
from raywarp.run.folder import PREFERENCES, Run, read_mark
from raywarp.run.points import Point
from raywarp.run.policy_files import Job
from raywarp.run.prometheus import step_seconds
from raywarp.storage.location import Storage

_QUIET = ("started", "finished", "stopped", "resumed")  # events that are shown in another way
PRINTED_SAMPLES = 8  # prompts; the report shows all
PLAIN_EVERY = 5  # steps between a policy's plain lines


def bars(console: Console, quiet: bool, *more: ProgressColumn) -> Progress:
    """Return progress bars, each with a note and the time left.

    The bars are hidden when `quiet` is set or when there is no terminal.

    Args:
        more: columns to show before the time left.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        *more,
    )
    return Progress(
        *columns, TimeRemainingColumn(), console=console, disable=quiet or not console.is_terminal
    )


class Bars:
    """The progress of one iteration's policies, as bars or plain lines."""

    def __init__(self, console: Console, steps: Mapping[str, int], quiet: bool = False):
        self.console, self.steps, self.quiet = console, steps, quiet
        self.live = bars(console, quiet)
        self.tasks: dict[str, Any] = {}
        self._first: dict[str, tuple[float, int]] = {}

    @property
    def plain(self) -> bool:
        """Whether plain lines replace the bars."""
        return not self.console.is_terminal and not self.quiet

    def add(self, job: Job, finished: bool) -> None:
        name, note = (
            f"  iteration {job.iteration} policy {job.index}",
            "already done" if finished else "waiting for rollouts",
        )
        self.tasks[job.key] = self.live.add_task(
            name,
            total=self.steps[job.key],
            completed=self.steps[job.key] if finished else 0,
            note=note,
        )
        if finished and self.plain:
            self.console.print(f"{name}: already done ({job.key})")

    def update(self, event: dict[str, Any]) -> None:
        if event["event"] == "resumed":
            self.live.update(self.tasks[event["key"]], completed=event["step"])
            if event["step"] and not self.quiet:
                self.console.print(
                    f"  iteration {event['iteration']} policy {event['policy']} continues at step"
                    f" {event['step']}"
                )
        if event["event"] != "step":
            return
        step, speed = event["step"] + 1, event["tokens"] / step_seconds(event)
        note = (
            f"reward {event['reward']:+.2f}  KL to anchor {event['kl_anchor']:.2f}  {speed:.0f}"
            " tokens/s"
        )
        self.live.update(self.tasks[event["key"]], completed=step, note=note)
        left, last = self._left(event["key"], step), self.steps[event["key"]]
        if self.plain and (step % PLAIN_EVERY == 0 or step in (1, last)):
            self.console.print(
                f"  iteration {event['iteration']} policy {event['policy']} step"
                f" {step}/{last}  {note}{left}"
            )

    def _left(self, key: str, step: int) -> str:
        """Return the time left for a policy, estimated from its pace in this process."""
        start, first = self._first.setdefault(key, (time.monotonic(), step))
        last = self.steps[key]
        if step in (first, last):
            return ""
        seconds = (time.monotonic() - start) / (step - first) * (last - step)
        return f"  {timedelta(seconds=round(seconds))} left"


class Display:
    """All that `train` prints, on one console.

    A quiet display prints only faults, repairs and results.
    """

    def __init__(self, console: Console | None = None, quiet: bool = False):
        self.console = terminal.console() if console is None else console
        self.quiet, self.start = quiet, time.monotonic()

    def progress(self, text: str) -> None:
        """Print a progress message, unless the display is quiet."""
        if not self.quiet:
            self.say(text)

    def say(self, text: str) -> None:
        self.console.print(
            f"[{time.monotonic() - self.start:5.0f} s] {text}", highlight=False, markup=False
        )

    def place(self) -> None:
        """Print where the run is, once Ray is there, and what is unusual about it."""
        self.progress(runtime.where())
        for note in runtime.notes():
            self.say(note)

    def event(self, row: dict[str, Any]) -> None:
        """Print a row of events.jsonl if a person should know of it."""
        if row["event"] in _QUIET:
            return
        who = f"iteration {row['iteration']} policy {row['policy']}" if "policy" in row else ""
        parts = [
            row.get("what", ""),
            who,
            f"step {row['step']}" if "step" in row and who else "",
            row.get("cause", ""),
        ]
        parts += [f"{row['steps_repeated']} steps again" if "steps_repeated" in row else ""]
        parts += [
            f"{row['seconds_lost']:.1f} s lost" if "seconds_lost" in row else "",
            row.get("message", ""),
        ]
        self.say(f"{row['event']}: {', '.join(part for part in parts if part)}")

    def faults(self, events: Sequence[dict[str, Any]]) -> None:
        """Print how many faults a finished run has survived, by cause."""
        counts = Counter(row.get("cause", "unknown") for row in events if row["event"] == "fault")
        if counts:
            kinds = ", ".join(f"{count} {cause}" for cause, count in counts.items())
            self.say(f"faults survived: {sum(counts.values())} ({kinds}); events.jsonl tells them")

    @contextlib.contextmanager
    def iteration(
        self, number: int, jobs: Sequence[Job], missing: Sequence[Job], steps: Mapping[str, int]
    ) -> Iterator[Bars]:
        """Show the training of an iteration's policies.

        Args:
            steps: of each policy, by its key.
        """
        self.progress(
            f"iteration {number}: {len(missing)} of {len(jobs)} policies to train,"
            f" {steps_in_words(steps.values())} steps each"
        )
        bars = Bars(self.console, steps, self.quiet)
        with bars.live:
            for job in jobs:
                bars.add(job, job not in missing)
            yield bars

    def merged(
        self,
        number: int | None,
        task_vectors: Sequence[AdapterDelta],
        measured: Mapping[str, Any] | None = None,
    ) -> None:
        """Print how alike the policies of an iteration are, in their weights and what they do.

        Args:
            number: the iteration, counted from 1; None for adapters that no run has trained.
        """
        who = f"iteration {number}" if number else "the adapters"
        blocks = geometry(task_vectors).values()
        angles = sorted(angle for block in blocks for angle in block["angles"])
        if angles:
            spread = (
                f"{angles[0]:.0f} to {angles[-1]:.0f} degrees, median"
                f" {angles[len(angles) // 2]:.0f}"
            )
            self.progress(f"{who} merged; angles between task vectors: {spread}")
            if measured and measured["kl_cosine"] is not None:
                half = measured["kl_cosine_ci"]
                error = "" if half is None else f" ± {half:.2f}"
                self.progress(
                    f"{who}: KL cosine {measured['kl_cosine']:.2f}{error}: averaging"
                    f" can save up to {100 * measured['kl_gain']:.0f} % of √KL"
                )
        else:
            self.progress(f"{who}: one policy, nothing to merge")

    @contextlib.contextmanager
    def _bar(self, title: str, total: int) -> Iterator[Callable[[int], None]]:
        """Show a bar in a terminal; yield what advances it."""
        bar = Progress(
            *Progress.get_default_columns(),
            console=self.console,
            disable=self.quiet or not self.console.is_terminal,
        )
        with bar:
            task = bar.add_task(f"  {title}", total=total)
            yield lambda count: bar.advance(task, count)

    @contextlib.contextmanager
    def evaluation(self, count: int) -> Iterator[Callable[[Point], None]]:
        self.progress(f"evaluating {count} points on held-out prompts")
        with self._bar("evaluation", count) as advance:

            def done(point: Point) -> None:
                advance(1)
                if not self.console.is_terminal:
                    self.progress(
                        f"  {point.name}: reward {point.reward:+.2f} at KL {point.kl:.2f}"
                    )

            yield done

    @contextlib.contextmanager
    def sampling(self, prompts: int, completions: int) -> Iterator[Callable[[int], None]]:
        """Show the progress of the ceiling's SFT completions; yield what counts them."""
        total, start = prompts * completions, time.monotonic()
        self.progress(f"ceiling: {completions} SFT completions of each of {prompts} prompts")
        with self._bar("ceiling", total) as advance:
            yield advance
        self.progress(f"ceiling: {total} completions in {time.monotonic() - start:.0f} s")

    def ceiling(self, ceiling: Ceiling, share_kl: float) -> None:
        """Print a ceiling's table and its verdict.

        Args:
            share_kl: KL in nats that the verdict is about.
        """
        self.console.print(ceiling_table(ceiling))
        self.say(verdict(ceiling, share_kl))

    def front(self, run: Run) -> None:
        front = run.front()
        points = [Point(**point) for point in front["points"]]
        chosen = next(point for point in points if point.name == front["chosen"])
        ceiling = ceiling_of(front)
        self.console.print(front_table(points, chosen, ceiling))
        if ceiling:
            self.say(str(front_share(points, ceiling, front["share_kl"])))
        if "hypervolume" in front:
            volume, (low, high) = front["hypervolume"], front["hypervolume_ci"]
            self.say(
                f"preference front: hypervolume of {', '.join(front['hypervolume_of'])} above SFT:"
                f" {volume:.3g} [{low:.3g}, {high:.3g}]; {run.folder / PREFERENCES}"
            )
        if mark := read_mark(Storage(run.folder)):
            self.say(f"{mark.level}: {mark.title.lower()}. {mark.text}")
        if not self.quiet:
            print_samples(
                self.console,
                run.samples()[:PRINTED_SAMPLES],
                list(dict.fromkeys(["sft", chosen.name, "slerp"])),
            )
        self.progress(f"front: {run.folder / 'front.png'}")
        beyond = ", extrapolated beyond SLERP" if chosen.extrapolated else ""
        self.say(f"chosen: {chosen.name} (*){beyond}, a PEFT adapter in {run.folder / 'adapter'}")
        self.say(
            "all of it on one page: raywarp report"
            f" {run.mirror.storage.uri if run.mirror else run.folder}"
        )

    def timing(self, run: Run) -> None:
        """Print where the time of each trained iteration went, and what was the bottleneck."""
        if self.quiet:
            return
        for row in run.timing():
            phases = ", ".join(
                f"{name.removesuffix('_seconds')} {seconds:.2f} s"
                for name, seconds in row["phases"].items()
            )
            shares = (
                f"trainers {row['trainer_busy']:.0%}, rollout workers {row['pool_busy']:.0%},"
                f" reward {row['reward_busy']:.0%} busy"
            )
            speed = (
                f"{row['steps']} steps in {row['seconds']:.0f} s ({row['steps_per_second']:.2f}"
                " steps/s)"
            )
            self.say(f"iteration {row['iteration']}: {speed}; {shares}; a step: {phases}")
            if row["restarts"]:
                self.say(f"  {row['restarts']} rollout worker(s) died and were started again")
            self.say(f"  {row['bound']}")
