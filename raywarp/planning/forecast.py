"""What each process of a run will hold in memory, by component, and what of it is too much for the
cluster.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from raywarp.adapters.weight_files import stored_bytes
from raywarp.cluster import resources
from raywarp.cluster.node_report import NodeReport
from raywarp.config.schema import Config
from raywarp.data import embedded
from raywarp.planning import memory, preflight
from raywarp.planning.known_models import known_config
from raywarp.planning.memory import Components, Shapes, in_units
from raywarp.rollout import engine


@dataclass(frozen=True)
class ProcessMemory:
    """One kind: its placement (count, CPUs and GPUs of each), and what each holds in memory, or (a
    Process of its own) on a GPU.

    share: of a GPU that it may take.
    """

    need: resources.Need
    components: Components
    on_gpu: bool = False
    share: float = 1.0

    @property
    def bytes(self) -> int:
        return sum(self.components.values())

    @property
    def weights(self) -> int:
        """What it cannot do without."""
        return sum(
            size
            for name, size in self.components.items()
            if "weights" in name and "float32" not in name
        )


@dataclass(frozen=True)
class Forecast:
    """shapes: None where the model's config.json is not in reach; then there are no components.

    problems: why it does not fit, each with the key to change. notes: what was assumed.
    """

    config: Config
    plan: resources.Plan
    shapes: Shapes | None
    processes: Sequence[ProcessMemory]
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
        return [
            self._too_large(p, p.weights, "weights alone", most)
            for p in self.processes
            if 0 < (most := _most(p, reports)) < p.weights
        ]

    def tight(self, reports: Sequence[NodeReport]) -> list[str]:
        """Processes, and all of them together, that may need more than there is."""
        warnings = [
            self._too_large(p, p.bytes, "estimate", most)
            for p in self.processes
            if 0 < (most := _most(p, reports)) < p.bytes
        ]
        asked = sum(p.bytes * p.need.count for p in self.processes if not p.on_gpu)
        there = sum(report.memory for report in reports)
        if not warnings and 0 < there < asked:
            warnings.append(
                f"all processes together may need {in_units(asked)} of memory, the cluster's nodes"
                f" have {in_units(there)}: lower optim.max_tokens_per_microbatch,"
                " rollout.kv_cache_gib, rollout.workers or cluster.policy_actors"
            )
        return warnings

    def cautions(self, reports: Sequence[NodeReport]) -> list[str]:
        """What does not stop a run: memory that may be too little, GPUs that would lie idle."""
        return [
            *self.tight(reports),
            *(preflight.idle_gpus(reports) if self.plan.uses_gpus else []),
        ]

    def _too_large(self, process: ProcessMemory, size: int, what: str, most: int) -> str:
        key = {
            "policy": "optim.max_tokens_per_microbatch, or set optim.gradient_checkpointing=true",
            "rollout_worker": "rollout.kv_cache_gib or set rollout.tensor_parallel_size",
        }.get(process.need.key, "reward.batch_size")
        if process.on_gpu and process.need.key == "rollout_worker":
            key = "rollout.chunk_size, or set rollout.tensor_parallel_size"
        share = f"{process.share:.0%} of " if process.share < 1 else ""
        where = f"{share}the largest {'GPU' if process.on_gpu else 'node'}"
        name = process.need.key.replace("_", " ")
        return (
            f"a {name} needs {in_units(size)} ({what}), {where} has {in_units(most)}: lower {key},"
            " or take a smaller model"
        )


@dataclass(frozen=True)
class Origin:
    """What the figures come from.

    model: folder or hub id, resolved. settings: transformers' configuration of it. prompt_tokens:
    of the longest prompt.
    """

    model: str
    settings: Any
    prompt_tokens: int
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def forecast(config: Config, source: Origin, placed: resources.Plan) -> Forecast:
    """The needs of a run on its placement, activations included."""
    from raywarp.planning.model_shapes import model_shapes

    dtype, length = placed.dtype, source.prompt_tokens + config.rollout.max_new_tokens
    rows = _rows(config, length)
    shapes = model_shapes(
        source.settings,
        config.lora,
        dtype,
        rows,
        length,
        placed.policy.gpus > 0,
        config.trust_remote_code,
    )
    return forecast_of_shapes(config, source.model, shapes, placed, source.prompt_tokens)


def forecast_of_shapes(
    config: Config, model: str, shapes: Shapes, placed: resources.Plan, prompt_tokens: int
) -> Forecast:
    """The same from shapes that are known; activations are in it as far as the shapes have them.

    Args:
        model: a folder or hub id, whose weights may lie here. prompt_tokens: of the longest prompt.
    """
    dtype, length = placed.dtype, prompt_tokens + config.rollout.max_new_tokens
    held = -(-config.warp.policies // placed.policy.count)
    stored, gpu = stored_bytes(model), placed.policy.gpus > 0
    tokens = _rows(config, length) * config.rollout.max_new_tokens
    policy = memory.policy_process(shapes, config, dtype, held, tokens, 0 if gpu else stored)
    rollout = memory.rollout_process(shapes, config, dtype, stored, placed.rollout.gpus > 0, length)
    reward = _reward_process(config)
    processes = [ProcessMemory(placed.policy, policy, gpu), ProcessMemory(placed.rollout, rollout)]
    if placed.rollout.gpus:
        lora = engine.adapter_mode(config.rollout, gpu=True) == "lora"
        rank = engine.lora_slots(engine.largest_rank(config)) if lora else 0
        on_gpu = memory.rollout_gpu(shapes, config, dtype, rank, engine.slot_count(rank), length)
        processes.append(
            ProcessMemory(placed.rollout, on_gpu, True, config.rollout.gpu_memory_utilization)
        )
    processes.append(ProcessMemory(placed.reward, reward, placed.reward.gpus > 0))
    return Forecast(config, placed, shapes, processes, dtype)


def _rows(config: Config, length: int) -> int:
    """Completions of a micro-batch."""
    return max(1, min(config.optim.batch_size, config.optim.max_tokens_per_microbatch // length))


def _reward_process(config: Config) -> Components:
    if not config.reward.model and not (config.control and config.control.model):
        return {"Python, Ray (and what the function needs)": memory.FUNCTION_RUNTIME}
    return {**_reward_weights(config), "Python, torch, Ray": memory.REWARD_RUNTIME}


def _reward_weights(config: Config) -> Components:
    name = embedded.cached(config.reward.model) if config.reward.model else None
    if name is None:
        return {}
    from raywarp.adapters.weight_files import weight_bytes
    from raywarp.planning.model_shapes import classifier_parameters

    known = known_config(name)
    stored = weight_bytes(Path(name)) or (
        2 * classifier_parameters(known) if known is not None else 0
    )
    return {"classifier weights": stored} if stored else {}


def _most(process: ProcessMemory, reports: Sequence[NodeReport]) -> int:
    """Bytes of the largest node, or of what a process may have of the largest GPU; 0 where that is
    not known.
    """
    if process.on_gpu:
        return int(
            process.share
            * max((size for report in reports for size in report.gpu_memory), default=0)
        )
    return max((report.memory for report in reports), default=0)
