"""Tests of rows as they lie in files: CSV text stays text, and folders of save_to_disk are read."""

from pathlib import Path
from typing import Any

import datasets
import pytest

from raywarp.config.schema import ConfigError
from raywarp.data.rows import load_rows


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.parametrize("folder", [False, True])
def test_csv_text_stays_text(folder: bool, tmp_path: Path) -> None:
    """Also where only a late row shows that a column is text; numbers stay numbers."""
    place = tmp_path / "set"
    place.mkdir()
    path = place / "train.csv"
    head = "text,answer,count,rating,late,maybe,sure,empty\n"
    rows = ["NA,007,7,1.5,1,2,True,\n", "null,12,-3,2,2,,False,\n", ",,0,1e-3,3,4,True,\n"]
    path.write_text(head + "".join(rows) + '"a, b",x,1,2.25,nan,5,True,\n')
    found = load_rows(str(place if folder else path))
    assert {name: list(found[name]) for name in found.column_names} == {
        "text": ["NA", "null", None, "a, b"],
        "answer": ["007", "12", None, "x"],
        "count": [7, -3, 0, 1],
        "rating": [1.5, 2.0, 0.001, 2.25],
        "late": ["1", "2", "3", "nan"],
        "maybe": [2.0, None, 4.0, 5.0],
        "sure": [True, False, True, True],
        "empty": [None] * 4,
    }


@pytest.mark.parametrize(
    ("cells", "wanted"),
    [
        (["007", "010"], ["007", "010"]),
        (["+1", "2"], ["+1", "2"]),
        (["1_000", "2"], ["1_000", "2"]),
        (["None", "n/a"], ["None", "n/a"]),
        (["inf", "1.0"], ["inf", "1.0"]),
        (["1" * 30, "2"], ["1" * 30, "2"]),
        (["true", "false"], ["true", "false"]),
        (["3", "4"], [3, 4]),
    ],
)
def test_what_of_a_csv_is_a_number(cells: list[str], wanted: list[Any], tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text,answer\n" + "".join(f"a film,{cell}\n" for cell in cells))
    assert list(load_rows(str(path))["answer"]) == wanted


def test_folders_of_save_to_disk(tmp_path: Path) -> None:
    one = datasets.Dataset.from_dict({"text": ["a b", "c d"]})
    other = datasets.Dataset.from_dict({"text": ["e"]})
    one.with_format("numpy").save_to_disk(tmp_path / "single")
    datasets.DatasetDict(train=one, test=other).save_to_disk(tmp_path / "several")
    assert load_rows(str(tmp_path / "single"))[:] == {"text": ["a b", "c d"]}
    assert load_rows(str(tmp_path / "several"), split="test").to_list() == other.to_list()
    for name, split, message in (
        ("single", "test", r'Unknown split "test"\. Should be one of \[\'train\'\]'),
        ("several", "dev", r"\['test', 'train'\]"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_rows(str(tmp_path / name), split=split)
    with pytest.raises(ConfigError, match="has no subset, and name=main"):
        load_rows(str(tmp_path / "single"), "main")
