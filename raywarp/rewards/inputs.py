"""Inputs of a reward model's training, and the check whether its folder already holds a model."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raywarp.config.schema import Config, ConfigError
from raywarp.data.models import check_tensors, check_weights, read_model_config
from raywarp.data.preferences import PreferenceSplits, load_preferences
from raywarp.data.prompts import resolve_model
from raywarp.rewards.classifier import load_tokenizer
from raywarp.rewards.score import REWARD_FILE, check_trained
from raywarp.storage.location import Storage
from raywarp.storage.sealed import MANIFEST, DamagedError, read_record

SETTINGS_FILE = "settings.json"
WORK = ".ray_train"  # a folder inside the model's folder, removed at success
# Keys that may change without making it another model.
FREE_KEYS = {
    "reward_training.num_workers",
    "reward_training.use_gpu",
    "reward_training.sft_completions",
}


@dataclass(frozen=True)
class RewardInputs:
    """The checked inputs of a reward model's training.

    Attributes:
        backbone: a hub id or an absolute folder, since Ray Train's workers run in their own folder.
        splits: the preference pairs.
    """

    backbone: str
    splits: PreferenceSplits


def prepare_reward(config: Config) -> RewardInputs | None:
    """Check all inputs of the training. Return None where config.out holds the finished model.

    Raises:
        ConfigError: an input is wrong, or the folder holds another model.
    """
    out, settings, training = (
        Storage(config.out).folder,
        settings_of(config),
        config.reward_training,
    )
    if out is None:
        raise ConfigError(
            f"out={config.out}: a reward model is trained into a folder, which every node must"
            " reach; set out to one"
        )
    if (stored := _finished(out)) is not None:
        _refuse_other(out, stored["settings"], settings)
        return None
    if out.exists() and not out.is_dir():
        raise ConfigError(f"out={config.out} is a file; it must be a folder")
    if (begun := _begun(out)) is not None:
        _refuse_other(out, begun, settings)
    elif (out / "config.json").exists():
        raise ConfigError(
            f"out={config.out} holds a model that raywarp did not train; choose another folder"
        )
    if training.batch_size % training.num_workers:
        raise ConfigError(
            f"reward_training.batch_size={training.batch_size} is not a multiple of"
            f" reward_training.num_workers={training.num_workers}"
        )
    return RewardInputs(_check_backbone(config), load_preferences(config.preferences, config.seed))


def settings_of(config: Config) -> dict[str, Any]:
    """Return the settings that decide the trained weights, by dotted key, as JSON values."""
    sections = {"preferences": config.preferences, "reward_training": config.reward_training}
    flat = {
        f"{name}.{key}": value
        for name, section in sections.items()
        for key, value in section.model_dump(mode="json").items()
    }
    return {"seed": config.seed} | {
        key: value for key, value in flat.items() if key not in FREE_KEYS
    }


def _refuse_other(out: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key):
            raise ConfigError(
                f"{out} holds a reward model trained with {key}={old.get(key)}, and now"
                f" {key}={new.get(key)}; set out to another folder, or delete this one"
            )


def _finished(out: Path) -> dict[str, Any] | None:
    """Return reward.json of a finished model, or None.

    A damaged model is reported, and loses the files that mark it as finished.
    """
    try:
        return check_trained(out)
    except DamagedError as error:
        print(f"reward model: {error}; trained again", flush=True)
        for name in (MANIFEST, REWARD_FILE, "config.json"):
            (out / name).unlink(missing_ok=True)
        return None


def _begun(out: Path) -> dict[str, Any] | None:
    """Return the settings of a training that has begun. Without them it starts over."""
    path = out / WORK / SETTINGS_FILE
    try:
        if (settings := read_record(path)) or not (out / WORK / "run").is_dir():
            return settings
        problem = f"{path} is missing"
    except DamagedError as error:
        problem = str(error)
    print(f"reward model: {problem}; its training starts over", flush=True)
    shutil.rmtree(out / WORK)
    return None


def _check_backbone(config: Config) -> str:
    what = f"reward_training.backbone={config.reward_training.backbone}"
    name = resolve_model(config.reward_training.backbone, what="reward_training.backbone")
    settings = read_model_config(name, config.trust_remote_code, what)
    check_weights(name, what)
    from transformers import AutoModelForSequenceClassification

    auto, options = (
        AutoModelForSequenceClassification,
        {"num_labels": 1, "trust_remote_code": config.trust_remote_code},
    )
    check_tensors(auto, name, settings, what, new_head=True, **options)
    load_tokenizer(name, config.trust_remote_code)
    return name
