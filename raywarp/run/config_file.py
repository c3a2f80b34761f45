"""A run's config.yaml: writing it, reading it, and comparing it with another configuration."""

import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from raywarp.cluster.runtime import submission_id
from raywarp.config.load import to_yaml
from raywarp.config.schema import Config

CONFIG_FILE = "config.yaml"
# Raise it when a change makes the sampler sample another policy than before.
# Older runs are then marked, and they are not continued.
SAMPLER_VERSION = 1
# Defaults of earlier versions where the default is now null.
_FORMER = {"reward.max_length": 256}
_CHECKSUM = "# sha256 of the lines below: "
_SAMPLER = "# sampler version: "
# Keys that change how a run is carried out or shown, but not what it trains.
_FREE_KEYS = {
    *("out", "store", "cluster", "front", "control", "preferences", "reward_training"),
    "recipe",
    "retention",
    *("checkpoint_every", "kl_to_sft_every", "loggers", "tune"),
    *(
        "rollout.workers",
        "rollout.kv_cache_gib",
        "rollout.gpu_memory_utilization",
        "rollout.sleep",
        "reward.batch_size",
        "reward.timeout_seconds",
        "reward.concurrency",
        "reward.retries",
        "reward.retry_on",
    ),
    *("optim.max_tokens_per_microbatch", "optim.gradient_checkpointing"),
}


def saved_form(config: Config) -> str:
    """Return the text of config.yaml: its sha256, the sampler version, and the YAML.

    The sha256 tells a damaged file from the configuration of another run.
    """
    text = f"{_SAMPLER}{SAMPLER_VERSION}\n{to_yaml(config)}"
    return f"{_CHECKSUM}{_sha256(text)}\n{text}"


def read_saved_config(data: bytes) -> dict[str, Any] | None:
    """Return a saved configuration from its file's content, or None if it is damaged."""
    try:
        text = data.decode()
        first, _, rest = text.partition("\n")
        if first.startswith(_CHECKSUM) and first != _CHECKSUM + _sha256(rest):
            return None
        theirs = yaml.safe_load(text)
    except (UnicodeDecodeError, yaml.YAMLError):
        return None
    return theirs if isinstance(theirs, dict) else None


def saved_sampler(data: bytes) -> int | None:
    """Return the sampler version that a saved configuration names, or None.

    Configurations from before the first version name none.
    """
    found = re.search(rf"^{_SAMPLER}(\d+)$".encode(), data, re.MULTILINE)
    return int(found[1]) if found else None


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def differing_keys(theirs: Mapping[str, Any], config: Config) -> list[str]:
    """Return, in words, each key whose value makes a saved configuration another run's.

    Only keys that decide what is trained count. A relative path equals the absolute one that it
    leads to, as submit.py writes it.

    Args:
        theirs: the saved configuration. A missing key has its default.
        config: the configuration to compare it with.
    """
    default, now = (dict(flat(one.model_dump(mode="json"))) for one in (Config(), config))
    before = default | dict(flat(theirs))
    return [
        f"{key} is {before.get(key)!r} there and {value!r} here"
        for key, value in now.items()
        if not _FREE_KEYS & {key, key.partition(".")[0]}
        and not _is_same(before.get(key), value)
        and (before.get(key), value) != (_FORMER.get(key), None)
    ]


def _is_same(theirs: Any, ours: Any) -> bool:
    """Return whether two values are equal, or relative and absolute paths of the same file."""
    if isinstance(theirs, list) and isinstance(ours, list) and len(theirs) == len(ours):
        return all(map(_is_same, theirs, ours))
    if isinstance(theirs, Mapping) and isinstance(ours, Mapping):
        return theirs.keys() == ours.keys() and all(_is_same(theirs[k], ours[k]) for k in ours)
    if isinstance(theirs, str) and isinstance(ours, str) and theirs != ours:
        return _is_same_file(theirs, ours) or _is_same_file(ours, theirs)
    return bool(theirs == ours)


def _is_same_file(absolute: str, relative: str) -> bool:
    """Return whether the second path is relative, and leads to the first one.

    A job's working directory is a copy of another one. So only the ends of both must be alike.
    """
    path = Path(relative).expanduser()
    if not os.path.isabs(absolute) or os.path.isabs(relative) or not path.exists():
        return False
    parts = Path(os.path.normpath(path)).parts
    is_copy = submission_id() is not None and Path(absolute).parts[-len(parts) :] == parts
    return os.path.abspath(path) == os.path.normpath(absolute) or is_copy


_WHOLE = {"prompts.template_kwargs"}  # keys that take any mapping


def flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted keys and their values."""
    for key, value in tree.items():
        if isinstance(value, Mapping) and prefix + key not in _WHOLE:
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
