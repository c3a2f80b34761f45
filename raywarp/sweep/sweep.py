"""`raywarp tune`: runs a sweep of WARP runs with Ray Tune. Trials share their common policies."""

import contextlib
import logging
import os
import time
import uuid
from collections.abc import Callable
from typing import Any

import ray

from raywarp import identity
from raywarp.cluster import placement_groups, resources, runtime
from raywarp.cluster.claims import Table
from raywarp.cluster.runtime import stoppable
from raywarp.config.callables import PREFIX
from raywarp.config.schema import Config, ConfigError
from raywarp.config.search import DIRECTIONS, SearchSpace, Values, choice_texts, search_space
from raywarp.data.moment import keep_moment
from raywarp.planning.inputs import Inputs, prepare
from raywarp.planning.plan import check_cluster, opening
from raywarp.run.display import Display
from raywarp.run.folder import Run, read_mark
from raywarp.storage import scratch
from raywarp.storage.location import Storage
from raywarp.storage.locks import exclusive
from raywarp.sweep.files import SweepFiles
from raywarp.sweep.listeners import SweepLoggers, SweepProgress, TrialListener, callback
from raywarp.sweep.results import Sweep, conclude, save_sweep, show_sweep
from raywarp.sweep.trial import SweepPlan, Trial

MOST_PREPARED = 16  # the most different inputs that are checked before anything starts
_SETTINGS = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # nothing here reads their files
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_AIR_NEW_OUTPUT": "0",  # in Ray 2.60 its tables ignore verbose=0
}


def tune(config: Config, display: Display | None = None) -> Sweep:
    """Run the sweep that config.tune describes, or continue it.

    Results that its folder `out` already holds are reused.

    Raises:
        ConfigError: the input is wrong; nothing was started.
        Stopped: SIGTERM or Ctrl-C, a KeyboardInterrupt. Finished work is kept.
    """
    display = display or Display()
    space = search_space(config)
    _refuse_callables(config)
    inputs = check_inputs(space)
    run = Run.open(config, display.say)
    files = SweepFiles(os.path.abspath(config.out) if run.mirror is None else config.out)
    _refuse_earlier(files)
    with exclusive(config.out, run.folder, display.say):
        runtime.start_ray()
        display.place()
        plan, concurrent = _plan_sweep(space, files)
        check_cluster(plan.space.largest(), inputs)
        run.save_config(config)
        keep_moment(Storage(plan.store), inputs.prompts.rendered_at)
        display.progress(opening(space, concurrent))
        with run.mirrored():
            points = _run_trials(plan, run, concurrent, display)
            placement_groups.take_back()
            sweep = conclude(plan, files, points)
            save_sweep(sweep, plan, run)
            show_sweep(sweep, display)
    return sweep


def _refuse_callables(config: Config) -> None:
    """Raise ConfigError for a reward function that only this process has: trials are others."""
    for key, scorer in config.scorers.items():
        if (scorer.function or "").startswith((PREFIX, "__main__:")):
            raise ConfigError(
                f"{key}.function={scorer.function} is of this script, and a sweep's trials run in"
                " processes of their own; put it into a module, and name it as module:function"
            )


def _refuse_earlier(files: SweepFiles) -> None:
    """Refuse a sweep with trials that an earlier version sampled.

    Their fronts cannot be compared with new ones.

    Raises:
        ConfigError: the sweep has such a trial.
    """
    for name in files.begun():
        if mark := read_mark(Storage(files.trial_folder(name))):
            raise ConfigError(
                f"the sweep in out={files.out} cannot be continued: of trial {name}, {mark.reason};"
                " choose another out"
            )


def check_inputs(space: SearchSpace) -> Inputs:
    """Return the inputs of the first trial, and check those of trials that read something else.

    With optuna only the first point is known before the sweep starts. At most MOST_PREPARED
    different inputs are checked.

    Raises:
        ConfigError: some inputs are wrong.
    """
    different: dict[str, Config] = {}
    for point in space.points or [space.first()]:
        config = space.config(point)
        read = config.model_dump(
            include={
                "model",
                "base",
                "sft_adapter",
                "prompts",
                "reward",
                "rewards",
                "control",
                "lora",
                "trust_remote_code",
            }
        )
        different.setdefault(
            identity.content_key([read, config.rollout.max_new_tokens, config.rollout.engine]),
            config,
        )
    first, *_ = [prepare(config) for config in list(different.values())[:MOST_PREPARED]]
    return first


def _plan_sweep(space: SearchSpace, files: SweepFiles) -> tuple[SweepPlan, int]:
    """Return what the trials have in common, and how many of them run at the same time.

    All trials get the same number of actors, so that the next trial always has enough resources.
    All get the same number of threads, because results depend on it. A continued sweep keeps the
    threads that it began with.
    """
    largest, settings = space.largest(), space.settings
    each, concurrent = resources.fit_several(
        largest, min(settings.max_concurrent or space.trials, space.trials)
    )
    before = files.plan().get("threads") if largest.cluster.threads is None else None
    threads = before or each.threads
    cluster = space.base.cluster.model_copy(
        update={"threads": threads, "policy_actors": each.policy.count}
    )
    base = space.base.model_copy(
        update={"cluster": cluster, "out": files.out, "store": _absolute(space.base.store)}
    )
    files.save_plan(
        {"threads": threads, "policy_actors": each.policy.count, "concurrent": concurrent}
    )
    return (
        SweepPlan(SearchSpace(base, settings, space.domains), uuid.uuid4().hex, os.getcwd()),
        concurrent,
    )


def _absolute(place: str | None) -> str | None:
    """Return a folder as an absolute path, and a URI or None unchanged."""
    return os.path.abspath(place) if place is not None and "://" not in place else place


def _run_trials(plan: SweepPlan, run: Run, concurrent: int, display: Display) -> list[Values]:
    """Run all trials with Ray Tune, and return their values in the order of their creation.

    Tune's own files lie in a temporary folder, because nothing reads them again.
    """
    with contextlib.ExitStack() as stack:
        folder = scratch.claim()
        stack.callback(scratch.discard, folder)
        stack.enter_context(_environment(_SETTINGS))
        from ray import tune as ray_tune

        logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
        space, shown = plan.space, SweepProgress(plan, display)
        listeners: list[TrialListener] = [
            shown,
            *([SweepLoggers(plan, run, display)] if space.base.loggers else []),
        ]
        trainable = ray_tune.with_resources(
            ray_tune.with_parameters(Trial, plan=plan), _resources()
        )
        tuner = ray_tune.Tuner(
            trainable,
            param_space=(
                {} if space.search == "optuna" else {"point": ray_tune.grid_search(space.points)}
            ),
            tune_config=_tune_config(space, concurrent),
            run_config=ray_tune.RunConfig(
                name="trials",
                storage_path=str(folder),
                verbose=0,
                checkpoint_config=ray_tune.CheckpointConfig(checkpoint_at_end=False),
                failure_config=ray_tune.FailureConfig(max_failures=space.base.cluster.max_failures),
                callbacks=[callback(listener) for listener in listeners],
            ),
        )
        stack.callback(_end_trials, plan)
        with stoppable(), shown:
            found = tuner.fit()
    return space.points or [plan.point(found[n].config or {}) for n in range(len(found))]


def _tune_config(space: SearchSpace, concurrent: int) -> Any:
    """Return Ray Tune's configuration of the search.

    Args:
        concurrent: number of trials at the same time.
    """
    from ray import tune as ray_tune
    from ray.tune.schedulers import ASHAScheduler

    objectives = space.settings.objectives
    modes = [DIRECTIONS[name] for name in objectives]
    if space.search == "optuna":
        return ray_tune.TuneConfig(
            search_alg=_optuna(space, concurrent), num_samples=space.trials, reuse_actors=True
        )
    if space.search == "asha":
        longest = max(space.config(point).warp.iterations for point in space.points)
        scheduler = ASHAScheduler(
            metric=objectives[0], mode=modes[0], max_t=longest, grace_period=1, reduction_factor=2
        )
        return ray_tune.TuneConfig(
            scheduler=scheduler, max_concurrent_trials=concurrent, reuse_actors=True
        )
    return ray_tune.TuneConfig(max_concurrent_trials=concurrent, reuse_actors=True)


def _optuna(space: SearchSpace, concurrent: int) -> Any:
    """Return a search by optuna, whose trials run in groups that start together.

    The suggestions then do not depend on which trial of a group ends first, so a rerun repeats
    them.
    """
    import optuna
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
    from ray.tune.search import ConcurrencyLimiter
    from ray.tune.search.optuna import OptunaSearch

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    kinds: dict[str, Callable[[Any], Any]] = {
        "choice": lambda domain: CategoricalDistribution(choice_texts(domain)),
        "uniform": lambda domain: FloatDistribution(domain.uniform[0], domain.uniform[1]),
        "loguniform": lambda domain: FloatDistribution(
            domain.loguniform[0], domain.loguniform[1], log=True
        ),
        "randint": lambda domain: IntDistribution(domain.randint[0], domain.randint[1] - 1),
    }
    modes = [DIRECTIONS[name] for name in space.settings.objectives]
    names = [str(name) for name in space.settings.objectives]
    metric, mode = (names, modes) if len(names) > 1 else (names[0], modes[0])
    found = OptunaSearch(
        space={key: kinds[domain.kind](domain) for key, domain in space.domains.items()},
        metric=metric,
        mode=mode,
        seed=space.seed,
    )
    return ConcurrencyLimiter(found, max_concurrent=concurrent, batch=True)


def _resources() -> Any:
    """Return the resources of a trial's own process: a thousandth of this process's node.

    It takes no CPU, because a run that just fits needs all of them. A trial's process does the work
    of a run's driver. On this node it sees the same files.
    """
    from ray import tune as ray_tune

    here = f"node:{ray.util.get_node_ip_address()}"
    return ray_tune.PlacementGroupFactory(
        [{here: 0.001} if here in ray.cluster_resources() else {"CPU": 0.001}]
    )


def _end_trials(plan: SweepPlan) -> None:
    """Stop the trials that still run, and let them save their policies first.

    After a signal, Ray leaves a job 3 s for this.
    """
    table, deadline = Table(plan.store), time.monotonic() + runtime.SAVE_SECONDS
    handles, busy = table.ask("trials", plan.id)
    if not handles:
        return
    table.ask("stop", plan.id)
    total = busy
    while busy and time.monotonic() < deadline:
        time.sleep(0.05)
        _, busy = table.ask("trials", plan.id)
    runtime.note(
        [
            f"{total - busy} of {total} policies under way are saved where they were, the others at"
            " their last checkpoint"
        ]
    )
    for handle in handles:
        ray.kill(handle)


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Any:
    """Set environment variables inside the `with` block, and restore them afterwards."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
