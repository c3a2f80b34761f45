"""What a person sees while a sweep goes on: a line per trial and iteration; in a terminal also a bar per trial, and one for all."""

from types import TracebackType
from typing import Any

from rich.progress import TimeElapsedColumn

from raywarp.config.search import describe
from raywarp.run.display import Display, bars
from raywarp.sweep.trial import SweepPlan


class SweepProgress:
    """A context manager, inside which the bars are shown."""

    def __init__(self, plan: SweepPlan, display: Display):
        self.plan, self.display = plan, display
        self.bars = bars(display.console, display.quiet, TimeElapsedColumn())
        self.all = self.bars.add_task("  trials", total=plan.space.trials, note="")
        self.under_way: dict[str, Any] = {}

    def began(self, trial: Any) -> None:
        point = self.plan.point(trial.config)
        iterations = self.plan.config(point).warp.iterations
        self.under_way[trial.trial_id] = self.bars.add_task(f"  {describe(point)}", total=iterations, note="iteration 1")

    def reported(self, trial: Any, result: dict[str, Any]) -> None:
        who = describe(self.plan.point(trial.config))
        if "failed" in result:
            return self.display.say(f"  {who}: failed: {result['failed'].splitlines()[0]}")
        found = f"reward {result['reward']:+.2f} at KL {result['kl']:.2f}, hypervolume {result['hypervolume']:.2f}"
        if trial.trial_id in self.under_way:
            self.bars.update(self.under_way[trial.trial_id], completed=result["iteration"], note=found)
        return self.display.progress(f"  {who}: iteration {result['iteration']}: {found}")

    def ended(self, trial: Any) -> None:
        if trial.trial_id in self.under_way:
            self.bars.remove_task(self.under_way.pop(trial.trial_id))
        self.bars.advance(self.all)

    def died(self, trial: Any) -> None:
        self.ended(trial)
        self.display.say(f"  {describe(self.plan.point(trial.config))}: its process died again and again")

    def __enter__(self) -> "SweepProgress":
        self.bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.bars.stop()
