"""What a person sees while a sweep goes on: a line per trial and iteration; in a terminal also a bar per trial, and one for all."""

from collections.abc import Sequence
from types import TracebackType
from typing import Any

from ray.tune import Callback
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from raywarp.progress import Display
from raywarp.search_space import Point, decode, describe
from raywarp.trial import SweepPlan


class SweepProgress:
    """A context manager, inside which the bars are shown."""

    def __init__(self, plan: SweepPlan, display: Display):
        self.plan, self.display = plan, display
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=20), MofNCompleteColumn(), TextColumn("{task.fields[note]}"))
        hidden = display.quiet or not display.console.is_terminal
        self.bars = Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=display.console, disable=hidden)
        self.all = self.bars.add_task("  trials", total=plan.space.trials, note="")
        self.under_way: dict[str, Any] = {}

    def point(self, trial: Any) -> Point:
        return self.plan.space.resolved(decode(trial.config))

    def began(self, trial: Any) -> None:
        iterations = self.plan.config(self.point(trial)).warp.iterations
        self.under_way[trial.trial_id] = self.bars.add_task(f"  {describe(self.point(trial))}", total=iterations, note="iteration 1")

    def reported(self, trial: Any, result: dict[str, Any]) -> None:
        who = describe(self.point(trial))
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
        self.display.say(f"  {describe(self.point(trial))}: its process died again and again")

    def __enter__(self) -> "SweepProgress":
        self.bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.bars.stop()

    def callback(self) -> Callback:
        """For Tune."""
        watcher = self

        class Told(Callback):
            def __reduce__(self) -> Any:
                return (Callback, ())  # Tune stores its callbacks, and a console cannot be

            def on_trial_start(self, iteration: int, trials: Sequence[Any], trial: Any, **info: Any) -> None:
                watcher.began(trial)

            def on_trial_result(self, iteration: int, trials: Sequence[Any], trial: Any, result: dict[str, Any], **info: Any) -> None:
                watcher.reported(trial, result)

            def on_trial_complete(self, iteration: int, trials: Sequence[Any], trial: Any, **info: Any) -> None:
                watcher.ended(trial)

            def on_trial_error(self, iteration: int, trials: Sequence[Any], trial: Any, **info: Any) -> None:
                watcher.died(trial)

        return Told()
