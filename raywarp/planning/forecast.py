"""The forecast of a run's memory: what each process holds, and what the cluster cannot hold."""

import math
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
    """The memory of one kind of process.

    A kind that uses GPUs has a second ProcessMemory for what each process holds on its GPU.

    Attributes:
        need: number of these processes, and the CPUs and GPUs of each.
        components: component → bytes that each process holds.
        on_gpu: whether the components lie on a GPU.
        share: the share of a GPU that the process may take, at most 1.
    """

    need: resources.Need
    components: Components
    on_gpu: bool = False
    share: float = 1.0

    @property
    def bytes(self) -> int:
        return sum(self.components.values())

    @property
    def resting(self) -> int:
        """Bytes that a policy holds while another process works."""
        return sum(size for name, size in self.components.items() if name not in memory.WORKING)

    @property
    def weights(self) -> int:
        """Bytes of its weights: the least memory that it needs."""
        return sum(
            size
            for name, size in self.components.items()
            if "weights" in name and "float32" not in name
        )


@dataclass(frozen=True)
class Forecast:
    """What a run needs, and whether the cluster has it.

    Attributes:
        config: the run's configuration.
        plan: its actors with their resources.
        shapes: shapes of the model; None if its config.json cannot be read here. The processes then
            have no components.
        processes: memory of each kind of process.
        dtype: dtype of the base model: float32, bfloat16 or float16.
        problems: why the run does not fit, each with the key to change.
        warnings: what may go wrong, but does not stop the run.
        notes: what the forecast assumes.
        reports: memory, GPUs and versions of each node; empty if no cluster was asked.
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
        """Return a message for each process whose weights exceed the largest node or GPU."""
        return [
            self._too_large(p, True, most)
            for p in self.processes
            if 0 < (most := _most(p, reports)) < p.weights
        ]

    def tight(self, reports: Sequence[NodeReport]) -> list[str]:
        """Return a message for each process that may need more than the largest node or GPU has.

        If each fits by itself, all of them together are compared with the nodes' memory.
        """
        warnings = [
            self._too_large(p, False, most)
            for p in self.processes
            if 0 < (most := _most(p, reports)) < p.bytes
        ]
        asked = sum(p.bytes * p.need.count for p in self.processes if not p.on_gpu)
        there = sum(report.memory for report in reports)
        if not warnings:
            warnings += self._crowded_gpu(reports)
        if not warnings and 0 < there < asked:
            warnings.append(
                f"all processes together may need {in_units(asked)} of memory, the cluster's nodes"
                f" have {in_units(there)}: lower optim.max_tokens_per_microbatch,"
                " rollout.kv_cache_gib, rollout.workers or cluster.policy_actors"
            )
        return warnings

    def _crowded_gpu(self, reports: Sequence[NodeReport]) -> list[str]:
        """Return a message if a GPU is too small for the processes that may be on it together.

        Engines that sleep have it in turns with the policies: while an engine works, the policies
        hold what they do not need for a step.
        """
        size = max((size for report in reports for size in report.gpu_memory), default=0)
        policy, rollout, reward = (
            next((p for p in self.processes if p.on_gpu and p.need == need), None)
            for need in self.plan.needs
        )
        each = int(rollout.share * size) if rollout else 0
        largest, told = size if size else math.inf, ""
        for counts in self.plan.together:
            policies, engines, rewards = counts
            scoring = reward.bytes * rewards if reward else 0
            resting = policy.resting if policy else 0
            working = policy.bytes if policy else 0
            need = working * policies + each * engines + scoring
            text = f"{self._counted(counts)} on one GPU may need {in_units(need)}, it"
            if self.config.rollout.sleep and policies and engines:
                sampling = resting * policies + each * engines + scoring
                training = working + resting * (policies - 1) + memory.ASLEEP * engines + scoring
                need = max(sampling, training)
                text = (
                    "on a GPU that is shared in turns, sampling may need"
                    f" {in_units(sampling)} and training {in_units(training)}, it"
                )
            if need > largest and sum(counts) > 1:
                ways = ["lower rollout.gpu_memory_utilization"] * (engines > 0)
                if policies:
                    ways.append("lower optim.max_tokens_per_microbatch")
                    ways += ["set base.quantize=nf4"] * (self.config.base.quantize == "none")
                ways += ["take a smaller reward model"] * (rewards > 0)
                largest, told = need, f"{text} has {in_units(size)}: {', or '.join(ways)}"
        return [told] if told else []

    def _counted(self, counts: Sequence[int]) -> str:
        """Return numbers of actors as text: 1 x policy and 2 x rollout worker."""
        pairs = zip(counts, self.plan.needs, strict=True)
        return " and ".join(f"{n} x {need.key.replace('_', ' ')}" for n, need in pairs if n)

    def cautions(self, reports: Sequence[NodeReport]) -> list[str]:
        """Return warnings that do not stop a run: memory may be short, or GPUs would be idle."""
        return [
            *self.tight(reports),
            *(preflight.idle_gpus(reports) if self.plan.uses_gpus else []),
        ]

    def _too_large(self, process: ProcessMemory, alone: bool, most: int) -> str:
        """Return a message on a process that needs more than `most` bytes.

        Args:
            alone: its weights alone do.
        """
        size, what = (process.weights, "weights alone") if alone else (process.bytes, "estimate")
        if process.need.key == "policy" and process.need.gpus and not process.on_gpu:
            return (
                f"a policy needs {in_units(size)} ({what}) of its node while it loads, the largest"
                f" node has {in_units(most)}: take a larger node, or a smaller model"
            )
        share = f"{process.share:.0%} of " if process.share < 1 else ""
        where = f"{share}the largest {'GPU' if process.on_gpu else 'node'}"
        name = process.need.key.replace("_", " ")
        return (
            f"a {name} needs {in_units(size)} ({what}), {where} has {in_units(most)}:"
            f" {', or '.join(self._remedies(process, alone, size * process.share > most))}"
        )

    def _remedies(self, process: ProcessMemory, alone: bool, exceeds: bool) -> list[str]:
        """Return what makes a process smaller, or its share of a GPU larger.

        Args:
            alone: its weights alone are too large, so that nothing helps that leaves them.
            exceeds: not even a whole GPU would hold it.
        """
        config, on_gpu = self.config, process.on_gpu
        if process.need.key == "reward_worker":
            fewer = [] if alone or on_gpu else ["lower reward.batch_size"]
            return [*fewer, "take a smaller reward model"]
        if process.need.key == "policy":
            found = {
                "lower rollout.gpu_memory_utilization": process.share < 1 and self.plan.shares_gpus,
                "raise cluster.gpus_per_policy": any(n > 1 for n, *_ in self.plan.together),
                "lower optim.max_tokens_per_microbatch": not alone,
                "set optim.gradient_checkpointing=true": not (
                    alone or config.optim.gradient_checkpointing
                ),
                "set base.quantize=nf4": on_gpu and config.base.quantize == "none",
            }
        else:
            found = {
                "raise rollout.gpu_memory_utilization": process.share < 1 and not exceeds,
                "lower rollout.chunk_size": on_gpu and not alone,
                "set rollout.tensor_parallel_size": on_gpu and process.need.gpus >= 1,
                "set rollout.sleep=false": process.need.gpus > 0 and not on_gpu,
                "lower rollout.kv_cache_gib": not (process.need.gpus or alone),
            }
        found["set dtype=bfloat16 or float16"] = self.dtype == "float32"
        return [*(way for way, helps in found.items() if helps), "take a smaller model"]


@dataclass(frozen=True)
class Origin:
    """What a forecast is made from.

    Attributes:
        model: folder or hub id of the model, resolved.
        settings: transformers' configuration of the model.
        prompt_tokens: tokens of the longest prompt.
        notes: what was assumed.
        warnings: what would stop a run on this machine.
    """

    model: str
    settings: Any
    prompt_tokens: int
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def forecast(config: Config, source: Origin, placed: resources.Plan) -> Forecast:
    """Return the forecast of a run, with its activations.

    Args:
        source: the model and the length of its prompts.
        placed: the run's actors with their resources.
    """
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
    """Return the forecast of a run from known shapes.

    It includes activations if shapes.saved_bytes is not 0.

    Args:
        model: folder or hub id. If its weights are on this machine, their dtype is read.
        shapes: shapes of the model and its adapters.
        placed: the run's actors with their resources.
        prompt_tokens: tokens of the longest prompt.
    """
    dtype, length = placed.dtype, prompt_tokens + config.rollout.max_new_tokens
    held = -(-config.warp.policies // placed.policy.count)
    stored, gpu = stored_bytes(model), placed.policy.gpus > 0
    tokens = _rows(config, length) * config.rollout.max_new_tokens
    policy = memory.policy_process(shapes, config, dtype, held, tokens, stored, gpu)
    rollout = memory.rollout_process(shapes, config, dtype, stored, placed.rollout.gpus > 0, length)
    reward = _reward_process(config)
    processes = [
        ProcessMemory(placed.policy, policy, gpu, _policy_share(config, placed)),
        ProcessMemory(placed.rollout, rollout),
    ]
    if gpu:
        host = memory.loading_policy(shapes, dtype, stored)
        processes.insert(0, ProcessMemory(placed.policy, host))
    if placed.rollout.gpus:
        lora = engine.adapter_mode(config.rollout, gpu=True) == "lora"
        rank = engine.lora_slots(engine.largest_rank(config)) if lora else 0
        on_gpu = memory.rollout_gpu(
            shapes, config, dtype, rank, engine.slot_count(rank, config.rollout.concurrency), length
        )
        processes.append(
            ProcessMemory(placed.rollout, on_gpu, True, config.rollout.gpu_memory_utilization)
        )
    processes.append(ProcessMemory(placed.reward, reward))
    if placed.reward.gpus:
        processes.append(ProcessMemory(placed.reward, _reward_weights(config), True))
    return Forecast(config, placed, shapes, processes, dtype)


def _policy_share(config: Config, placed: resources.Plan) -> float:
    """Return the share of a GPU that a policy actor may take.

    The policy actors that may be on one GPU have equal parts of what the rollout workers beside
    them leave by rollout.gpu_memory_utilization. Where these sleep, all have it in turns.
    """
    shares = [1.0]
    for policies, engines, _ in placed.together:
        if policies and not (engines and config.rollout.sleep):
            left = 1 - config.rollout.gpu_memory_utilization * engines
            shares.append(max(left, 0.0) / policies)
    return min(shares)


def _rows(config: Config, length: int) -> int:
    """Return the number of completions in a micro-batch; `length` is in tokens."""
    return max(1, min(config.optim.batch_size, config.optim.max_tokens_per_microbatch // length))


def _reward_process(config: Config) -> Components:
    """Return a reward worker's memory in the host, by component.

    Weights are read there, also on their way to a GPU.
    """
    if not any(scorer.model for scorer in config.scorers.values()):
        processes = max(scorer.concurrency for scorer in config.scorers.values())
        return {
            "Python, Ray": memory.FUNCTION_RUNTIME,
            "processes (and what the function needs)": processes * memory.FUNCTION_PROCESS,
        }
    return {**_reward_weights(config), "Python, torch, Ray": memory.REWARD_RUNTIME}


def _reward_weights(config: Config) -> Components:
    """Return the bytes of the largest reward model's weights; nothing if they are not known."""
    models = [scorer.model for scorer in config.rewards_by_key.values() if scorer.model]
    sizes = [_classifier_bytes(name) for model in models if (name := embedded.cached(model))]
    return {"classifier weights": max(sizes)} if any(sizes) else {}


def reward_numbers(config: Config) -> float:
    """Return the parameters of all reward models, taken from 16-bit files; 0 if not known."""
    models = [scorer.model for scorer in config.rewards_by_key.values() if scorer.model]
    return sum(_classifier_bytes(name) for model in models if (name := embedded.cached(model))) / 2


def _classifier_bytes(name: str) -> int:
    """Return the bytes of a classifier's weights; 0 if they cannot be known here."""
    from raywarp.adapters.weight_files import weight_bytes
    from raywarp.planning.model_shapes import classifier_parameters

    known = known_config(name)
    return weight_bytes(Path(name)) or (
        2 * classifier_parameters(known) if known is not None else 0
    )


def _most(process: ProcessMemory, reports: Sequence[NodeReport]) -> int:
    """Return the bytes of the largest node, or the process's share of the largest GPU.

    The result is 0 if no node has reported its memory.
    """
    if process.on_gpu:
        return int(
            process.share
            * max((size for report in reports for size in report.gpu_memory), default=0)
        )
    return max((report.memory for report in reports), default=0)
