"""Tests that a run of an earlier sampler is marked wherever its front is shown.

It is not continued.
"""

import json
import shutil
from pathlib import Path

import pytest
from tiny_run import Listener, as_of_before, tiny_config

from raywarp.cli.commands import main
from raywarp.config.load import parse_config, to_yaml
from raywarp.config.schema import Config, ConfigError
from raywarp.report.data import report_data
from raywarp.report.page import build
from raywarp.run.card import marked
from raywarp.run.config_file import saved_form, saved_sampler
from raywarp.run.folder import Run, read_mark
from raywarp.storage import sealed
from raywarp.storage.location import Storage

ROUNDED = "Sampled from rounded weights"


def old(run: Run, folder: Path, **changes: str | None) -> Path:
    """A copy without the adapters, as an earlier version would have left it."""
    copy = shutil.copytree(run.folder, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return as_of_before(Path(copy), **changes)  # type: ignore[arg-type]


def config_of(run: Run, out: Path, model: Path) -> Config:
    return tiny_config(
        run.folder.parent, model, out, control={"function": "raywarp.embedded:vader"}
    )


def test_a_run_of_this_version_says_so_in_three_places_and_has_no_mark(
    tiny_finished: Run, tmp_path: Path
) -> None:
    assert saved_sampler((tiny_finished.folder / "config.yaml").read_bytes()) == 1
    assert saved_sampler(saved_form(Config()).encode()) == 1
    assert sealed.read_record(tiny_finished.folder / "front.json")["sampler"] == 1  # type: ignore[index]
    assert [row["sampler"] for row in tiny_finished.events() if row["event"] == "started"] == [1]
    assert read_mark(Storage(tiny_finished.folder)) is None
    assert report_data(str(tiny_finished.folder))["mark"] is None
    for names in (
        ["config.yaml", "front.json"],
        ["config.yaml", "events.jsonl"],
        ["front.json", "events.jsonl"],
    ):
        folder = Path(shutil.copytree(tiny_finished.folder, tmp_path / names[0] / names[1]))
        for name in names:
            (folder / name).unlink()
        assert read_mark(Storage(folder)) is None, names  # one of them is enough


@pytest.mark.parametrize(
    ("dtype", "adapter", "level", "title"),
    [
        ("bfloat16", "merged", "warning", ROUNDED),
        ("bfloat16", "lora", "warning", "Sampled in part from rounded weights"),
        (None, "", "warning", "Perhaps sampled from rounded weights"),
        ("float32", "merged", "note", "Sampled by an earlier version"),
        ("float32", "lora", "note", "Sampled by an earlier version"),
    ],
)
def test_an_old_run_is_marked_by_what_was_rounded(
    tiny_finished: Run, tmp_path: Path, dtype: str | None, adapter: str, level: str, title: str
) -> None:
    folder = old(tiny_finished, tmp_path / "run", dtype=dtype, adapter=adapter)
    data = report_data(str(folder))
    assert data["missing"] == []
    first, *others = data["findings"]
    assert (first["level"], first["title"], data["mark"]) == (level, title, title)
    assert others == report_data(str(tiny_finished.folder))["findings"]
    assert ("reward and KL of a point belong to two policies" in first["text"]) == (
        level == "warning"
    )
    assert data["front"]["points"] == tiny_finished.front()["points"]
    assert title.encode() in build([str(folder)])
    display = Listener()
    display.front(Run(folder))
    assert f"{level}: {title.lower()}." in display.text()


def test_an_old_run_that_never_came_to_a_front_is_marked_by_its_configuration(
    tiny_finished: Run, tmp_path: Path
) -> None:
    for dtype, title in (
        ("float32", "Sampled by an earlier version"),
        ("bfloat16", "Perhaps sampled from rounded weights"),
    ):
        folder = old(tiny_finished, tmp_path / dtype, dtype=dtype)
        (folder / "front.json").unlink()
        assert report_data(str(folder))["findings"][0]["title"] == title
    (folder / "config.yaml").unlink()
    assert (
        report_data(str(folder))["findings"][0]["title"] == "Perhaps sampled from rounded weights"
    )
    (folder / "events.jsonl").unlink()
    assert read_mark(Storage(folder)) is None  # nothing is left that could say so


def test_a_flipped_bit_makes_no_old_run(tmp_path: Path) -> None:
    config, said = parse_config({"out": str(tmp_path)}), list[str]()
    run = Run(tmp_path)
    run.save_config(config)
    run.add_metrics({"step": 0})
    path = tmp_path / "config.yaml"
    path.write_bytes(path.read_bytes().replace(b"# sampler version: 1", b"# sampler version: 0"))
    Run.open(config, said.append)
    assert "is not what was written; written anew" in said[0]


def test_several_runs_are_marked_each_by_itself(tiny_finished: Run, tmp_path: Path) -> None:
    page = build([str(tiny_finished.folder), str(old(tiny_finished, tmp_path / "run"))])
    data = json.loads(page.partition(b'id="data">')[2].partition(b"</script>")[0])
    assert [run["mark"] for run in data["runs"]] == [None, ROUNDED]


@pytest.mark.parametrize("command", ["train", "tune"])
def test_an_old_run_is_not_continued(
    tiny_finished: Run,
    tiny_llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    no_ray: None,
    command: str,
) -> None:
    monkeypatch.chdir(tiny_finished.folder.parent)
    config = config_of(tiny_finished, tmp_path / "out", tiny_llama)
    (tmp_path / "my.yaml").write_text(to_yaml(config.model_copy(update={"dtype": "bfloat16"})))
    place, sweep = tmp_path / "out", ["tune={warp.ema_rate: {grid: [0.01, 0.1]}}"]
    folder = old(tiny_finished, place if command == "train" else place / "trials" / "0123")
    if command == "tune":
        shutil.copy(folder / "config.yaml", place)
    before = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
    arguments = [command, str(tmp_path / "my.yaml"), *(sweep if command == "tune" else [])]
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert (
        "it was sampled by an earlier version of raywarp, whose policies were rounded to bfloat16"
        " when they were sampled" in said
    )
    assert "choose another out" in said
    assert {path: path.read_bytes() for path in place.rglob("*") if path.is_file()} == before
    shutil.rmtree(folder)
    with pytest.raises(pytest.fail.Exception, match="Ray would have started"):
        main(arguments)


def test_an_old_float32_run_is_not_continued_either_and_the_reason_is_another(
    tiny_finished: Run, tiny_llama: Path, tmp_path: Path
) -> None:
    folder = old(tiny_finished, tmp_path / "run", dtype="float32")
    with pytest.raises(
        ConfigError,
        match=(
            "whose policies this version does not continue .its weights were float32, and were not"
            " rounded"
        ),
    ):
        Run.open(config_of(tiny_finished, folder, tiny_llama))


def test_a_start_of_before_that_sampled_nothing_is_no_old_run(
    tiny_finished: Run, tiny_llama: Path, tmp_path: Path
) -> None:
    folder = old(tiny_finished, tmp_path / "run", dtype="float32")
    for name in ("metrics.jsonl", "front.json", "timing.json"):
        (folder / name).unlink()
    shutil.rmtree(folder / "iterations")
    Run.open(config_of(tiny_finished, folder, tiny_llama))


def test_a_card_has_its_mark_below_the_title(tiny_finished: Run, tmp_path: Path) -> None:
    mark = read_mark(Storage(old(tiny_finished, tmp_path / "run")))
    assert mark is not None
    text = (tiny_finished.folder / "adapter" / "README.md").read_text()
    head, _, rest = marked(text, mark).partition(f"\n\n> **{ROUNDED}.** {mark.text}")
    assert head + rest == text
    assert head.splitlines()[-1].startswith("# ")
    assert marked("no title", mark).startswith("no title\n\n> **")
