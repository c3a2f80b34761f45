"""What the page says of a run's configuration: what was asked for, and every setting."""

from collections.abc import Mapping
from typing import Any

from raywarp.config.schema import Config
from raywarp.config.secrets import redact
from raywarp.run.config_file import flat


def planned(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return what the configuration asks for, in the words of the page's head."""
    if not config:
        return None
    warp = warp_of(config)
    names = ("iterations", "policies", "steps", "ema_rate", "liti_rate", "kl_coef")
    reward, listed = config.get("reward") or {}, config.get("rewards") or []
    return {
        **{name: warp.get(name) for name in names},
        "policy_steps": policy_steps(config),
        "model": redact(str(config.get("model", ""))),
        "reward": redact(", ".join(filter(None, map(_source, listed or [reward])))),
        "control": bool(config.get("control")),
    }


def warp_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the section `warp`, with the default of each key that a run did not save."""
    return {**Config().warp.model_dump(), **config.get("warp", {})}


def policy_steps(config: Mapping[str, Any]) -> list[int]:
    """Return how many steps each policy of an iteration takes."""
    warp = warp_of(config)
    changes = warp.get("each") or [{}] * warp["policies"]
    return [own.get("warp.steps", warp["steps"]) for own in changes]


def rows(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return every key with its value, and whether the value differs from the default."""
    default = dict(flat(Config().model_dump(mode="json")))
    return [
        {
            "key": key,
            "value": redact(_setting(value)),
            "changed": key in default and default[key] != value,
        }
        for key, value in flat(config)
        if not isinstance(value, Mapping)
    ]


def _setting(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "–"}[value]
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _source(reward: Mapping[str, Any]) -> str:
    """Return what a reward of a saved configuration scores with, after its name if it has one."""
    source = str(reward.get("model") or reward.get("function") or "")
    name, weight = reward.get("name"), reward.get("weight", 1)
    return f"{weight:g} × {name} ({source})" if name else source
