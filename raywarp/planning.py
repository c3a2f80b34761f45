"""`raywarp plan`: what a run asks of the cluster, what each of its processes holds in memory, and whether it fits.

The same figures are checked when a run starts (see preflight.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from raywarp import embedded, engines, memory, placement, preflight
from raywarp.config import Config, ConfigError
from raywarp.data import HUB_ID
from raywarp.hardware import run_dtype
from raywarp.known_models import known_config
from raywarp.memory import Components, Shapes
from raywarp.model_files import read_model_config, stored_bytes
from raywarp.node_check import NodeReport
from raywarp.rewards import own_file

UNKNOWN_PROMPT = 128  # tokens of a prompt that has not been seen


@dataclass(frozen=True)
class Process:
    """One kind: its placement (count, CPUs and GPUs of each), and what each holds in memory, or (a Process of its own) on a GPU.

    share: of a GPU that it may take.
    """

    need: placement.Need
    components: Components
    on_gpu: bool = False
    share: float = 1.0

    @property
    def bytes(self) -> int:
        return sum(self.components.values())

    @property
    def weights(self) -> int:
        """What it cannot do without."""
        return sum(size for name, size in self.components.items() if "weights" in name and "float32" not in name)


@dataclass(frozen=True)
class Forecast:
    """shapes: None where the model's config.json is not in reach; then there are no components.

    problems: why it does not fit, each with the key to change. notes: what was assumed.
    """

    config: Config
    plan: placement.Plan
    shapes: Shapes | None
    processes: Sequence[Process]
    dtype: str
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    reports: Sequence[NodeReport] = ()

    @property
    def fits(self) -> bool:
        return not self.problems

    def impossible(self, reports: Sequence[NodeReport]) -> list[str]:
        """Processes whose weights alone are more than any node, or any GPU, has."""
        return [self._too_large(p, p.weights, "weights alone", most) for p in self.processes if 0 < (most := _most(p, reports)) < p.weights]

    def tight(self, reports: Sequence[NodeReport]) -> list[str]:
        """Processes, and all of them together, that may need more than there is."""
        warnings = [self._too_large(p, p.bytes, "estimate", most) for p in self.processes if 0 < (most := _most(p, reports)) < p.bytes]
        asked = sum(p.bytes * p.need.count for p in self.processes if not p.on_gpu)
        there = sum(report.memory for report in reports)
        if not warnings and 0 < there < asked:
            warnings.append(
                f"all processes together may need {_size(asked)} of memory, the cluster's nodes have {_size(there)}: lower "
                "optim.max_tokens_per_microbatch, rollout.kv_cache_gib, rollout.workers or cluster.policy_actors"
            )
        return warnings

    def cautions(self, reports: Sequence[NodeReport]) -> list[str]:
        """What does not stop a run: memory that may be too little, GPUs that would lie idle."""
        return [*self.tight(reports), *(preflight.idle_gpus(reports) if self.plan.uses_gpus else [])]

    def _too_large(self, process: Process, size: int, what: str, most: int) -> str:
        key = {
            "policy": "optim.max_tokens_per_microbatch, or set optim.gradient_checkpointing=true",
            "rollout_worker": "rollout.kv_cache_gib or set rollout.tensor_parallel_size",
        }.get(process.need.key, "reward.batch_size")
        if process.on_gpu and process.need.key == "rollout_worker":
            key = "rollout.chunk_size, or set rollout.tensor_parallel_size"
        share = f"{process.share:.0%} of " if process.share < 1 else ""
        where = f"{share}the largest {'GPU' if process.on_gpu else 'node'}"
        name = process.need.key.replace("_", " ")
        return f"a {name} needs {_size(size)} ({what}), {where} has {_size(most)}: lower {key}, or take a smaller model"


def plan(config: Config, offline: bool = False) -> Forecast:
    """What a run of this config needs, and whether it fits; nothing is started but a local Ray, where there is no cluster to join.

    Args:
        offline: neither a cluster nor a hub is asked, and no data are read: the needs only.

    Raises:
        ConfigError: the config is wrong (and, unless offline, its model, data or reward).
    """
    if config.tune is not None and config.tune.space:
        return _plan_sweep(config, offline)
    if offline:
        return _offline(config)
    from raywarp.session import start_ray

    source = _source(config)
    start_ray()
    problems = []
    try:
        placed = placement.make_plan(config)
    except ConfigError as error:
        problems, placed = str(error).splitlines(), placement.wish(config, placement.cluster_gpus())
    result = forecast(config, source, placed)
    reports = preflight.node_reports(config, local_paths(config, source.model))
    problems += [*preflight.access_problems(reports, config.out), *preflight.version_problems(reports), *result.impossible(reports)]
    if result.shapes:
        problems += preflight.disk_problems(config, memory.checkpoint_bytes(result.shapes, config))
    warnings = [*source.warnings, *result.cautions(reports)]
    return Forecast(config, placed, result.shapes, result.processes, result.dtype, problems, warnings, source.notes, reports)


def _plan_sweep(config: Config, offline: bool) -> Forecast:
    """Of the largest trial, with a note on all of them."""
    from raywarp.search_space import search_space
    from raywarp.sweep import opening

    space = search_space(config)
    found = plan(space.largest(), offline)
    concurrent = None
    if not offline and found.fits:
        concurrent = placement.fit_several(space.largest(), min(space.settings.max_concurrent or space.trials, space.trials))[1]
    return replace(found, notes=[f"the sweep has {opening(space, concurrent)}; the figures are of its largest trial", *found.notes])


def check_cluster(config: Config, model: str, shapes: Shapes | None = None, prompt_tokens: int = 0) -> None:
    """What `plan` checks, at the start of a run; activations are left out, since it takes a second to count them.

    Args:
        shapes: of the model and its adapters; None for a stage without policies.
        prompt_tokens: of the longest prompt.

    Raises:
        ConfigError: see preflight.preflight.
    """
    found = None
    if shapes is not None:
        try:
            placed = placement.make_plan(config)
        except ConfigError:  # the session says so, after it has waited for what may become free
            placed = placement.wish(config, placement.cluster_gpus())
        found = _forecast(config, model, shapes, placed, prompt_tokens)
    preflight.preflight(config, found, local_paths(config, model) if found else [])


@dataclass(frozen=True)
class Source:
    """What the figures come from.

    model: folder or hub id, resolved. settings: transformers' configuration of it. prompt_tokens: of the longest prompt.
    """

    model: str
    settings: Any
    prompt_tokens: int
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def _source(config: Config) -> Source:
    """What a run would read; where its model cannot be loaded here but its shapes are known, these."""
    from raywarp.inputs import prepare

    try:
        inputs = prepare(config)
    except ConfigError as error:
        source = shapes_only(config)
        if source is None:
            raise
        return replace(source, warnings=[f"a run from here ends at once: {error}"])
    return Source(inputs.model, read_model_config(inputs.model, config.trust_remote_code, f"model={config.model}"), inputs.longest_prompt)


def shapes_only(config: Config, weights: bool = False) -> Source | None:
    """From a config.json that is here (in a folder, or in the hub's cache), or from known_models.py; nothing is fetched.

    Args:
        weights: also where the weights are here, too.
    """
    model, what = embedded.cached(config.model), f"model={config.model}"
    if model is None:
        return None
    prompt = config.prompts.max_tokens or 2 * (config.prompts.max_words or 0) or UNKNOWN_PROMPT
    notes = [f"prompts are taken to have at most {prompt} tokens"]
    folder = _folder_of_config(model)
    if folder is None:
        known = known_config(model)
        notes.append(f"the config.json of {what} is not in reach: these are the shapes that it had when raywarp was written")
        return Source(model, known, prompt, notes) if known is not None else None
    whole = any(folder.glob("*.safetensors"))
    if whole and not weights:
        return None
    if not whole:
        notes.append(f"the weights of {what} are not here")
    return Source(model, read_model_config(str(folder), config.trust_remote_code, what), prompt, notes)


def _folder_of_config(model: str) -> Path | None:
    """Where a model's config.json is on this machine."""
    from huggingface_hub import try_to_load_from_cache

    if (Path(model).expanduser() / "config.json").is_file():
        return Path(model).expanduser()
    cached = try_to_load_from_cache(model, "config.json") if HUB_ID.fullmatch(model) else None
    return Path(cached).parent if isinstance(cached, str) else None


def forecast(config: Config, source: Source, placed: placement.Plan) -> Forecast:
    """The needs of a run on its placement, activations included."""
    from raywarp.model_shapes import model_shapes

    dtype, length = run_dtype(config.dtype, placed.uses_gpus), source.prompt_tokens + config.rollout.max_new_tokens
    rows = _rows(config, length)
    shapes = model_shapes(source.settings, config.lora, dtype, rows, length, placed.policy.gpus > 0, config.trust_remote_code)
    return _forecast(config, source.model, shapes, placed, source.prompt_tokens)


def _forecast(config: Config, model: str, shapes: Shapes, placed: placement.Plan, prompt_tokens: int) -> Forecast:
    dtype, length = run_dtype(config.dtype, placed.uses_gpus), prompt_tokens + config.rollout.max_new_tokens
    held = -(-config.warp.policies // placed.policy.count)
    stored, gpu = stored_bytes(model), placed.policy.gpus > 0
    tokens = _rows(config, length) * config.rollout.max_new_tokens
    policy = memory.policy_process(shapes, config, dtype, held, tokens, 0 if gpu else stored)
    rollout = memory.rollout_process(shapes, config, dtype, stored, placed.rollout.gpus > 0, length)
    reward = _reward_process(config)
    processes = [Process(placed.policy, policy, gpu), Process(placed.rollout, rollout)]
    if placed.rollout.gpus:
        slots = engines.lora_slots(engines.front_rank(config), refuse=False) if config.rollout.adapter != "merged" else 0
        on_gpu = memory.rollout_gpu(shapes, config, dtype, slots, engines.MOST_LORAS, length)
        processes.append(Process(placed.rollout, on_gpu, True, config.rollout.gpu_memory_utilization))
    processes.append(Process(placed.reward, reward, placed.reward.gpus > 0))
    return Forecast(config, placed, shapes, processes, dtype)


def _rows(config: Config, length: int) -> int:
    """Completions of a micro-batch."""
    return max(1, min(config.optim.batch_size, config.optim.max_tokens_per_microbatch // length))


def local_paths(config: Config, model: str) -> list[str]:
    """Folders and files on this machine that processes on other nodes read, too."""
    scorers = [scorer for scorer in (config.reward, config.control) if scorer is not None]
    names = [model, *(embedded.resolve(scorer.model) for scorer in scorers if scorer.model)]
    modules = [own_file(scorer.function) for scorer in scorers if scorer.function]
    folders = [Path(name).expanduser().absolute() for name in names]
    return [*(str(folder) for folder in folders if folder.is_dir()), *filter(None, modules)]


def _offline(config: Config) -> Forecast:
    placed = placement.wish(config, 0)
    notes = ["offline: GPUs are counted where the config names them; a policy actor is counted for each policy"]
    source = shapes_only(config, weights=True)
    if source is None:
        notes.append(
            f"memory is not known: the config.json of model={config.model} is not in reach; "
            "a folder with nothing but that file will do: plan … model=FOLDER"
        )
        return Forecast(
            config, placed, None, [Process(need, {}) for need in placed.needs], run_dtype(config.dtype, placed.uses_gpus), notes=notes
        )
    notes += source.notes
    result = forecast(config, source, placed)
    disk = preflight.disk_problems(config, memory.checkpoint_bytes(result.shapes, config)) if result.shapes else []
    return Forecast(config, placed, result.shapes, result.processes, result.dtype, disk, notes=notes)


def _reward_process(config: Config) -> Components:
    if not config.reward.model and not (config.control and config.control.model):
        return {"Python, Ray (and what the function needs)": memory.FUNCTION_RUNTIME}
    return {**_reward_weights(config), "Python, torch, Ray": memory.REWARD_RUNTIME}


def _reward_weights(config: Config) -> Components:
    name = embedded.cached(config.reward.model) if config.reward.model else None
    if name is None:
        return {}
    from raywarp.model_files import weight_bytes
    from raywarp.model_shapes import classifier_parameters

    known = known_config(name)
    stored = weight_bytes(Path(name)) or (2 * classifier_parameters(known) if known is not None else 0)
    return {"classifier weights": stored} if stored else {}


def _most(process: Process, reports: Sequence[NodeReport]) -> int:
    """Bytes of the largest node, or of what a process may have of the largest GPU; 0 where that is not known."""
    if process.on_gpu:
        return int(process.share * max((size for report in reports for size in report.gpu_memory), default=0))
    return max((report.memory for report in reports), default=0)


def _size(count: float) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def render(found: Forecast, console: Any) -> None:
    """Tables of processes and of their memory, disk and traffic, and the verdict as the last line."""
    from rich.table import Table

    config, shapes = found.config, found.shapes
    table = Table("process", "count", "GPUs each", "CPUs each", "memory each", "on each GPU", title=f"{config.model}, {found.dtype}")
    for need in found.plan.needs:
        host, gpu = (_sizes(found.processes, need, on_gpu) for on_gpu in (False, True))
        table.add_row(need.key.replace("_", " "), str(need.count), f"{need.gpus:g}", f"{need.cpus:g}", host, gpu)
    console.print(table)
    if shapes is not None:
        parts = Table("memory of one", "component", "bytes", title="what it holds")
        for process in found.processes:
            for component, held in process.components.items():
                if held:
                    where = ", on each GPU" if process.on_gpu else ""
                    parts.add_row(process.need.key.replace("_", " ") + where, component, _size(held))
        console.print(parts)
    for line in (*_summary(found, shapes), *found.notes, *(f"warning: {text}" for text in found.warnings), *found.problems):
        console.print(line, highlight=False, markup=False)
    console.print("it fits" if found.fits else "it does not fit", highlight=False, markup=False)


def _sizes(processes: Sequence[Process], need: placement.Need, on_gpu: bool) -> str:
    """What one of a kind holds in memory, or on a GPU."""
    for process in processes:
        if (process.need, process.on_gpu) == (need, on_gpu):
            if not process.components:
                return "not known"
            return _size(process.bytes) + (f" (of {process.share:.0%})" if process.share < 1 else "")
    return ""


def _summary(found: Forecast, shapes: Shapes | None) -> list[str]:
    config, lines = found.config, []
    for report in found.reports:
        gpus = f", GPUs of {', '.join(map(_size, report.gpu_memory))}" if report.gpu_memory else ""
        listed = ", ".join(f"{name} {version}" for name, version in report.versions.items())
        lines.append(f"node {report.address}: {_size(report.memory)} of memory{gpus}; {listed}")
    if shapes is None:
        return lines
    from raywarp.policy_files import KEPT_CHECKPOINTS

    each, results = memory.checkpoint_bytes(shapes, config), memory.result_bytes(shapes, config)
    kept = (KEPT_CHECKPOINTS + 1) * config.warp.policies * each  # the new one is written before the oldest goes
    free = preflight.free_bytes(config.out)
    room = "" if free is None else f"; {_size(free)} free"
    lines.append(
        f"disk of out={config.out}: checkpoints {_size(each)} x {KEPT_CHECKPOINTS + 1} x {config.warp.policies} policies = {_size(kept)} "
        f"while they train, results {_size(results)}{room}"
    )
    step, policies = memory.task_vector_bytes(shapes, config), config.warp.policies
    total = f", {_size(policies * step)} for all {policies}" if policies > 1 else ""
    lines.append(f"adapters on the network: {_size(step)} per policy and step{total}, to each node with a rollout worker")
    if config.warp.iterations > 1:
        lines.append(f"and the init of an iteration once, to each node: at most {_size(memory.init_bytes(shapes, config))}")
    return lines
