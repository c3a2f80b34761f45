"""Where metrics go besides metrics.jsonl, when the config's `loggers` asks for it: TensorBoard, Weights & Biases, MLflow."""

import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from raywarp.config import Config, ConfigError

_LABELS = ("iteration", "policy", "step", "key", "spans")


def check_loggers(config: Config) -> None:
    """Raises ConfigError where a logger's package is not installed, and says how to install it."""
    for name in config.loggers:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(f"loggers={config.loggers}: {name} is not installed; pip install 'raywarp[{name}]'")


class Loggers:
    """All loggers of a run as one; a context manager.

    Metrics are named `<metric>/iteration <i> policy <m>`, with the policy's own step, so that policies lie over one another.
    """

    def __init__(self, config: Config, folder: Path):
        starters: dict[str, Callable[[Config, Path], Any]] = {"tensorboard": _TensorBoard, "wandb": _Wandb, "mlflow": _Mlflow}
        self._sinks = [starters[name](config, folder) for name in config.loggers]

    def log(self, row: Mapping[str, Any]) -> None:
        """One row of metrics.jsonl."""
        suffix = f"/iteration {row['iteration']} policy {row['policy']}"
        values = {name + suffix: float(value) for name, value in row.items() if name not in _LABELS}
        for sink in self._sinks:
            sink.log(values, row["step"])

    def __enter__(self) -> "Loggers":
        return self

    def __exit__(self, *_: object) -> None:
        for sink in self._sinks:
            sink.close()


class _TensorBoard:
    def __init__(self, config: Config, folder: Path):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder / "tensorboard"))

    def log(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name.replace(" ", "_"), value, step)

    def close(self) -> None:
        self.writer.close()


class _Wandb:
    def __init__(self, config: Config, folder: Path):
        import wandb

        self.run = wandb.init(project="raywarp", name=folder.name, dir=str(folder), config=config.model_dump(mode="json"))

    def log(self, values: Mapping[str, float], step: int) -> None:
        policy = next(iter(values)).rpartition("/")[2]
        self.run.log({**values, f"step/{policy}": step})  # wandb's own step may only grow, and policies take turns

    def close(self) -> None:
        self.run.finish()


class _Mlflow:
    def __init__(self, config: Config, folder: Path):
        import mlflow

        self.mlflow = mlflow
        mlflow.start_run(run_name=folder.name)
        mlflow.log_dict(config.model_dump(mode="json"), "config.json")

    def log(self, values: Mapping[str, float], step: int) -> None:
        self.mlflow.log_metrics(dict(values), step=step)

    def close(self) -> None:
        self.mlflow.end_run()


def sweep_loggers(config: Config, folder: Path, name: str) -> list[Any]:
    """Ray Tune's callbacks for the same services, which get a row per trial and iteration.

    Args:
        folder: of the sweep, where TensorBoard's files go.
        name: of the sweep: a group of runs in W&B, an experiment in MLflow.
    """
    made: list[Any] = []
    if "tensorboard" in config.loggers:
        made.append(_tensorboard_callback(folder / "tensorboard"))
    if "wandb" in config.loggers:
        from ray.air.integrations.wandb import WandbLoggerCallback

        made.append(WandbLoggerCallback(project="raywarp", group=name))
    if "mlflow" in config.loggers:
        from ray.air.integrations.mlflow import MLflowLoggerCallback

        made.append(MLflowLoggerCallback(experiment_name=f"raywarp {name}"))
    return made


def _tensorboard_callback(folder: Path) -> Any:
    """Not Tune's own (2.60), whose files lie beside its pickles."""
    from ray.tune import Callback
    from torch.utils.tensorboard import SummaryWriter

    class TensorBoard(Callback):
        def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: Mapping[str, Any], **info: Any) -> None:
            with SummaryWriter(str(folder / trial.trial_id)) as writer:
                for metric in ("hypervolume", "reward", "kl", "control"):
                    if metric in result:
                        writer.add_scalar(metric, result[metric], result.get("iteration", 0))

    return TensorBoard()
