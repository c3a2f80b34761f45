"""Base + η·ΔW as a model of its own, from folder to folder."""

import json
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, get_args

import torch

from raywarp.adapters.peft import AdapterFile
from raywarp.adapters.peft_config import BASE_QUANTIZE
from raywarp.adapters.recipe import check_liti_rate
from raywarp.adapters.weight_files import inside
from raywarp.baking.base import Base, open_base
from raywarp.baking.card import Baked, baked_card
from raywarp.baking.places import find_places
from raywarp.baking.quantised_base import quantised_tensors
from raywarp.baking.rounding import WRITTEN
from raywarp.baking.weights import BakedWeights
from raywarp.config.schema import ConfigError
from raywarp.storage import sealed
from raywarp.storage.location import is_uri

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
CONFIG, CARD = "config.json", "README.md"
_COPIED = {".json", ".jsonl", ".txt", ".model", ".jinja", ".py", ".tiktoken", ".vocab", ".spm"}
_CODE = {".py", ".jinja"}  # also in folders below
_NOT_COPIED = (CONFIG, "model.safetensors.index.json", "adapter_config.json")
_DTYPE_KEYS = ("dtype", "torch_dtype")


def bake(
    adapter: str | Path,
    out: str | Path,
    liti_rate: float = 1.0,
    dtype: Dtype = "auto",
    base: str | None = None,
    shard_size: float = 5.0,
    trust_remote_code: bool = False,
    allow_different_base: bool = False,
) -> Baked:
    """Write base + η·ΔW as full weights, with config, tokenizer, code and a card.

    Args:
        adapter: a local folder or a hub id.
        out: an empty or new folder.
        liti_rate: η; above 1 extrapolates.
        dtype: of the weights; auto keeps each tensor's own.
        base: folder, hub id or `embedded:` name; by default what the adapter names.
        shard_size: largest size of a weight file, in GB.
        trust_remote_code: whether the base's own code may run.
        allow_different_base: do not compare the base's name with what the adapter names.

    Raises:
        AdapterError: an adapter that is no plain B·A, or not whole.
        ConfigError: a base that it cannot be added to exactly, an `out` that is in use, or no room.
            Nothing is left half-written.
    """
    check_liti_rate(liti_rate)
    if not math.isfinite(shard_size) or shard_size <= 0:
        raise ConfigError(f"a weight file's size must be above 0 GB, not {shard_size}")
    if dtype not in get_args(Dtype):
        raise ConfigError(f"the dtype must be one of {', '.join(get_args(Dtype))}, not {dtype}")
    check_unused(out)
    file = AdapterFile(adapter)
    opened = open_base(file, base, trust_remote_code, allow_different_base)
    places, untied = find_places(opened, file.sizes, file.name)
    file.require_finite()
    asked = None if dtype == "auto" else getattr(torch, dtype)
    quantised = quantised_tensors(file, opened)
    weights = BakedWeights(opened, file, places, liti_rate, asked, quantised)
    with new_model(out) as folder:
        _check_room(folder, weights.size)
        files = weights.write(folder, int(shard_size * 1e9))
        baked = _baked(Path(out), opened, file, liti_rate, weights, files, untied)
        _copy_files(opened, folder)
        _write_config(opened, folder, baked)
        (folder / CARD).write_text(baked_card(baked, opened.config), encoding="utf-8")
    return baked


def _baked(
    out: Path,
    base: Base,
    adapter: AdapterFile,
    rate: float,
    weights: BakedWeights,
    files: int,
    untied: bool,
) -> Baked:
    name = str(weights.dtype).removeprefix("torch.")
    kept = weights.losses.kept()
    return Baked(
        folder=out,
        base=base.name,
        adapter=adapter.name,
        liti_rate=rate,
        dtype=name,
        kept={name: kept.pop(WRITTEN)} | {key: own for key, own in kept.items() if key != name},
        shares={module: own.share for module, own in weights.losses.sums[WRITTEN].items()},
        size=weights.size,
        files=files,
        untied=untied,
        quantize=adapter.config.get(BASE_QUANTIZE) or "none",
    )


def _check_room(folder: Path, size: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < size:
        raise ConfigError(
            f"the model has {size / 1e9:.2f} GB, and {folder.parent} has room for {free / 1e9:.2f}"
        )


def check_unused(out: str | Path) -> None:
    """Raise ConfigError unless `out` is a new or an empty folder."""
    if is_uri(str(out)):
        raise ConfigError(f"--out {out}: a model is written to a folder; copy it from there")
    place = Path(out).expanduser().resolve()
    if reason := sealed.why_in_use(place):
        raise ConfigError(reason)


@contextmanager
def new_model(out: str | Path) -> Iterator[Path]:
    """Yield a folder that becomes `out` if the body succeeds; see storage.sealed.new_files.

    Raises:
        ConfigError: `out` cannot be written.
    """
    place = Path(out).expanduser().resolve()
    try:
        with sealed.new_files(place, last=CONFIG) as folder:
            yield folder
    except OSError as error:
        raise ConfigError(f"cannot write {place}: {error.strerror or error}") from None


def _copy_files(base: Base, folder: Path) -> None:
    """Copy what a model's folder holds besides weights: tokenizer, templates, code, licence."""
    for path in sorted(base.folder.iterdir()):
        legal = path.name.upper().startswith(("LICENSE", "LICENCE", "NOTICE"))
        if path.is_file() and path.name not in _NOT_COPIED and (path.suffix in _COPIED or legal):
            shutil.copyfile(inside(base.folder, path.name, base.what), folder / path.name)
    home = base.folder.resolve()
    own = home.parent.parent if home.parent.name == "snapshots" else home  # the hub's cache links
    for path in sorted(base.folder.glob("*/**/*")):
        place = path.relative_to(base.folder)
        hidden = any(part.startswith((".", "__")) for part in place.parts)
        inside_it = path.resolve().is_relative_to(own)
        if path.is_file() and path.suffix in _CODE and inside_it and not hidden:
            (folder / place).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / place)


def _write_config(base: Base, folder: Path, baked: Baked) -> None:
    """Write config.json: the base's, with the dtype of the weights, and untied where they are."""
    settings = json.loads(json.dumps(base.settings))
    nested = [part for part in settings.values() if isinstance(part, dict)]
    for part in (settings, *nested):
        for key in _DTYPE_KEYS:
            if isinstance(part.get(key), str):
                part[key] = baked.dtype
    if not any(key in settings for key in _DTYPE_KEYS):
        settings["dtype"] = baked.dtype
    if baked.untied:
        for part in (settings, *(part for part in nested if "tie_word_embeddings" in part)):
            part["tie_word_embeddings"] = False
    (folder / CONFIG).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
