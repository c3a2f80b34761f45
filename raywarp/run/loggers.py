"""Loggers for TensorBoard, W&B and MLflow, which get a run's numbers, picture, texts and adapter.

The key `loggers` chooses them. If a service fails, the run says so, sends it no more, and goes on.
"""

import importlib.util
import os
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

from raywarp.config.load import to_yaml
from raywarp.config.schema import Config, ConfigError
from raywarp.data.models import first_line
from raywarp.run.config_file import CONFIG_FILE, flat
from raywarp.run.folder import PICTURE, Run
from raywarp.storage import sealed
from raywarp.storage.sealed import DamagedError

# The services' own ids of this run, under which a continued run goes on there.
IDS_FILE = "loggers.json"
TENSORBOARD = "tensorboard"  # a folder
FRONT_TABLE, SAMPLE_TABLE = "front", "samples"
_LABELS = ("iteration", "policy", "step", "key", "spans")
_SHOWN_PROMPTS = 8  # in TensorBoard, which shows texts on one page; the others have tables


def check_loggers(config: Config) -> None:
    """Raise ConfigError if a logger's package is not installed, and say how to install it."""
    for name in config.loggers:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(
                f"loggers={config.loggers}: {name} is not installed; pip install 'raywarp[{name}]'"
            )


class Loggers:
    """All loggers of a run as one; a context manager.

    Metrics are named `<metric>/iteration <i> policy <m>` and have the policy's own step, so that
    the policies' curves overlay each other.

    Args:
        config: the run's configuration; its `loggers` names the services.
        run: the run's folder, which keeps the services' ids.
        group: name of runs that belong together, such as those of a sweep.
        lazy: start the loggers with the first message, not on entry.

    Raises:
        ConfigError: a service refuses to start, for example because there is no login.
    """

    def __init__(self, config: Config, run: Run, group: str = "", lazy: bool = False):
        self.config, self.run, self.group, self._lazy = config, run, group, lazy
        self._sinks: dict[str, Any] | None = None

    def _start(self) -> None:
        if self._sinks is not None:
            return
        self._sinks = {}
        starters: dict[str, Callable[..., Any]] = {
            "tensorboard": _TensorBoard,
            "wandb": _Wandb,
            "mlflow": _Mlflow,
        }
        ids = _known_ids(self.run.folder)
        for name in self.config.loggers:
            try:
                self._sinks[name] = starters[name](self.config, self.run, ids.get(name), self.group)
            except Exception as error:
                raise ConfigError(
                    f"loggers={self.config.loggers}: {name} does not start: {first_line(error)}"
                ) from None

    def log(self, row: Mapping[str, Any]) -> None:
        """Log one row of metrics.jsonl."""
        policy = f"iteration {row['iteration']} policy {row['policy']}"
        values = {
            f"{name}/{policy}": float(value) for name, value in row.items() if name not in _LABELS
        }
        self.log_values(values, row["step"], f"step/{policy}")

    def log_measurement(self, row: Mapping[str, Any]) -> None:
        """Log one row of trajectory.jsonl."""
        policy = f"iteration {row['iteration']} policy {row['policy']}"
        values = {
            f"held_out_{name}/{policy}": float(row[name])
            for name in row
            if name in ("reward", "kl", "control") or name.startswith("reward/")
        }
        self.log_values(values, row["step"], f"step/{policy}")

    def log_values(self, values: Mapping[str, float], step: int, axis: str) -> None:
        """Log numbers at a step.

        Args:
            values: name → number.
            step: the step.
            axis: name of the axis that the step counts on.
        """
        self._each(lambda sink: sink.log(values, step, axis))

    def finish(self, run: Run) -> None:
        """Log the front with its picture, the texts of its points, and the chosen adapter.

        Args:
            run: a run that has them.
        """
        front, samples = front_rows(run), text_rows(run)
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
                self.run.say(f"{name} gets no more of this run, which goes on: {first_line(error)}")

    def __enter__(self) -> "Loggers":
        if not self._lazy:
            self._start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(failed=kind is not None and kind is not GeneratorExit)

    @property
    def is_started(self) -> bool:
        return bool(self._sinks)

    def close(self, failed: bool = False) -> None:
        """Close the loggers; all that was logged is stored afterwards."""
        if self.is_started:
            self._each(lambda sink: sink.close(failed))


def front_rows(run: Run) -> list[dict[str, Any]]:
    """Return one row per point of the front."""
    front = run.front()
    return [{**point, "chosen": point["name"] == front["chosen"]} for point in front["points"]]


def text_rows(run: Run) -> list[dict[str, Any]]:
    """Return one row per prompt and point: the text with its reward, KL and control score.

    The control score is None where there is none.
    """
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


def was_logged(folder: Path) -> bool:
    """Return whether the run of this folder was logged to any service."""
    return any((folder / name).exists() for name in (IDS_FILE, TENSORBOARD))


def _known_ids(folder: Path) -> dict[str, str]:
    try:
        ids: dict[str, str] = (sealed.read_record(folder / IDS_FILE) or {"ids": {}})["ids"]
        return ids
    except DamagedError:
        return {}


def _save_id(folder: Path, name: str, own: str) -> None:
    ids = _known_ids(folder)
    if ids.get(name) != own:
        sealed.write_record(folder / IDS_FILE, {"ids": {**ids, name: own}})


def _columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    return {name: [row[name] for row in rows] for name in (rows[0] if rows else {})}


class _TensorBoard:
    """The logger for TensorBoard.

    TensorBoard has no place for an adapter, so a text says where it is.
    """

    def __init__(self, config: Config, run: Run, known: str | None, group: str):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(run.folder / TENSORBOARD))
        self.writer.add_text("config", textwrap.indent(to_yaml(config), "    "))

    def log(self, values: Mapping[str, float], step: int, axis: str) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name.replace(" ", "_"), value, step)

    def finish(
        self, run: Run, front: Sequence[Mapping[str, Any]], samples: Sequence[Mapping[str, Any]]
    ) -> None:
        from matplotlib.image import imread

        self.writer.add_image(FRONT_TABLE, imread(run.folder / PICTURE)[..., :3], dataformats="HWC")
        self.writer.add_text(FRONT_TABLE, _markdown(front))
        prompts = list(dict.fromkeys(row["prompt"] for row in samples))[:_SHOWN_PROMPTS]
        self.writer.add_text(
            SAMPLE_TABLE, _markdown([row for row in samples if row["prompt"] in prompts])
        )
        self.writer.add_text("adapter", str(run.folder / "adapter"))

    def close(self, failed: bool) -> None:
        self.writer.close()


def _markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return a table, in which markup inside a cell is escaped."""
    names = list(rows[0]) if rows else []
    lines = [names, ["---"] * len(names), *([_cell(row[name]) for name in names] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: Any) -> str:
    text = "" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)
    return re.sub(r"([\\`*_{}\[\]<>#|~&])", r"\\\1", " ".join(text.split()))


class _Wandb:
    """The logger for W&B.

    With WANDB_MODE=offline it writes to the run's folder, for `wandb sync`.
    """

    def __init__(self, config: Config, run: Run, known: str | None, group: str):
        import wandb

        self.wandb, self.name = wandb, run_name(config)
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "raywarp"),
            name=self.name,
            id=known,
            group=group or None,
            reinit="create_new",  # trials of a sweep are open at the same time
            resume="allow",
            dir=str(run.folder),
            config=config.model_dump(mode="json"),
            settings=wandb.Settings(console="off", silent=True),
        )
        _save_id(run.folder, "wandb", self.run.id)
        self._defined: set[str] = set()

    def log(self, values: Mapping[str, float], step: int, axis: str) -> None:
        for name in values.keys() - self._defined:
            # W&B's own step may only grow, but policies take turns.
            self.run.define_metric(name, step_metric=axis)
        self._defined |= values.keys()
        self.run.log({**values, axis: step})

    def finish(
        self, run: Run, front: Sequence[Mapping[str, Any]], samples: Sequence[Mapping[str, Any]]
    ) -> None:
        tables = {FRONT_TABLE: front, SAMPLE_TABLE: samples}
        made = {
            name: self.wandb.Table(columns=list(rows[0]), data=[list(row.values()) for row in rows])
            for name, rows in tables.items()
            if rows
        }
        self.run.log({**made, "front picture": self.wandb.Image(str(run.folder / PICTURE))})
        chosen = next(row for row in front if row["chosen"])
        self.run.summary.update(
            {name: value for name, value in chosen.items() if value is not None}
        )
        artifact = self.wandb.Artifact(
            f"{re.sub(r'[^A-Za-z0-9_.-]', '-', self.name)}-adapter",
            type="model",
            metadata=dict(chosen),
        )
        artifact.add_dir(str(run.folder / "adapter"))
        self.run.log_artifact(artifact)

    def close(self, failed: bool) -> None:
        self.run.finish(exit_code=int(failed))


class _Mlflow:
    """The logger for MLflow.

    MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME mean what they mean to MLflow itself.
    """

    def __init__(self, config: Config, run: Run, known: str | None, group: str):
        import mlflow
        from mlflow.tracking import MlflowClient

        self.mlflow, self.client = mlflow, MlflowClient()
        self.id = known if known and self._is_there(known) else ""
        if not self.id:
            self.id = mlflow.start_run(
                run_name=run_name(config),
                nested=True,
                tags={"raywarp.group": group} if group else None,
            ).info.run_id
            # The run is then no longer the active one, so that several can go on at once.
            mlflow.end_run("RUNNING")
            mlflow.log_params(
                {
                    key: str(value)
                    for key, value in flat(config.model_dump(mode="json", exclude_none=True))
                },
                run_id=self.id,
            )
            mlflow.log_text(to_yaml(config), CONFIG_FILE, run_id=self.id)
        _save_id(run.folder, "mlflow", self.id)

    def _is_there(self, known: str) -> bool:
        try:
            return bool(self.client.get_run(known))
        except self.mlflow.exceptions.MlflowException:  # the id is of another server
            return False

    def log(self, values: Mapping[str, float], step: int, axis: str) -> None:
        self.mlflow.log_metrics(dict(values), step=step, run_id=self.id)

    def finish(
        self, run: Run, front: Sequence[Mapping[str, Any]], samples: Sequence[Mapping[str, Any]]
    ) -> None:
        self.mlflow.log_artifact(str(run.folder / PICTURE), run_id=self.id)
        for name, rows in ((FRONT_TABLE, front), (SAMPLE_TABLE, samples)):
            self.mlflow.log_table(_columns(rows), f"{name}.json", run_id=self.id)
        chosen = next(row for row in front if row["chosen"])
        self.mlflow.log_metrics(
            {f"chosen/{name}": value for name, value in chosen.items() if type(value) is float},
            run_id=self.id,
        )
        self.mlflow.log_artifacts(str(run.folder / "adapter"), "adapter", run_id=self.id)

    def close(self, failed: bool) -> None:
        self.client.set_terminated(self.id, "FAILED" if failed else "FINISHED")
