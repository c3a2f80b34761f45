"""The trials of a sweep in TensorBoard, W&B and MLflow: a run each, a row per iteration, and at its end front, texts and adapter."""

from typing import Any

from raywarp.config.schema import ConfigError
from raywarp.config.search import DIRECTIONS, name_of
from raywarp.run.display import Display
from raywarp.run.folder import FRONT_FILE, Run
from raywarp.run.loggers import Loggers, run_name, was_logged
from raywarp.sweep.trial import SweepPlan


class SweepLoggers:
    """In the process that runs the sweep. What an earlier invocation measured and logged is not logged again."""

    def __init__(self, plan: SweepPlan, run: Run, display: Display):
        self.plan, self.run, self.display = plan, run, display
        self.group = run_name(plan.space.base)
        self.trials: dict[str, Loggers] = {}
        self.old: set[str] = set()

    def began(self, trial: Any) -> None:
        point = self.plan.point(trial.config)
        config = self.plan.config(point).model_copy(update={"loggers": self.plan.space.base.loggers})
        folder = self.run.folder / "loggers" / name_of(point)
        folder.mkdir(parents=True, exist_ok=True)  # not the trial's own, which is another process's to make
        if was_logged(folder):
            self.old.add(trial.trial_id)
        self.trials[trial.trial_id] = Loggers(config, Run(folder, say=self.display.say), self.group, lazy=True)

    def reported(self, trial: Any, result: dict[str, Any]) -> None:
        if trial.trial_id not in self.trials or "failed" in result or (result["known"] and trial.trial_id in self.old):
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
            if (run.folder / FRONT_FILE).is_file():  # else the sweep is in an object store
                loggers.finish(run)
            loggers.close(failed)

    def died(self, trial: Any) -> None:
        self.ended(trial, failed=True)
