"""Tests of real sweeps: Ray Tune, its trials' actors, and a tiny Llama.

What trials have in common is trained once, even if processes die. The reward writes down every
batch that it is asked about. What was trained is thus counted by what happened, not by what is
claimed.
"""

import json
import os
import signal
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray
import wandb
import yaml
from conftest import left_behind, logger_environment, traces, write_prompts
from killing import Command, Patience, descendants, set_pace, survivors
from logged import items, wandb_records
from ray.util.placement_group import placement_group_table
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_models import save_tiny_llama
from tiny_run import Listener

from raywarp.adapters.peft import load_peft
from raywarp.algorithm.hypervolume import hypervolume
from raywarp.cluster.claims import ClaimTable, Table
from raywarp.config.load import load_config
from raywarp.config.search import describe, name_of
from raywarp.planning.plan import plan, print_forecast
from raywarp.report.page import read, save_report
from raywarp.rollout.transport import digest
from raywarp.run.ceiling import Ceiling
from raywarp.run.terminal import console
from raywarp.storage.location import Storage
from raywarp.sweep.results import Sweep
from raywarp.sweep.sweep import tune

pytestmark = pytest.mark.slow

REWARD = '''
"""Counts good words. Every batch leaves a line in the file `batches`; takes as many seconds per training batch as the file `pace` says."""
import pathlib
import time

HERE = pathlib.Path(__file__).parent
TRAINING = 8  # completions of a training batch; an evaluation asks for fewer

def score(prompts, completions, **columns):
    with (HERE / "batches").open("a") as file:
        file.write(f"{len(prompts)}\\n")
    if len(prompts) == TRAINING and (HERE / "pace").exists():
        time.sleep(float((HERE / "pace").read_text()))
    return [text.split().count("good") + 0.1 * len(text.split()) for text in completions]

def broken(prompts, completions, **columns):
    raise ZeroDivisionError("the scale is broken")
'''  # noqa: E501
STEPS = 2
SETTINGS: dict[str, Any] = {
    "model": "./model",
    "dtype": "float32",
    "prompts": {"dataset": "./prompts.jsonl", "held_out_fraction": 0.5},
    "reward": {"function": "sweep_reward:score"},
    "lora": {"rank": 2, "alpha": 4},
    "warp": {"iterations": 2, "policies": 2, "steps": STEPS, "kl_coef": 0.02},
    "optim": {"lr": 0.03, "batch_size": 8, "warmup_steps": 1},
    "rollout": {
        "engine": "transformers",
        "completions_per_prompt": 4,
        "max_new_tokens": 4,
        "temperature": 1.0,
    },
    "cluster": {"policy_actors": 1, "threads": 1},
    "front": {
        "prompts": 7,
        "etas": [0.3, 0.6],
        "choose": {"eta": 1},
        "samples": 1,
        "every": 0,
        "ceiling_completions": 16,
        "share_kl": 0.3,
    },
    "checkpoint_every": 1,
}
EMA, LITI = [0.1, 0.4], [0.3, 0.6]
GRID = {
    "anchor": {"grid": ["ema", "sft"]},
    "ema_rate": {"grid": EMA},
    "liti_rate": {"grid": LITI},
}


def make_project(folder: Path) -> Path:
    save_tiny_llama(folder / "model")
    (folder / "sweep_reward.py").write_text(REWARD)
    write_prompts(folder / "prompts.jsonl")
    return folder


def batches(folder: Path) -> int:
    """Training batches so far."""
    path = folder / "batches"
    return path.read_text().split().count("8") if path.exists() else 0


def settings(out: str | Path, search: dict[str, Any], **sections: Any) -> dict[str, Any]:
    tree = {**SETTINGS, "out": str(out), "tune": search}
    for name, values in sections.items():
        tree[name] = {**tree[name], **values} if isinstance(values, dict) else values
    return tree


def sweep_of(out: Path) -> dict[str, Any]:
    tree: dict[str, Any] = json.loads((out / "sweep.json").read_text())
    return tree


def digests(store: Path) -> dict[str, str]:
    """Policy's key → digest of its adapter, of those that are finished."""
    finished = [
        Path(name).name
        for name in Storage(store).names("policies")
        if Storage(store).has(f"policies/{name}")
    ]
    return {key: digest(load_peft(store / "policies" / key)) for key in finished}


def fronts(out: Path) -> dict[str, Any]:
    """Trial → the points of its front."""
    return {
        path.parent.name: json.loads(path.read_text())["points"]
        for path in out.glob("trials/*/front.json")
    }


@pytest.fixture(scope="module")
def sweep_folder(ray_cluster: Any, working_directory: Path) -> Path:
    return make_project(working_directory)


@pytest.fixture(scope="module")
def grid(sweep_folder: Path) -> tuple[Sweep, Path, str]:
    """2 · 2 trials with an EMA and 2 without, I = 2, M = 2; what they said."""
    before = traces()
    loggers = ["tensorboard", "wandb", "mlflow"]
    with pytest.MonkeyPatch.context() as patched:
        for name, value in logger_environment(sweep_folder).items():
            patched.setenv(name, value)
        sweep = tune(
            load_config(settings(sweep_folder / "grid", GRID, loggers=loggers)),
            heard := Listener(),
        )
        wandb.teardown()
    assert not left_behind(before)
    return sweep, sweep_folder / "grid", heard.text()


def test_what_trials_have_in_common_is_trained_once(
    grid: tuple[Sweep, Path, str], sweep_folder: Path
) -> None:
    """3·2 policy runs of iteration 1 and 6·2 of iteration 2, of 24 that the trials ask for."""
    sweep, out, said = grid
    assert batches(sweep_folder) == 18 * STEPS
    assert len(digests(out)) == 18
    assert len(list((out / "merges").iterdir())) == 3 + 6  # as their policies
    assert (sweep.asked, sweep.executed) == (24, 18)
    assert "they ask for 24 policy runs, of which 18 differ" in said
    assert "24 policy runs were asked for, 18 executed: sharing saved 6 of them" in said
    runs = sweep_of(out)["policy_runs"]
    assert (runs["asked"], runs["executed"]) == (24, 18)
    assert runs["seconds_saved"] == pytest.approx(6 * runs["seconds_each"])
    assert runs["seconds_each"] > 0
    assert [len(path.read_text().splitlines()) for path in out.glob("trials/*/metrics.jsonl")] == [
        2 * 2 * STEPS
    ] * 6


def test_the_trials_share_one_ceiling(grid: tuple[Sweep, Path, str], sweep_folder: Path) -> None:
    """Trials that run side by side measure it once: 7 prompts × 16 completions, in one call.

    A trial's share of it is recomputed from its front.json.
    """
    sweep, out, said = grid
    assert "2 at a time" in said
    assert (sweep_folder / "batches").read_text().split().count("112") == 1
    assert len(Storage(out).names("ceilings")) == 1
    (tree,) = sweep_of(out)["ceilings"].values()
    for trial in sweep_of(out)["trials"]:
        front = json.loads((out / "trials" / trial["name"] / "front.json").read_text())
        assert front["ceiling"] == tree
        limit = Ceiling.read(tree).at(0.3)
        assert limit
        line = sorted((p["kl"], p["reward"]) for p in front["points"] if p["eta"] is not None)
        kls, rewards = zip(*line, strict=True)
        best = max(np.interp(np.linspace(0, np.sqrt(0.3), 101), np.sqrt(kls), rewards))
        gain = limit[0] - tree["reward"][0]
        share = max((best - tree["reward"][0]) / gain, 0)
        assert trial["ceiling_share"] == pytest.approx(share, rel=0.02, abs=0.01)
    assert all("ceiling_share" in trial.measured for trial in sweep.trials)


def test_the_report_page_of_a_sweep_has_all_fronts(grid: tuple[Sweep, Path, str]) -> None:
    """The best first, each under its values; what has only just begun is left out."""
    sweep, out, _ = grid
    (new := out / "trials" / "new").mkdir()
    data = read([str(out)])
    new.rmdir()
    assert [run["name"] for run in data["runs"]] == [
        describe(trial.point) for trial in sweep.trials
    ]
    assert all(len(run["front"]["points"]) > 4 for run in data["runs"])
    assert data["title"] == "grid, 6 trials – raywarp report"
    where, _ = save_report([str(out)])
    assert where == str(out / "report.html")
    assert "ema_rate=0.1, liti_rate=0.3" in Path(where).read_text()


def test_every_trial_has_its_front_and_the_sweep_ranks_them(grid: tuple[Sweep, Path, str]) -> None:
    _, out, _ = grid
    tree = sweep_of(out)
    trials = tree["trials"]
    names = ("warp.anchor", "warp.ema_rate", "warp.liti_rate")
    assert {tuple(trial["values"][name] for name in names) for trial in trials} == {
        (anchor, ema, liti)
        for anchor, emas in (("ema", EMA), ("sft", [None]))
        for ema in emas
        for liti in LITI
    }
    volumes = [trial["hypervolume"] for trial in trials]
    assert volumes == sorted(volumes, reverse=True)
    assert tree["best"] == trials[0]["name"]
    found = fronts(out)
    every = []
    for trial in trials:
        line = [point for point in found[trial["name"]] if point["eta"] is not None]
        assert sorted(point["eta"] for point in line) == [0, 0.3, 0.6, 1]
        kl_reward = [(point["kl"], point["reward"]) for point in line]
        assert trial["hypervolume"] == pytest.approx(
            hypervolume(kl_reward, (10.0, line[0]["reward"]))
        )
        assert (trial["state"], trial["iterations"], trial["chosen"]) == ("finished", 2, "slerp")
        every += [(trial["name"], point) for point in line]
    for name, point in every:
        better = any(
            o["kl"] <= point["kl"]
            and o["reward"] >= point["reward"]
            and (o["kl"], o["reward"]) != (point["kl"], point["reward"])
            for _, o in every
        )
        optimal = next(trial for trial in trials if trial["name"] == name)["pareto_etas"]
        assert (point["eta"] in optimal) == (not better and point["eta"] > 0)
    assert (out / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_the_best_config_is_the_best_trials_run(grid: tuple[Sweep, Path, str]) -> None:
    sweep, out, _ = grid
    best = yaml.safe_load((out / "best.yaml").read_text())
    values = sweep.trials[0].point
    assert (best["warp"]["ema_rate"], best["warp"]["liti_rate"]) == (
        values["warp.ema_rate"],
        values["warp.liti_rate"],
    )
    assert best["out"] == str(out / "trials" / sweep.trials[0].name)
    assert (Path(best["out"]) / "adapter" / "adapter_model.safetensors").is_file()
    load_config(best)


def test_each_logger_has_a_run_per_trial_and_a_row_per_iteration(
    grid: tuple[Sweep, Path, str], sweep_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep, out, _ = grid
    trial = out / "trials" / sweep.trials[0].name
    logged = out / "loggers" / trial.name
    measured = [
        row["hypervolume"]
        for row in json.loads(trial.with_name(f"{trial.name}.json").read_text())["rows"]
    ]

    events = EventAccumulator(str(logged / "tensorboard")).Reload()
    assert {"hypervolume", "reward", "kl"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("hypervolume")] == [1, 2]
    assert [event.value for event in events.Scalars("hypervolume")] == pytest.approx(measured)
    assert len(events.Images("front")) == 1

    assert len(list(out.glob("loggers/*/wandb/offline-run-*"))) == 6
    records = list(wandb_records(logged))
    rows = [items(record.history.item) for record in records if record.HasField("history")]
    assert [(row["iteration"], row["hypervolume"]) for row in rows if "hypervolume" in row] == [
        (1, measured[0]),
        (2, measured[1]),
    ]
    assert {record.run.run_group for record in records if record.HasField("run")} == {"grid"}

    for name, value in logger_environment(sweep_folder).items():
        monkeypatch.setenv(name, value)
    from mlflow.tracking import MlflowClient

    client = MlflowClient()
    runs = {run.info.run_name: run for run in client.search_runs(["0"])}
    assert runs.keys() == {trial.name for trial in sweep.trials}
    own = runs[trial.name].info
    assert [
        (metric.step, metric.value)
        for metric in client.get_metric_history(own.run_id, "hypervolume")
    ] == [
        (1, measured[0]),
        (2, measured[1]),
    ]
    assert own.status == "FINISHED"
    assert {"adapter", "front.png", "samples.json"} <= {
        file.path for file in client.list_artifacts(own.run_id)
    }


def test_a_finished_sweep_is_shown_again_without_any_actor(
    grid: tuple[Sweep, Path, str], sweep_folder: Path
) -> None:
    sweep, out, _ = grid
    before, count = fronts(out), len((sweep_folder / "batches").read_text().split())
    again = tune(load_config(settings(out, GRID)), Listener())
    assert again == sweep
    assert fronts(out) == before
    assert len((sweep_folder / "batches").read_text().split()) == count  # nothing was even measured


def test_plan_says_what_a_sweep_asks_for(
    grid: tuple[Sweep, Path, str], sweep_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    print_forecast(
        plan(load_config(settings(sweep_folder / "planned", GRID)), offline=True), console()
    )
    said = " ".join(capsys.readouterr().out.split())
    assert "6 trials of warp.anchor, warp.ema_rate, warp.liti_rate (grid)" in said
    assert "24 policy runs, of which 18 differ" in said


def test_asha_ends_the_worse_trial_between_iterations(
    grid: tuple[Sweep, Path, str], sweep_folder: Path
) -> None:
    """One at a time, the better first iteration first; with the grid's store there is nothing to
    train.
    """
    _, out, _ = grid
    records = [json.loads(path.read_text()) for path in out.glob("trials/*.json")]
    first = {record["point"]["warp.ema_rate"]: record["rows"][0]["kl"] for record in records}
    order, count = sorted(EMA, key=first.__getitem__), batches(sweep_folder)
    search = {
        "ema_rate": {"grid": order},
        "liti_rate": {"choice": [0.3]},
        "search": "asha",
        "objectives": ["kl"],
        "num_samples": 1,
    }
    tree = settings(
        sweep_folder / "asha",
        {**search, "max_concurrent": 1},
        store=str(out),
        front={"etas": [0.3, 0.6, 1.0]},
    )
    sweep = tune(load_config(tree), Listener())
    assert [
        (trial.point["warp.ema_rate"], trial.state, trial.iterations) for trial in sweep.trials
    ] == [
        (order[0], "finished", 2),
        (order[1], "stopped", 1),
    ]
    assert batches(sweep_folder) == count
    assert (sweep.asked, sweep.executed) == (6, 0)


def test_optuna_takes_several_objectives_and_repeats_its_search(
    grid: tuple[Sweep, Path, str], sweep_folder: Path
) -> None:
    _, out, _ = grid
    search = {
        "ema_rate": {"choice": EMA},
        "liti_rate": {"choice": LITI},
        "search": "optuna",
        "objectives": ["reward", "kl"],
        "num_samples": 2,
    }
    config, count = (
        load_config(settings(sweep_folder / "optuna", {**search, "seed": 1}, store=str(out))),
        batches(sweep_folder),
    )
    sweep = tune(config, Listener())
    assert batches(sweep_folder) == count
    assert all(trial.state == "finished" for trial in sweep.trials)
    worth = [(-trial.measured["reward"], trial.measured["kl"]) for trial in sweep.trials]
    # nothing beats the best in both
    assert not any(
        a <= worth[0][0] and b <= worth[0][1] and (a, b) != worth[0] for a, b in worth[1:]
    )
    measured = len((sweep_folder / "batches").read_text().split())
    assert [trial.point for trial in tune(config, Listener()).trials] == [
        trial.point for trial in sweep.trials
    ]
    assert len((sweep_folder / "batches").read_text().split()) == measured


def test_a_trial_that_fails_is_named_and_the_others_go_on(
    grid: tuple[Sweep, Path, str], sweep_folder: Path
) -> None:
    """A random search, over the learning rate and a reward that raises."""
    functions = {"grid": ["sweep_reward:broken", "sweep_reward:score"]}
    search = {
        "reward.function": functions,
        "lr": {"loguniform": [0.001, 0.1]},
        "num_samples": 1,
        "search": "random",
    }
    tree = settings(
        sweep_folder / "random", search, warp={"iterations": 1, "policies": 1, "steps": 1}
    )
    sweep = tune(load_config(tree), heard := Listener())
    states = {trial.point["reward.function"].partition(":")[2]: trial for trial in sweep.trials}
    assert states["score"].state == "finished"
    assert sweep.best == states["score"].name
    assert states["broken"].state == "failed"
    assert "the scale is broken" in states["broken"].message
    assert "the scale is broken" in heard.text()
    written = {trial["name"]: trial for trial in sweep_of(sweep_folder / "random")["trials"]}
    assert "the scale is broken" in written[states["broken"].name]["message"]


def test_whoever_waits_takes_over_from_an_owner_that_dies(
    grid: tuple[Sweep, Path, str], sweep_folder: Path
) -> None:
    """Two trials with the same first iteration; the process of the one that trains it is killed in
    the middle.
    """
    _, reference, _ = grid
    out, killed, before = sweep_folder / "takeover", list[int](), batches(sweep_folder)
    search = {"ema_rate": {"grid": EMA[:1]}, "liti_rate": {"grid": LITI}}
    config = load_config(settings(out, search, front={"etas": [0.3, 0.6, 1.0]}))
    set_pace(sweep_folder, 1.5)

    def kill_the_owner() -> None:
        patience = Patience(120)
        while batches(sweep_folder) - before < 3 and patience.lasts():
            pass
        owners = {
            owner
            for key, owner in Table(str(out)).ask("owners").items()
            if not key.startswith("folder ")
        }
        set_pace(sweep_folder, 0)
        for owner in owners:
            actor = ray._private.state.actors()[owner.split()[-1]]
            killed.append(actor["Pid"])
            os.kill(actor["Pid"], signal.SIGKILL)

    killer = threading.Thread(target=kill_the_owner, daemon=True)
    killer.start()
    sweep = tune(config, Listener())
    killer.join()
    assert len(killed) == 1
    # the dead one's room, too
    assert not [group for group in placement_group_table().values() if group["state"] != "REMOVED"]
    assert [trial.state for trial in sweep.trials] == ["finished", "finished"]
    assert (sweep.asked, sweep.executed) == (8, 6)
    # of both policies the step under way, and the one since a checkpoint
    assert 6 * STEPS <= batches(sweep_folder) - before <= 6 * STEPS + 4
    theirs = digests(reference)
    assert all(theirs[key] == ours for key, ours in digests(out).items())
    assert len(digests(out)) == 6


def test_a_killed_sweep_continues(
    grid: tuple[Sweep, Path, str],
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """SIGKILL for the real command in iteration 2 of the first trial, SIGTERM soon after, then to
    the end: equal to the grid's trials, and nothing is left in the temporary folder.
    """
    _, reference, _ = grid
    folder = make_project(tmp_path_factory.mktemp("killed"))
    temporary = tmp_path_factory.mktemp("temporary")
    monkeypatch.setenv("TMPDIR", str(temporary))
    # Ray's sockets need a short path
    monkeypatch.setenv("RAY_TMPDIR", os.environ.get("RAY_TMPDIR", "/tmp"))
    search = {  # the names of trials are hashes of these keys' values, as in the grid
        "anchor": {"grid": ["ema"]},
        "ema_rate": {"grid": EMA[:1]},
        "liti_rate": {"grid": LITI},
    }
    (folder / "config.yaml").write_text(
        yaml.safe_dump(settings("x", search, front={"etas": [0.3, 0.6, 1.0]}))
    )
    out = folder / "out"
    set_pace(folder, 0.5)
    command = Command(folder, "out", verb="tune")
    command.wait_until(lambda: batches(folder) > 2 * STEPS)
    pids = descendants(command)
    command.process.kill()
    command.process.wait()
    assert not survivors(pids)
    left = batches(folder)
    set_pace(folder, 1.5)
    command = Command(folder, "out", verb="tune")
    command.wait_until(lambda: batches(folder) > left)
    command.process.send_signal(signal.SIGTERM)
    assert command.end(60) == 143
    assert "stopped by SIGTERM; " in command.tail()
    assert "the same command continues" in command.tail()
    set_pace(folder, 0)
    command = Command(folder, "out", verb="tune")
    assert command.end(600) == 0, command.tail()
    assert "8 policy runs were asked for, 6 executed" in command.tail()
    # of two policies under way, twice: a step, and one since a checkpoint
    assert 6 * STEPS <= batches(folder) <= 6 * STEPS + 2 * 2 * 2
    theirs = digests(reference)
    ours = digests(out)
    assert len(ours) == 6
    assert all(theirs[key] == one for key, one in ours.items())
    points = fronts(reference)
    assert {name: front == points[name] for name, front in fronts(out).items()} == dict.fromkeys(
        fronts(out), True
    )
    assert len(fronts(out)) == 2
    assert not list(temporary.glob("raywarp-*"))


def test_a_claim_lives_as_long_as_its_owner() -> None:
    living = {"a", "b"}
    table = ClaimTable(living.__contains__)
    assert table.take("a", ["1", "2"]) == ["1", "2"]
    assert table.take("b", ["2", "3"]) == ["3"]
    assert table.take("a", ["1", "3"]) == ["1"]
    assert table.held("b", ["1", "2", "3"]) == ["1", "2"]
    table.release("b", ["1"])  # not its own
    assert table.held("b", ["1"]) == ["1"]
    living.remove("a")
    assert table.held("b", ["1", "2"]) == []
    assert table.take("b", ["1"]) == ["1"]
    table.release("b", ["1", "3"])
    assert table.owner_of == {}


def test_claims_of_a_killed_process_are_free_at_once(ray_cluster: Any) -> None:
    """By the real actor: its owners are actors, of which one is killed, and one does not answer for
    a while.
    """

    @ray_cluster.remote(num_cpus=0)
    class Owner:
        def pid(self) -> int:
            return os.getpid()

        def work(self) -> None:
            time.sleep(600)

    place = tempfile.mkdtemp()
    table, first, second = Table(place), Owner.remote(), Owner.remote()
    pid, other = ray_cluster.get([first.pid.remote(), second.pid.remote()])
    assert table.ask("take", "first", [first], ["k"]) == ["k"]
    first.work.remote()
    psutil.Process(other).suspend()
    assert table.ask("take", "second", [second], ["k", "l"]) == ["l"]
    assert table.ask("held", "third", ["k", "l"]) == ["k", "l"]  # at work, or held up: alive
    os.kill(pid, signal.SIGKILL)
    patience = Patience(20)
    while table.ask("held", "third", ["k", "l"]) != ["l"]:
        assert patience.lasts()
    psutil.Process(other).resume()
    ray_cluster.kill(second)
    while table.ask("held", "third", ["l"]):
        assert patience.lasts()
    actor = table._actor
    ray_cluster.kill(actor)
    assert table.ask("owners") == {}  # a new one
    ray_cluster.kill(table._actor)


def test_names_are_the_values(grid: tuple[Sweep, Path, str]) -> None:
    sweep, _, _ = grid
    assert {trial.name for trial in sweep.trials} == {
        name_of(trial.point) for trial in sweep.trials
    }
