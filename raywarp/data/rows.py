"""Rows of a dataset: from the hub, a local file or folder, or what `save_to_disk` wrote."""

import glob
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from raywarp.config.datasets import SNIPPETS
from raywarp.config.field_types import Cells
from raywarp.config.schema import ConfigError
from raywarp.data import embedded

if TYPE_CHECKING:
    import datasets

FORMATS = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".csv": "csv"}
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
SAVED = ("state.json", "dataset_dict.json")  # in a folder of save_to_disk, of one split or several
# What of a CSV file is a number: text that a number prints as again, "7" but not "007".
_WHOLE = re.compile(r"0|-?[1-9]\d{0,17}")
_DECIMAL = re.compile(r"-?(0|[1-9]\d{0,14})(\.\d{1,17})?([eE][+-]?\d{1,3})?")
_SHOWN = 8  # of a column's values, in a message
_CHUNK = 50_000  # rows of a CSV file that are looked at together


def is_path(name: str) -> bool:
    """Return whether a name that does not exist here is a path rather than a hub id.

    It is one if its first folder exists here, or if it cannot be an id.
    """
    first = name.partition("/")[0]
    return (
        not HUB_ID.fullmatch(name)
        or first in (".", "..", "~", "runs")
        or ("/" in name and Path(first).is_dir())
    )


def load_rows(dataset: str, name: str | None = None, split: str = "train") -> "datasets.Dataset":
    """Load one split of a dataset.

    Text of a CSV file stays text: "NA", "null" and "007" are what they say. Only an empty cell is
    missing.

    Args:
        dataset: a hub id, a local folder (of files, or of `save_to_disk`), or a local parquet,
            JSONL, JSON or CSV file. A file, and a saved dataset without splits, have only train.
        name: the dataset's configuration (subset).

    Raises:
        ConfigError: it does not exist, cannot be reached or read, has no such subset or split, or
            is empty.
    """
    import datasets  # here, so that a Ray actor that only needs Prompt starts faster

    datasets.disable_progress_bars()
    # The library logs what it raises, with a traceback.
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    if dataset.startswith(embedded.EMBEDDED):
        raise ConfigError(f"unknown embedded dataset '{dataset}'; there is {SNIPPETS}")
    path = Path(dataset).expanduser()
    kind = FORMATS.get(path.suffix)
    if path.is_file() and kind is None:
        raise ConfigError(f"dataset file {dataset} is none of {', '.join(FORMATS)}")
    if not path.exists() and (kind or is_path(dataset)):
        raise ConfigError(f"dataset {dataset} does not exist (in {os.getcwd()})")
    try:
        if any((path / file).is_file() for file in SAVED):
            rows = _saved(path, name, split)
        else:
            rows = _built(dataset, path, kind, name, split)
    # datasets passes errors of pyarrow, pandas, httpx and the hub through unchanged
    except Exception as error:
        reason = " ".join(str(error.__cause__ or error).split())[:400]
        raise ConfigError(f"cannot load split '{split}' of dataset {dataset}: {reason}") from None
    if not len(rows):
        raise ConfigError(f"split '{split}' of dataset {dataset} is empty")
    return rows


def with_values(rows: "datasets.Dataset", where: Cells, dataset: str) -> "datasets.Dataset":
    """Return the rows that have the given values in the given columns.

    Args:
        where: for each column the value, or the values of which one will do.
        dataset: names the rows in messages.

    Raises:
        ConfigError: there is no such column, or no such row.
    """
    if not where:
        return rows
    kept = np.ones(len(rows), dtype=bool)
    for column, value in where.items():
        what = f"prompts.where={{{column}: {json.dumps(value)}}}"
        if column not in rows.column_names:
            raise ConfigError(
                f"{what}: the columns of {dataset} are {', '.join(rows.column_names)}"
            )
        cells = list(rows[column])
        fits = np.array([_is_among(cell, value) for cell in cells])
        if not fits.any():
            held = sorted({json.dumps(cell, default=str)[:40] for cell in cells})
            more = f", … ({len(held)} values)" if len(held) > _SHOWN else ""
            raise ConfigError(
                f"{what}: no row of {dataset} has that; the column holds"
                f" {', '.join(held[:_SHOWN])}{more}"
            )
        kept &= fits
    if not kept.any():
        raise ConfigError(f"prompts.where={where}: no row of {dataset} has all of that")
    return rows.select(np.flatnonzero(kept))


def _is_among(cell: Any, value: Any) -> bool:
    """Return whether a cell is the value, or one of the values; true is not 1."""
    values = value if isinstance(value, list) else [value]
    return any(cell == one and isinstance(cell, bool) == isinstance(one, bool) for one in values)


def _saved(path: Path, name: str | None, split: str) -> "datasets.Dataset":
    """Return one split of what `save_to_disk` wrote."""
    import datasets

    if name is not None:
        raise ValueError(f"a folder of save_to_disk has no subset, and name={name}")
    rows = datasets.load_from_disk(str(path))
    found = rows if isinstance(rows, datasets.DatasetDict) else {"train": rows}
    if split not in found:
        raise ValueError(f'Unknown split "{split}". Should be one of {sorted(found)}.')
    return found[split].with_format(None)  # a saved format would turn values into tensors


def _built(
    dataset: str, path: Path, kind: str | None, name: str | None, split: str
) -> "datasets.Dataset":
    """Return one split of a file, a folder of files, or a dataset of the hub."""
    import datasets

    source: dict[str, Any] = (
        {"path": kind, "data_files": str(path)}
        if path.is_file()
        else {"path": str(path) if path.is_dir() else dataset, "name": name}
    )
    if kind == "csv" and path.is_file():
        source |= _csv_options([str(path)])
    elif path.is_dir() and (
        files := glob.glob(f"{glob.escape(str(path))}/**/*.csv", recursive=True)
    ):
        source |= _csv_options(files)
    return datasets.load_dataset(split=split, **source)


def _csv_options(files: Iterable[str]) -> dict[str, Any]:
    """Return what lets the CSV reader take text as it is, with a type for each column."""
    import datasets

    kinds: dict[str, str] = {}
    for file in files:
        for column, kind in _csv_kinds(file).items():
            kinds[column] = kind if kinds.get(column, kind) == kind else _wider(kinds[column], kind)
    features = datasets.Features({column: datasets.Value(kind) for column, kind in kinds.items()})
    return {"features": features, "keep_default_na": False, "na_values": [""]}


def _wider(one: str, other: str) -> str:
    return "float64" if {one, other} == {"int64", "float64"} else "string"


def _csv_kinds(file: str) -> dict[str, str]:
    """Return the type of each of a CSV file's columns: that of all its cells."""
    import pandas

    kinds: dict[str, str] = {}
    chunks = pandas.read_csv(
        file, dtype=str, keep_default_na=False, na_values=[""], chunksize=_CHUNK
    )
    for chunk in chunks:
        for column in chunk.columns:
            known, cells = kinds.get(column), chunk[column]
            if known != "string":
                found = _cell_kind(cells.dropna().unique(), cells.isna().any())
                kinds[column] = found if known in (None, found) else _wider(known, found)
    return kinds


def _cell_kind(cells: Iterable[str], some_missing: bool) -> str:
    """Return the type of cells; a whole number that may be missing is a float64, as in pandas."""
    cells = list(cells)
    if cells and all(_WHOLE.fullmatch(cell) for cell in cells):
        return "float64" if some_missing else "int64"
    if all(_DECIMAL.fullmatch(cell) for cell in cells):
        return "float64"
    is_bool = not some_missing and all(cell in ("True", "False") for cell in cells)
    return "bool" if is_bool else "string"
