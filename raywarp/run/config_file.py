"""A run's config.yaml: writing it, reading it, and comparing it with another configuration."""

import hashlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

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

    Only keys that decide what is trained count.

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
        and before.get(key) != value
        and (before.get(key), value) != (_FORMER.get(key), None)
    ]


_WHOLE = {"prompts.template_kwargs"}  # keys that take any mapping


def flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted keys and their values."""
    for key, value in tree.items():
        if isinstance(value, Mapping) and prefix + key not in _WHOLE:
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
