"""What vLLM is told of a model, and what it knows: its class, its LoRA, its modules' names."""

import contextlib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from raywarp.algorithm.factors import Factors
from raywarp.config.schema import ConfigError
from raywarp.data.models import read_model_config
from raywarp.rollout.base_weights import BaseWeightsError, Read, weight_names
from raywarp.rollout.engine import EngineSettings, adapter_mode, lora_slots, slot_count

CPU_SEQUENCES = 128  # completions that run at once; more would not make two cores faster
CPU_TOKENS = 4096  # prompt tokens in one pass
# Adapters that vLLM may hold in the host's memory: no limit. Above a limit, vLLM 0.32 drops those
# that a call needs, and looks for them in files. LoraLoader removes what no call uses.
HELD_LORAS = 2**20


def arguments(settings: EngineSettings, mode: str, files: str | Path) -> dict[str, Any]:
    """Return the arguments of vLLM's LLM.

    Args:
        mode: rollout.adapter, with auto resolved.
        files: folder or hub id of the model.
    """
    rollout = settings.rollout
    found: dict[str, Any] = {
        "model": str(files),
        "dtype": settings.dtype,
        "seed": settings.seed,
        "max_model_len": settings.max_model_len,
        "trust_remote_code": settings.trust_remote_code,
        "tensor_parallel_size": rollout.tensor_parallel_size,
        "logprobs_mode": "processed_logprobs",
        # vLLM knows a prefix by its LoRA too. In the other modes it would reuse the blocks of the
        # adapter before (vLLM 0.32).
        "enable_prefix_caching": mode == "lora",
        "disable_log_stats": True,
        "load_format": "safetensors",  # never a pickle
        # A model's own top_p or repetition penalty would change what log-probs mean.
        "generation_config": "vllm",
        # By itself vLLM 0.32 takes Mistral's own configuration and tokenizer where a repository has
        # both, and the trainer has transformers' ones.
        "config_format": "hf",
        "tokenizer_mode": "hf",
    }
    if rollout.tensor_parallel_size > 1:
        # Inside a placement group, vLLM would ask Ray for bundles of its own.
        found |= {"distributed_executor_backend": "mp"}
    if settings.gpu:
        found |= {
            "gpu_memory_utilization": rollout.gpu_memory_utilization,
            "enable_sleep_mode": rollout.sleep,
        }
    else:
        cache = int(rollout.kv_cache_gib * 2**30)
        found |= {
            "enforce_eager": True,
            "kv_cache_memory_bytes": cache,
            "max_num_seqs": CPU_SEQUENCES,
        }
        # Cutting a prompt in two would need a seeded generator to be set back, which CPU
        # generators cannot do (vLLM 0.32).
        found |= {
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": max(CPU_TOKENS, settings.max_model_len),
        }
    if mode == "lora":
        rank = lora_slots(settings.lora_rank)
        found |= {
            "enable_lora": True,
            "max_loras": slot_count(rank, rollout.concurrency),
            "max_cpu_loras": HELD_LORAS,
            "max_lora_rank": rank,
        }
    if mode == "unmerged":
        found |= {"worker_extension_cls": "raywarp.rollout.vllm.layers.AdaptedWorker"}
    return found


def inspect_here(settings: EngineSettings) -> None:
    """Let vLLM inspect the model's class in this process, on CPUs.

    vLLM 0.32 starts a process for it, which imports all of vLLM for seconds, so that CUDA is not
    initialised here. A class that cannot be imported is left to vLLM, which says why.
    """
    from vllm.model_executor.models import ModelRegistry

    with contextlib.suppress(Exception):
        config = read_model_config(settings.model, settings.trust_remote_code, "model")
        for name in config.architectures or ():
            if name in ModelRegistry.models:
                ModelRegistry.register_model(name, ModelRegistry.models[name].load_model_cls())


def check_lora(settings: EngineSettings) -> None:
    """Check that vLLM's class of this model supports LoRA.

    Raises:
        ConfigError: it does not; the message says what to set instead.
    """
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.models import ModelRegistry
    from vllm.model_executor.models.interfaces import supports_lora

    config = EngineArgs(
        model=settings.model, trust_remote_code=settings.trust_remote_code
    ).create_model_config()
    model_class, _ = ModelRegistry.resolve_model_cls(config.architectures, config)
    if not supports_lora(model_class):
        exact = (
            "dtype=float32 with rollout.adapter=merged, or rollout.engine=transformers"
            if settings.gpu
            else "rollout.adapter=unmerged, or rollout.engine=transformers"
        )
        raise ConfigError(
            f"model={settings.model}: vLLM's {model_class.__name__} takes no LoRA adapters; set"
            f" {exact}"
        )


def refusal(error: Exception, settings: EngineSettings, mode: str) -> ConfigError:
    """Return vLLM's error in terms of this project's keys."""
    text = str(error)
    if isinstance(error, ConfigError):
        return error
    if "KV cache" in text or "cache blocks" in text:
        more = (
            "rollout.gpu_memory_utilization"
            if settings.gpu
            else f"rollout.kv_cache_gib={settings.rollout.kv_cache_gib:g}"
        )
        return ConfigError(
            f"the KV cache has no room for one completion of {settings.max_model_len} tokens with"
            f" its prompt: raise {more}, or lower"
            f" rollout.max_new_tokens={settings.rollout.max_new_tokens} or prompts.max_tokens"
            f" (vLLM: {text.splitlines()[0]})"
        )
    automatic = adapter_mode(settings.rollout.model_copy(update={"adapter": "auto"}), settings.gpu)
    other = "" if mode == automatic else ", or rollout.adapter=auto"
    narrow = "dtype=bfloat16, dtype=float32 or " if settings.dtype == "float16" else ""
    return ConfigError(
        f"model={settings.model}: vLLM does not run it here with rollout.adapter={mode} and"
        f" dtype={settings.dtype} ({type(error).__name__}: {' '.join(text.split())[:200]}); set"
        f" {narrow}rollout.engine=transformers{other}"
    )


class LoraNames:
    """The names by which vLLM's LoRA finds modules, for use as a function.

    Known names are kept, so a model's files are read only once for them.

    Args:
        llm: vLLM's LLM.
        read: yields every weight of the checkpoint with its name.
    """

    def __init__(self, llm: Any, read: Read):
        self.llm, self.read = llm, read
        self._known: dict[str, str] = {}

    def __call__(self, modules: Collection[str]) -> dict[str, str]:
        """Return module → the name by which vLLM's LoRA finds it.

        Raises:
            BaseWeightsError: the checkpoint or vLLM's LoRA has no such module.
        """
        if new := [module for module in modules if module not in self._known]:
            theirs = weight_names(new, [name for name, _ in self.read()])
            pairs = [(module, theirs[module].removesuffix(".weight")) for module in new]
            found, *_ = self.llm.collective_rpc(_known_to_lora, args=(pairs,))
            if lacking := [module for module in new if module not in found]:
                raise BaseWeightsError(f"vLLM's LoRA has no module for {lacking[0]}")
            self._known |= found
        return {module: self._known[module] for module in modules}


def _known_to_lora(worker: Any, names: Sequence[tuple[str, str]]) -> dict[str, str]:
    """Return module → the name that leads vLLM 0.32 to one of its layers. Runs in vLLM's process.

    Args:
        worker: vLLM's.
        names: for each module, its own name and that in its file. The first that works is used.
    """
    from vllm.lora.utils import parse_fine_tuned_lora_name

    model = worker.get_model()
    packed, mapper = (
        getattr(model, "packed_modules_mapping", {}),
        getattr(model, "hf_to_vllm_mapper", None),
    )
    layers = {name for name, _ in model.named_modules()}
    for layer in list(layers):
        parent, _, last = layer.rpartition(".")
        layers |= {f"{parent}.{part}" for part in packed.get(last, ())}
    found = {}
    for pair in names:
        for name in pair:
            if (
                pair[0] not in found
                and parse_fine_tuned_lora_name(f"base_model.model.{name}.lora_A.weight", mapper)[0]
                in layers
            ):
                found[pair[0]] = name
    return found


def hold_lora(worker: Any, request: Any, factors: Mapping[str, Factors]) -> bool:
    """Give vLLM 0.32's LoRA an adapter from memory, which it would read from files.

    Runs in its process. vLLM holds the adapter in the host's memory.

    Args:
        request: the LoRARequest; its path is not read.
        factors: the adapter by the names of LoraNames.

    Returns:
        whether vLLM holds it.
    """
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.peft_helper import PEFTHelper

    manager = worker.model_runner.lora_manager
    factors = {name: f if f.rank else _column_of_zeros(f) for name, f in factors.items()}
    rank = max(f.rank for f in factors.values())
    helper = PEFTHelper(rank, rank, sorted({name.rpartition(".")[2] for name in factors}))
    helper.validate_legal(manager.lora_config)
    tensors = {
        f"base_model.model.{name}.lora_{side}.weight": getattr(f, side)
        for name, f in factors.items()
        for side in ("A", "B")
    }

    def load(_: Any) -> Any:
        model = manager._adapter_manager.model
        mapper = getattr(model, "hf_to_vllm_mapper", None)
        lora = LoRAModel.from_lora_tensors(
            request.lora_int_id,
            tensors,
            helper,
            device="cpu",  # as vLLM does; it copies to the GPU those that a pass needs
            dtype=manager.lora_config.lora_dtype,
            model_vocab_size=manager.vocab_size,
            weights_mapper=mapper.get_rename_mapper() if mapper else None,
            skip_prefixes=getattr(model, "lora_skip_prefixes", None),
        )
        lora.is_3d_lora_weight = request.is_3d_lora_weight
        return lora

    manager._load_adapter = load
    try:
        return bool(manager.add_adapter(request))
    finally:
        del manager._load_adapter


def _column_of_zeros(f: Factors) -> Factors:
    """Return factors of rank 1 that change nothing, since vLLM knows no rank 0."""
    return Factors(f.B.new_zeros(len(f.B), 1), f.A.new_zeros(1, f.A.shape[1]))


class _NoLora:
    """A replacement for vLLM's LoRA kernels at the logits, where raywarp has no adapter."""

    def add_lora_logits(self, y: Tensor, *_: Any, **__: Any) -> Tensor:
        return y


def leave_logits_alone(worker: Any) -> None:
    """Turn vLLM's LoRA kernels off at the logits, where no adapter acts. Runs in vLLM's process.

    The kernels of vLLM 0.32 expect as many rows of logits as there are sequences. They fail when a
    whole prompt is scored.
    """
    from vllm.lora.layers import LogitsProcessorWithLoRA

    for module in worker.get_model().modules():
        if isinstance(module, LogitsProcessorWithLoRA) and not bool(module.lora_b_stacked.any()):
            module.punica_wrapper = _NoLora()
