"""Bradley–Terry training of a reward model on Ray Train, resumable by the same command."""

import json
import math
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
from ray.train import (
    Checkpoint,
    CheckpointConfig,
    LoggingConfig,
    RunConfig,
    ScalingConfig,
    WorkerGroupError,
)
from ray.train.torch import TorchTrainer, get_device, prepare_model

from raywarp.cluster.device import CPU_ENV
from raywarp.config.schema import Config, ConfigError
from raywarp.data.pairs import Preference
from raywarp.rewards.bradley_terry import PairTrainer, accuracy_interval
from raywarp.rewards.inputs import (
    READING,
    SETTINGS_FILE,
    WORK,
    RewardInputs,
    prepare_reward,
    settings_of,
)
from raywarp.rewards.progress import following
from raywarp.rewards.reading import Reading
from raywarp.rewards.score import REWARD_FILE
from raywarp.run.display import Display
from raywarp.storage.sealed import (
    MANIFEST,
    DamagedError,
    append_jsonl,
    check_sealed,
    read_jsonl,
    seal,
    write_jsonl,
    write_record,
)


@dataclass(frozen=True)
class RewardSummary:
    """The result of a reward model's training.

    Attributes:
        folder: holds the model, for AutoModelForSequenceClassification.
        accuracy: pairwise accuracy on held-out test pairs.
        accuracy_ci: its 95 % interval.
        pairs: number of test pairs.
        steps: number of steps.
        best_step: the step whose weights were kept.
        already_complete: the model was finished before, and nothing was done.
    """

    folder: Path
    accuracy: float
    accuracy_ci: tuple[float, float]
    pairs: int
    steps: int
    best_step: int
    already_complete: bool


def train_reward(
    config: Config, inputs: RewardInputs | None = None, display: Display | None = None
) -> RewardSummary:
    """Train the reward model into the folder config.out. Continue where a killed run stopped.

    Ray must be initialised.

    Args:
        inputs: what prepare_reward returned, if it was called.
        display: shows the progress.

    Raises:
        ConfigError: as in prepare_reward, or the cluster lacks the resources.
        ray.train.TrainingFailedError: a worker died. The same call continues from its last
            checkpoint.
    """
    out, training, display = (
        Path(config.out).absolute(),
        config.reward_training,
        display or Display(),
    )
    inputs = inputs or prepare_reward(config)
    if inputs is None:
        display.say(f"reward model {out} is already complete")
        return _summary(out, already_complete=True)
    use_gpu, splits = _check_workers(config), inputs.splits
    for note in inputs.notes():
        display.say(note)
    test = splits.test[: training.test_pairs]
    kept = {**settings_of(config), READING: inputs.reading.template}
    write_record(out / WORK / SETTINGS_FILE, kept)
    job = {
        "config": config.model_dump(mode="json"),
        "backbone": inputs.backbone,
        "reading": asdict(inputs.reading),
        "left_out": dict(splits.left_out),
        "out": str(out),
        "pairs": ray.put(
            (splits.rated or splits.train, splits.validation[: training.eval_pairs], test)
        ),
    }
    if problem := _snapshot_problem(out / WORK / "run"):
        display.say(f"reward model: {problem}; its training starts over")
        shutil.rmtree(out / WORK / "run")
    with following(out / "metrics.jsonl", training.steps, display):
        _run_trainer(job, training.num_workers, use_gpu, out / WORK)
    _move_model(out)
    return _summary(out)


def _snapshot_problem(run: Path) -> str | None:
    """Return why Ray Train (2.60) cannot continue by its list of checkpoints, if it cannot.

    Ray Train overwrites the list in place, so a kill may leave half of it.
    """
    path, there = (
        run / "checkpoint_manager_snapshot.json",
        [folder.name for folder in run.glob("checkpoint_*") if folder.is_dir()],
    )
    try:
        snapshot = json.loads(path.read_bytes())
        named = [
            result["checkpoint_dir_name"]
            for result in (*snapshot["checkpoint_results"], snapshot["latest_checkpoint_result"])
            if result
        ]
    except FileNotFoundError:
        return f"{path} is missing" if there else None
    except (ValueError, KeyError, TypeError):
        return f"{path} cannot be read"
    return next((f"{run / name} is missing" for name in named if name not in there), None)


def _run_trainer(job: dict[str, Any], workers: int, use_gpu: bool, work: Path) -> None:
    trainer = TorchTrainer(
        _train_worker,
        train_loop_config=job,
        scaling_config=ScalingConfig(num_workers=workers, use_gpu=use_gpu),
        run_config=RunConfig(  # type: ignore[call-arg]  # Ray 2.60 shows type checkers the class of its old API
            name="run",
            storage_path=str(work),
            checkpoint_config=CheckpointConfig(num_to_keep=1),
            logging_config=LoggingConfig(log_level="CRITICAL"),
            worker_runtime_env={
                "env_vars": {"TOKENIZERS_PARALLELISM": "false", **({} if use_gpu else CPU_ENV)}
            },
        ),
    )
    try:
        trainer.fit()
    except WorkerGroupError as error:
        for failure in error.worker_failures.values():
            if wrong := _config_error(failure):
                raise wrong from None
        raise


def _train_worker(job: dict[str, Any]) -> None:
    """Train, validate and checkpoint in each worker. The first tests and writes the model."""
    config, context, out = (
        Config.model_validate(job["config"]),
        ray.train.get_context(),
        Path(job["out"]),
    )
    settings, first, world = (
        config.reward_training,
        context.get_world_rank() == 0,
        context.get_world_size(),
    )
    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(config.cluster.threads or max(1, cores // context.get_local_world_size()))
    train, validation, test = ray.get(job["pairs"])
    trainer = PairTrainer(
        settings,
        job["backbone"],
        train,
        config.seed,
        get_device(),
        config.trust_remote_code,
        context.get_world_rank(),
        world,
        _parallel,
        config.preferences.margin,
        Reading(**job["reading"]),
    )
    fault = _resume(trainer)
    metrics = out / "metrics.jsonl"
    if first:
        rows = [row for row in read_jsonl(metrics) if row.get("step", math.inf) <= trainer.step]
        faults = [text for text in (fault, _lost_rows(metrics, rows, trainer.step)) if text]
        write_jsonl(metrics, [*rows, *({"step": trainer.step, "fault": text} for text in faults)])
    while trainer.step < settings.steps:
        row = trainer.update()
        if first:
            append_jsonl(metrics, row)
        if trainer.step % settings.eval_every == 0 or trainer.step == settings.steps:
            _validate(trainer, validation, out, first)
    if first:
        _test_and_export(trainer, test, job["left_out"], config, out / WORK / "model")
    # The report is also a barrier: no worker leaves before the model is written.
    ray.train.report({"step": trainer.step})


def _resume(trainer: PairTrainer) -> str | None:
    """Load the last checkpoint, if there is one. Return why it could not be used, if so.

    Every worker reads the same checkpoint, and comes to the same result.
    """
    if (checkpoint := ray.train.get_checkpoint()) is None:
        return None
    try:
        with checkpoint.as_directory() as folder:
            check_sealed(Path(folder))
            trainer.load(Path(folder))
    except (DamagedError, FileNotFoundError) as error:
        return f"{error}; the training starts over"
    return None


def _lost_rows(metrics: Path, rows: Sequence[dict[str, Any]], steps: int) -> str:
    """Return in words which finished steps the file lacks, or "" where it has them all."""
    lost = set(range(1, steps + 1)) - {row["step"] for row in rows if "loss" in row}
    return (
        f"{metrics} lacks {len(lost)} of the first {steps} steps; how the training went there is"
        " not known any more"
        if lost
        else ""
    )


def _parallel(model: Any) -> Any:
    if ray.train.get_context().get_world_size() == 1:
        return model
    # Buffers are not broadcast, because several forward passes precede one backward pass.
    return prepare_model(model, parallel_strategy_kwargs={"broadcast_buffers": False})


def _validate(trainer: PairTrainer, pairs: Sequence[Preference], out: Path, first: bool) -> None:
    if not first:
        ray.train.report({"step": trainer.step})
        return
    row = trainer.validate(pairs)
    with tempfile.TemporaryDirectory(dir=out / WORK) as folder:
        trainer.save(Path(folder))
        seal(Path(folder))
        ray.train.report(row, checkpoint=Checkpoint.from_directory(folder))
    append_jsonl(out / "metrics.jsonl", row)


def _test_and_export(
    trainer: PairTrainer,
    test: Sequence[Preference],
    left_out: dict[str, int],
    config: Config,
    folder: Path,
) -> None:
    trainer.take_best()
    chosen, rejected = trainer.scores(test)
    correct = (chosen > rejected).tolist()
    shutil.rmtree(folder, ignore_errors=True)
    trainer.export(folder)
    seal(folder)
    report = {
        "accuracy": sum(correct) / len(correct),
        "accuracy_ci": accuracy_interval(test, correct),
        "pairs": len(correct),
        "backbone": config.reward_training.backbone,
        "steps": config.reward_training.steps,
        "best_step": trainer.best_step,
        "validation": trainer.history,
        "settings": settings_of(config),
        "reading": asdict(trainer.reading),
        "left_out": left_out,
    }
    write_record(folder / REWARD_FILE, report)


def _move_model(out: Path) -> None:
    """Move the finished model's files into their folder, reward.json last.

    The folder counts as complete once it has reward.json.
    """
    files = sorted(
        (out / WORK / "model").iterdir(),
        key=lambda path: (path.name == REWARD_FILE, path.name == MANIFEST),
    )
    for path in files:
        path.replace(out / path.name)
    shutil.rmtree(out / WORK)


def _summary(out: Path, already_complete: bool = False) -> RewardSummary:
    stored = json.loads((out / REWARD_FILE).read_text())
    low, high = stored["accuracy_ci"]
    return RewardSummary(
        out,
        stored["accuracy"],
        (low, high),
        stored["pairs"],
        stored["steps"],
        stored["best_step"],
        already_complete,
    )


def _check_workers(config: Config) -> bool:
    """Return whether the workers get GPUs. Raise ConfigError if the cluster is too small."""
    training, cluster = config.reward_training, ray.cluster_resources()
    workers = training.num_workers
    use_gpu = training.use_gpu if training.use_gpu is not None else cluster.get("GPU", 0) >= 1
    resource = "GPU" if use_gpu else "CPU"
    if cluster.get(resource, 0) < workers:
        raise ConfigError(
            f"reward_training.num_workers={workers} needs {workers} {resource}s, the cluster has"
            f" {cluster.get(resource, 0):g}; lower num_workers or set reward_training.use_gpu"
        )
    return use_gpu


def _config_error(failure: BaseException | None) -> ConfigError | None:
    """Return the ConfigError that a worker raised, without Ray's wrapping."""
    while failure is not None and not isinstance(failure, ConfigError):
        failure = (
            getattr(failure, "_base_exc", None)
            or getattr(failure, "cause", None)
            or failure.__cause__
        )
    return failure
