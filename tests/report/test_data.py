"""Tests of the report page's data.

The runs are finished, broken or under way. Some values are worked by hand.
"""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import S3Server
from tiny_run import DAMAGE, copied, files_of

from raywarp.cli.commands import main
from raywarp.report.data import report_data
from raywarp.report.findings import findings, over_optimisation
from raywarp.report.page import build, page_data, render, save_report
from raywarp.report.page_json import plain, to_json
from raywarp.report.series import METRICS, curves, stretches, summary, trajectory
from raywarp.report.texts import clip, departure, sample_texts
from raywarp.report.timeline import SLICES, timeline
from raywarp.report.trajectories import trajectories
from raywarp.run.ceiling import Ceiling
from raywarp.run.folder import Run
from raywarp.run.points import Point
from raywarp.storage import sealed
from raywarp.storage.location import Storage

READ = (
    "config.yaml",
    "metrics.jsonl",
    "events.jsonl",
    "timing.json",
    "front.json",
    "samples.json",
    "iterations/1/geometry.json",
)


def test_a_finished_run_lacks_nothing(tiny_finished: Run) -> None:
    data = report_data(str(tiny_finished.folder))
    assert data["missing"] == []
    assert data["state"]["word"] == "finished"
    assert data["front"]["points"] == tiny_finished.front()["points"]
    assert data["front"]["ceiling"]["reward"] == tiny_finished.front()["ceiling"]["reward"]
    assert data["front"]["ceiling"]["shares"].keys() == {p["name"] for p in data["front"]["points"]}
    assert data["front"]["ceiling"]["said"].startswith("SLERP's front: ")
    assert [(c["iteration"], c["policy"], c["last"]) for c in data["curves"]["curves"]] == [
        (i, m, 5) for i in (1, 2) for m in (1, 2)
    ]
    drawn = {metric["name"] for metric in data["curves"]["metrics"]}
    assert drawn == {
        "reward",
        "kl_anchor",
        "kl_sft",
        "entropy",
        "length",
        "eos_rate",
        "sampler_gap",
        "adapter_effect",
        "engine_gap",
        "grad_norm",
        "flat_groups",
    }
    assert [(way["iteration"], way["policy"], way["held_out"]) for way in data["trajectories"]] == [
        (i, m, True) for i in (1, 2) for m in (1, 2)
    ]
    assert all([point[2] for point in way["points"]] == [0, 3, 6] for way in data["trajectories"])
    assert [(row["iteration"], len(row["blocks"]), row["pairs"]) for row in data["geometry"]] == [
        (1, 2, ["1–2"]),
        (2, 2, ["1–2"]),
    ]
    assert [one["total"] for one in data["training_texts"]] == [6] * 4
    assert {"python", "ray", "torch", "peft"} <= data["versions"].keys()
    assert {"key": "warp.steps", "value": "6", "changed": True} in data["config"]
    assert {"key": "warp.advantage", "value": "rloo", "changed": False} in data["config"]


def test_texts_come_with_their_own_values(tiny_finished: Run) -> None:
    """The reward function counts `good`, so each value can be told from its text."""
    texts = report_data(str(tiny_finished.folder))["texts"]
    assert texts["points"] == ["sft", "policy 1", "policy 2", "lerp", "liti 0.5", "slerp"]
    assert (texts["total"], len(texts["rows"])) == (2, 2)
    for row in texts["rows"]:
        assert row["rewards"] == [text.split().count("good") for text in row["texts"]]
        assert len(row["kl"]) == len(row["control"]) == len(row["texts"]) == 6
        assert row["kl"][0] == 0
        assert row["changed"] == departure(row["texts"][0], row["texts"][4])


def test_every_actor_has_a_lane_and_works_within_the_run(tiny_finished: Run) -> None:
    line = report_data(str(tiny_finished.folder))["timeline"]
    assert list(line["lanes"]) == [
        "policy actor 1",
        "rollout worker 1",
        "reward worker",
        "control worker",
    ]
    assert all(
        len(lane) == SLICES and sum(lane) > 0 and max(lane) <= 1 for lane in line["lanes"].values()
    )
    assert list(line["iterations"]) == ["1", "2", "evaluation"]
    assert line["iterations"]["2"] < line["iterations"]["evaluation"]
    for row in tiny_finished.metrics():
        (asked, sent), (start, end) = row["spans"]["policy actor 1"]
        ((sampling, sampled),) = row["spans"]["rollout worker 1"]
        assert asked <= sent <= start <= end
        assert asked <= sampling + 0.01
        assert sampling <= sampled <= start + 0.01
        assert end - start == pytest.approx(row["update_seconds"], abs=0.002)


@pytest.mark.parametrize("way", DAMAGE)
@pytest.mark.parametrize("name", READ)
def test_a_broken_file_is_named_and_the_rest_is_shown(
    tiny_finished: Run, tmp_path: Path, name: str, way: str
) -> None:
    folder = copied(tiny_finished, tmp_path / "run")
    DAMAGE[way](folder / name)
    data = report_data(str(folder))
    render(page_data([data], "broken"))
    shown = {
        "config.yaml": data["config"],
        "metrics.jsonl": data["curves"],
        "events.jsonl": data["events"],
        "timing.json": data["timing"],
        "front.json": data["front"],
        "samples.json": data["texts"],
        "iterations/1/geometry.json": len(data["geometry"]) == 2,
    }
    assert all(value for other, value in shown.items() if other != name), shown
    # nothing vouches for a line of these: a bit of a number is as good as another
    if way != "flipped" or not name.endswith(".jsonl"):
        assert name in " ".join(data["missing"]), data["missing"]


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        "{}",
        "null",
        "3",
        '"text"',
        '{"points": 3}',
        '[{"prompt": 3}]',
        '{"a": {"norms": [1]}}',
    ],
)
def test_files_of_another_kind_are_survived(
    tiny_finished: Run, tmp_path: Path, content: str
) -> None:
    """Valid JSON, valid checksums where there are any, and none of what should be in it."""
    folder = copied(tiny_finished, tmp_path / "run")
    for name in ("samples.json", "iterations/1/geometry.json"):
        (folder / name).write_text(content)
    for name in ("metrics.jsonl", "events.jsonl"):
        (folder / name).write_text(
            f'{content}\n{{"iteration": 1, "policy": 1, "step": 0, "spans": {{"a": 3}}, "reward":'
            ' "high", "event": 4}\n'
        )
    value = json.loads(content)
    for name in ("front.json", "timing.json"):
        sealed.write_record(
            folder / name,
            value if isinstance(value, dict) else {"points": value, "iterations": value},
        )
    render(page_data([report_data(str(folder))], "strange"))


def test_a_run_under_way_says_what_is_not_there_yet(tiny_finished: Run, tmp_path: Path) -> None:
    folder = copied(tiny_finished, tmp_path / "run")
    for name in ("front.json", "samples.json", "timing.json"):
        (folder / name).unlink()
    shutil.rmtree(folder / "iterations" / "2")
    rows = [row for row in tiny_finished.metrics() if row["iteration"] == 1 or row["step"] < 2]
    sealed.write_jsonl(folder / "metrics.jsonl", rows)
    sealed.write_jsonl(folder / "events.jsonl", tiny_finished.events()[:1])
    data = report_data(str(folder))
    assert data["state"]["word"] in ("running", "silent")
    assert data["missing"] == [
        "front.json is missing: the front is measured after the last iteration.",
        "Iteration 2: 2, 2 of 6 steps of its policies are done.",
    ]
    assert len(data["curves"]["curves"]) == 4
    sealed.write_jsonl(
        folder / "events.jsonl", [{"time": "2020-01-01T00:00:00+00:00", "event": "started"}]
    )
    sealed.write_jsonl(folder / "metrics.jsonl", [])
    assert report_data(str(folder))["state"]["word"] == "silent"


def test_a_policy_under_way_shows_the_texts_of_its_newest_checkpoint(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    for step in (2, 4):
        with storage.writing(f"policies/abc/checkpoint-{step:06d}") as folder:
            rows = [
                {"step": n, "prompt": "p", "completion": f"text {n}", "reward": 1.0}
                for n in range(step)
            ]
            sealed.write_jsonl(folder / "samples.jsonl", rows)
    sealed.write_jsonl(
        tmp_path / "metrics.jsonl",
        [{"iteration": 1, "policy": 1, "step": n, "key": "abc", "reward": 0.5} for n in range(5)],
    )
    (texts,) = report_data(str(tmp_path))["training_texts"]
    assert [row["completion"] for row in texts["rows"]] == ["text 0", "text 1", "text 2", "text 3"]


def test_a_run_in_an_object_store(tiny_finished: Run, s3: S3Server) -> None:
    """Policies lie there under unique prefixes, as Storage writes them; the page is put beside the
    run.
    """
    uri = s3.uri("report-run")
    storage = Storage(uri)
    for path in files_of(tiny_finished.folder):
        name = path.relative_to(tiny_finished.folder).as_posix()
        if not name.startswith("policies/") and path.suffix != ".safetensors":
            storage.put(path, name)
    for folder in (tiny_finished.folder / "policies").iterdir():
        with storage.writing(f"policies/{folder.name}") as target:
            shutil.copy(folder / "samples.jsonl", target)
    local, there = report_data(str(tiny_finished.folder)), report_data(uri)
    assert {name for name in local if local[name] != there[name]} <= {"place", "name", "config"}
    where, size = save_report([uri])
    assert where == "s3://bucket/report-run/report.html"
    page = storage.read("report.html")
    assert page is not None
    assert len(page) == size


def test_the_command(
    tiny_finished: Run,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = copied(tiny_finished, tmp_path / "run")
    before = {path: path.read_bytes() for path in files_of(run)}
    assert main(["report", str(run)]) == 0
    assert capsys.readouterr().out.startswith(f"{run / 'report.html'} (1.")
    assert {
        path: path.read_bytes() for path in files_of(run) if path.name != "report.html"
    } == before
    assert main(["report", str(run), "--out", str(tmp_path / "pages" / "one.html")]) == 0
    other = copied(tiny_finished, tmp_path / "other")
    monkeypatch.chdir(tmp_path)
    assert main(["report", str(run), str(other)]) == 0
    data = json.loads(
        (tmp_path / "report.html").read_text().split('id="data">')[1].split("</script>")[0]
    )
    assert [one["name"] for one in data["runs"]] == ["run", "other"]
    assert data["title"] == "2 runs – raywarp report"


def test_what_is_no_run_is_refused(
    tiny_finished: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "config.yaml").write_text("album: summer\n")
    for arguments, words in (
        ([str(tmp_path / "nowhere")], "nowhere does not exist"),
        ([str(tmp_path / "photos")], "holds no run of raywarp"),
        ([str(tmp_path)], "holds no run of raywarp"),
        ([str(tiny_finished.folder), "--out", str(tmp_path)], "is a folder; name a file in it"),
        (
            [str(tiny_finished.folder), "--out", "s3://bucket/page.html"],
            "is no file of this machine",
        ),
        ([str(tiny_finished.folder), "--serve", "--port", "99999"], "--port=99999 cannot be used"),
    ):
        assert main(["report", *arguments]) == 2
        message = capsys.readouterr().err
        assert words in message
        assert len(message.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]


def test_the_page_is_small_and_asks_nothing_of_the_network(tiny_finished: Run) -> None:
    page = build([str(tiny_finished.folder)]).decode()
    assert len(page) < 1.5e6
    head, _, _ = page.partition("<style>")
    assert "default-src 'none'" in head
    assert "connect-src 'none'" in head
    assert not any(
        f'{attribute}="http' in page.partition("<script>")[0] for attribute in ("src", "href")
    )


def point(name: str, eta: float | None, reward: float, control: float | None, **more: Any) -> Point:
    """With intervals of ± 0.1."""
    return Point(
        name,
        eta,
        reward,
        0.1,
        1.0,
        0.1,
        control,
        None if control is None else 0.1,
        **{"distinct_2": 0.9, "length": 10.0, "eos_rate": 0.5, **more},
    )


def test_over_optimisation_is_said_where_reward_and_control_part() -> None:
    """Errors of a difference are √2·0.1 = 0.14."""
    rising = [
        point("sft", 0.0, 0.0, 0.2),
        point("liti 0.5", 0.5, 0.6, 0.5),
        point("slerp", 1.0, 1.2, 0.8),
    ]
    assert over_optimisation(rising) == []
    (parted,) = over_optimisation([*rising[:2], point("slerp", 1.0, 1.2, 0.3)])
    assert (parted.level, parted.title) == ("warning", "Reward and control part")
    assert "From η = 0.5 to η = 1 the reward rises from 0.60 to 1.20" in parted.text
    assert "falls from 0.50 to 0.30" in parted.text
    assert "choose an η of at most 0.5" in parted.text
    assert [
        one.title for one in over_optimisation([*rising[:2], point("slerp", 1.0, 1.2, 0.4)])
    ] == [
        "The control score does not follow the reward"  # 0.1 lower is within the error
    ]
    # no reward was gained, so none was gamed
    assert over_optimisation([*rising[:2], point("slerp", 1.0, 0.7, 0.3)]) == []
    assert over_optimisation([point("sft", 0.0, 0.0, None), point("slerp", 1.0, 1.0, None)]) == []
    assert (
        over_optimisation(
            [
                point("sft", 0.0, 0.0, 0.5),
                point("policy 1", None, 1.0, 0.0),
                point("slerp", 1.0, 1.0, 0.9),
            ]
        )
        == []
    )


def test_other_findings() -> None:
    points = [
        point("sft", 0.0, 0.0, None),
        point("slerp", 1.0, 0.05, None, distinct_2=0.3, length=30.0),
    ]
    titles = [one.title for one in findings(points, "slerp", [0.5] * 3, [30.0, 40.0, math.nan])]
    assert titles == [
        "Nothing was gained yet",
        "The chosen point repeats itself",
        "Texts became longer",
        "Sampler and trainer disagree",
        "The policies went much the same way",
    ]
    assert findings([], None, [], []) == []
    # none is off by more than 0.1 and two errors
    assert findings([], None, [], [], [(1.0, 0.01), (0.7, 0.2), (1.12, 0.02)]) == []
    (weak,) = findings([], None, [], [], [(1.0, 0.01), (0.7, 0.05), (0.6, 0.3)])
    assert (weak.level, weak.title) == ("warning", "The sampler runs another policy")
    assert "was 0.70 ± 0.05 times that in the trainer, 1 of 3 times" in weak.text
    assert (
        findings(
            [point("sft", 0.0, 0.0, None), point("slerp", 1.0, 1.0, None)], "slerp", [0.01], [90.0]
        )
        == []
    )


def test_a_point_above_the_ceiling_is_a_fault_of_measurement() -> None:
    """An honest front has no such finding; nor has one beyond what was measured."""
    rewards = torch.randn(40, 32, generator=torch.Generator().manual_seed(0))
    ceiling = Ceiling.of("key", rewards.tolist())
    limit, half = ceiling.at(1.0) or (0.0, 0.0)

    def found(kl: float, reward: float) -> list[str]:
        own = Point("slerp", 1.0, reward, 0.05, kl, 0.1, None, None, 0.9, 10.0, 0.5)
        texts = findings([point("sft", 0.0, 0.0, None), own], None, [], [], [], ceiling)
        return [f"{one.level}: {one.title}. {one.text}" for one in texts]

    assert found(1.0, 0.9 * limit) == []
    assert found(1.0, limit + half) == []
    assert found(4.0, 9.0) == []
    (fault,) = found(1.0, limit + 2 * half + 0.3)
    assert fault.startswith("warning: A point is above the ceiling. slerp: no policy can be there.")
    assert f"the most that these nats can buy is {limit:.2f} ± {half:.2f}" in fault
    assert "Either the reward is not that of the texts that were measured, or KL and" in fault


def test_a_run_without_a_ceiling_is_shown_as_before(tiny_finished: Run, tmp_path: Path) -> None:
    """As runs of earlier versions have none."""
    folder = copied(tiny_finished, tmp_path / "run")
    without = ("ceiling", "share_kl", "sha256")
    front = {key: value for key, value in tiny_finished.front().items() if key not in without}
    sealed.write_record(folder / "front.json", front)
    data = report_data(str(folder))
    assert data["front"]["ceiling"] is None
    assert data["missing"] == []


def test_a_chosen_point_that_has_forgotten_is_noted() -> None:
    """Beyond 0.1 nats per token by more than its error; others than the chosen one do not count."""
    sft = point("sft", 0.0, 0.0, None, retention=0.0, retention_ci=0.0)
    far = point("slerp", 1.0, 2.0, None, retention=0.5, retention_ci=0.05)
    near = point("liti 0.5", 0.5, 1.0, None, retention=0.14, retention_ci=0.05)
    (found,) = findings([sft, near, far], "slerp", [], [])
    assert (found.level, found.title) == ("note", "The chosen point has forgotten")
    assert "slerp loses 0.50 ± 0.05 nats per token" in found.text
    assert "1.6 times less likely" in found.text  # exp(0.5)
    assert findings([sft, near, far], "liti 0.5", [], []) == []
    assert (
        findings([point("sft", 0.0, 0.0, None), point("slerp", 1.0, 2.0, None)], "slerp", [], [])
        == []
    )


def test_runs_of_before_lack_what_is_newer_and_are_shown(
    tiny_finished: Run, tmp_path: Path
) -> None:
    """Neither retention and marks in front.json, nor a merge in geometry.json."""
    now = report_data(str(tiny_finished.folder))
    merges = [row["merge"] for row in now["geometry"]]
    assert all(-1.5 < merge["kl_cosine"] < 1.5 and merge["prompts"] == 4 for merge in merges)
    folder = copied(tiny_finished, tmp_path / "run")
    front = sealed.read_record(folder / "front.json")
    assert front
    for one in front["points"]:
        for name in ("retention", "retention_ci", "extrapolated"):
            del one[name]
    sealed.write_record(folder / "front.json", front)
    for iteration in ("1", "2"):
        place = folder / "iterations" / iteration
        geometry = json.loads((place / "geometry.json").read_text())
        del geometry["merge"]
        sealed.write_json(place / "geometry.json", geometry)
        sealed.seal(place)
    before = report_data(str(folder))
    assert before["missing"] == []
    assert [row["merge"] for row in before["geometry"]] == [None, None]
    assert [row["angles"] for row in before["geometry"]] == [
        row["angles"] for row in now["geometry"]
    ]
    assert before["front"]["points"] == now["front"]["points"]
    assert main(["report", str(folder)]) == 0


def test_long_curves_become_means_with_least_and_largest() -> None:
    rows = [
        {"iteration": 1, "policy": 1, "step": n, "reward": float(n % 2), "kl_sft": n / 100}
        for n in reversed(range(1000))
    ]
    (curve,) = curves(rows)
    assert list(curve.steps) == list(range(1000))
    drawn = summary([curve])
    (line,) = drawn["curves"]
    assert (drawn["stretch"], drawn["steps"], len(line["steps"]), line["last"]) == (
        3,
        1000,
        334,
        999,
    )
    assert line["values"]["reward"]["mean"][:2] == [0.3333, 0.6667]  # of 0, 1, 0 and of 1, 0, 1
    assert (line["values"]["reward"]["low"][0], line["values"]["reward"]["high"][0]) == (0, 1)
    assert line["values"]["kl_sft"]["mean"][0] == 0.01
    assert [metric["name"] for metric in drawn["metrics"]] == ["reward", "kl_sft"]
    way = trajectory(curve)
    assert len(way) == 12
    assert way[0] == [0.415, 0.5, 41.5]  # steps 0 to 83
    assert [cut.stop - cut.start for cut in stretches(10, 4)] == [3, 3, 3, 1]
    short = summary(curves(rows[-5:]))["curves"][0]
    assert short["values"]["reward"] == {"mean": [0, 1, 0, 1, 0]}
    assert len(METRICS) == len(short["values"]) + 11


def test_a_path_is_measured_on_held_out_prompts_where_it_can_be() -> None:
    """Policy 1 was measured, in whatever order its rows come; policy 2 was not, and policy 3 has
    not finished a step.
    """
    steps = [{"iteration": 1, "policy": m, "step": 0, "reward": 0.5, "kl_sft": 0.1} for m in (1, 2)]
    measured = {"reward": 0.3, "reward_ci": 0.1, "kl_ci": 0.2, "control": 0.7, "control_ci": 0.4}
    rows = [
        {"iteration": 1, "policy": m, "step": step, "kl": 0.1 * step, **measured}
        for m, step in ((1, 10), (1, 0), (3, 0))
    ]
    rows += [{"iteration": 1, "policy": 1, "step": 20}, {"iteration": "x", "step": 0}]
    one, two, three = trajectories(curves(steps), rows)
    rest = [0.2, 0.1, 0.7, 0.4]
    assert one == {
        "iteration": 1,
        "policy": 1,
        "held_out": True,
        "points": [[0, 0.3, 0, *rest], [1, 0.3, 10, *rest]],
    }
    assert two == {"iteration": 1, "policy": 2, "held_out": False, "points": [[0.1, 0.5, 0]]}
    assert (three["policy"], three["held_out"], len(three["points"])) == (3, True, 1)


def test_busy_shares_by_hand() -> None:
    """240 slices of 1 s; actor 1 works in the first half, worker 1 in every second half of a slice;
    a pause of an hour is cut out.
    """
    spans: list[dict[str, Any]] = [
        {"iteration": 1, "spans": {"policy actor 1": [[1000, 1060], [1030, 1120]]}}
    ]
    spans += [
        {"iteration": 2, "spans": {"rollout worker 1": [[second + 0.5, second + 1]]}}
        for second in range(1000, 1120)
    ]
    spans += [
        {"iteration": 2, "spans": {"rollout worker 1": [[second + 0.5, second + 1]]}}
        for second in range(4720, 4840)
    ]
    spans += [
        {"iteration": 2, "spans": {"reward worker": [[4720, 4720.5]]}},
        {"iteration": 2},
        {"iteration": 3, "spans": None},
    ]
    line = timeline(spans, [1010.0, 1500.0, None, 9e9, 4720.0])
    assert line is not None
    assert line["seconds"] == 1
    assert list(line["lanes"]) == ["policy actor 1", "rollout worker 1", "reward worker"]
    assert line["lanes"]["policy actor 1"] == [1.0] * 120 + [0.0] * 120
    assert line["lanes"]["rollout worker 1"] == [0.5] * 240
    assert line["lanes"]["reward worker"] == [0.0] * 120 + [0.5] + [0.0] * 119
    assert line["pauses"] == [[120, 3600.0]]
    assert (line["starts"][119], line["starts"][120]) == (1119, 4720)
    assert line["moments"] == [10, 120, None, None, 120]
    assert line["iterations"] == {"1": 0, "2": 0}
    assert timeline([{"iteration": 1, "reward": 1.0}]) is None


def test_departure_and_what_is_kept_of_too_many_texts() -> None:
    assert departure("a b c", "a b c") == 0
    assert departure("the film is good", "the film is very good") == 5
    assert departure("", "abc") == 3
    assert departure("aa", "aaa") == 1
    assert clip("x" * 12, 10) == "x" * 10 + " … (2 more characters)"
    rows = [
        {"prompt": "p", "sft": "a" * 3000, "slerp": "a" * (3000 - n) + "b" * n} for n in range(1000)
    ]
    kept = sample_texts(rows, [], None, share=0.3)
    assert kept is not None
    assert (kept["points"], kept["target"], kept["total"]) == (["sft", "slerp"], "slerp", 1000)
    assert [row["place"] for row in kept["rows"]] == list(range(1000 - len(kept["rows"]), 1000))
    assert 1_180_000 < len(to_json(kept)) < 1_200_000
    tags = sample_texts([{"prompt": "p", "sft": "a", "slerp": "<" * 3000}] * 1000, [], None)
    assert tags is not None
    assert len(to_json(tags)) < 4_000_000  # a sign that is escaped counts as what it becomes


def test_json_stands_safely_in_a_page() -> None:
    text = "</script><!--<script>\u2028\u202e\x00\ud800 é שלום 🎬 &amp;"
    encoded = to_json({"text": text})
    assert not set(encoded) & set("<>&\u2028\u202e\x00\ud800")
    assert "é שלום 🎬" in encoded
    assert json.loads(encoded) == {"text": text}
    encoded.encode()
    assert plain({"a": [math.nan, np.float64("inf"), 1.5, (None, True)]}) == {
        "a": [None, None, 1.5, [None, True]]
    }
    page = render(page_data([{"name": text}], text)).decode()
    assert page.count("</script>") == 3


def test_several_rewards_have_a_chart_each() -> None:
    rows = [
        {"iteration": 1, "policy": 1, "step": n, "reward": 1.0, "reward/b": n, "reward/a": 2.0}
        for n in range(3)
    ]
    drawn = summary(curves(rows))
    titles = [metric["title"] for metric in drawn["metrics"]]
    assert titles == ["Reward", "Reward a", "Reward b"]
    assert drawn["curves"][0]["values"]["reward/b"]["mean"] == [0, 1, 2]
