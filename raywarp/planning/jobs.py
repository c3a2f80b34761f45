"""Paths of a run that is a Ray job.

`ray job submit` copies the working directory to a temporary folder on the cluster, and starts the
command there. A relative path in such a job thus leads into the temporary copy.
"""

import json
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from raywarp.cluster.runtime import submission_id
from raywarp.config.load import compact
from raywarp.config.schema import Config, ConfigError
from raywarp.run.config_file import CONFIG_FILE
from raywarp.storage.location import Storage
from raywarp.storage.locks import writable

# A folder of a Ray session (Ray 2.60), where Ray Tune puts the working directories of trials.
_SESSION = re.compile(r"/session_\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d_\d+_\d+(/|$)")
_WRITTEN = ("out", "store")
# Read, and written too: the score's standardisation is kept beside the weights.
_MODELS = ("reward.model", "control.model")
_READ = (
    "model",
    "sft_adapter",
    "reward_training.backbone",
    "prompts.dataset",
    "preferences.dataset",
    "retention.dataset",
)


def in_job() -> bool:
    """Return whether this process is the driver of a Ray job, or was started by one."""
    return submission_id() is not None


def check_paths(config: Config) -> None:
    """Check that the paths a run writes to are usable, as far as their names show.

    In a job they must not be relative, because the job's copy of the working directory is deleted.
    Nor in a worker of Ray, such as a user's own Tune trial, which has a temporary directory.

    Raises:
        ConfigError: `out` or `store` leads through a file, has too long a name or the like. In a
            job, also if one of them, or a reward model's folder, is relative.
    """
    for key in _WRITTEN:
        if (place := _value(config, key)) and (folder := Storage(place).folder):
            with writable(key, place), suppress(FileNotFoundError):
                (folder / CONFIG_FILE).stat()
    if in_job():
        where = "a Ray job it would lie in a temporary copy of the working directory"
        remedy = "cluster/submit.py makes it absolute"
    elif _SESSION.search(os.getcwd()):
        where = "a worker of Ray it would lie in a temporary folder of Ray's session"
        remedy = (
            "trials of Ray Tune stay in the driver's folder with RAY_CHDIR_TO_TRIAL_DIR=0 there"
        )
    else:
        return
    for key, value in _relative(config, _WRITTEN, _MODELS):
        raise ConfigError(
            f"{key}={value} is relative: in {where} ({os.getcwd()}). Give an absolute path that"
            f" every node sees, or a URI such as s3://bucket/run; {remedy}"
        )


def absolute_paths(config: Config) -> list[str]:
    """Return overrides `key=value` that make the configuration's relative paths absolute.

    They are for a cluster on this machine, whose processes see the same files.
    """
    relative = _relative(config, _WRITTEN, (*_MODELS, *_READ))
    found = [
        f"{key}={_absolute(value)}"
        for key, value in relative
        if not key.startswith("rewards.")  # a list has no overrides
    ]
    given = config.prompts.datasets or []
    sources = [source.model_dump(mode="json", exclude_none=True) for source in given]
    if sources != (listed := [_with_absolute(source, "dataset") for source in sources]):
        found.append(f"prompts.datasets={json.dumps(listed)}")
    policies = config.warp.each or []
    if policies != (each := [_of_policy(changes) for changes in policies]):
        found.append(f"warp.each={compact(each)}")
    return found


def _of_policy(changes: dict[str, Any]) -> dict[str, Any]:
    """Return a policy's changes with absolute paths of its datasets."""
    found = _with_absolute(changes, "prompts.dataset")
    if sources := found.get("prompts.datasets"):
        found["prompts.datasets"] = [_with_absolute(source, "dataset") for source in sources]
    return found


def _with_absolute(tree: dict[str, Any], key: str) -> dict[str, Any]:
    """Return a mapping in which the path at a key, if there is one, is absolute."""
    path = tree.get(key)
    return {**tree, key: _absolute(path)} if path and _is_relative(path) else {**tree}


def _absolute(path: str) -> str:
    return os.path.abspath(Path(path).expanduser())


def _is_relative(value: str, written: bool = False) -> bool:
    if not value or "://" in value or value.startswith("embedded:") or os.path.isabs(value):
        return False
    return written or value.startswith((".", "~", "runs/")) or Path(value).exists()


def _relative(
    config: Config, written: tuple[str, ...], read: tuple[str, ...]
) -> Iterator[tuple[str, str]]:
    """Yield the keys whose value is a relative path, and the value.

    A value that is read may also be a hub id. It counts as a path if it exists, or if it begins as
    only a path does.

    Args:
        written: keys of places that a run writes to.
        read: keys of models and datasets that a run reads.
    """
    listed = {f"rewards.{entry.name}.model": entry.model for entry in config.rewards}
    known = {key: _value(config, key) for key in (*written, *read)}
    for key, value in (known | (listed if "reward.model" in read else {})).items():
        if value and _is_relative(value, key in written):
            yield key, value


def _value(config: Config, key: str) -> str | None:
    """Return the value of a dotted key as text; None if it or a section above it is not set."""
    node: object = config
    for part in key.split("."):
        node = getattr(node, part, None)
    return str(node) if node is not None else None
