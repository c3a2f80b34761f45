"""Loading a configuration: a YAML file, `key=value` overrides, and the help of every key.

An error about an unknown key names the nearest known one.
"""

import copy
import difflib
import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from raywarp.config.callables import named
from raywarp.config.rewards import RewardConfig, RewardLoraConfig
from raywarp.config.schema import Config, ConfigError
from raywarp.config.secrets import keys_with_secrets, redact
from raywarp.config.strict_yaml import StrictYamlError, load_yaml
from raywarp.config.tune import TuneConfig

SHOWN = 80  # the most characters of a wrong value in a message


def load_config(
    source: str | Path | Mapping[str, Any] | None = None, overrides: Sequence[str] = ()
) -> Config:
    """Read a configuration, apply `a.b=value` overrides, and validate it.

    Args:
        source: a YAML file or a nested mapping; None stands for the defaults.
        overrides: of the form `a.b=value`.

    Raises:
        ConfigError: an unreadable file, an unknown key (the message names the nearest one), or a
            value out of range.
    """
    if isinstance(source, Mapping):
        try:
            tree = copy.deepcopy(named(source))
        except ValueError as error:
            raise ConfigError(f"the reward function {error}") from None
    else:
        tree = _read_yaml(source) if source is not None else {}
    for override in overrides:
        _apply_override(tree, override)
    return parse_config(tree)


def _read_yaml(path: str | Path) -> dict[str, Any]:
    try:
        loaded = load_yaml(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the config {path}: {error}") from None
    except StrictYamlError as error:
        raise ConfigError(f"the config {path}: {error}") from None
    if loaded in (None, {}):
        raise ConfigError(f"the config {path} is empty; `raywarp train --help` lists the keys")
    if not isinstance(loaded, dict):
        raise ConfigError(
            f"the config {path} must hold keys and values, not a {type(loaded).__name__}"
        )
    return loaded


def parse_config(tree: dict[str, Any]) -> Config:
    """Validate a nested dict; see load_config for the errors."""
    if secret := next(keys_with_secrets(tree), None):
        raise ConfigError(
            f"{secret} holds credentials, and a configuration is saved with its run: take them out,"
            " and set the environment variables that the service reads (AWS_ACCESS_KEY_ID and"
            " AWS_SECRET_ACCESS_KEY, GOOGLE_APPLICATION_CREDENTIALS, HF_TOKEN)"
        )
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("\n".join(dict.fromkeys(_explain(e) for e in error.errors()))) from None


def to_yaml(config: Config) -> str:
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def known_keys(section: type[BaseModel] = Config, prefix: str = "") -> Iterator[str]:
    """Yield all dotted keys of the configuration, sections included."""
    for name, field in section.model_fields.items():
        yield prefix + name
        for inner in section_types(field.annotation):
            yield from known_keys(inner, f"{prefix}{name}.")


@functools.cache
def config_help() -> str:
    """Return every key with its default and description, for --help."""
    lines = ["keys and their defaults:"]
    for key, field in _fields(Config):
        default = "" if field.default is None else f" [{compact(field.default)}]"
        lines.append(f"  {key}{default}: {field.description}")
    return "\n".join(lines).replace("%", "%%")


def compact(value: Any) -> str:
    """Return a value as one line of YAML."""
    plain = value.model_dump(exclude_none=True) if isinstance(value, BaseModel) else value
    return yaml.safe_dump(plain, default_flow_style=True, width=1000).replace("\n...", "").strip()


def _fields(section: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield dotted key → field, for the keys that have a description.

    A section is searched for keys where it has no description itself, or is one of _EXPLAINED.
    """
    for name, field in section.model_fields.items():
        if field.description:
            yield prefix + name, field
        inner = [
            kind
            for kind in section_types(field.annotation)
            if not field.description or kind in _EXPLAINED
        ]
        for kind in inner:
            yield from _fields(kind, f"{prefix}{name}.")


# Sections whose key has a description, as have the keys in them.
_EXPLAINED = (
    RewardConfig,
    RewardLoraConfig,
    TuneConfig,
)


def section_types(annotation: Any) -> list[type[BaseModel]]:
    """Return the sections that a key's type allows; a mapping or list of sections is none."""
    kinds = getattr(annotation, "__args__", (annotation,))
    options = () if get_origin(annotation) in (dict, list) else kinds
    return [o for o in options if isinstance(o, type) and issubclass(o, BaseModel)]


# A key that an override sets → its alternative, which is then removed.
_ALTERNATIVES = {
    f"{section}.{one}": other
    for section, pair in {
        "front.choose": ("eta", "max_kl"),
        "reward": ("model", "function"),
        "control": ("model", "function"),
        "prompts": ("dataset", "datasets"),
    }.items()
    for one, other in (pair, pair[::-1])
}


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(
            f"override {_shown(redact(override))} is not of the form key=value, for example"
            " warp.steps=20"
        )
    try:
        value = load_yaml(text)
    except StrictYamlError as error:
        raise ConfigError(f"the value of {_shown(redact(override))} is wrong: {error}") from None
    # After "tune." stands any key that is searched, as one name; see search.py.
    of_tune = key.startswith("tune.")
    if key not in set(known_keys()) and not of_tune:
        raise ConfigError(unknown(key))
    node = tree
    *path, leaf = key.split(".", 1 if of_tune else -1)
    for part in path:
        child = node.get(part)
        if not isinstance(child, dict):
            child = node[part] = {}
        node = child
    if key in _ALTERNATIVES:
        node.pop(_ALTERNATIVES[key], None)
    node[leaf] = value


def unknown(key: str) -> str:
    """Return the message about an unknown key."""
    keys = list(known_keys())
    leaf = key.rsplit(".", 1)[-1]
    same_leaf = [k for k in keys if k.rsplit(".", 1)[-1] == leaf]
    by_leaf = {k.rsplit(".", 1)[-1]: k for k in reversed(keys)}
    near = same_leaf or difflib.get_close_matches(key, keys, n=1, cutoff=0.6)
    near = near or [
        by_leaf[m] for m in difflib.get_close_matches(leaf, list(by_leaf), n=1, cutoff=0.5)
    ]
    hint = f"; did you mean '{near[0]}'?" if near else "; `raywarp train --help` lists the keys"
    return f"unknown key '{key}'{hint}"


def _explain(error: Any) -> str:
    # The parts of `loc` that name a union's member are left out.
    key = ".".join(
        str(part) for part in error["loc"] if not set(str(part)) & set("[(-") and part != "str"
    )
    if error["type"] == "extra_forbidden":
        return unknown(key)
    key = key.replace("tune.space.", "tune.")  # the user may write it without `space`
    message = error["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    given = (
        "" if isinstance(error["input"], dict | BaseModel) else f" (got {_shown(error['input'])})"
    )
    return f"{key}: {message}{given}" if key else message


def _shown(value: Any) -> str:
    """Return a value as it appears in a message.

    Python refuses to print integers of thousands of digits, so their size is given instead.
    """
    if isinstance(value, int) and abs(value) > 10**SHOWN:
        return f"an integer of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= SHOWN else text[: SHOWN - 1] + "…"
