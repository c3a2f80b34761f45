"""Listeners to a sweep's trials in Ray Tune: the terminal, and TensorBoard, W&B and MLflow."""

from types import TracebackType
from typing import Any, Protocol

from ray.tune import Callback
from rich.progress import TimeElapsedColumn

from raywarp.config.schema import ConfigError
from raywarp.config.search import DIRECTIONS, describe, name_of
from raywarp.run.display import Display, bars
from raywarp.run.folder import FRONT_FILE, Run
from raywarp.run.loggers import Loggers, run_name, was_logged
from raywarp.sweep.trial import SweepPlan


class TrialListener(Protocol):
    """The events of trials that Ray Tune reports.

    Each `trial` is Tune's own object, with `trial_id` and `config`. `ended` or `died` is the last
    event of a trial.
    """

    def began(self, trial: Any) -> None: ...

    def reported(self, trial: Any, result: dict[str, Any]) -> None: ...

    def ended(self, trial: Any) -> None: ...

    def died(self, trial: Any) -> None: ...


def callback(listener: TrialListener) -> Callback:
    """Return a Tune callback that calls the listener.

    Tune pickles its callbacks. Consoles and connections cannot be pickled, so an empty callback is
    pickled instead.
    """

    class Listening(Callback):
        def __reduce__(self) -> Any:
            return (Callback, ())

        def on_trial_start(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
            listener.began(trial)

        def on_trial_result(
            self, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **info: Any
        ) -> None:
            listener.reported(trial, result)

        def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
            listener.ended(trial)

        def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
            listener.died(trial)

    return Listening()


class SweepProgress:
    """Progress bars of a sweep and its trials. They are shown inside the `with` block."""

    def __init__(self, plan: SweepPlan, display: Display):
        self.plan, self.display = plan, display
        self.bars = bars(display.console, display.quiet, TimeElapsedColumn())
        self.all = self.bars.add_task("  trials", total=plan.space.trials, note="")
        self.under_way: dict[str, Any] = {}

    def began(self, trial: Any) -> None:
        point = self.plan.point(trial.config)
        iterations = self.plan.config(point).warp.iterations
        self.under_way[trial.trial_id] = self.bars.add_task(
            f"  {describe(point)}", total=iterations, note="iteration 1"
        )

    def reported(self, trial: Any, result: dict[str, Any]) -> None:
        who = describe(self.plan.point(trial.config))
        if "failed" in result:
            return self.display.say(f"  {who}: failed: {result['failed'].splitlines()[0]}")
        found = (
            f"reward {result['reward']:+.2f} at KL {result['kl']:.2f}, hypervolume"
            f" {result['hypervolume']:.2f}"
        )
        if trial.trial_id in self.under_way:
            self.bars.update(
                self.under_way[trial.trial_id], completed=result["iteration"], note=found
            )
        return self.display.progress(f"  {who}: iteration {result['iteration']}: {found}")

    def ended(self, trial: Any) -> None:
        if trial.trial_id in self.under_way:
            self.bars.remove_task(self.under_way.pop(trial.trial_id))
        self.bars.advance(self.all)

    def died(self, trial: Any) -> None:
        self.ended(trial)
        self.display.say(
            f"  {describe(self.plan.point(trial.config))}: its process died again and again"
        )

    def __enter__(self) -> "SweepProgress":
        self.bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.bars.stop()


class SweepLoggers:
    """The loggers of a sweep's trials, in the process that runs the sweep.

    Values that an earlier invocation measured and logged are not logged again.
    """

    def __init__(self, plan: SweepPlan, run: Run, display: Display):
        self.plan, self.run, self.display = plan, run, display
        self.group = run_name(plan.space.base)
        self.trials: dict[str, Loggers] = {}
        self.old: set[str] = set()

    def began(self, trial: Any) -> None:
        point = self.plan.point(trial.config)
        config = self.plan.config(point).model_copy(
            update={"loggers": self.plan.space.base.loggers}
        )
        folder = self.run.folder / "loggers" / name_of(point)
        # This is not the trial's own folder, because the trial's process creates that one.
        folder.mkdir(parents=True, exist_ok=True)
        if was_logged(folder):
            self.old.add(trial.trial_id)
        self.trials[trial.trial_id] = Loggers(
            config, Run(folder, say=self.display.say), self.group, lazy=True
        )

    def reported(self, trial: Any, result: dict[str, Any]) -> None:
        if (
            trial.trial_id not in self.trials
            or "failed" in result
            or (result["known"] and trial.trial_id in self.old)
        ):
            return
        values = {name: result[name] for name in DIRECTIONS if name in result}
        try:
            self.trials[trial.trial_id].log_values(values, result["iteration"], "iteration")
        except ConfigError as error:
            del self.trials[trial.trial_id]
            self.display.say(f"{error}; the sweep goes on without")

    def ended(self, trial: Any, failed: bool = False) -> None:
        loggers = self.trials.pop(trial.trial_id, None)
        if loggers and loggers.is_started:
            run = Run(self.run.folder / "trials" / loggers.run.folder.name)
            # If the sweep is in an object store, this machine has no such file.
            if (run.folder / FRONT_FILE).is_file():
                loggers.finish(run)
            loggers.close(failed)

    def died(self, trial: Any) -> None:
        self.ended(trial, failed=True)
