"""Where a run's numbers, picture, texts and adapter go besides its folder, when `loggers` asks for it: TensorBoard, W&B, MLflow.

A service that fails gets no more of the run, and the run says so and goes on.
"""

import importlib.util
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

from raywarp import store
from raywarp.config import Config, ConfigError, to_yaml
from raywarp.run import CONFIG_FILE, PICTURE, Run, flat
from raywarp.store import DamagedError

IDS_FILE = "loggers.json"  # the services' own ids of this run, by which a continued one goes on there
FRONT_TABLE, SAMPLE_TABLE = "front", "samples"
_LABELS = ("iteration", "policy", "step", "key", "spans")
_SHOWN_PROMPTS = 8  # in TensorBoard, whose texts are one page; the others have tables


def check_loggers(config: Config) -> None:
    """Raises ConfigError where a logger's package is not installed, and says how to install it."""
    for name in config.loggers:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(f"loggers={config.loggers}: {name} is not installed; pip install 'raywarp[{name}]'")


class Loggers:
    """All loggers of a run as one; a context manager.

    Args:
        lazy: they start when they are first told something.

    Raises:
        ConfigError: a service refuses: for want of a login, say.

    Metrics are named `<metric>/iteration <i> policy <m>`, with the policy's own step, so that policies lie over one another.
    """

    def __init__(self, config: Config, run: Run, lazy: bool = False):
        self.config, self.run, self._lazy = config, run, lazy
        self._sinks: dict[str, Any] | None = None

    def _start(self) -> None:
        if self._sinks is not None:
            return
        self._sinks = {}
        starters: dict[str, Callable[[Config, Run, str | None], Any]] = {"tensorboard": _TensorBoard, "wandb": _Wandb, "mlflow": _Mlflow}
        ids = _known_ids(self.run.folder)
        for name in self.config.loggers:
            try:
                self._sinks[name] = starters[name](self.config, self.run, ids.get(name))
            except Exception as error:
                raise ConfigError(f"loggers={self.config.loggers}: {name} does not start: {_line(error)}") from None

    def log(self, row: Mapping[str, Any]) -> None:
        """One row of metrics.jsonl."""
        suffix = f"/iteration {row['iteration']} policy {row['policy']}"
        values = {name + suffix: float(value) for name, value in row.items() if name not in _LABELS}
        self._each(lambda sink: sink.log(values, row["step"]))

    def finish(self, run: Run) -> None:
        """The front with its picture, the texts of its points, and the chosen adapter, of a run that has them."""
        front, samples = front_rows(run), sample_rows(run)
        self._each(lambda sink: sink.finish(run, front, samples))

    def _each(self, tell: Callable[[Any], None]) -> None:
        self._start()
        for name, sink in list((self._sinks or {}).items()):
            try:
                tell(sink)
            except Exception as error:
                del (self._sinks or {})[name]
                with suppress(Exception):
                    sink.close(failed=True)
                self.run.say(f"{name} gets no more of this run, which goes on: {_line(error)}")

    def __enter__(self) -> "Loggers":
        if not self._lazy:
            self._start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._sinks:
            self._each(lambda sink: sink.close(failed=kind is not None and kind is not GeneratorExit))


def front_rows(run: Run) -> list[dict[str, Any]]:
    """A row per point of the front."""
    front = run.front()
    return [{**point, "chosen": point["name"] == front["chosen"]} for point in front["points"]]


def sample_rows(run: Run) -> list[dict[str, Any]]:
    """A row per prompt and point: the text, and its own reward, KL and control score (where there is one)."""
    points = [point["name"] for point in run.front()["points"]]
    return [
        {
            "prompt": sample["prompt"],
            "point": point,
            "completion": sample[point],
            "reward": sample["rewards"][point],
            "kl": sample["kl"][point],
            "control": sample.get("control", {}).get(point),
        }
        for sample in run.samples()
        for point in points
    ]


def run_name(config: Config) -> str:
    return PurePosixPath(config.out.partition("?")[0]).name or "raywarp"


def _known_ids(folder: Path) -> dict[str, str]:
    try:
        ids: dict[str, str] = (store.read_record(folder / IDS_FILE) or {"ids": {}})["ids"]
        return ids
    except DamagedError:
        return {}


def _save_id(folder: Path, name: str, own: str) -> None:
    ids = _known_ids(folder)
    if ids.get(name) != own:
        store.write_record(folder / IDS_FILE, {"ids": {**ids, name: own}})


def _line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    return {name: [row[name] for row in rows] for name in (rows[0] if rows else {})}


class _TensorBoard:
    """Which has no place for an adapter: a text says where it is."""

    def __init__(self, config: Config, run: Run, known: str | None):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(run.folder / "tensorboard"))
        self.writer.add_text("config", textwrap.indent(to_yaml(config), "    "))

    def log(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name.replace(" ", "_"), value, step)

    def finish(self, run: Run, front: Sequence[Mapping[str, Any]], samples: Sequence[Mapping[str, Any]]) -> None:
        from matplotlib.image import imread

        self.writer.add_image(FRONT_TABLE, imread(run.folder / PICTURE)[..., :3], dataformats="HWC")
        self.writer.add_text(FRONT_TABLE, _markdown(front))
        prompts = list(dict.fromkeys(row["prompt"] for row in samples))[:_SHOWN_PROMPTS]
        self.writer.add_text(SAMPLE_TABLE, _markdown([row for row in samples if row["prompt"] in prompts]))
        self.writer.add_text("adapter", str(run.folder / "adapter"))

    def close(self, failed: bool) -> None:
        self.writer.close()


def _markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table; what would be markup in a cell is not."""
    names = list(rows[0]) if rows else []
    lines = [names, ["---"] * len(names), *([_cell(row[name]) for name in names] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: Any) -> str:
    text = "" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)
    return re.sub(r"([\\`*_{}\[\]<>#|~&])", r"\\\1", " ".join(text.split()))


class _Wandb:
    """WANDB_MODE=offline writes to the run's folder, for `wandb sync`."""

    def __init__(self, config: Config, run: Run, known: str | None):
        import wandb

        self.wandb, self.name = wandb, run_name(config)
        self.run = wandb.init(
            project="raywarp",
            name=self.name,
            id=known,
            resume="allow",
            dir=str(run.folder),
            config=config.model_dump(mode="json"),
            settings=wandb.Settings(console="off", silent=True),
        )
        _save_id(run.folder, "wandb", self.run.id)
        self._defined: set[str] = set()

    def log(self, values: Mapping[str, float], step: int) -> None:
        policy = next(iter(values)).rpartition("/")[2]
        own_step = f"step/{policy}"  # wandb's own step may only grow, and policies take turns
        for name in values.keys() - self._defined:
            self.run.define_metric(name, step_metric=own_step)
        self._defined |= values.keys()
        self.run.log({**values, own_step: step})

    def finish(self, run: Run, front: Sequence[Mapping[str, Any]], samples: Sequence[Mapping[str, Any]]) -> None:
        tables = {FRONT_TABLE: front, SAMPLE_TABLE: samples}
        made = {
            name: self.wandb.Table(columns=list(rows[0]), data=[list(row.values()) for row in rows])
            for name, rows in tables.items()
            if rows
        }
        self.run.log({**made, "front picture": self.wandb.Image(str(run.folder / PICTURE))})
        chosen = next(row for row in front if row["chosen"])
        self.run.summary.update({name: value for name, value in chosen.items() if value is not None})
        artifact = self.wandb.Artifact(f"{re.sub(r'[^A-Za-z0-9_.-]', '-', self.name)}-adapter", type="model", metadata=dict(chosen))
        artifact.add_dir(str(run.folder / "adapter"))
        self.run.log_artifact(artifact)

    def close(self, failed: bool) -> None:
        self.run.finish(exit_code=int(failed))


class _Mlflow:
    """To MLFLOW_TRACKING_URI, into MLFLOW_EXPERIMENT_NAME, as MLflow itself has it."""

    def __init__(self, config: Config, run: Run, known: str | None):
        import mlflow

        self.mlflow = mlflow
        try:
            self.run = mlflow.start_run(run_id=known, run_name=run_name(config))
        except mlflow.exceptions.MlflowException:
            if known is None:
                raise
            known, self.run = None, mlflow.start_run(run_name=run_name(config))  # the known one is another server's
        if known is None:
            mlflow.log_params({key: str(value) for key, value in flat(config.model_dump(mode="json", exclude_none=True))})
            mlflow.log_text(to_yaml(config), CONFIG_FILE)
        _save_id(run.folder, "mlflow", self.run.info.run_id)

    def log(self, values: Mapping[str, float], step: int) -> None:
        self.mlflow.log_metrics(dict(values), step=step)

    def finish(self, run: Run, front: Sequence[Mapping[str, Any]], samples: Sequence[Mapping[str, Any]]) -> None:
        self.mlflow.log_artifact(str(run.folder / PICTURE))
        for name, rows in ((FRONT_TABLE, front), (SAMPLE_TABLE, samples)):
            self.mlflow.log_table(_columns(rows), f"{name}.json")
        chosen = next(row for row in front if row["chosen"])
        self.mlflow.log_metrics({f"chosen/{name}": value for name, value in chosen.items() if type(value) is float})
        self.mlflow.log_artifacts(str(run.folder / "adapter"), "adapter")

    def close(self, failed: bool) -> None:
        self.mlflow.end_run("FAILED" if failed else "FINISHED")


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
