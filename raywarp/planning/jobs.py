"""A run as a Ray job: `ray job submit` copies the working directory to a temporary folder on the
cluster, and starts the command there.
"""

import json
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from raywarp.config.schema import Config, ConfigError
from raywarp.run.config_file import CONFIG_FILE
from raywarp.storage.location import Storage
from raywarp.storage.locks import writable

_WRITTEN = ("out", "store")
_MODELS = (
    "reward.model",
    "control.model",
)  # the score's standardisation is kept beside the weights
_READ = ("model", "reward_training.backbone", "prompts.dataset", "preferences.dataset")


def in_job() -> bool:
    """Whether this process is a job's driver (or was started by one), as Ray 2.60 tells its
    drivers.
    """
    try:
        return (
            "job_submission_id"
            in json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))["metadata"]
        )
    except (ValueError, KeyError, TypeError):
        return False


def check_paths(config: Config) -> None:
    """What a run writes can lie where it is to, as far as names say; and inside a job not in the
    job's copy of the working directory, which goes away.

    Raises:
        ConfigError: `out` or `store` leads through a file, has too long a name or the like; in a
            job, also if it, or the folder of a reward model, is relative.
    """
    for key in _WRITTEN:
        if (place := _value(config, key)) and (folder := Storage(place).folder):
            with writable(key, place), suppress(FileNotFoundError):
                (folder / CONFIG_FILE).stat()
    if not in_job():
        return
    for key, value in _relative(config, _WRITTEN, _MODELS):
        raise ConfigError(
            f"{key}={value} is relative: in a Ray job it would lie in a temporary copy of the"
            f" working directory ({os.getcwd()}). Give an absolute path that every node sees, or a"
            " URI such as s3://bucket/run; cluster/submit.py makes it absolute"
        )


def absolute_paths(config: Config) -> list[str]:
    """Overrides `key=value` that put what is relative to this working directory where it is now,
    for a cluster on this machine.
    """
    relative = _relative(config, _WRITTEN, (*_MODELS, *_READ))
    return [f"{key}={os.path.abspath(Path(value).expanduser())}" for key, value in relative]


def _relative(
    config: Config, written: tuple[str, ...], read: tuple[str, ...]
) -> Iterator[tuple[str, str]]:
    """Keys whose value is a relative path; what is read may be a hub id as well, and counts if it
    exists or can only be a path.
    """
    for key in (*written, *read):
        value = _value(config, key)
        if not value or "://" in value or value.startswith("embedded:") or os.path.isabs(value):
            continue
        if key in written or value.startswith((".", "~", "runs/")) or Path(value).exists():
            yield key, value


def _value(config: Config, key: str) -> str | None:
    node: object = config
    for part in key.split("."):
        node = getattr(node, part, None)
    return str(node) if node is not None else None
