"""A run's config.yaml: how it is written, read again, and told from another run's."""

import hashlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from raywarp.config.load import to_yaml
from raywarp.config.schema import Config

CONFIG_FILE = "config.yaml"
# raise it when what is sampled is another policy than before: older runs are then marked, and not
# continued
SAMPLER_VERSION = 1
_CHECKSUM = "# sha256 of the lines below: "
_SAMPLER = "# sampler version: "
# Keys that change how a run is carried out or looked at, but not what it trains.
_FREE_KEYS = {
    *("out", "store", "cluster", "front", "control", "preferences", "reward_training"),
    *("checkpoint_every", "kl_to_sft_every", "loggers", "tune"),
    *(
        "rollout.workers",
        "rollout.kv_cache_gib",
        "rollout.gpu_memory_utilization",
        "reward.batch_size",
        "reward.timeout_seconds",
    ),
    *("optim.max_tokens_per_microbatch", "optim.gradient_checkpointing"),
}


def saved_form(config: Config) -> str:
    """Behind a first line with its sha256, by which damage is told from another run's
    configuration, and one with its sampler's version.
    """
    text = f"{_SAMPLER}{SAMPLER_VERSION}\n{to_yaml(config)}"
    return f"{_CHECKSUM}{_sha256(text)}\n{text}"


def read_saved_config(data: bytes) -> dict[str, Any] | None:
    """A saved configuration, from its file's content; None if it is damaged."""
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
    """The version of the sampler that a saved configuration names; None where it names none, as it
    did before there was a version.
    """
    found = re.search(rf"^{_SAMPLER}(\d+)$".encode(), data, re.MULTILINE)
    return int(found[1]) if found else None


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def differing_keys(theirs: Mapping[str, Any], config: Config) -> list[str]:
    """What makes a saved configuration another run's: each key that decides what is trained and has
    another value, in words.
    """
    default, now = (dict(flat(one.model_dump(mode="json"))) for one in (Config(), config))
    before = default | dict(flat(theirs))
    return [
        f"{key} is {before.get(key)!r} there and {value!r} here"
        for key, value in now.items()
        if not _FREE_KEYS & {key, key.partition(".")[0]} and before.get(key) != value
    ]


def flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and their values."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
