"""Results of a sweep, as table, plot and files.

They are the ranked trials, the Pareto-optimal points of all fronts, and what sharing saved.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from raywarp.algorithm.hypervolume import pareto
from raywarp.config.load import to_yaml
from raywarp.config.search import DIRECTIONS, describe, name_of, short, show
from raywarp.run.ceiling import Ceiling, ceiling_of
from raywarp.run.display import Display
from raywarp.run.figures import draw_ceiling, footnote
from raywarp.run.folder import Run
from raywarp.run.points import Point
from raywarp.storage import sealed
from raywarp.storage.location import Storage
from raywarp.storage.sealed import DamagedError
from raywarp.sweep.files import SWEEP_FILE, SweepFiles
from raywarp.sweep.trial import SweepPlan, front_line, measures

LEGEND = 12  # the most trials that the plot's legend names


@dataclass(frozen=True)
class Outcome:
    """The outcome of one trial.

    Attributes:
        name: name of the trial.
        point: the trial's values, dotted key → value.
        state: finished, failed, unfinished, or stopped (by ASHA, after some iterations).
        message: why the trial failed or is unfinished, else empty.
        iterations: number of finished iterations.
        measured: measures of the last finished iteration, see trial.measures; empty without one.
        front: points of that iteration on the line from SFT to SLERP, by rising η.
        ceiling: the ceiling of that front, if it was measured.
        policies: keys of the policies of all iterations that were begun.
    """

    name: str
    point: dict[str, Any]
    state: str
    message: str
    iterations: int
    measured: dict[str, Any]
    front: list[Point]
    ceiling: Ceiling | None
    policies: list[str]


@dataclass(frozen=True)
class Sweep:
    """The results of a sweep.

    Attributes:
        trials: the trials, the best first.
        objectives: names of what the trials are ranked by.
        optimal: (trial, η) of the Pareto-optimal points of all fronts together: no other point has
            more reward at no more KL. SFT is in every front and left out.
        asked: policy runs that the trials asked for.
        executed: policy runs that were executed.
        seconds: mean time of an executed policy run, in seconds.
    """

    trials: list[Outcome]
    objectives: list[str]
    optimal: list[tuple[str, float]]
    asked: int
    executed: int
    seconds: float

    @property
    def best(self) -> str | None:
        """Name of the best finished trial; None if no trial is finished."""
        return next((trial.name for trial in self.trials if trial.state == "finished"), None)

    @property
    def saved_seconds(self) -> float:
        """Seconds of training that sharing saved."""
        return (self.asked - self.executed) * self.seconds

    def summary(self) -> str:
        """Return a line on the policy runs, and on what sharing saved."""
        line = f"{self.asked} policy runs were asked for, {self.executed} executed"
        if self.asked <= self.executed:
            return line
        return (
            f"{line}: sharing saved {self.asked - self.executed} of them, about"
            f" {_duration(self.saved_seconds)} of training"
        )


def conclude(plan: SweepPlan, files: SweepFiles, points: Sequence[dict[str, Any]]) -> Sweep:
    """Return the results of a sweep, from its trials' records.

    Args:
        points: the trials' values. Equal ones count once.
    """
    space, objectives = plan.space, [str(name) for name in plan.space.settings.objectives]
    outcomes, trained = [], set[str]()
    for point in {name_of(point): point for point in points}.values():
        name, config = name_of(point), plan.config(point)
        record = files.record(name, point)
        trained |= set(record.trained)
        front = front_line(record.rows[-1]["front"]) if record.rows else []
        done, last = len(record.rows), config.warp.iterations
        stopped = space.search == "asha" and done > 0
        state = (
            "failed"
            if record.failed
            else "finished"
            if done == last
            else "stopped"
            if stopped
            else "unfinished"
        )
        policies = [key for row in record.rows for key in row["policies"]]
        policies += [key for key in record.trained if key not in policies]
        ceiling = ceiling_of(record.rows[-1]) if record.rows else None
        measured = measures(space, config, front, ceiling) if front else {}
        message = record.failed or (
            "its process died again and again; the same command continues"
            if state == "unfinished"
            else ""
        )
        outcomes.append(
            Outcome(name, dict(point), state, message, done, measured, front, ceiling, policies)
        )
    every = [(o.name, point) for o in outcomes for point in o.front]
    places = pareto([(point.kl, point.reward) for _, point in every])
    optimal = [(every[n][0], every[n][1].eta or 0.0) for n in places if every[n][1].eta]
    asked, executed = sum(len(o.policies) for o in outcomes), len(trained)
    return Sweep(
        rank(outcomes, objectives),
        objectives,
        optimal,
        asked,
        executed,
        _mean_seconds(plan.store, trained),
    )


def rank(outcomes: Sequence[Outcome], objectives: Sequence[str]) -> list[Outcome]:
    """Return the trials ranked: finished ones first, and the best at the top.

    With one objective, they are sorted by it. With several, the trials that no other one beats come
    first, then hypervolume decides.
    """

    def worth(outcome: Outcome) -> list[float]:
        """Return the objectives' values, signed so that less is better."""
        return [
            outcome.measured.get(name, 0.0) * (1 if DIRECTIONS[name] == "min" else -1)
            for name in objectives
        ]

    def beaten(outcome: Outcome) -> bool:
        """Return whether another trial of its state is as good in all objectives, better in one."""
        mine = worth(outcome)
        others = [
            worth(other) for other in outcomes if other.measured and other.state == outcome.state
        ]
        return any(
            other != mine and all(a <= b for a, b in zip(other, mine, strict=True))
            for other in others
        )

    def place(outcome: Outcome) -> tuple[Any, ...]:
        order = ["finished", "stopped", "unfinished", "failed"].index(outcome.state)
        if not outcome.measured:
            return (order, 1)
        if len(objectives) == 1:
            return (order, 0, worth(outcome)[0])
        return (order, 0, beaten(outcome), -outcome.measured["hypervolume"])

    return sorted(outcomes, key=place)


def save_sweep(sweep: Sweep, plan: SweepPlan, run: Run) -> None:
    """Write sweep.json, sweep.png and best.yaml into the sweep's folder."""
    optimal = {
        name: [eta for other, eta in sweep.optimal if other == name] for name, _ in sweep.optimal
    }
    rows = [
        {
            "name": trial.name,
            "values": trial.point,
            "state": trial.state,
            **({"message": trial.message} if trial.message else {}),
            "iterations": trial.iterations,
            **trial.measured,
            "pareto_etas": optimal.get(trial.name, []),
            "front": [
                {
                    "eta": p.eta,
                    "kl": p.kl,
                    "kl_ci": p.kl_ci,
                    "reward": p.reward,
                    "reward_ci": p.reward_ci,
                }
                for p in trial.front
            ],
            **({"ceiling": trial.ceiling.key} if trial.ceiling else {}),
            "policies": trial.policies,
        }
        for trial in sweep.trials
    ]
    runs = {
        "asked": sweep.asked,
        "executed": sweep.executed,
        "seconds_each": sweep.seconds,
        "seconds_saved": sweep.saved_seconds,
    }
    tree = {
        "search": plan.space.search,
        "objectives": {name: DIRECTIONS[name] for name in sweep.objectives},
        "kl_unit": "nats per completion, KL(policy || SFT)",
        "policy_runs": runs,
        "best": sweep.best,
        "ceilings": {one.key: one.json() for one in ceilings(sweep)},
        "trials": rows,
    }
    sealed.write_json(run.folder / SWEEP_FILE, tree)
    if any(trial.front for trial in sweep.trials):
        plot_sweep(
            sweep, run.folder / "sweep.png", f"{len(sweep.trials)} trials: {plan.space.base.model}"
        )
    if best := next((trial for trial in sweep.trials if trial.name == sweep.best), None):
        text = (
            f"# The best of {len(sweep.trials)} trials by {', '.join(sweep.objectives)}:"
            f" {describe(best.point)}\n"
        )
        sealed.write_text(run.folder / "best.yaml", text + to_yaml(plan.config(best.point)))
    run.push()


def show_sweep(sweep: Sweep, display: Display) -> None:
    """Print the table of the trials, their messages, and the summary."""
    display.console.print(sweep_table(sweep))
    for trial in sweep.trials:
        if trial.message:
            display.say(f"{trial.name} ({describe(trial.point)}) {trial.state}: {trial.message}")
    display.say(sweep.summary())


def ceilings(sweep: Sweep) -> list[Ceiling]:
    """Return the different ceilings of the trials' fronts: one, if all have the same reward."""
    found = {trial.ceiling.key: trial.ceiling for trial in sweep.trials if trial.ceiling}
    return list(found.values())


def sweep_table(sweep: Sweep) -> Table:
    """Return a table of the trials, the best first."""
    optimal = {name for name, _ in sweep.optimal}
    by = ", ".join(sweep.objectives)
    title = (
        f"trials by {by}; reward and KL of the chosen point, ± is half of a 95 % interval, * has a"
        " Pareto-optimal point"
    )
    chosen_points = [
        point
        for trial in sweep.trials
        for point in trial.front
        if point.name == trial.measured.get("chosen")
    ]
    title += footnote(chosen_points)
    table = Table(box=SIMPLE_HEAD, title=title, title_justify="left")
    keys = list(sweep.trials[0].point) if sweep.trials else []
    for heading in ("trial", *map(short, keys)):
        table.add_column(heading, no_wrap=True)
    shares = ["of ceiling"] if ceilings(sweep) else []
    for heading in ("hypervolume", *shares, "reward", "KL, nats", "chosen", "iterations", "state"):
        table.add_column(heading, justify="left" if heading == "state" else "right", no_wrap=True)
    for trial in sweep.trials:
        values = [show(trial.point[key]) for key in keys]
        found = ["", *([""] * len(shares)), "", "", ""]
        if trial.measured:
            chosen = next(point for point in trial.front if point.name == trial.measured["chosen"])
            found = [
                f"{trial.measured['hypervolume']:.2f}",
                *[_share(trial) for _ in shares],
                f"{chosen.reward:.2f} ± {chosen.reward_ci:.2f}",
                f"{chosen.kl:.2f} ± {chosen.kl_ci:.2f}",
                chosen.title,
            ]
        table.add_row(
            trial.name + (" *" if trial.name in optimal else ""),
            *values,
            *found,
            str(trial.iterations),
            trial.state,
        )
    return table


def _share(trial: Outcome) -> str:
    """Return the trial's share of its ceiling as text; empty without a ceiling."""
    return f"{100 * trial.measured['ceiling_share']:.0f} %" if trial.ceiling else ""


def plot_sweep(sweep: Sweep, path: Path, title: str) -> None:
    """Draw sweep.png.

    The left panel has every trial's front, the Pareto-optimal points of all of them together, and
    the ceiling.
    The right panel has the hypervolume of each trial.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = [trial for trial in sweep.trials if trial.front]
    figure, (axes, bars) = plt.subplots(
        1, 2, figsize=(12, 5.5), dpi=150, layout="constrained", width_ratios=(3, 2)
    )
    colours = plt.get_cmap("viridis")
    for n, trial in enumerate(shown):
        colour = colours(n / max(len(shown) - 1, 1) * 0.9)
        label = describe(trial.point) if n < LEGEND else None
        kl, reward = [point.kl for point in trial.front], [point.reward for point in trial.front]
        axes.plot(kl, reward, marker="o", markersize=3, linewidth=1.2, color=colour, label=label)
        bars.barh(n, trial.measured["hypervolume"], color=colour)
    points = {(trial.name, point.eta): point for trial in shown for point in trial.front}
    best = [points[name, eta] for name, eta in sweep.optimal]
    kl, reward = [point.kl for point in best], [point.reward for point in best]
    axes.step(kl, reward, where="post", color="black", linewidth=0.8, linestyle="--")
    axes.plot(
        kl, reward, "o", markersize=9, fillstyle="none", color="black", label="Pareto-optimal"
    )
    for ceiling in ceilings(sweep):
        draw_ceiling(axes, ceiling)
    axes.set_xlabel("KL(policy ‖ SFT), nats per completion")
    axes.set_ylabel("reward")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend(loc="best", fontsize=8)
    bars.set_yticks(range(len(shown)), [trial.name for trial in shown], fontsize=8)
    bars.invert_yaxis()
    corner = sorted(
        {tuple(round(value, 4) for value in trial.measured["reference"]) for trial in shown}
    )
    where = (
        f"KL ≤ {corner[0][0]:g}, reward ≥ {corner[0][1]:.3g}"
        if len(corner) == 1
        else "each trial's reference"
    )
    bars.set_xlabel(f"hypervolume ({where}), nats × reward")
    image = io.BytesIO()
    figure.savefig(image, format="png")
    sealed.write_bytes(path, image.getvalue())
    plt.close(figure)


def _mean_seconds(place: str, keys: set[str]) -> float:
    """Return the mean time of a policy run in seconds.

    It counts the updates, and the rollouts as far as the updates waited for them.

    Args:
        place: the store of the policies.
        keys: keys of the policies that were trained.
    """
    spent, storage = [], Storage(place)
    for key in sorted(keys):
        try:
            folder = storage.fetch(f"policies/{key}")
        except DamagedError:
            continue
        rows = sealed.read_jsonl(folder / "metrics.jsonl") if folder else []
        if rows:
            spent.append(
                sum(
                    row["rollout_seconds"] + row["request_seconds"] + row["update_seconds"]
                    for row in rows
                )
            )
    return sum(spent) / len(spent) if spent else 0.0


def _duration(seconds: float) -> str:
    """Return a time in seconds, minutes or hours, as text."""
    return (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{seconds / 60:.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )
