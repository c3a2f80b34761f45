"""Tests of runs whose processes are really killed.

They end with the adapters of an undisturbed run, and say what happened. The runs are the real
command's. tests/bench/chaos.py and tests/bench/driver_kill.py do the same for longer.
"""

import asyncio
import json
import os
import pickle
import re
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from killing import (
    SETTINGS,
    Command,
    adapters,
    descendants,
    kill,
    make_project,
    missing_lines,
    own_home,
    processes,
    set_pace,
    survivors,
    told,
)
from ray.exceptions import ActorUnavailableError, RayError, RayTaskError
from tiny_models import save_tiny_llama
from transformers import AutoModelForSequenceClassification

from raywarp.adapters.peft import load_peft
from raywarp.algorithm.deltas import AdapterDelta
from raywarp.algorithm.factors import Factors
from raywarp.cluster import faults, health, supervisor
from raywarp.cluster.faults import BrokenProcessError, Failures, FaultError
from raywarp.cluster.runtime import SAVE_SECONDS
from raywarp.cluster.turns import InTurns
from raywarp.config.load import parse_config
from raywarp.config.rewards import RewardConfig
from raywarp.data.text import Completion, Prompt
from raywarp.rewards.actor import RewardActor, Scorer
from raywarp.rewards.reward import RewardError
from raywarp.rollout.engine import Engine, EngineSettings
from raywarp.rollout.pool import PoolHealth, RolloutPool
from raywarp.rollout.protocol import Request, Rollout
from raywarp.rollout.transport import digest
from raywarp.rollout.worker import RolloutWorker
from raywarp.run.folder import Run
from raywarp.run.policy_files import Job, PolicyFiles
from raywarp.storage.location import Storage
from raywarp.storage.sealed import StoreError
from raywarp.training.actors import Kinds
from raywarp.training.evaluation import sft_scores, submit_points
from raywarp.training.policy_actor import PolicyActor
from raywarp.training.progress import Progress
from raywarp.training.session import Session
from raywarp.training.tracking import HeldOut

STEPS = 24
SECRETS = {
    name: f"sentinel-{n}-of-a-secret"
    for n, name in enumerate(("AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "WANDB_API_KEY"))
}


@pytest.fixture(scope="module")
def faults_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A user's folder, and a Ray of its own for every command, with secrets in the environment."""
    before = {name: os.environ.get(name) for name in ("RAY_TMPDIR", "HOME", *SECRETS)}
    os.environ.update(SECRETS)
    with tempfile.TemporaryDirectory(prefix="rw", ignore_cleanup_errors=True) as folder:
        own_home(Path(folder))
        yield make_project(tmp_path_factory.mktemp("faults"), warp={"steps": STEPS})
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@pytest.fixture(scope="module")
def undisturbed(faults_folder: Path) -> Run:
    set_pace(faults_folder, 0)
    command = Command(faults_folder, "undisturbed")
    assert command.end() == 0, command.tail()
    return command.run


def assert_same_end(command: Command, undisturbed: Run) -> None:
    assert command.end() == 0, command.tail()
    assert adapters(command.run) == adapters(undisturbed)
    assert missing_lines(command.run, 1, 2, STEPS) == 0


def test_every_actor_may_die_and_the_others_do_not_notice(
    faults_folder: Path, undisturbed: Run
) -> None:
    """One after another: a policy actor, the rollout worker, the reward worker, the pool; and
    stopped processes, which do not get on.
    """
    set_pace(faults_folder, 0.3)
    command = Command(faults_folder, "actors", "cluster.hang_seconds=10")
    driver = psutil.Process(command.process.pid)
    command.wait_for_steps(14)  # 7 of each policy, or nearly; checkpoints are of step 5
    for kind, number in (
        ("policy actor", signal.SIGKILL),
        ("rollout worker", signal.SIGKILL),
        ("reward worker", signal.SIGKILL),
        ("pool", signal.SIGKILL),
        ("reward worker", signal.SIGSTOP),
        ("rollout worker", signal.SIGSTOP),
    ):
        seen, before = len(told(command.run, "recovered")), last_steps(command.run)
        kill(processes(kind, driver)[0], number)
        command.wait_until(lambda seen=seen: len(told(command.run, "recovered")) > seen)
        if kind == "policy actor":
            assert_others_went_on(command.run, before)
        set_pace(faults_folder, 1.0)
    set_pace(faults_folder, 0)
    assert_same_end(command, undisturbed)

    events = told(command.run, "fault")
    assert [(row["what"].rstrip(" 12"), row["cause"]) for row in events] == [
        ("policy actor", "killed"),
        ("rollout worker", "killed"),
        ("reward worker", "killed"),
        ("rollout pool", "killed"),
        ("reward worker", "hang"),
        ("rollout worker", "hang"),
    ]
    first, second = told(command.run, "hang")
    assert "no answer for 1" in first["message"]
    unknown = "It was at\nan unknown place: its process does not answer"
    assert re.fullmatch(
        f"its call has not ended for 1. s; started again. {unknown}", second["message"]
    )
    (again,) = told(command.run, "continued")
    assert again["policy"] == events[0]["policy"]
    assert 0 <= again["steps_repeated"] < SETTINGS["checkpoint_every"] + 1
    other = 3 - again["policy"]
    assert all(
        row.get("policy") != other
        for row in command.run.events()
        if row["event"] in ("fault", "continued")
    )
    steps = [row["step"] for row in command.run.metrics() if row["policy"] == other]
    assert steps == sorted(set(steps))  # the other one never went back
    assert all(row["seconds_lost"] >= 0 for row in told(command.run, "recovered"))
    assert "faults survived: 6 (4 killed, 2 hang)" in command.log.read_text()


def last_steps(run: Run) -> dict[int, int]:
    """Policy → its last step so far."""
    return {
        policy: max(row["step"] for row in run.metrics() if row["policy"] == policy)
        for policy in (1, 2)
    }


def assert_others_went_on(run: Run, before: dict[int, int]) -> None:
    """No step of the policy that was not lost took nearly as long as the recovery of the one that
    was.
    """
    (recovered,) = told(run, "recovered")
    other = 3 - recovered["policy"]
    rows = [row for row in run.metrics() if row["policy"] == other and row["step"] > before[other]]
    assert len(rows) >= 3
    longest = max(
        row["request_seconds"] + row["wait_seconds"] + row["update_seconds"] for row in rows
    )
    assert longest < recovered["seconds_lost"] / 2


def test_no_secret_of_the_environment_is_written(faults_folder: Path, undisturbed: Run) -> None:
    """Neither into the run's folder nor into any log, Ray's among them."""
    logs = [*Path(os.environ["RAY_TMPDIR"]).rglob("logs/**/*"), faults_folder / "undisturbed.log"]
    assert len(logs) > 10
    for path in [*undisturbed.folder.rglob("*"), *logs]:
        if path.is_file():
            content = path.read_bytes()
            assert not [name for name, value in SECRETS.items() if value.encode() in content], path


def test_sigterm_saves_every_policy_and_sigkill_leaves_no_orphans(
    faults_folder: Path, undisturbed: Run
) -> None:
    """Between two checkpoints, then once more without a warning; the same command continues from
    where each of them left it.
    """
    set_pace(faults_folder, 0.3)
    command = Command(faults_folder, "driver", "checkpoint_every=100")
    command.wait_for_steps(7)
    command.process.send_signal(signal.SIGTERM)
    command.wait_until(lambda: told(command.run, "stopped"), 5)  # 3 s, and what a busy machine adds
    assert command.end(60) == 143
    message = command.log.read_text().splitlines()
    assert any(
        line.startswith("raywarp: stopped by SIGTERM; iteration 1 policy 1 is saved at step")
        for line in message
    )
    saved = {row["policy"]: row["step"] for row in told(command.run, "saved")}
    assert sum(saved.values()) >= 7

    command = Command(faults_folder, "driver", "checkpoint_every=100")
    command.wait_for_steps(sum(saved.values()) + 4)
    assert {row["policy"]: row["step"] for row in told(command.run, "resumed")} == saved
    children = descendants(command)
    assert len(children) > 6
    command.stop()
    assert not survivors(children, 30)

    set_pace(faults_folder, 0)
    command = Command(faults_folder, "driver")
    assert_same_end(command, undisturbed)
    assert [(row["what"], row["cause"]) for row in told(command.run, "fault")] == [
        ("driver", "killed")
    ]


class Troubled(PolicyActor):
    """Its first update never ends, its second one takes more memory than there is, its third finds
    a broken GPU, each once; later it dies whenever it comes to step 3.
    """

    def _step(self, progress: Progress, scores: list[float], idle_seconds: float) -> dict[str, Any]:
        if self.first_time(progress, "slept"):
            self.sleep_for_ever()
        if progress.policy.step == 1 and self.first_time(progress, "asked"):
            torch.empty(1 << 60, dtype=torch.uint8)
        if progress.policy.step == 2 and self.first_time(progress, "used a GPU"):
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        if progress.policy.step == 3:
            os._exit(1)
        return super()._step(progress, scores, idle_seconds)

    def first_time(self, progress: Progress, what: str) -> bool:
        mark = progress.files.storage.cache / what
        seen = mark.exists()
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()
        return not seen

    def sleep_for_ever(self) -> None:
        time.sleep(10**6)


def test_a_hang_is_told_with_its_stack_and_what_always_dies_is_given_up(
    ray_cluster: Any, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = {**SETTINGS, "model": str(tiny_llama), "reward": {"function": "raywarp.embedded:vader"}}
    tree["warp"] = {**tree["warp"], "policies": 1}
    tree["cluster"] = {"policy_actors": 1, "threads": 1, "max_failures": 1, "hang_seconds": 10}
    events: list[dict[str, Any]] = []

    def report(event: str, **details: Any) -> None:
        events.append({"event": event, **details})

    prompts = [Prompt(f"prompt {n}", (3, 4, 5 + n), {}) for n in range(8)]
    with Session(
        parse_config(tree), str(tiny_llama), 3, kinds=Kinds(policy=Troubled), report=report
    ) as session:
        job = Job(1, 1, "key", Storage(tmp_path))
        with pytest.raises(FaultError) as refusal:
            list(session.fine_tune([job], session.zero, prompts))
    message = str(refusal.value)
    assert message.startswith(
        "policy 1 of iteration 1 failed 2 times without getting beyond step 3 (killed: "
    )
    assert (
        "cluster.max_failures=1; what was saved is kept, and the same command continues" in message
    )
    (hang,) = [row for row in events if row["event"] == "hang"]
    assert (hang["what"], hang["policy"], hang["step"]) == ("policy actor 1", 1, 0)
    assert "in sleep_for_ever" in hang["message"]
    faults = [row for row in events if row["event"] == "fault"]
    assert [row["cause"] for row in faults] == [
        *("hang", "out of memory", "GPU error", "killed", "killed")
    ]
    assert [row["step"] for row in faults] == [0, 1, 2, 3, 3]
    # With the memory's error the policy was saved; from a broken GPU nothing can be.
    continued = [row for row in events if row["event"] == "continued"]
    assert [(row["step"], row["steps_repeated"]) for row in continued[1:3]] == [(1, 0), (1, 1)]
    assert "can't allocate memory" in faults[1]["message"]


def test_a_policy_actor_that_loads_does_not_hang(ray_cluster: Any, tiny_llama: Path) -> None:
    """One that takes another's place loads in fine_tune, where a busy machine or a slow disk may
    hold it up.
    """
    loading, may_end = threading.Event(), threading.Event()

    class Slow(PolicyActor):
        def start(self) -> AdapterDelta:
            loading.set()
            may_end.wait(60)
            return super().start()

    class Init:
        def fetch(self) -> AdapterDelta:
            pulses.append(actor.pulse())
            raise StoreError("enough is known")

    tree = {**SETTINGS, "model": str(tiny_llama), "reward": {"function": "raywarp.embedded:vader"}}
    actor, pulses = Slow(parse_config(tree), str(tiny_llama), "float32", 1), []
    with ThreadPoolExecutor() as pool:
        training = pool.submit(next, actor.fine_tune([], Init(), {}, None, None, HeldOut({})))  # type: ignore[arg-type]
        assert loading.wait(60)
        time.sleep(0.1)
        pulses.append(actor.pulse())
        may_end.set()
        with pytest.raises(StoreError, match="enough is known"):
            training.result(60)
    assert [pulse.busy for pulse in pulses] == [True, True]
    assert pulses[0].working == 0
    assert pulses[1].working > 0


class Uneven(PolicyActor):
    """Of two policies the first one's reward fails in its second step, after which it cannot save;
    the second one is in a long step.
    """

    def _step(self, progress: Progress, scores: list[float], idle_seconds: float) -> dict[str, Any]:
        mark = progress.files.storage.cache / "long"
        if progress.policy.step == 1 and progress.job.index == 1:
            while not mark.exists():
                time.sleep(0.1)
            raise RewardError("not a finite number")
        if progress.policy.step == 1:
            mark.touch()
            time.sleep(2 * SAVE_SECONDS + 1)
        return super()._step(progress, scores, idle_seconds)

    def _checkpoint(self, progress: Progress) -> None:
        if progress.job.index == 1:
            raise StoreError("no space left on device")
        super()._checkpoint(progress)


def test_when_one_policy_fails_the_others_are_saved_however_long_their_steps(
    ray_cluster: Any, tiny_llama: Path, tmp_path: Path
) -> None:
    tree = {**SETTINGS, "model": str(tiny_llama), "reward": {"function": "raywarp.embedded:vader"}}
    saved: dict[int, str] = {}

    def report(event: str, **details: Any) -> None:
        if event == "saved":
            saved[details["policy"]] = details["message"]

    prompts, storage = (
        [Prompt(f"prompt {n}", (3, 4, 5 + n), {}) for n in range(8)],
        Storage(tmp_path),
    )
    with Session(
        parse_config(tree), str(tiny_llama), 3, kinds=Kinds(policy=Uneven), report=report
    ) as session:
        jobs = [Job(1, index, f"key-{index}", storage) for index in (1, 2)]
        with pytest.raises(StoreError, match="no space left"):
            list(session.fine_tune(jobs, session.zero, prompts))
    assert saved == {
        1: "iteration 1 policy 1 was not saved: its last checkpoint is of step 0",
        2: "iteration 1 policy 2 is saved at step 2",
    }
    assert [name.rpartition("-")[2] for name in PolicyFiles(storage, "key-2").checkpoints()] == [
        "000002"
    ]


def test_a_rollout_worker_that_hangs_is_told_with_its_stack(
    ray_cluster: Any, tiny_llama: Path, tmp_path: Path
) -> None:
    class Stuck(RolloutWorker):
        """Its first call never ends."""

        def _generate(self, engine: Engine, requests: Sequence[Request]) -> InTurns[list[Rollout]]:
            if not (mark := tmp_path / "slept").exists():
                mark.touch()
                self.sleep_for_ever()
            return (yield from super()._generate(engine, requests))

        def sleep_for_ever(self) -> None:
            time.sleep(10**6)

    tree = {**SETTINGS, "model": str(tiny_llama), "reward": {"function": "raywarp.embedded:vader"}}
    tree["cluster"] = {"policy_actors": 1, "threads": 1, "hang_seconds": 10}
    prompts = [Prompt(f"prompt {n}", (3, 4, 5 + n), {}) for n in range(3)]
    events: list[dict[str, Any]] = []

    def report(event: str, **details: Any) -> None:
        events.append({"event": event, **details})

    with Session(
        parse_config(tree), str(tiny_llama), 3, kinds=Kinds(worker=Stuck), report=report
    ) as session:
        (point,) = submit_points(session, [None], prompts, range(3))
        measured = point.wait()
        assert submit_points(session, [None], prompts, range(3))[0].wait() == measured
    assert [(row["event"], row["what"], row["cause"]) for row in events[:2]] == [
        ("hang", "rollout worker 1", "hang"),
        ("fault", "rollout worker 1", "hang"),
    ]
    assert re.match(
        r"its call has not ended for 1\d s; started again\. It was at\n", events[0]["message"]
    )
    assert "in sleep_for_ever" in events[0]["message"]


class Forgetful(RolloutPool):
    """Never answers the first call of each size, like one that Ray has lost."""

    async def generate(self, requests: Sequence[Request]) -> Any:
        known: set[int] = self.__dict__.setdefault("known", set())
        if (size := len(requests[0].prompts)) not in known:
            known.add(size)
            await asyncio.Event().wait()
        return await super().generate(requests)


def test_a_call_that_ray_has_lost_is_made_again(
    ray_cluster: Any, tiny_llama: Path, tmp_path: Path
) -> None:
    """Nobody dies, nobody works, and one waits: once in training, once while a point is
    measured.
    """
    tree = {**SETTINGS, "model": str(tiny_llama), "reward": {"function": "raywarp.embedded:vader"}}
    tree["warp"] = {**tree["warp"], "steps": 4}
    tree["cluster"] = {
        "policy_actors": 2,
        "cpus_per_policy": 0.5,
        "cpus_per_rollout_worker": 0.5,
        "threads": 1,
        "hang_seconds": 15,
    }
    prompts = [Prompt(f"prompt {n}", (3, 4, 5 + n), {}) for n in range(8)]
    events: list[dict[str, Any]] = []

    def report(event: str, **details: Any) -> None:
        events.append({"event": event, **details})

    def results(session: Session, folder: Path) -> list[Any]:
        jobs = [Job(1, n, f"key-{n}", Storage(folder)) for n in (1, 2)]
        steps = [
            row for row in session.fine_tune(jobs, session.zero, prompts) if row["event"] == "step"
        ]
        (point,) = submit_points(session, [None], prompts[:3], range(3))
        policies = [digest(load_peft(folder / "policies" / job.key)) for job in jobs]
        return [
            sorted((row["policy"], row["step"], row["reward"]) for row in steps),
            policies,
            point.wait(),
        ]

    with Session(
        parse_config(tree), str(tiny_llama), 3, kinds=Kinds(pool=Forgetful), report=report
    ) as session:
        disturbed = results(session, tmp_path / "lost")
        hangs = [row for row in events if row["event"] == "hang"]
        assert [row["what"] for row in hangs][1:] == ["evaluation"], hangs
        assert hangs[0]["what"].startswith("policy actor")
        assert (
            "for completions or scores that nobody works at; started again" in hangs[0]["message"]
        )
        assert [row["cause"] for row in events if row["event"] == "fault"] == ["hang"]
        told = len(events)
        assert results(session, tmp_path / "plain") == disturbed
        assert not events[told:]


def test_workers_may_die_while_the_reward_is_standardised_and_while_the_front_is_measured(
    ray_cluster: Any, tiny_llama: Path, tmp_path: Path
) -> None:
    """Everything that works dies a moment after the work was asked for; the answers are those of a
    session without deaths.
    """
    tree = {**SETTINGS, "model": str(tiny_llama), "reward": {"function": "raywarp.embedded:vader"}}
    tree["rollout"] = {**tree["rollout"], "max_new_tokens": 64, "ignore_eos": True}
    tree["cluster"] = {"policy_actors": 1, "threads": 1}
    events: list[dict[str, Any]] = []

    def report(event: str, **details: Any) -> None:
        events.append({"event": event, **details})

    prompts = [Prompt(f"prompt {n}", (3, 4, 5 + n % 20), {}) for n in range(256)]
    driver = psutil.Process()

    def answers(kinds: Sequence[str], work: Callable[[], Any]) -> Any:
        victims = [process for kind in kinds for process in processes(kind, driver)]
        timer = threading.Timer(0.15, lambda: [kill(process) for process in victims])
        timer.start()
        found = work()
        timer.join()
        assert not survivors([process.pid for process in victims])
        return found

    with Session(parse_config(tree), str(tiny_llama), 3, report=report) as session:
        generator = torch.Generator().manual_seed(0)
        factors = {
            name: Factors(
                torch.randn(f.B.shape[0], 2, generator=generator),
                torch.randn(2, f.A.shape[1], generator=generator) / 50,
            )
            for name, f in session.zero.factors.items()
        }

        def front() -> Any:
            points = submit_points(
                session, [None, AdapterDelta(factors)], prompts[:128], list(range(128))
            )
            return [point.wait() for point in points]

        scores, measured = sft_scores(session, prompts), front()
        assert (
            answers(["rollout worker", "reward worker"], lambda: sft_scores(session, prompts))
            == scores
        )
        assert answers(["rollout worker", "reward worker", "policy actor"], front) == measured
    told = [(row["what"].rstrip(" 1"), row["cause"]) for row in events if row["event"] == "fault"]
    assert sorted(told) == [
        ("policy actor", "killed"),
        *[("reward worker", "killed")] * 2,
        *[("rollout worker", "killed")] * 2,
    ]


def test_a_reward_worker_that_is_started_again_scores_as_before(
    ray_cluster: Any, tmp_path: Path
) -> None:
    """The mean and deviation that it was never told again come with the call."""
    folder = save_tiny_llama(tmp_path / "model")
    AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1).save_pretrained(folder)
    options = {"max_restarts": -1, "max_task_retries": 3, "num_cpus": 0}
    actor = (
        ray_cluster.remote(concurrency_groups={health.WATCH: 1})(RewardActor)
        .options(**options)
        .remote(RewardConfig(model=str(folder)))
    )
    scorer, prompts = Scorer(actor, (0.5, 0.25)), [Prompt("the film was", (3,), {})]
    rollouts = [ray_cluster.put(Rollout([Completion((3,), (0.0,), "good", True)], ()))]
    raw = ray_cluster.get(Scorer(actor).submit(prompts, rollouts))
    before = ray_cluster.get(scorer.submit(prompts, rollouts))
    assert before == [(raw[0] - 0.5) / 0.25]
    process = ray_cluster.get(actor.pulse.remote())
    os.kill(process.id, signal.SIGKILL)
    assert ray_cluster.get(scorer.submit(prompts, rollouts)) == before
    assert ray_cluster.get(actor.pulse.remote()).id != process.id
    ray_cluster.kill(actor)


def test_the_same_number_on_another_node_is_a_new_process(ray_cluster: Any) -> None:
    """Every container counts its processes from 1."""
    told: list[tuple[str, Any]] = []
    helper = supervisor.SupervisedActor(
        "reward worker",
        None,
        10,
        lambda event, **details: told.append((event, details.get("cause"))),
    )
    answers = iter([health.Process(212, "first", done=3), health.Process(212, "second", done=1)])
    helper.pulse = health.Pulse(lambda: ray_cluster.put(next(answers)))
    for _ in range(2):
        while helper.check() is None:
            time.sleep(0.05)
    assert told == [("fault", "node lost"), ("recovered", None)]


def test_a_process_that_answers_again_was_only_out_of_reach(ray_cluster: Any) -> None:
    """A connection breaks, and Ray makes another one: it is back, its standstill counts, and its
    death is told when it comes.
    """
    told: list[tuple[str, Any]] = []
    helper = supervisor.SupervisedActor(
        "reward worker",
        None,
        10,
        lambda event, **details: told.append((event, details.get("cause"))),
    )
    node, lost = (
        ray_cluster.get_runtime_context().get_node_id(),
        ActorUnavailableError("Socket closed", None),
    )
    first, second = health.Process(7, node, done=3), health.Process(8, node, done=1)
    answers: Iterator[Any] = iter([first, lost, first, first, lost, second])

    def poll() -> Any:
        if isinstance(answer := next(answers), Exception):
            raise answer
        return answer

    helper.pulse.poll = poll  # type: ignore[method-assign]
    at_work = []
    for _ in range(6):
        helper.check()
        at_work.append(helper.at_work)
    assert told == [("fault", "killed"), ("recovered", None)] * 2
    assert at_work == [True, True, False, False, True, True]


def test_a_rollout_worker_that_loads_does_not_hang(ray_cluster: Any) -> None:
    """One that took another's place before its next call loads its engine in that call."""

    class Slow(RolloutWorker):
        def _start_engine(self) -> Any:
            time.sleep(10**6)

    told: list[str] = []
    settings = EngineSettings("nowhere", "float32", 16, 8, parse_config({}).rollout, gpu=False)
    worker = (
        ray_cluster.remote(concurrency_groups={health.WATCH: 1})(Slow)
        .options(num_cpus=0)
        .remote(settings)
    )
    helper = supervisor.SupervisedPool(
        "rollout pool",
        None,
        10,
        lambda event, **details: told.append(details["message"]),
        workers=[worker],
    )
    in_flight = iter([9.0, 11.0, health.START_SECONDS + 1])
    helper.pulse.poll = lambda: PoolHealth(
        health.Process(7, "node"), {0: next(in_flight)}, {}, {}, []
    )  # type: ignore[method-assign]
    call = worker.generate.remote([])
    while not ray_cluster.get(worker.loads.remote()):
        time.sleep(0.02)
    counts = []
    for _ in range(3):
        helper.check()
        counts.append(len(told))
    assert counts == [0, 0, 1]
    assert told[0].startswith("its call has not ended for 301 s; started again")
    with pytest.raises(RayError):
        ray_cluster.get(call)


def test_causes() -> None:
    node = ActorUnavailableError("The actor died because its node has died. Node Id: 4a", None)
    assert faults.kind_of(node) == faults.NODE_LOST
    assert faults.kind_of(ActorUnavailableError("Socket closed", None)) == faults.KILLED
    assert (
        faults.kind_of(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))
        == faults.OUT_OF_MEMORY
    )
    for text in (
        "[enforce fail] DefaultCPUAllocator: can't allocate memory",
        "HIP out of memory. Tried to allocate 2.00 GiB",
    ):
        assert faults.kind_of(RuntimeError(text)) == faults.OUT_OF_MEMORY
    for text in (
        "CUDA error: an illegal memory access was encountered",
        "CUDA error: uncorrectable ECC error encountered",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "NCCL error in: ProcessGroupNCCL.cpp:2251, unhandled system error",
        "NCCL Error 1: unhandled cuda error (run with NCCL_DEBUG=INFO for details)",
        "CUDA unknown error - this may be due to an incorrectly set up environment",
        "cusolver error: CUSOLVER_STATUS_EXECUTION_FAILED, when calling `cusolverDnCreate(handle)`",
        "cusparse error: CUSPARSE_STATUS_EXECUTION_FAILED, when calling `cusparseCreate(handle)`",
        "Triton Error [CUDA]: an illegal memory access was encountered",
        "Triton Error [HIP]: Code: 719, Message: unspecified launch failure",
    ):
        error = RayTaskError("fine_tune", f"RuntimeError: {text}", RuntimeError(text))
        assert faults.kind_of(error) == faults.GPU_ERROR
        assert faults.is_survivable(error)
    assert faults.kind_of(ValueError("mine")) == faults.EXCEPTION
    quoting = RewardError("not a finite number for the prompt 'I am low on memory'")
    assert (
        faults.kind_of(quoting)
        == faults.kind_of(RayTaskError("score", "CUDA out of memory", quoting))
        == faults.EXCEPTION
    )
    assert not faults.is_survivable(quoting)  # a new policy actor would not help
    assert [faults.is_survivable(error) for error in (node, MemoryError(), ValueError("mine"))] == [
        True,
        True,
        False,
    ]


def test_a_broken_process_is_renewed_and_its_cause_kept_between_processes() -> None:
    out_of_memory = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nof 80")
    broken = pickle.loads(pickle.dumps(BrokenProcessError.after("an engine", out_of_memory)))
    assert str(broken) == (
        "an engine failed with OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB"
    )
    assert faults.kind_of(RayTaskError("generate", "", broken)) == faults.OUT_OF_MEMORY
    assert faults.is_survivable(RayTaskError("generate", "", broken))
    assert faults.kind_of(BrokenProcessError.after("an engine", ValueError())) == faults.EXCEPTION


def test_pauses_grow_and_progress_forgives() -> None:
    failures = Failures(2)
    assert [(failures.again(), failures.pause()) for _ in range(3)] == [
        (True, 0.5),
        (True, 1.0),
        (False, 2.0),
    ]
    failures.progressed()
    assert failures.again()
    assert json.dumps([Failures(0).again(), Failures(100).pause()]) == "[false, 0.0]"
