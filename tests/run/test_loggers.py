"""Tests of what TensorBoard, W&B and MLflow got of a finished run, read by their own libraries."""

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import logger_environment
from logged import items, wandb_records
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_run import Listener

from raywarp.adapters.peft import load_peft
from raywarp.config.load import load_config, parse_config
from raywarp.config.schema import Config, ConfigError
from raywarp.run.folder import Run
from raywarp.run.loggers import Loggers, check_loggers, front_rows, text_rows


def metric_of(run: Run, name: str, iteration: int, policy: int) -> list[tuple[int, float]]:
    return [
        (row["step"], row[name])
        for row in run.metrics()
        if (row["iteration"], row["policy"]) == (iteration, policy)
    ]


def logged_config(run: Run) -> dict[str, Any]:
    return load_config(run.folder / "config.yaml").model_dump(mode="json")


def test_tensorboard_has_metrics_config_picture_and_texts(tiny_finished: Run) -> None:
    events = EventAccumulator(str(tiny_finished.folder / "tensorboard")).Reload()
    curve = [(event.step, event.value) for event in events.Scalars("reward/iteration_2_policy_1")]
    assert curve == metric_of(tiny_finished, "reward", 2, 1)
    (effect,) = events.Scalars("adapter_effect/iteration_1_policy_2")
    assert (effect.step, effect.value) == (0, pytest.approx(1, abs=1e-3))

    def text(name: str) -> str:
        return events.Tensors(f"{name}/text_summary")[0].tensor_proto.string_val[0].decode()

    assert "ema_rate: 0.2" in text("config")
    assert text("front").count("\n") == 1 + len(tiny_finished.front()["points"])
    assert all(row["prompt"] in text("samples") for row in tiny_finished.samples())
    (image,) = events.Images("front")
    assert image.encoded_image_string.startswith(b"\x89PNG")
    assert text("adapter") == str(tiny_finished.folder / "adapter")


def test_wandb_has_metrics_config_picture_tables_and_the_adapter(tiny_finished: Run) -> None:
    records = list(wandb_records(tiny_finished.folder))
    configs = [items(record.run.config.update) for record in records if record.HasField("run")]
    assert {key: configs[0][key] for key in ("warp", "lora", "out")} == {
        key: logged_config(tiny_finished)[key] for key in ("warp", "lora", "out")
    }

    rows = [items(record.history.item) for record in records if record.HasField("history")]
    name = "reward/iteration 1 policy 2"
    found = [(row["step/iteration 1 policy 2"], row[name]) for row in rows if name in row]
    assert found == metric_of(tiny_finished, "reward", 1, 2)
    axes = {
        record.metric.name: record.metric.step_metric
        for record in records
        if record.HasField("metric")
    }
    assert axes[name] == "step/iteration 1 policy 2"

    last = next(row for row in rows if "samples/path" in row)
    (files,) = tiny_finished.folder.glob("wandb/offline-run-*/files")
    for table, wanted in (
        ("samples", text_rows(tiny_finished)),
        ("front", front_rows(tiny_finished)),
    ):
        stored = json.loads((files / last[f"{table}/path"]).read_text())
        assert [dict(zip(stored["columns"], row, strict=True)) for row in stored["data"]] == wanted
    assert (files / last["front picture/path"]).read_bytes() == (
        tiny_finished.folder / "front.png"
    ).read_bytes()

    deadline, found = time.monotonic() + 20, list[Any]()
    # W&B's own process writes it a moment after the run is finished
    while not found and time.monotonic() < deadline:
        found = [
            record.artifact
            for record in wandb_records(tiny_finished.folder)
            if record.artifact.type == "model"
        ]
        time.sleep(0.1)
    (artifact,) = found
    contents = {entry.path: entry.size for entry in artifact.manifest.contents}
    adapter = tiny_finished.folder / "adapter"
    assert artifact.name == "run-adapter"
    assert contents == {path.name: path.stat().st_size for path in adapter.iterdir()}


def kept(row: dict[str, Any]) -> dict[str, Any]:
    """To the nine digits that MLflow keeps of a table's numbers; the last one is rounded either
    way.
    """
    return {
        name: pytest.approx(value, rel=0, abs=1e-9) if isinstance(value, float) else value
        for name, value in row.items()
    }


def test_mlflow_has_metrics_config_picture_tables_and_the_adapter(
    tiny_finished: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in logger_environment(tiny_finished.folder.parent).items():
        monkeypatch.setenv(name, value)
    from mlflow.tracking import MlflowClient

    client = MlflowClient()
    (run,) = client.search_runs(
        [experiment.experiment_id for experiment in client.search_experiments()]
    )
    assert run.info.status == "FINISHED"
    assert run.data.params["warp.ema_rate"] == "0.2"
    history = client.get_metric_history(run.info.run_id, "reward/iteration 2 policy 2")
    assert sorted((metric.step, metric.value) for metric in history) == metric_of(
        tiny_finished, "reward", 2, 2
    )
    chosen = next(row for row in front_rows(tiny_finished) if row["chosen"])
    assert run.data.metrics["chosen/kl"] == chosen["kl"]

    folder = Path(client.download_artifacts(run.info.run_id, ""))
    for table, wanted in (
        ("samples.json", text_rows(tiny_finished)),
        ("front.json", front_rows(tiny_finished)),
    ):
        stored = json.loads((folder / table).read_text())
        for row, own in zip(stored["data"], wanted, strict=True):
            assert dict(zip(stored["columns"], row, strict=True)) == kept(own)
    assert (folder / "front.png").read_bytes() == (tiny_finished.folder / "front.png").read_bytes()
    assert load_config(folder / "config.yaml").model_dump(mode="json") == logged_config(
        tiny_finished
    )
    theirs, ours = (
        load_peft(place / "adapter").factors for place in (folder, tiny_finished.folder)
    )
    assert {name: factors.B.tolist() for name, factors in theirs.items()} == {
        name: factors.B.tolist() for name, factors in ours.items()
    }


def test_a_continued_run_goes_on_under_its_old_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in logger_environment(tmp_path).items():
        monkeypatch.setenv(name, value)
    config, run = (
        parse_config({"loggers": ["wandb", "mlflow"], "out": str(tmp_path)}),
        Run(tmp_path),
    )
    for step in (0, 1):
        with Loggers(config, run) as loggers:
            loggers.log({"iteration": 1, "policy": 1, "step": step, "reward": float(step)})
    names = [
        re.search(r"run-(\w+)\.wandb", path.name)
        for path in tmp_path.glob("wandb/offline-run-*/*.wandb")
    ]
    assert len({found[1] for found in names if found}) == 1
    from mlflow.tracking import MlflowClient

    (one,) = (client := MlflowClient()).search_runs(["0"])
    assert [
        metric.value
        for metric in client.get_metric_history(one.info.run_id, "reward/iteration 1 policy 1")
    ] == [0.0, 1.0]


def test_a_service_that_fails_gets_no_more_and_the_run_goes_on(tmp_path: Path) -> None:
    heard = Listener()
    with Loggers(
        parse_config({"loggers": ["tensorboard"]}), Run(tmp_path, say=heard.say)
    ) as loggers:
        loggers.log({"iteration": 1, "policy": 1, "step": 0, "reward": 0.5})
        loggers.log({"iteration": 1, "policy": 1, "step": "no step", "reward": 0.5})
        loggers.log({"iteration": 1, "policy": 1, "step": 2, "reward": 0.5})
    assert heard.text().count("tensorboard gets no more of this run") == 1
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("reward/iteration_1_policy_1")] == [0]


def test_a_service_that_refuses_ends_the_run_before_it_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {
        **logger_environment(tmp_path),
        "MLFLOW_TRACKING_URI": "no-such-scheme://host",
    }.items():
        monkeypatch.setenv(name, value)
    config: Config = parse_config({"loggers": ["mlflow"]})
    with (
        pytest.raises(ConfigError, match="mlflow does not start: "),
        Loggers(config, Run(tmp_path)),
    ):
        pass


def test_a_logger_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        ConfigError, match=r"mlflow is not installed; pip install 'raywarp\[mlflow\]'"
    ):
        check_loggers(parse_config({"loggers": ["mlflow"]}))
    check_loggers(parse_config({}))
