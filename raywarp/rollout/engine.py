"""The interface of a rollout worker's engine, its settings, and the checks before it starts.

The engine is vLLM, or transformers where vLLM does not exist.
"""

import importlib.util
import os
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import ray

from raywarp.cluster.turns import InTurns
from raywarp.config.schema import Config, ConfigError, RolloutConfig
from raywarp.data.text import Completion
from raywarp.rollout.protocol import Adapter, Request

# vLLM 0.32 allocates its LoRA slots for one of these ranks (besides 1 and 2).
LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
# Adapters that one forward pass can mix. Each takes memory; further adapters wait their turn.
MOST_LORAS = 4
# The key of an unmerged adapter's slot in the extra arguments of a vLLM request.
SLOT = "raywarp_adapter"
LARGE_RANK = 64  # above it vLLM gets one slot, since a slot's memory grows with its rank
NO_VLLM = (
    "vLLM {problem}: it comes with raywarp[gpu] where there is a CUDA GPU, else raywarp[cpu], of"
    " which ./cluster/local.sh install takes the right one; or set rollout.engine=transformers,"
    " which is slower"
)


@dataclass(frozen=True)
class EngineSettings:
    """What a worker needs to start its engine.

    Attributes:
        model: hub id or folder.
        dtype: float32, bfloat16 or float16.
        max_model_len: tokens of the longest prompt and completion together.
        lora_rank: the largest rank of any sampled adapter; see largest_rank.
        rollout: the section of the configuration.
        gpu: whether the worker has a GPU.
        trust_remote_code: whether the model's own code may run.
        seed: of the engine.
        sft_adapter: folder or hub id of the adapter that the SFT model has on the base, if any.
        quantize: base.quantize.
    """

    model: str
    dtype: str
    max_model_len: int
    lora_rank: int
    rollout: RolloutConfig
    gpu: bool
    trust_remote_code: bool = False
    seed: int = 0
    sft_adapter: str | None = None
    quantize: str = "none"


class Loader(Protocol):
    """How an engine takes adapters; loaders.py implements and explains the methods."""

    def in_weights(self, adapter: Adapter) -> Hashable: ...
    def load(self, adapters: Sequence[Adapter]) -> None: ...
    def digests(self, adapters: Sequence[Adapter]) -> list[tuple[str, ...]]: ...
    def request(self, adapter: Adapter) -> Any: ...


class Engine(Protocol):
    """What a rollout worker runs. It is made from EngineSettings.

    Attributes:
        adapter_mode: rollout.adapter, with auto resolved.
    """

    adapter_mode: str

    @property
    def loader(self) -> Loader: ...

    def sample(self, requests: Sequence[Request]) -> InTurns[list[list[Completion]]]:
        """Return the completions of each request. The loader has loaded their adapters."""

    def logprobs(self, requests: Sequence[Request]) -> InTurns[list[list[tuple[float, ...]]]]:
        """Return, for each prompt, the log-prob at temperature 1 of every token but the first.

        Args:
            requests: their adapters are loaded. Each prompt has at least 2 and fewer than
                max_model_len tokens.
        """

    def capacity(self) -> int:
        """Return how many completions of full length run at the same time."""

    def sleep(self) -> None:
        """Free the GPU until `wake`. The weights go to the host's memory."""

    def wake(self) -> None: ...

    def close(self) -> None: ...


def check_engine(config: Config) -> None:
    """Check what can be known before anything starts.

    Raises:
        ConfigError: vLLM is not installed, or the adapter mode is not exact with this engine,
            precision or rank.
    """
    rollout = config.rollout
    if rollout.engine == "transformers" and rollout.tensor_parallel_size > 1:
        raise ConfigError(
            f"rollout.tensor_parallel_size={rollout.tensor_parallel_size} needs rollout.engine=vllm"
        )
    if rollout.engine == "vllm" and importlib.util.find_spec("vllm") is None:
        raise ConfigError(NO_VLLM.format(problem="is not installed"))
    gpu = expects_gpu(config)
    kinds: list[tuple[bool, str | None]] = [(bool(gpu), None)]
    if gpu is None:  # only the cluster can tell, also whether its GPUs compute in bfloat16
        kinds += [(True, None), *([(True, "float32")] if config.dtype == "auto" else [])]
    refusals = [mode_problem(config, on_gpu, dtype) for on_gpu, dtype in kinds]
    if all(refusals):
        raise ConfigError(refusals[0])


def expects_gpu(config: Config) -> bool | None:
    """Return whether rollout workers will have GPUs; None where only the cluster can tell."""
    share = config.cluster.gpus_per_rollout_worker
    if share is not None:
        return share > 0
    if ray.is_initialized():
        return bool(ray.cluster_resources().get("GPU"))
    if (
        os.environ.get("RAY_ADDRESS")
        or Path(os.environ.get("RAY_TMPDIR", "/tmp"), "ray", "ray_current_cluster").exists()
    ):
        return None
    import torch

    return torch.cuda.is_available()


def adapter_mode(rollout: RolloutConfig, gpu: bool) -> str:
    """Return rollout.adapter, with auto resolved.

    auto means vLLM's LoRA on GPUs, and factors beside the weights elsewhere.
    """
    if rollout.adapter != "auto":
        return rollout.adapter
    return "lora" if gpu and rollout.engine == "vllm" else "unmerged"


def check_mode(config: Config, gpu: bool, dtype: str | None = None) -> None:
    """Check that the adapter mode is exact on workers with or without GPUs; see mode_problem.

    Raises:
        ConfigError: it is not; the message names one that is.
    """
    if problem := mode_problem(config, gpu, dtype):
        raise ConfigError(problem)


def mode_problem(config: Config, gpu: bool, dtype: str | None = None) -> str:
    """Return why the adapter mode would not sample the trained policy, and which mode does.

    The text is empty where the mode is exact.

    Args:
        gpu: whether the workers have GPUs.
        dtype: of the run's plan; by default what the config gives on this machine.
    """
    from raywarp.cluster.device import run_dtype

    rollout, mode = config.rollout, adapter_mode(config.rollout, gpu)
    dtype = dtype or run_dtype(config.dtype, gpu)
    vllm = rollout.engine == "vllm"
    exact = "lora" if vllm and gpu else "unmerged"
    if rollout.concurrency > 1 and (mode == "merged" or not vllm):
        return (
            f"rollout.concurrency={rollout.concurrency}: only vLLM with adapters beside its weights"
            f" works on several policies at once; set rollout.engine=vllm with"
            f" rollout.adapter={'lora' if gpu else 'unmerged'} (or auto), or rollout.concurrency=1"
        )
    if mode == "merged" and dtype != "float32":
        return (
            f"rollout.adapter=merged with dtype={dtype} rounds W + ΔW, and most of a small ΔW is"
            f" lost; use rollout.adapter={exact} (or auto), or dtype=float32"
        )
    if mode == "lora" and not vllm:
        return (
            "rollout.adapter=lora is vLLM's; rollout.engine=transformers has"
            " rollout.adapter=unmerged (or auto)"
        )
    if mode == "lora" and not gpu and dtype != "float32":
        return (
            f"rollout.adapter=lora with dtype={dtype} on CPUs: vLLM adds an adapter's share after"
            " it has rounded the product, and loses what is below half a step; use"
            " rollout.adapter=unmerged (or auto), or dtype=float32"
        )
    if rollout.sleep and not gpu:
        return (
            "rollout.sleep=true frees a GPU for the trainer, and these workers have none; leave it"
            " out, or set cluster.gpus_per_rollout_worker=0.5 and cluster.gpus_per_policy=0.5 where"
            " there is a GPU"
        )
    if mode == "unmerged" and vllm and gpu:
        return (
            "rollout.adapter=unmerged is for CPUs; vLLM on GPUs has rollout.adapter=lora (or auto)"
        )
    if mode == "lora" and not lora_slots(largest_rank(config)):
        averaged = config.warp.average_last
        rank = f"lora.rank={config.lora.rank}"
        rank += f" times warp.average_last={averaged}" if averaged > 1 else ""
        on_start = ", on top of sft_adapter" if config.sft_adapter else ""
        return (
            f"the adapters of this run reach rank {largest_rank(config)}"
            f" ({rank} for each of its {config.warp.policies} policies in"
            f" {config.warp.iterations} iterations{on_start}), and vLLM's largest is"
            f" {LORA_RANKS[-1]}; lower lora.rank or warp.iterations, or set lora.init=frozen,"
            " which keeps merges at lora.rank"
        )
    return ""


def lora_slots(rank: int) -> int:
    """Return the smallest rank ≥ `rank` for which vLLM has slots; 0 where there is none."""
    return next((allowed for allowed in LORA_RANKS if rank <= allowed), 0)


def slot_count(rank: int, concurrency: int = 1) -> int:
    """Return how many adapters of this rank one pass of vLLM's LoRA can mix.

    Args:
        concurrency: calls that an engine works on at once.
    """
    return max(concurrency, MOST_LORAS if rank <= LARGE_RANK else 1)


def largest_rank(config: Config) -> int:
    """Return the largest rank of any adapter that a run samples.

    It is that of a policy on top of its init, or that of the last merge, and the SFT adapter's
    besides. With one frozen A, merges keep lora.rank; policies of several ranks or seeds have
    several.

    Raises:
        ConfigError: the SFT adapter cannot be read.
    """
    from raywarp.adapters.start import start_rank
    from raywarp.algorithm.factors import AdapterError

    frozen = {(own.policy_rank, own.seed) for own in config.of_policies}
    try:
        start = start_rank(config.sft_adapter)
    except AdapterError as error:
        raise ConfigError(f"sft_adapter={config.sft_adapter}: {error}") from None
    if config.lora.init == "frozen" and len(frozen) == 1:
        ((rank, _),) = frozen
        return start + (rank if config.warp.iterations == 1 else 2 * rank)
    return start + config.merged_rank * config.warp.iterations
