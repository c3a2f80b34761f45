"""The driver: Algorithm 1 of WARP (Ramé et al. 2024, arXiv 2406.16768).

    θ_init ← θ_sft
    for each of I iterations:
        for m = 1..M: θ_m ← RL from θ_init, KL to the EMA of θ_m   (stage 1, policy_actor.py)
        θ_slerp ← θ_init + slerp(θ_1 − θ_init, …, θ_M − θ_init)    (stage 2, averaging.py)
        θ_init ← (1 − η)·θ_init + η·θ_slerp                        (stage 3, LITI)
    return the front (1 − η)·θ_sft + η·θ_slerp for 0 ≤ η ≤ 1

Every θ is kept as LoRA factors of θ − θ_sft; `merged` holds those of θ_slerp.
The base weights of the SFT model are never written.
"""

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Any

from raywarp.adapters.peft_config import held_base
from raywarp.algorithm.averaging import liti, slerp
from raywarp.algorithm.deltas import AdapterDelta, add, trailing, zeros_like
from raywarp.algorithm.truncation import compress
from raywarp.cluster.claims import NO_CLAIMS, Claims, Elsewhere
from raywarp.cluster.runtime import stoppable
from raywarp.config.schema import Config
from raywarp.front_stage import Fronts, session_of
from raywarp.planning.inputs import Inputs, prepare
from raywarp.run.card import run_origin
from raywarp.run.display import Display
from raywarp.run.events import Journal
from raywarp.run.folder import Run
from raywarp.run.front import run_candidates
from raywarp.run.history import METRICS_FILE
from raywarp.run.keys import front_key, key_chain, key_of_numerics
from raywarp.run.loggers import Loggers
from raywarp.run.policy_files import EMA, TRAJECTORY_FILE, Job
from raywarp.run.prometheus import RunMetrics
from raywarp.soup_stage import Soup
from raywarp.standardisation import reward_statistics
from raywarp.storage import sealed
from raywarp.storage.locks import exclusive
from raywarp.training.merges import measure_merge
from raywarp.training.session import Session


@dataclass(frozen=True)
class IterationState:
    """The state of a run after one of its iterations.

    Attributes:
        iteration: the finished iteration, counted from 1; 0 before the first one.
        keys: keys of the policies, one sequence per iteration of the run.
        determinants: what the keys depend on besides the configuration, see run/keys.py.
        init: θ_init − θ_sft, where θ_init is what the iteration started from.
        policies: the task vectors θ_m − θ_init of its M policies; none at iteration 0.
    """

    run: Run
    session: Session
    iteration: int
    keys: Sequence[Sequence[str]]
    determinants: Mapping[str, object]
    init: AdapterDelta
    policies: Sequence[AdapterDelta]


def train(config: Config, display: Display | None = None) -> Run:
    """Run WARP, or continue a run. Results that the folder `out` already holds are reused.

    Raises:
        ConfigError: the input is wrong; nothing was started.
        RewardError: the reward failed or was not a finite number. Finished work is kept.
        FaultError: an actor died too often, or the cluster has no room for it any more. Finished
            work is kept.
        Stopped: SIGTERM or Ctrl-C, a KeyboardInterrupt. Finished work is kept.
    """
    display = display or Display()
    with closing(iterations(config, prepare(config, display.progress), display)) as states:
        for state in states:
            run = state.run
    return run


def iterations(
    config: Config, inputs: Inputs, display: Display, claims: Claims = NO_CLAIMS
) -> Generator[IterationState]:
    """Run `train` step by step: yield the state at the start and after each iteration.

    Close the generator to leave it early. Actors start when they are first needed; a run that is
    finished and whole starts none.

    Args:
        claims: which policies this run may train, where runs share a store.

    Raises:
        Elsewhere: another run is training policies that this run needs. All other work is done.
    """
    run = Run.open(config, display.say)
    for text in inputs.notes:
        display.say(text)
    gauges = RunMetrics(PurePosixPath(config.out).name)
    with (
        exclusive(config.out, run.folder, display.say) if claims.alone else nullcontext(),
        run.mirrored(),
        Journal(run, display, gauges) as journal,
        stoppable() if claims.alone else nullcontext(),
    ):
        known = run.numerics(key_of_numerics(config, inputs.fingerprints()))
        lazy = known is not None
        session_of_run = session_of(inputs, display, journal.report, lazy, shares=not claims.alone)
        with Loggers(config, run, lazy=lazy) as loggers, session_of_run as session:
            run.save_config(config, inputs.prompts.rendered_at)
            run.clean()
            journal.begin()
            yield from Driver(
                config, inputs, run, session, display, loggers, gauges, claims
            ).iterations(known)


@dataclass(frozen=True)
class Driver:
    """One run of Algorithm 1: what its stages work with, and the outputs that they report to."""

    config: Config
    inputs: Inputs
    run: Run
    session: Session
    display: Display
    loggers: Loggers
    gauges: RunMetrics
    claims: Claims

    def iterations(self, known: Mapping[str, object] | None) -> Iterator[IterationState]:
        """Run Algorithm 1, and yield the state at the start and after each iteration.

        Args:
            known: numerics that this run found earlier, so that no actor has to start to find them.
        """
        config, run = self.config, self.run
        inputs_and_reward = {
            **self.inputs.fingerprints(),
            **reward_statistics(self.session, run, self.inputs),
        }
        is_whole = known is not None and run.has_policies(
            key_chain(config, {**inputs_and_reward, **known})
        )
        numerics = known if known and is_whole else self.session.numerics()
        determinants = {**inputs_and_reward, **numerics}
        all_keys = key_chain(config, determinants)
        init = self.first_init(all_keys[0][0])
        yield IterationState(run, self.session, 0, all_keys, determinants, init, ())
        for iteration, keys in enumerate(all_keys, start=1):
            policies = self.fine_tune(iteration, keys, init)
            merged = add(init, slerp(policies, config.warp.merge_weights))
            measured = self.measure_merge(keys, init, policies)
            run.save_iteration(iteration, init, merged, keys, policies, measured)
            self.display.merged(iteration, policies, measured)
            if iteration == config.warp.iterations:
                self.save_front(init, policies, keys, determinants, numerics)
                self.display.timing(run)
            yield IterationState(
                run, self.session, iteration, all_keys, determinants, init, policies
            )
            if iteration < config.warp.iterations:
                init = self.next_init(init, merged, keys)

    def first_init(self, key: str) -> AdapterDelta:
        """Return θ_init − θ_sft of the first iteration: the zero task vector.

        A finished policy has the same shapes, so reading one saves starting the actors.
        """
        try:
            folder = None if self.session.is_started else self.run.find_policy(key)
        except sealed.DamagedError:
            folder = None
        if folder:
            stored = self.run.load_policy(folder)
            zero = replace(zeros_like(stored), peft=held_base(stored.peft))
        else:
            zero = self.session.zero
        # Sorted, so that both sources give the modules in the same order.
        return replace(zero, factors=dict(sorted(zero.factors.items())))

    def next_init(
        self, init: AdapterDelta, merged: AdapterDelta, keys: Sequence[str]
    ) -> AdapterDelta:
        """Stage 3: return LITI(θ_init, θ_slerp), or the policy's EMA with warp.elastic_reset."""
        if self.config.warp.elastic_reset:
            return compress(self.run.load_policy(self.run.policy_folder(f"{keys[0]}{EMA}")))
        return liti(init, merged, self.config.warp.liti_rate or 0.0)

    def fine_tune(
        self, iteration: int, keys: Sequence[str], init: AdapterDelta
    ) -> list[AdapterDelta]:
        """Stage 1: fine-tune M policies from θ_init, and return their task vectors θ_m − θ_init.

        Policies whose keys are in the store are read instead of trained.

        Raises:
            Elsewhere: other runs are training some of the policies. The rest is finished.
        """
        run, session, warp = self.run, self.session, self.config.warp
        count = self.config.front.tracked_prompts
        jobs = [Job(iteration, m, key, run.store) for m, key in enumerate(keys, start=1)]
        with self.claims.take(keys) as taken:
            unfinished = [job for job in jobs if not self.is_found(job)]
            missing = [job for job in unfinished if job.key in taken]
            self.claims.begin(iteration, [job.key for job in missing])
            run.restore_rows(
                iteration, warp.iterations, [job.key for job in jobs if job not in unfinished]
            )
            own = {job.index: self.inputs.of_policy(job.index) for job in missing}
            train = {m: inputs.prompts.train for m, inputs in own.items()}
            tracked = {m: inputs.prompts.tracked(count) for m, inputs in own.items()}
            steps = {job.key: self.config.of_policy(job.index).warp.steps for job in jobs}
            with (
                self.display.iteration(iteration, jobs, missing, steps) as bars,
                closing(session.fine_tune(missing, init, train, tracked)) as events,
            ):
                for event in events:
                    self.note(event)
                    bars.update(event)
        if session.timing and session.timing.steps:
            run.save_timing(iteration, session.timing.row())
        if others := [job.key for job in unfinished if job not in missing]:
            raise Elsewhere(iteration, others)
        return [
            trailing(
                run.load_policy(run.find_policy(key) or run.policy_folder(key)), own.policy_rank
            )
            for key, own in zip(keys, self.config.of_policies, strict=True)
        ]

    def is_found(self, job: Job) -> bool:
        """Return whether the store has the policy (and its EMA, if needed), undamaged."""
        keys = [job.key, *([f"{job.key}{EMA}"] if self.config.warp.elastic_reset else [])]
        try:
            return all(self.run.find_policy(key) is not None for key in keys)
        except sealed.DamagedError as error:
            self.display.say(
                f"iteration {job.iteration} policy {job.index} has to be trained: {error}"
            )
            return False

    def note(self, event: Mapping[str, Any]) -> None:
        """Save and log the metrics in an event of a policy's training."""
        if event["event"] == "resumed":
            rows = {METRICS_FILE: event["metrics"], TRAJECTORY_FILE: event["trajectory"]}
            return self.run.set_policy_rows(event["key"], rows)
        row = {name: value for name, value in event.items() if name != "event"}
        if event["event"] == "measured":
            self.run.add_measurement(row)
            self.loggers.log_measurement(row)
        elif event["event"] == "step":
            self.run.add_metrics(row)
            self.loggers.log(row)
            self.gauges.step(row)

    def measure_merge(
        self, keys: Sequence[str], init: AdapterDelta, policies: Sequence[AdapterDelta]
    ) -> Mapping[str, Any] | None:
        """Return how alike the policies are on the tracked prompts; see training/merges.py."""
        prompts = self.inputs.prompts.tracked(self.config.front.tracked_prompts)
        return measure_merge(
            self.session, self.config, self.run, keys, init, policies, prompts, self.claims
        )

    def save_front(
        self,
        init: AdapterDelta,
        policies: Sequence[AdapterDelta],
        keys: Sequence[str],
        determinants: Mapping[str, object],
        numerics: Mapping[str, object],
    ) -> None:
        """Measure the front of the last iteration, and save the adapter of the chosen η."""
        config = self.config
        fronts = Fronts(config, self.inputs, self.run, self.session, self.display, self.claims)
        soup = Soup(init, policies, config.corners, config.mixes)
        if fronts.save(
            front_key(config, self.inputs.front, keys, soup.wanted),
            lambda: run_candidates(config, init, policies),
            run_origin(config),
            determinants,
            numerics,
            soup,
        ):
            self.loggers.finish(self.run)
