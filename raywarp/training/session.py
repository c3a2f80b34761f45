"""The session of a run: its actors, which fine-tune, sample and score. It replaces dead ones."""

import contextlib
import itertools
import logging
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from types import TracebackType
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError

from raywarp.algorithm.deltas import AdapterDelta
from raywarp.cluster import faults, health, placement_groups, runtime
from raywarp.cluster.faults import Failures, FaultError
from raywarp.cluster.health import Process, Report
from raywarp.cluster.supervisor import ActorSlot, SupervisedActor, SupervisedPool, hang_of
from raywarp.config.schema import Config
from raywarp.data.text import Prompt
from raywarp.rewards.actor import Scorer
from raywarp.rollout.effect import Sampler
from raywarp.rollout.pool import PoolReport
from raywarp.rollout.proof import Proof
from raywarp.rollout.protocol import AdapterPart
from raywarp.run.policy_files import Job
from raywarp.training.actors import REAL, Actors, Kinds, find_room, reward_titles
from raywarp.training.draws import drawn_by_each
from raywarp.training.fine_tuning import TICK, FineTuning
from raywarp.training.startup import Startup, request_start, warn_of_small_cache
from raywarp.training.timing import Timing, measure
from raywarp.training.tracking import HeldOut


def log_event(event: str, **details: Any) -> None:
    """Log an event of the actors, where no run records it."""
    logging.getLogger(__name__).warning(
        ", ".join([event, *(f"{name} {value}" for name, value in details.items())])
    )


class Session:
    """A context manager that holds the actors of a run.

    Args:
        model: folder or hub id, already resolved.
        prompt_tokens: length of the longest prompt, in tokens.
        policies: whether policy actors are needed too.
        report: is called with events of the actors: `report("fault", what=…, cause=…, …)`. See
            Run.add_event.
        shares: whether other sessions take the resources that this one frees, so that it must not
            wait for them.
        check: is called once Ray is running, before any actor starts.
        lazy: start the actors when they are first needed.
        texts: token ids of some of the run's texts. The sampler is proven on them before anything
            else. Without texts, tokens of the whole vocabulary are used. Without policies there is
            no proof.
        proves: whether the sampler is proven.
    """

    def __init__(
        self,
        config: Config,
        model: str,
        prompt_tokens: int,
        policies: bool = True,
        kinds: Kinds = REAL,
        report: Report = log_event,
        shares: bool = False,
        check: Callable[[], None] = lambda: None,
        lazy: bool = False,
        texts: Sequence[Sequence[int]] = (),
        proves: bool = True,
    ):
        self.config, self.model, self.prompt_tokens = config, model, prompt_tokens
        self._trains, self._kinds = policies, kinds
        self.report, self._shares, self._check, self._lazy = report, shares, check, lazy
        self._texts, self._proves = texts, proves and policies
        self.proof: Proof | None = None
        self.is_started = False
        self._statistics: dict[str, tuple[float, float]] = {}
        self.timing: Timing | None = None
        self._free_before: dict[str, float] = {}
        self._actors: Actors | None = None
        self._helpers: list[SupervisedActor] = []
        self._startup = Startup(config, self.get)
        self._failures = Failures(config.cluster.max_failures)
        self.policies: list[ActorSlot] = []
        self.workers: list[Any] = []
        self.pool: Any = None
        self.reward: Any = None
        self.control: Any = None

    def __enter__(self) -> "Session":
        if not self._lazy:
            self.start()
        return self

    def start(self) -> None:
        """Start the actors, unless they are running."""
        if self.is_started:
            return
        runtime.start_ray()
        self._check()
        try:
            self._start()
        except BaseException as error:
            self._stop(isinstance(error, KeyboardInterrupt))
            raise
        self.is_started = True

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.is_started:
            self._stop(isinstance(error, KeyboardInterrupt))
            self.is_started = False

    def numerics(self) -> dict[str, Any]:
        """Return the settings that decide a result's bits: dtype, threads, engine, adapter mode."""
        self.start()
        return {"dtype": self.plan.dtype, "threads": self.plan.threads, **self.engine}

    @property
    def zero(self) -> AdapterDelta:
        """The zero task vector of the model's adapted weights."""
        self.start()
        return self._zero

    def fine_tune(
        self,
        jobs: Sequence[Job],
        init: AdapterDelta,
        prompts: Sequence[Prompt] | Mapping[int, Sequence[Prompt]],
        held_out: Mapping[int, Sequence[Prompt]] | None = None,
    ) -> Generator[dict[str, Any]]:
        """Fine-tune all jobs on the policy actors, and yield their events (see FineTuning.run).

        Close the generator to end early: it then saves the policies in training. Afterwards
        `timing` says where the time went.

        Args:
            prompts: training prompts of all policies, or of each by its index.
            held_out: policy's index → what it is measured on every front.every steps.
        """
        if not jobs:
            self.timing = None
            return
        self.start()
        work = (
            AdapterPart.put(init),
            ray.put(drawn_by_each(self.config, jobs, prompts)),
            self.pool,
            self.reward,
            HeldOut({m: list(own) for m, own in (held_out or {}).items()}, self.control),
            self.proof,
        )
        self.get(self.pool.reset.remote())
        start, before = time.monotonic(), self._reward_seconds()
        fine_tuning = FineTuning(self.config, self.present(), work, self._tick, self.report)
        yield from fine_tuning.run(jobs)
        report: PoolReport = self.get(self.pool.report.remote())
        # A reward worker that was restarted counts from 0.
        reward_seconds = max(self._reward_seconds() - before, 0.0)
        self.timing = measure(
            fine_tuning.rows, time.monotonic() - start, fine_tuning.trainers, report, reward_seconds
        )

    def set_reward_statistics(self, mean: float, deviation: float, key: str = "reward") -> None:
        """Standardise all later rewards of this key as (raw − mean) / deviation."""
        self._statistics[key] = (mean, deviation)
        if self.is_started:
            actors = [part.actor for part in self.reward.parts]
            self.reward = Scorer.of(actors, self.config.rewards_by_key, self._statistics)

    def persist(self, work: Callable[[], Any]) -> Any:
        """Return the result of work that can be repeated.

        If policy actors die, replace them and do the work again.

        Raises:
            FaultError: actors died more than cluster.max_failures times without a success.
            Exception: any other exception of the work.
        """
        while True:
            try:
                result = work()
            except RayError as error:
                if not faults.is_survivable(error):
                    raise faults.cause_of(error) from None
                self._recover(error)
            else:
                self._failures.progressed()
                return result

    def present(self) -> list[ActorSlot]:
        """Return the policy actors' slots. Renew a slot that was given up, if it has room again."""
        for slot in self.policies:
            if slot.gone and placement_groups.is_found(slot.bundle):
                slot.renew()
        return [slot for slot in self.policies if not slot.gone]

    def next_policy(self) -> ActorSlot:
        """Return the slot whose turn it is."""
        slot = self.present()[0]
        self.policies.remove(slot)
        self.policies.append(slot)
        return slot

    @property
    def chunk(self) -> int:
        return self.config.rollout.chunk_size or self.config.optim.batch_size

    def get(self, refs: Any, check: Callable[[], None] = lambda: None) -> Any:
        """Return ray.get's result, and check the actors while it waits.

        Args:
            check: is called now and then, too.

        Raises:
            GetTimeoutError: every actor waits and none works. Ask for the results again.
        """
        wanted, standstill, seconds = (
            refs if isinstance(refs, list) else [refs],
            health.Standstill(),
            self.config.cluster.hang_seconds,
        )
        while len(ray.wait(wanted, num_returns=len(wanted), timeout=TICK)[0]) < len(wanted):
            runtime.check()
            check()
            at_work = self._tick() or not self._helpers
            for slot in self.policies:
                if text := hang_of(slot, seconds):
                    self.report("hang", what=slot.name, cause=faults.HANG, message=text)
            if standstill.lasts(
                at_work or any(slot.at_work for slot in self.policies if not slot.gone), seconds
            ):
                text = (
                    f"nobody has worked for {standstill.seconds:.0f} s at what is waited for; it is"
                    " asked for again"
                )
                self.report("hang", what="evaluation", cause=faults.HANG, message=text)
                raise GetTimeoutError(text)
        return ray.get(refs)

    def _tick(self) -> bool:
        """Check the pool and the reward workers. Return whether one of them works."""
        for helper in self._helpers:
            helper.check()
        return any(helper.at_work for helper in self._helpers)

    def _recover(self, error: RayError) -> None:
        text = faults.explain(error)
        if not self._failures.again():
            most = self.config.cluster.max_failures
            raise FaultError(
                f"{text}; that happened more than cluster.max_failures={most} times; the same"
                " command continues"
            )
        time.sleep(self._failures.pause())
        deadline = time.monotonic() + self.config.cluster.timeout_seconds
        for slot in self.present():
            try:
                slot.process = self.get(slot.actor.pulse.remote())
                if faults.kind_of(error) == faults.GPU_ERROR:
                    raise error  # this process answers, but may be the one that lost its GPU
            except RayError as death:
                self.report(
                    "fault", what=slot.name, cause=slot.cause(death), message=faults.explain(death)
                )
                if slot.await_room(deadline):
                    slot.renew()
                else:
                    slot.leave()
                    self.report(
                        "lost", what=slot.name, message=f"no room for it: {placement_groups.lack()}"
                    )
        if self.policies and all(slot.gone for slot in self.policies):
            raise self.policies[0].no_room(self.config.cluster.timeout_seconds)

    def _reward_seconds(self) -> float:
        """Return the seconds of the reward worker that has worked most."""
        refs = [part.actor.seconds_of_work.remote() for part in self.reward.parts]
        return max(map(float, self.get(refs)))

    def _start(self) -> None:
        config = self.config
        self._free_before = ray.available_resources()
        plan, bundles = find_room(config, self._trains, self.report, self._check)
        self.plan = plan
        self._actors = actors = Actors(
            config, plan, self.model, self.prompt_tokens, self._kinds, bundles
        )
        self.workers = actors.workers()
        self.pool = actors.pool()
        if self._trains:
            self.policies = actors.policies()
        scorers = actors.rewards()
        rewarding = scorers[: len(config.rewards_by_key)]
        self.reward = Scorer.of(rewarding, config.rewards_by_key, self._statistics)
        self.control = Scorer(scorers[-1]) if config.control else None
        engines, rewards = request_start(self.workers), request_start(scorers)
        # vLLM measures what is free on its GPU, so policies wait where they share it.
        zeros = None if plan.shares_gpus else self._start_policies()
        started = self._startup.results(
            "a rollout worker", self.workers, engines, actors.bundles["rollout"]
        )
        self._remind({n: worker["process"] for n, worker in enumerate(started)})
        self.engine: dict[str, str] = started[0]["numerics"]
        warn_of_small_cache(config, plan, self.prompt_tokens, started[0]["capacity"])
        if self._trains:
            attempts = itertools.chain([zeros] if zeros else [], iter(self._start_policies, None))
            check = self._startup.look_after(self.policies)
            self._zero: AdapterDelta = self.persist(lambda: self.get(next(attempts), check))[0]
        self._startup.results("the reward worker", scorers, rewards, actors.bundles["reward"])
        wait, hang = config.cluster.timeout_seconds, config.cluster.hang_seconds
        rooms, most = actors.bundles, config.cluster.max_failures
        self._helpers = [
            SupervisedPool(
                "rollout pool",
                self.pool,
                hang,
                self.report,
                most,
                rooms["rollout"],
                wait,
                workers=self.workers,
                remind=self._remind,
            )
        ]
        for name, scorer, bundle in zip(
            reward_titles(config), scorers, rooms["reward"], strict=True
        ):
            self._helpers.append(
                SupervisedActor(name, scorer, hang, self.report, most, [bundle], wait)
            )
        if self._proves:
            self.examine_workers()

    def _start_policies(self) -> list[Any]:
        return request_start([slot.actor for slot in self.present()])

    def examine_workers(self) -> None:
        """Prove that each worker's engine runs the trainer's policies. Part of the start.

        A synthetic adapter's effect in each engine is compared with that in the trainer
        (rollout/proof.py).

        Raises:
            EffectError: an engine does not run the trainer's policies.
        """
        assert self._actors
        longest, texts = self._actors.settings.max_model_len - 1, ray.put(list(self._texts))

        def reference(tokens: int) -> Any:
            return self.persist(
                lambda: self.get(self.present()[0].actor.reference.remote(texts, longest, tokens))
            )

        sampler = Sampler(
            self.model, self.engine["engine"], self.engine["adapter"], self.plan.dtype
        )
        bundles = self._actors.bundles["rollout"]
        self.proof = self._startup.prove_workers(sampler, reference, self.workers, bundles)
        self._remind({})

    def _remind(self, processes: Mapping[int, Process]) -> None:
        """Tell the pool the workers' processes and the proof, which a restarted one lacks."""
        self.pool.know.remote(processes)
        if self.proof:
            self.pool.prove_with.remote(self.proof)

    def _stop(self, at_once: bool) -> None:
        """Shut the engines down, then stop all other actors.

        A killed engine may leave shared memory behind.
        """
        for helper in self._helpers:
            with contextlib.suppress(Exception):
                helper.last_check(0.25 if at_once else 5)
        with contextlib.suppress(Exception):
            ray.get(
                [worker.shutdown.remote() for worker in self._living_workers()],
                timeout=0.5 if at_once else 20,
            )
        if self._actors:
            self._actors.stop()
        if not at_once and not self._shares:
            placement_groups.wait_until_free(self._free_before)

    def _living_workers(self) -> list[Any]:
        """Return the rollout workers that are not away after a loss."""
        down = next(
            (helper.down for helper in self._helpers if isinstance(helper, SupervisedPool)), {}
        )
        return [worker for index, worker in enumerate(self.workers) if index not in down]
