"""What a rollout worker runs: vLLM, or transformers where vLLM does not exist; one interface."""

import importlib.util
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Protocol

from raywarp.completion import Completion
from raywarp.config import Config, ConfigError, RolloutConfig
from raywarp.rollout import Adapter, Request

LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # vLLM 0.32 allocates its LoRA slots for one of these (1 and 2 aside)
MOST_LORAS = 4  # adapters that one forward pass can mix; each has memory of its own, and further ones wait their turn
FRONT_RANK = 64  # slots are made this large for the front's points, if the policies' rank is below; see EngineSettings.lora_rank
NO_VLLM = (
    "vLLM {problem}: it comes with raywarp[gpu] where there is a CUDA GPU, else raywarp[cpu], of which ./cluster/local.sh install takes "
    "the right one; or set rollout.engine=transformers, which is slower"
)


@dataclass(frozen=True)
class EngineSettings:
    """What a worker's engine needs to know.

    model: hub id or folder.
    dtype: float32 or bfloat16.
    max_model_len: tokens of the longest prompt and completion.
    lora_rank: of adapters that are to be swapped as LoRA: a policy's, or of the front's points if that is at most FRONT_RANK,
        so that the front is measured in one go; an adapter of higher rank is put into the weights, which takes longer.
    """

    model: str
    dtype: str
    max_model_len: int
    lora_rank: int
    rollout: RolloutConfig
    gpu: bool
    trust_remote_code: bool = False
    seed: int = 0


class Loader(Protocol):
    """See loaders.py."""

    def in_weights(self, adapter: Adapter) -> Hashable: ...
    def load(self, adapters: Sequence[Adapter]) -> None: ...
    def digests(self, adapters: Sequence[Adapter]) -> list[tuple[str, ...]]: ...


class Engine(Protocol):
    """Made from EngineSettings; adapter_mode is what `rollout.adapter: auto` became."""

    adapter_mode: str

    @property
    def loader(self) -> Loader: ...

    def sample(self, requests: Sequence[Request]) -> list[list[Completion]]:
        """Completions of requests whose adapters the loader has loaded."""

    def capacity(self) -> int:
        """Completions of full length that run at the same time."""

    def lost(self) -> bool:
        """Whether it needs to be started again."""

    def close(self) -> None: ...


def start_engine(settings: EngineSettings) -> Engine:
    """The engine that rollout.engine names; raises ConfigError as the engine does."""
    if settings.rollout.engine == "transformers":
        from raywarp.transformers_engine import TransformersEngine

        return TransformersEngine(settings)
    from raywarp.vllm_engine import VllmEngine

    return VllmEngine(settings)


def check_engine(config: Config) -> None:
    """What can be known before anything is started.

    Raises:
        ConfigError: vLLM is not installed, or the adapter mode does not go with engine or rank.
    """
    rollout = config.rollout
    if rollout.engine == "transformers":
        if rollout.adapter == "lora":
            raise ConfigError("rollout.engine=transformers merges adapters into the weights; use rollout.adapter=auto or merged")
        if rollout.tensor_parallel_size > 1:
            raise ConfigError(f"rollout.tensor_parallel_size={rollout.tensor_parallel_size} needs rollout.engine=vllm")
        return
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError(NO_VLLM.format(problem="is not installed"))
    if rollout.adapter == "lora":
        lora_slots(config.lora.rank)


def lora_slots(rank: int, refuse: bool = True) -> int:
    """The smallest rank that vLLM has slots for.

    Raises:
        ConfigError: it has none that large (or, without `refuse`, the result is 0).
    """
    for allowed in LORA_RANKS:
        if rank <= allowed:
            return allowed
    if refuse:
        raise ConfigError(f"lora.rank={rank} exceeds vLLM's largest, {LORA_RANKS[-1]}; use rollout.adapter=merged or a smaller lora.rank")
    return 0


def front_rank(config: Config) -> int:
    """See EngineSettings.lora_rank."""
    return max(config.lora.rank, min(FRONT_RANK, config.lora.rank * config.warp.policies * config.warp.iterations))
