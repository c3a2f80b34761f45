"""The adapters that `raywarp front` measures: of any origin, or the policies of a finished run."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raywarp import identity
from raywarp.adapters.merging import open_adapters
from raywarp.adapters.peft import AdapterFile, load_peft
from raywarp.adapters.peft_config import BASE_QUANTIZE
from raywarp.adapters.start import Start, load_start, of_sft
from raywarp.algorithm.averaging import task_vectors
from raywarp.algorithm.deltas import AdapterDelta, aligned, trailing, zeros_like
from raywarp.algorithm.factors import AdapterError
from raywarp.config.load import parse_config
from raywarp.config.schema import Config, ConfigError
from raywarp.planning.inputs import Inputs
from raywarp.planning.sft_adapter import checked_adapter
from raywarp.rollout.transport import digest
from raywarp.run.config_file import CONFIG_FILE, read_saved_config
from raywarp.run.folder import SOURCES_FILE
from raywarp.run.history import fetched, last_iteration
from raywarp.storage import sealed
from raywarp.storage.location import Storage, is_uri

# What a point may not be called after its adapter, since other points have these names.
_TAKEN = ("sft", "slerp", "lerp", "karcher", "liti")


@dataclass(frozen=True)
class Sources:
    """The adapters of a front.

    Attributes:
        names: of the adapters' points.
        places: where each adapter is, as the user gave it.
        init_place: likewise of the init; empty where it is the SFT model.
        init: θ_init − θ_sft.
        policies: the task vectors θ_m − θ_init.
        of_run: whether a run of raywarp trained them.
    """

    names: Sequence[str]
    places: Sequence[str]
    init_place: str
    init: AdapterDelta
    policies: Sequence[AdapterDelta]
    of_run: bool = False

    @property
    def key(self) -> str:
        """A hash of the adapters and the init."""
        return identity.content_key([digest(delta) for delta in (self.init, *self.policies)])

    def json(self) -> dict[str, Any]:
        """Return what names the adapters, as front.json has it."""
        rows = [
            {"name": name, "place": place}
            for name, place in zip(self.names, self.places, strict=True)
        ]
        return {"adapters": rows, **({"init": self.init_place} if self.init_place else {})}


def saved_run(place: str) -> dict[str, Any] | None:
    """Return the saved configuration of the run at a place; None where there is no run.

    Raises:
        ConfigError: the configuration cannot be read.
    """
    if not (is_uri(place) or Path(place).is_dir()):  # a hub id
        return None
    data = Storage(place).read(CONFIG_FILE)
    if data is None:
        return None
    tree = read_saved_config(data)
    if tree is None:
        raise ConfigError(f"{place}/{CONFIG_FILE} is not what was written")
    return tree if "warp" in tree and "lora" in tree else None


def front_config(config: Config, adapters: Sequence[str], init: str | None = None) -> Config:
    """Return the configuration whose model takes these adapters.

    The section `lora` gets their modules and ranks, and one policy actor is enough. A run keeps
    its own.

    Raises:
        ConfigError: there is no adapter, one is no plain LoRA, or they name different bases. A run
            stands with others, or with an init.
    """
    if not adapters:
        raise ConfigError("name at least one adapter, or the folder of a run")
    runs = [place for place in adapters if saved_run(place) is not None]
    if runs and (len(adapters) > 1 or init):
        beside = "other adapters" if len(adapters) > 1 else "an init"
        raise ConfigError(
            f"{runs[0]} is a run, and stands beside {beside}; name the run alone, or one of its"
            f" adapters, such as {runs[0].rstrip('/')}/adapter"
        )
    if runs:
        return config
    try:
        files = open_adapters([*adapters, *([init] if init else [])])
    except AdapterError as error:
        raise ConfigError(str(error)) from None
    modules = sorted(files[0].shapes)
    ranks = [max(rank for _, rank, _ in file.shapes.values()) for file in files]
    lora = config.lora.model_copy(update={"target_modules": modules, "rank": sum(ranks)})
    warp = config.warp.model_copy(
        update={"policies": 1, "iterations": 1, "each": None, "merge_weights": None}
    )
    return config.model_copy(update={"lora": lora, "warp": warp})


def base_of(adapters: Sequence[str]) -> dict[str, str]:
    """Return `model` and `base.quantize` as the adapters' own configuration has them.

    A key that no adapter has is missing.

    Raises:
        ConfigError: see front_config.
    """
    likes = [_opened(place).like() for place in adapters]
    found: dict[str, list[Any]] = {
        "model": [like.base_model for like in likes],
        "base.quantize": [like.peft.get(BASE_QUANTIZE) for like in likes],
    }
    return {key: next(filter(None, own)) for key, own in found.items() if any(own)}


def read_sources(inputs: Inputs, adapters: Sequence[str], init: str | None = None) -> Sources:
    """Read all adapters, and check that they are of the model.

    Raises:
        ConfigError: an adapter holds NaN, or is of another model. A run is not finished.
    """
    start = load_start(inputs.config.sft_adapter)
    if (saved := saved_run(adapters[0])) is not None:
        return _of_run(adapters[0], saved, start)
    whole = [_read(inputs, place, start) for place in (*adapters, *([init] if init else []))]
    whole = aligned(whole, [*adapters, *([init] if init else [])])
    at = whole.pop() if init else zeros_like(whole[0])
    vectors = task_vectors(whole, at) if init else whole
    return Sources(_names(adapters), list(adapters), init or "", at, vectors)


def check_same(folder: Path, sources: Sources, out: str) -> None:
    """Raise ConfigError if the front in a folder is of other adapters.

    Args:
        folder: of the front; it may be new.
        out: names the folder in the error.
    """
    known = sealed.read_record(folder / SOURCES_FILE)
    if known and known["key"] != sources.key:
        places = ", ".join(row["place"] for row in known["adapters"])
        raise ConfigError(
            f"out={out} holds the front of {places}, or of an earlier version of them; choose"
            " another out"
        )


def _opened(place: str) -> AdapterFile:
    try:
        return AdapterFile(place)
    except AdapterError as error:
        raise ConfigError(str(error)) from None


def _read(inputs: Inputs, place: str, start: Start | None) -> AdapterDelta:
    """Return an adapter as a change of the SFT model, in float32."""
    delta = checked_adapter(place, place, inputs.config, inputs.model, inputs.settings).delta
    return task_vectors([delta], start.delta)[0] if start else delta


def _of_run(place: str, saved: Mapping[str, Any], start: Start | None) -> Sources:
    """Return the last iteration of a finished run: its policies, and the init they started from."""
    config, storage = parse_config(dict(saved)), Storage(place)
    done, wanted = last_iteration(storage), config.warp.iterations
    if done < wanted:
        raise ConfigError(
            f"{place} has finished {done} of {wanted} iterations; let `raywarp train` finish it"
        )
    last = f"iterations/{wanted}"
    names: list[str] = json.loads((fetched(storage, last) / "policies.json").read_text())
    found = [fetched(*_place_of(storage, name)) for name in names]
    ranks = [own.policy_rank for own in config.of_policies]
    policies = [
        trailing(of_sft(start, load_peft(own)), rank)
        for own, rank in zip(found, ranks, strict=True)
    ]
    init = of_sft(start, load_peft(fetched(storage, f"{last}/init")))
    titles = [f"policy {m}" for m in range(1, len(names) + 1)]
    places = [name if "/policies/" in name else f"{place.rstrip('/')}/{name}" for name in names]
    return Sources(titles, places, f"{place.rstrip('/')}/{last}/init", init, policies, True)


def _place_of(storage: Storage, name: str) -> tuple[Storage, str]:
    """Return the store of a policy, and its name there, by an entry of policies.json."""
    place, _, key = name.rpartition("policies/")
    return (Storage(place) if place else storage), f"policies/{key}"


def _names(places: Sequence[str]) -> list[str]:
    """Return a short name for each adapter: the last parts of its place, as few as tell them apart.

    An adapter that is given twice has its number behind its name.
    """
    parts = [place.rstrip("/").split("/") for place in places]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(own[-length:]) for own in parts]
        if len(set(names)) == len(names) and not any(
            name.partition(" ")[0] in _TAKEN for name in names
        ):
            return names
    return [f"{name} ({n})" for n, name in enumerate(names, start=1)]
