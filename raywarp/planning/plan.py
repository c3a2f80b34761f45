"""`raywarp plan`: the resources that a run needs, the memory of its processes, and whether it fits.

The same figures are checked when a run starts (see preflight.py).
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raywarp.adapters.weight_files import weight_bytes
from raywarp.cluster import resources
from raywarp.cluster.device import run_dtype
from raywarp.config.schema import Config, ConfigError
from raywarp.config.search import SearchSpace, search_space
from raywarp.data import embedded
from raywarp.data.models import local_folder, read_model_config
from raywarp.data.quantised_models import refuse_quantised_model
from raywarp.planning import memory, preflight
from raywarp.planning.ceiling_time import ceiling_lines
from raywarp.planning.forecast import (
    Forecast,
    Origin,
    ProcessMemory,
    forecast,
    forecast_of_shapes,
    reward_numbers,
)
from raywarp.planning.known_models import known_config
from raywarp.planning.machines import CPUS_PER_GPU, Machines, named_cluster
from raywarp.planning.memory import Shapes, in_units
from raywarp.planning.step_cost import cost_lines, step_cost
from raywarp.rewards.score import own_file
from raywarp.rollout.engine import check_mode, mode_problem

if TYPE_CHECKING:
    from raywarp.planning.inputs import Inputs  # imports transformers, which takes seconds

UNKNOWN_PROMPT = 128  # assumed tokens of the longest prompt, if neither data nor config tell


def plan(config: Config, offline: bool = False, cluster: str | None = None) -> Forecast:
    """Return what a run of this config needs, and whether it fits.

    If there is no cluster to join, a local Ray is started. Nothing else is started.

    Args:
        offline: ask neither a cluster nor a hub, and read no data. The result has the needs only.
        cluster: the nodes to judge by, such as 2x8xH100 (machines.py), instead of asking a cluster.

    Raises:
        ConfigError: the config is wrong, or (unless offline) its model, data or reward.
    """
    if config.tune is not None and config.tune.space:
        return _sweep_forecast(config, offline, cluster)
    if cluster is not None or offline:
        return _unasked(config, named_cluster(cluster) if cluster is not None else None, offline)
    from raywarp.cluster import runtime

    source = _origin(config)
    runtime.start_ray()
    placed, problems = resources.plan_or_wish(config)
    problems += filter(None, [mode_problem(config, placed.rollout.gpus > 0, placed.dtype)])
    result = forecast(config, source, placed)
    reports = preflight.node_reports(config, local_paths(config, source.model))
    problems += [
        *preflight.access_problems(reports, config),
        *preflight.version_problems(reports),
        *preflight.dtype_problems(reports, placed),
        *result.impossible(reports),
    ]
    if result.shapes:
        problems += preflight.disk_problems(config, memory.checkpoint_bytes(result.shapes, config))
    warnings = [*source.warnings, *result.cautions(reports)]
    return Forecast(
        config,
        placed,
        result.shapes,
        result.processes,
        result.dtype,
        problems,
        warnings,
        source.notes,
        reports,
    )


def _sweep_forecast(config: Config, offline: bool, cluster: str | None) -> Forecast:
    """Return the forecast of a sweep's largest trial, with a note on all its trials."""
    space = search_space(config)
    found = plan(space.largest(), offline, cluster)
    concurrent = None
    if not (offline or cluster) and found.fits:
        concurrent = resources.fit_several(
            space.largest(), min(space.settings.max_concurrent or space.trials, space.trials)
        )[1]
    return replace(
        found,
        notes=[
            f"the sweep has {opening(space, concurrent)}; the figures are of its largest trial",
            *found.notes,
        ],
    )


def opening(space: SearchSpace, concurrent: int | None) -> str:
    """Return a line with a sweep's numbers of trials and of policy runs.

    Args:
        concurrent: number of trials at the same time; None if it is not known.
    """
    line = f"{space.trials} trials of {', '.join(space.domains)} ({space.search})" + (
        f", {concurrent} at a time" if concurrent else ""
    )
    runs = policy_runs(space)
    return line + (
        f"; they ask for {runs[0]} policy runs, of which {runs[1]} differ and are executed"
        if runs
        else ""
    )


def check_cluster(config: Config, inputs: "Inputs") -> None:
    """Check at the start of a run what `plan` checks, except activations.

    Counting activations takes a second. A run that does not fit now may fit later: the session
    waits for free resources, and reports if there never are any.

    Raises:
        ConfigError: see preflight.preflight.
    """
    placed = preflight.check_sampler(config)
    found = forecast_of_shapes(config, inputs.model, inputs.shapes, placed, inputs.longest_prompt)
    preflight.preflight(config, found, local_paths(config, inputs.model))


def _origin(config: Config) -> Origin:
    """Return the model and prompt length that a run would read.

    If the run's inputs are unusable here but the model's shapes are known, return these shapes with
    a warning.

    Raises:
        ConfigError: the inputs are unusable, and the shapes are not known.
    """
    from raywarp.planning.inputs import prepare

    try:
        inputs = prepare(config)
    except ConfigError as error:
        source = shapes_only(config)
        if source is None:
            raise
        return replace(source, warnings=[f"a run from here ends at once: {error}"])
    return Origin(inputs.model, inputs.settings, inputs.longest_prompt, warnings=inputs.warnings)


def shapes_only(config: Config, weights: bool = False) -> Origin | None:
    """Return a model's shapes without its weights; nothing is downloaded.

    They come from a config.json in a folder or in the hub's cache, or else from known_models.py.

    Args:
        weights: return the shapes even if the weights are on this machine.

    Returns:
        None if no shapes are known, or if the weights are here and `weights` is False.
    """
    model, what = embedded.cached(config.model), f"model={config.model}"
    if model is None:
        return None
    prompt = config.prompts.max_tokens or 2 * (config.prompts.max_words or 0) or UNKNOWN_PROMPT
    notes = [f"prompts are taken to have at most {prompt} tokens"]
    folder = local_folder(model)
    if folder is None:
        known = known_config(model)
        notes.append(
            f"the config.json of {what} is not in reach: these are the shapes that it had when"
            " raywarp was written"
        )
        return Origin(model, known, prompt, notes) if known is not None else None
    whole = weight_bytes(folder) > 0
    if whole and not weights:
        return None
    if not whole:
        notes.append(f"the weights of {what} are not here")
    refuse_quantised_model(str(folder), what)
    settings = read_model_config(str(folder), config.trust_remote_code, what)
    return Origin(model, settings, prompt, notes)


def local_paths(config: Config, model: str) -> list[str]:
    """Return the folders and files of this machine that processes on other nodes also read."""
    scorers = list(config.scorers.values())
    names = [model, *(embedded.resolve(scorer.model) for scorer in scorers if scorer.model)]
    names += [config.sft_adapter] if config.sft_adapter else []
    modules = [own_file(scorer.function) for scorer in scorers if scorer.function]
    folders = [Path(name).expanduser().absolute() for name in names]
    return [*(str(folder) for folder in folders if folder.is_dir()), *filter(None, modules)]


def _unasked(config: Config, machines: Machines | None, offline: bool) -> Forecast:
    """Return the forecast without asking a cluster: the needs, judged by named nodes if any."""
    placed, problems = _placed_on(config, machines)
    check_mode(config, placed.rollout.gpus > 0, placed.dtype)
    notes = _assumptions(machines)
    source = shapes_only(config, weights=True) if offline else _origin(config)
    if source is None:
        notes.append(
            f"memory is not known: the config.json of model={config.model} is not in reach; "
            "a folder with nothing but that file will do: plan … model=FOLDER"
        )
        processes = [ProcessMemory(need, {}) for need in placed.needs]
        return Forecast(config, placed, None, processes, placed.dtype, problems, notes=notes)
    result = forecast(config, source, placed)
    reports = machines.reports if machines else []
    problems += result.impossible(reports)
    if result.shapes and not machines:  # whose disk is not this machine's
        problems += preflight.disk_problems(config, memory.checkpoint_bytes(result.shapes, config))
    return replace(
        result,
        problems=problems,
        warnings=[*source.warnings, *result.cautions(reports)],
        notes=[*notes, *source.notes, *_cost(config, result, source, machines)],
        reports=reports,
    )


def _placed_on(config: Config, machines: Machines | None) -> tuple[resources.Plan, list[str]]:
    return (
        resources.plan_or_wish(config, machines.nodes)
        if machines
        else (resources.wish(config, resources.Nodes.empty([])), [])
    )


def _assumptions(machines: Machines | None) -> list[str]:
    if machines is None:
        return [
            "offline: GPUs are counted where the config names them; a policy actor is counted for"
            " each policy"
        ]
    if machines.gpu is None:
        return []
    return [f"a node is taken to have {CPUS_PER_GPU} CPUs per GPU; its host memory is not judged"]


def _cost(config: Config, result: Forecast, source: Origin, machines: Machines | None) -> list[str]:
    """Return lines on a policy step's cost, where the kind of GPU is known."""
    plan = result.plan
    if not (machines and machines.gpu and result.shapes and plan.policy.gpus and plan.rollout.gpus):
        return []
    gpus = sum(need.total("GPU") for need in plan.needs)
    scored = reward_numbers(config) if plan.reward.gpus else 0
    scoring = run_dtype("auto", gpus=True, accelerators=[machines.name])
    cost = step_cost(
        config, result.shapes, plan.dtype, machines.gpu, source.prompt_tokens, scored, scoring
    )
    return cost_lines(cost, gpus, machines.name)


def print_forecast(found: Forecast, console: Any) -> None:
    """Print tables of the processes and their memory, then disk and traffic.

    The last line says whether the run fits.
    """
    from rich.table import Table

    config, shapes = found.config, found.shapes
    table = Table(
        "process",
        "count",
        "GPUs each",
        "CPUs each",
        "memory each",
        "on each GPU",
        title=f"{config.model}, {found.dtype}",
    )
    for need in found.plan.needs:
        host, gpu = (_memory_in_words(found.processes, need, on_gpu) for on_gpu in (False, True))
        table.add_row(
            need.key.replace("_", " "),
            str(need.count),
            f"{need.gpus:g}",
            f"{need.cpus:g}",
            host,
            gpu,
        )
    console.print(table)
    if shapes is not None:
        parts = Table("memory of one", "component", "bytes", title="what it holds")
        for process in found.processes:
            for component, held in process.components.items():
                if held:
                    where = ", on each GPU" if process.on_gpu else ""
                    parts.add_row(
                        process.need.key.replace("_", " ") + where, component, in_units(held)
                    )
        console.print(parts)
    for line in (
        *_verdict(found, shapes),
        *found.notes,
        *(f"warning: {text}" for text in found.warnings),
        *found.problems,
    ):
        console.print(line, highlight=False, markup=False)
    console.print(_judgement(found), highlight=False, markup=False)


def _judgement(found: Forecast) -> str:
    """Return whether the run fits; what is only estimated does not stop it."""
    if not found.fits:
        return "it does not fit"
    is_tight = found.tight(found.reports)
    return "by this estimate it does not fit: see the warnings" if is_tight else "it fits"


def _memory_in_words(processes: Sequence[ProcessMemory], need: resources.Need, on_gpu: bool) -> str:
    """Return the memory of one process of a kind as text, in the host or on a GPU."""
    for process in processes:
        if (process.need, process.on_gpu) == (need, on_gpu):
            if not process.components:
                return "not known"
            return in_units(process.bytes) + (
                f" (of {process.share:.0%})" if process.share < 1 else ""
            )
    return ""


def _verdict(found: Forecast, shapes: Shapes | None) -> list[str]:
    """Return lines about the nodes, and, if the shapes are known, about disk and traffic."""
    config, lines = found.config, []
    for report in found.reports:
        gpus = (
            f", GPUs of {', '.join(map(in_units, report.gpu_memory))}" if report.gpu_memory else ""
        )
        listed = ", ".join(f"{name} {version}" for name, version in report.versions.items())
        held = f"{in_units(report.memory)} of memory" if report.memory else "memory not known"
        lines.append(f"node {report.address}: {held}{gpus}" + (f"; {listed}" if listed else ""))
    ceiling = ceiling_lines(config, found.plan, shapes)
    if shapes is None:
        return lines + ceiling
    if shapes.scope:
        lines.append(shapes.scope)
    if config.base.quantize != "none":
        lines.append(memory.quantised_share(shapes))
    from raywarp.run.policy_files import KEPT_CHECKPOINTS

    each, results = memory.checkpoint_bytes(shapes, config), memory.result_bytes(shapes, config)
    # The new checkpoint is written before the oldest is deleted.
    kept = (KEPT_CHECKPOINTS + 1) * config.warp.policies * each
    free = preflight.free_bytes(config.out)
    room = "" if free is None else f"; {in_units(free)} free"
    lines.append(
        f"disk of out={config.out}: checkpoints {in_units(each)} x {KEPT_CHECKPOINTS + 1} x"
        f" {config.warp.policies} policies = {in_units(kept)} while they train, results"
        f" {in_units(results)}{room}"
    )
    step, policies = memory.task_vector_bytes(shapes, config), config.warp.policies
    total = f", {in_units(policies * step)} for all {policies}" if policies > 1 else ""
    lines.append(
        f"adapters on the network: {in_units(step)} per policy and step{total}, to each node with a"
        " rollout worker"
    )
    if config.warp.iterations > 1:
        lines.append(
            "and the init of an iteration once, to each node: at most"
            f" {in_units(memory.init_bytes(shapes, config))}"
        )
    return lines + ceiling


def policy_runs(space: SearchSpace) -> tuple[int, int] | None:
    """Return how many policy runs a sweep's trials ask for, and how many of these differ.

    Return None if that is not known in advance, as with optuna and asha.
    """
    from raywarp.run.keys import key_chain

    if not space.points or space.search == "asha":
        return None
    read = ("model", "base", "sft_adapter", "dtype", "prompts", "reward", "rewards")
    chains = []
    for config in map(space.config, space.points):
        chains += key_chain(config, {key: str(getattr(config, key)) for key in read})
    return sum(map(len, chains)), len({key for keys in chains for key in keys})
