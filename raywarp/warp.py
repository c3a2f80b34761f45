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
from dataclasses import dataclass
from pathlib import PurePosixPath

from raywarp import evaluation, store
from raywarp.adapters import AdapterDelta, add, scale, trailing
from raywarp.averaging import liti, slerp
from raywarp.claims import NO_CLAIMS, Claims, Elsewhere
from raywarp.config import Config
from raywarp.data import PromptSplits
from raywarp.inputs import Inputs, prepare
from raywarp.journal import Journal
from raywarp.loggers import Loggers
from raywarp.model_card import card
from raywarp.peft_files import load_peft
from raywarp.planning import check_cluster
from raywarp.policy_actor import Job
from raywarp.progress import Display
from raywarp.report import plot_front
from raywarp.reward_stage import reward_statistics
from raywarp.run import Run
from raywarp.run_metrics import RunMetrics
from raywarp.session import Session, start_ray
from raywarp.stop import stoppable

ALGORITHM_VERSION = 2  # part of every key: raise it when the same settings no longer give the same policy


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
    start_ray()
    check_cluster(config, inputs.model, inputs.shapes, inputs.longest_prompt)
    gauges = RunMetrics(PurePosixPath(config.out).name)
    with run.mirrored(), Journal(run, display, gauges) as journal, stoppable() if claims.alone else nullcontext():
        yield from _stages(config, run, inputs, display, journal, gauges, claims)


def _stages(
    config: Config, run: Run, inputs: Inputs, display: Display, journal: Journal, gauges: RunMetrics, claims: Claims
) -> Generator[Stage]:
    session_of_run = Session(config, inputs.model, inputs.longest_prompt, report=journal.report, shares=not claims.alone)
    with session_of_run as session, Loggers(config, run.folder) as loggers:
        run.save_config(config)
        run.clean()
        journal.begin()
        statistics = reward_statistics(session, run, config, inputs.prompts.train)
        determinants = {**inputs.fingerprints(), **statistics, **session.numerics()}
        all_keys = key_chain(config, determinants)
        init = session.zero
        yield Stage(run, session, 0, all_keys, determinants, init, ())
        for iteration, keys in enumerate(all_keys, start=1):
            policies = fine_tune(session, run, config, inputs.prompts, display, loggers, gauges, iteration, keys, init, claims)
            merged = add(init, slerp(policies))
            run.save_iteration(iteration, init, merged, keys, policies)
            display.merged(iteration, policies)
            if iteration == config.warp.iterations:
                key = front_key(config, inputs, keys)
                save_front(session, run, config, inputs.prompts, display, init, policies, key)
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


def found(run: Run, job: Job, display: Display) -> bool:
    """Whether the policy is in the store, and whole."""
    try:
        return run.find_policy(job.key) is not None
    except store.DamagedError as error:
        display.say(f"iteration {job.iteration} policy {job.index} has to be trained: {error}")
        return False


def policy_keys(config: Config, inputs: Mapping[str, object], iteration: int, init_key: str) -> list[str]:
    """The keys of θ_1..θ_M: hashes of all that determines a policy, and of nothing else (not the cluster, not worker counts).

    Args:
        inputs: fingerprints of base, prompts and reward, and the numerical settings.
        init_key: "sft", or the hash of what the iteration's init was made from.
    """
    warp = config.warp.model_dump(include={"steps", "ema_rate", "kl_coef", "advantage"})
    sampling = {"completions_per_prompt", "max_new_tokens", "temperature", "ignore_eos", "missing_eos_penalty", "chunk_size"}
    rollout = config.rollout.model_dump(include=sampling)
    shared = {
        "algorithm": ALGORITHM_VERSION,
        "init": init_key,
        "inputs": dict(inputs),
        "lora": config.lora.model_dump(),
        "optim": config.optim.model_dump(),
        "warp": warp,
        "rollout": rollout,
        "seed": config.seed,
        "iteration": iteration,
    }
    return [store.content_key({**shared, "policy": m}) for m in range(1, config.warp.policies + 1)]


def key_chain(config: Config, inputs: Mapping[str, object]) -> list[list[str]]:
    """The keys of all policies, iteration by iteration: they are known before anything is trained.

    Args:
        inputs: see policy_keys.
    """
    chain, init_key = list[list[str]](), "sft"
    for iteration in range(1, config.warp.iterations + 1):
        chain.append(policy_keys(config, inputs, iteration, init_key))
        init_key = store.content_key({"parents": [init_key, *chain[-1]], "merge": "slerp", "liti_rate": config.warp.liti_rate})
    return chain


def front_key(config: Config, inputs: Inputs, keys: Sequence[str]) -> str:
    """Of the front of an iteration whose policies have these keys."""
    return store.content_key([keys, inputs.evaluation, config.front.model_dump(), config.cluster.threads])


def save_front(
    session: Session,
    run: Run,
    config: Config,
    prompts: PromptSplits,
    display: Display,
    init: AdapterDelta,
    policies: Sequence[AdapterDelta],
    key: str,
) -> None:
    """Measure the front of the last iteration, unless front.json has it already, and keep the chosen η as adapter/."""
    if run.has_front(key):
        return display.front(run)
    points = evaluation.candidates(init, policies, evaluation.wanted_etas(config))
    with display.evaluation(len(points)) as done:
        results = evaluation.evaluate(session, config, points, prompts.held_out, done)
    measured = [point for point, _ in results]
    chosen = evaluation.choose(measured, config.front.choose)
    store.write_json(run.folder / "samples.json", evaluation.sample_rows(results, prompts.held_out, config.front))
    plot_front(measured, chosen, run.folder / "front.png", f"WARP, I={config.warp.iterations}, M={config.warp.policies}: {config.model}")
    adapter = scale(points[-1].delta or init, chosen.eta or 0.0)
    run.save_adapter(adapter, card(config, measured, chosen, adapter.rank, list(adapter.factors)))
    run.save_front({"key": key, **evaluation.front_json(measured, chosen, config)})
    display.front(run)
