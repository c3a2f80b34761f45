"""The driver: Algorithm 1 of WARP (Ramé et al. 2024).

    init ← SFT
    for each of I iterations:
        M policies are fine-tuned from init, each against its own EMA     (stage 1, policy_actor.py)
        merged ← init + slerp of their task vectors, per block            (stage 2, averaging.py)
        init ← (1 − η)·init + η·merged                                    (stage 3)
    the front: (1 − η)·SFT + η·merged for 0 ≤ η ≤ 1

Every change is kept as LoRA factors relative to the SFT model; its base weights are never written.
"""

from collections.abc import Generator, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, replace
from pathlib import PurePosixPath

from raywarp import evaluation, store
from raywarp.adapters import AdapterDelta, add, scale, trailing, zeros_like
from raywarp.averaging import liti, slerp
from raywarp.claims import NO_CLAIMS, Claims, Elsewhere
from raywarp.config import Config
from raywarp.data import PromptSplits
from raywarp.evaluation import Point
from raywarp.inputs import Inputs, prepare
from raywarp.journal import Journal
from raywarp.keys import front_key, key_chain, key_of_numerics
from raywarp.loggers import Loggers
from raywarp.model_card import card
from raywarp.peft_files import load_peft
from raywarp.planning import check_cluster
from raywarp.policy_actor import Job
from raywarp.progress import Display
from raywarp.report import plot_front
from raywarp.reward_stage import reward_statistics
from raywarp.rollout import spans_of
from raywarp.run import Run
from raywarp.run_metrics import RunMetrics
from raywarp.session import Session
from raywarp.stop import stoppable


@dataclass(frozen=True)
class Stage:
    """Where a run has got to: one iteration is done; 0: it is about to begin.

    keys: of all policies of all iterations. determinants: what they depend on besides the configuration: see policy_keys.
    init, policies: θ_init that the iteration started from, and the task vectors θ_m − θ_init that it ended with.
    """

    run: Run
    session: Session
    iteration: int
    keys: Sequence[Sequence[str]]
    determinants: Mapping[str, object]
    init: AdapterDelta
    policies: Sequence[AdapterDelta]


def train(config: Config, display: Display | None = None) -> Run:
    """Run WARP, or continue it: what the folder `out` already holds is not computed again.

    Raises:
        ConfigError: the input is wrong; nothing was started.
        RewardError: the reward failed or was not a finite number; what was done is kept.
        FaultError: a piece of the run died again and again, or there is no room for it any more; likewise.
        Stopped: SIGTERM or Ctrl-C; likewise. It is a KeyboardInterrupt.
    """
    display = display or Display()
    with closing(stages(config, prepare(config), display)) as found:
        for stage in found:
            run = stage.run
    return run


def stages(config: Config, inputs: Inputs, display: Display, claims: Claims = NO_CLAIMS) -> Generator[Stage]:
    """`train`, iteration by iteration. To be closed where it is left before its end.

    Args:
        claims: by whom policies are shared with other runs.

    Raises:
        Elsewhere: another run is at work on policies that this one needs, and all that could be done without them is.
    """
    run = Run.open(config, display.say)
    gauges = RunMetrics(PurePosixPath(config.out).name)
    with run.mirrored(), Journal(run, display, gauges) as journal, stoppable() if claims.alone else nullcontext():
        yield from _stages(config, run, inputs, display, journal, gauges, claims)


def _stages(
    config: Config, run: Run, inputs: Inputs, display: Display, journal: Journal, gauges: RunMetrics, claims: Claims
) -> Generator[Stage]:
    """Actors are started when there is something for them to do: never, where the run was finished and all of it is whole."""

    numerics_key = key_of_numerics(config, inputs)
    known = run.numerics(numerics_key)
    session_of_run = Session(
        config,
        inputs.model,
        inputs.longest_prompt,
        report=journal.report,
        shares=not claims.alone,
        check=lambda: check_cluster(config, inputs.model, inputs.shapes, inputs.longest_prompt),
        lazy=known is not None,
    )
    with Loggers(config, run, lazy=known is not None) as loggers, session_of_run as session:
        run.save_config(config)
        run.clean()
        journal.begin()
        inputs_and_reward = {**inputs.fingerprints(), **reward_statistics(session, run, config, inputs.prompts.train)}
        is_whole = known is not None and run.has_policies(key_chain(config, {**inputs_and_reward, **known}))
        numerics = known if known and is_whole else session.numerics()
        determinants = {**inputs_and_reward, **numerics}
        all_keys = key_chain(config, determinants)
        init = first_init(session, run, all_keys[0][0])
        yield Stage(run, session, 0, all_keys, determinants, init, ())
        for iteration, keys in enumerate(all_keys, start=1):
            policies = fine_tune(session, run, config, inputs.prompts, display, loggers, gauges, iteration, keys, init, claims)
            merged = add(init, slerp(policies))
            run.save_iteration(iteration, init, merged, keys, policies)
            display.merged(iteration, policies)
            if iteration == config.warp.iterations:
                key = front_key(config, inputs, keys)
                save_front(session, run, config, inputs.prompts, display, loggers, init, policies, key, {numerics_key: numerics})
                display.timing(run)
            yield Stage(run, session, iteration, all_keys, determinants, init, policies)
            if iteration < config.warp.iterations:
                init = liti(init, merged, config.warp.liti_rate)


def fine_tune(
    session: Session,
    run: Run,
    config: Config,
    prompts: PromptSplits,
    display: Display,
    loggers: Loggers,
    gauges: RunMetrics,
    iteration: int,
    keys: Sequence[str],
    init: AdapterDelta,
    claims: Claims,
) -> list[AdapterDelta]:
    """Stage 1: the task vectors θ_m − θ_init of one iteration; those whose key is in the store are read, not trained.

    Raises:
        Elsewhere: some are under way in other runs; the rest is finished.
    """
    jobs = [Job(iteration, m, key, run.store) for m, key in enumerate(keys, start=1)]
    with claims.take(keys) as taken:
        unfinished = [job for job in jobs if not found(run, job, display)]
        missing = [job for job in unfinished if job.key in taken]
        claims.begin(iteration, [job.key for job in missing])
        run.restore_metrics(iteration, config.warp.iterations, [job.key for job in jobs if job not in unfinished])
        with (
            display.iteration(iteration, jobs, missing, config.warp.steps) as bars,
            closing(session.fine_tune(missing, init, prompts.train)) as events,
        ):
            for event in events:
                if event["event"] == "resumed":
                    run.set_policy_metrics(event["key"], event["metrics"])
                elif event["event"] == "step":
                    row = {name: value for name, value in event.items() if name != "event"}
                    run.add_metrics(row)
                    loggers.log(row)
                    gauges.step(row)
                bars.update(event)
    if session.timing and session.timing.steps:
        run.save_timing(iteration, session.timing.row())
    if others := [job.key for job in unfinished if job not in missing]:
        raise Elsewhere(iteration, others)
    return [trailing(load_peft(run.find_policy(key) or run.policy_folder(key)), config.lora.rank) for key in keys]


def first_init(session: Session, run: Run, key: str) -> AdapterDelta:
    """θ_sft as a change of itself. A finished policy has the same shapes, so that nothing has to be started to know them."""
    try:
        folder = None if session.is_started else run.find_policy(key)
    except store.DamagedError:
        folder = None
    zero = replace(zeros_like(load_peft(folder)), peft={}) if folder else session.zero
    return replace(zero, factors=dict(sorted(zero.factors.items())))  # in one order, wherever it comes from


def found(run: Run, job: Job, display: Display) -> bool:
    """Whether the policy is in the store, and whole."""
    try:
        return run.find_policy(job.key) is not None
    except store.DamagedError as error:
        display.say(f"iteration {job.iteration} policy {job.index} has to be trained: {error}")
        return False


def save_front(
    session: Session,
    run: Run,
    config: Config,
    prompts: PromptSplits,
    display: Display,
    loggers: Loggers,
    init: AdapterDelta,
    policies: Sequence[AdapterDelta],
    key: str,
    numerics: Mapping[str, object],
) -> None:
    """Measure the front of the last iteration, unless front.json has it already, and keep the chosen η as adapter/; another choice of
    what is measured costs no more than that.

    Args:
        numerics: goes into front.json: see Run.numerics.
    """
    is_measured = run.has_front(key)
    if is_measured and run.front().get("choose") == config.front.choose.model_dump():
        return display.front(run)
    points = evaluation.candidates(init, policies, evaluation.wanted_etas(config))
    if is_measured:
        measured = [Point(**point) for point in run.front()["points"]]
    else:
        with display.evaluation(len(points)) as done:
            results = evaluation.evaluate(session, config, points, prompts.held_out, done)
        measured = [point for point, _ in results]
        run.save_evaluation_work(spans_of([piece for _, scored in results for piece in scored.work]))
        store.write_json(run.folder / "samples.json", evaluation.sample_rows(results, prompts.held_out, config.front))
    chosen = evaluation.choose(measured, config.front.choose)
    plot_front(measured, chosen, run.folder / "front.png", f"WARP, I={config.warp.iterations}, M={config.warp.policies}: {config.model}")
    adapter = scale(points[-1].delta or init, chosen.eta or 0.0)
    run.save_adapter(adapter, card(config, measured, chosen, adapter.rank, list(adapter.factors)))
    run.save_front({"key": key, "numerics": numerics, **evaluation.front_json(measured, chosen, config)})
    loggers.finish(run)
    display.front(run)
