"""Marks of runs that an earlier version of raywarp sampled: what that means for their results.

Before SAMPLER_VERSION 1, an adapter was added to the engine's weights. In bfloat16 this loses most
of a small change, so reward and KL belonged to two policies. A run names its sampler in
config.yaml, front.json and events.jsonl. A run that names none is older.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from raywarp.run.config_file import SAMPLER_VERSION, read_saved_config, saved_sampler
from raywarp.storage import sealed
from raywarp.storage.sealed import DamagedError


@dataclass(frozen=True)
class Mark:
    """What a person should know about a run from an earlier sampler.

    Attributes:
        level: "warning", or "note" where nothing was rounded.
        title: heading, for a person.
        text: explanation, for a person.
        reason: why the run cannot be continued.
    """

    level: str
    title: str
    text: str
    reason: str


_LOST = (
    "bfloat16 loses what is below half a step of a weight: most of a small change, most of all at a"
    " small η. Completions and rewards are of such rounded policies, and KL is of the adapters as"
    " they are: reward and KL of a point belong to two policies. "
)
_AGAIN = (
    "Do not compare this front with one of this version. To measure it, train again into another"
    " folder."
)
_EARLIER = "it was sampled by an earlier version of raywarp"
_MERGED = Mark(
    "warning",
    "Sampled from rounded weights",
    "An earlier version of raywarp made this run, which sampled from W + ΔW in bfloat16:"
    f" {_LOST}{_AGAIN}",
    f"{_EARLIER}, whose policies were rounded to bfloat16 when they were sampled",
)
_LORA = Mark(
    "warning",
    "Sampled in part from rounded weights",
    "An earlier version of raywarp made this run. It added an iteration's init, and adapters above"
    f" the engine's LoRA rank, to bfloat16 weights: {_LOST}Policies of the first iteration were"
    f" sampled as they are. {_AGAIN}",
    f"{_EARLIER}, whose inits were rounded to bfloat16 when they were sampled",
)
_UNKNOWN = Mark(
    "warning",
    "Perhaps sampled from rounded weights",
    "An earlier version of raywarp made this run, and how it sampled is not known. If it did so"
    f" from W + ΔW in bfloat16, as on CPUs: {_LOST}{_AGAIN}",
    f"{_EARLIER}, whose policies may have been rounded to bfloat16 when they were sampled",
)
_EXACT = Mark(
    "note",
    "Sampled by an earlier version",
    "An earlier version of raywarp made this run, in float32, so no change was lost by rounding:"
    " reward and KL are of the same policies. This version cannot continue it.",
    f"{_EARLIER}, whose policies this version does not continue (its weights were float32, and were"
    " not rounded)",
)


def sampler_mark(config: bytes | None, front: bytes | None, events: bytes | None) -> Mark | None:
    """Return the mark of a run, or None if it needs none.

    A damaged file names no sampler. There is also no mark if nothing is left that could name one.
    This is safe, because no policy of such a run is reused.

    Args:
        config: content of config.yaml; None if it is not there.
        front: content of front.json; None if it is not there.
        events: content of events.jsonl; None if it is not there.
    """
    tree, record = read_saved_config(config or b"") or {}, _record(front)
    starts = [row for row in sealed.parse_jsonl(events or b"") if row.get("event") == "started"]
    said = [
        saved_sampler(config) if config and tree else None,
        *(row.get("sampler") for row in (record, *starts)),
    ]
    known = [version for version in said if isinstance(version, int)]
    if (known and min(known) >= SAMPLER_VERSION) or not (known or tree or record or starts):
        return None
    return _mark(record.get("numerics") or {}, tree)


def _mark(numerics: Mapping[str, Mapping[str, Any]], config: Mapping[str, Any]) -> Mark:
    dtypes = {found.get("dtype") for found in numerics.values()} or {config.get("dtype")}
    adapters = {found.get("adapter") for found in numerics.values()}
    if dtypes == {"float32"}:
        return _EXACT
    if dtypes <= {None, "auto"}:
        return _UNKNOWN
    return _LORA if adapters == {"lora"} else _MERGED if adapters == {"merged"} else _UNKNOWN


def _record(front: bytes | None) -> dict[str, Any]:
    try:
        return sealed.parse_record(front, "front.json") if front is not None else {}
    except DamagedError:
        return {}
