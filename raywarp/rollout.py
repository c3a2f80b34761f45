"""Rollout workers: vLLM engines in Ray actors, shared by all policies and by evaluation.

A worker is given prompts as token ids with one seed each and the adapter to sample from, and returns token ids with the sampler's
log-probs. Which adapter it holds is decided by content: each call names the digests of the parts it wants (the iteration's init,
the policy), and the worker loads what it does not hold and returns the digests of what it did load.
"""

import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from torch import Tensor

from raywarp.adapters import AdapterDelta, Factors, add, digest, save_peft
from raywarp.batch import Completion
from raywarp.config import ConfigError, RolloutConfig

LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # vLLM 0.32 allocates its LoRA slots for one of these (1 and 2 aside)


class RolloutError(RuntimeError):
    """A worker did not do what it was asked; the message names worker and adapter."""


@dataclass(frozen=True)
class AdapterPart:
    """One summand of an adapter on its way to the workers: its content's digest, and where the content lies."""

    digest: str
    ref: Any  # ray.ObjectRef[AdapterDelta]; inside a dataclass, so that Ray does not fetch it before it is wanted

    @classmethod
    def put(cls, delta: AdapterDelta) -> "AdapterPart":
        return cls(digest(delta), ray.put(delta))


@dataclass(frozen=True)
class Rollout:
    """What one worker returns: its completions in the order of the prompts, and the digests of the parts it had loaded."""

    completions: list[Completion]
    digests: tuple[str, ...]
    seconds: float = 0.0
    swap_seconds: float = 0.0


@dataclass(frozen=True)
class EngineSettings:
    """What a worker's engine needs to know; model is a hub id or folder, dtype float32 or bfloat16, max_rank of any adapter it will see."""

    model: str
    dtype: str
    max_model_len: int
    max_rank: int
    rollout: RolloutConfig
    gpu: bool
    trust_remote_code: bool = False
    seed: int = 0


class RolloutWorker:
    """One vLLM engine. Ray runs its methods one at a time, so a swap and the generation after it are one step."""

    def __init__(self, settings: EngineSettings):
        self.settings = settings
        self.parts: dict[str, AdapterDelta] = {}

    def start(self) -> dict[str, str]:
        """Load the engine; returns what the keys of a run's results depend on: the adapter mode that `auto` became.

        Raises:
            ConfigError: no vLLM here, no weights that merged mode can read, or an adapter rank that vLLM has no room for.
        """
        try:
            from vllm import LLM
        except ImportError as error:
            raise ConfigError(f"vLLM cannot be imported ({error}); install it with pip install 'raywarp[cpu]' or 'raywarp[gpu]'") from None
        self.mode = self._resolve_mode()
        self.engine = LLM(**self._engine_arguments())
        self.loader = LoraLoader(self.engine) if self.mode == "lora" else MergedLoader(self.engine, self.settings.model)
        return {"adapter": self.mode}

    def generate(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], adapter: Sequence[AdapterPart]) -> Rollout:
        """One completion per prompt from base + Σ parts.

        Args:
            prompts: token ids of each prompt.
            seeds: of each prompt's sampling; the same seed, prompt and adapter give the same completion again.
            adapter: the parts whose changes are added to the base; none gives the SFT model.
        """
        from vllm import TokensPrompt

        start = time.perf_counter()
        loaded = self._load(adapter)
        swapped = time.perf_counter()
        outputs = self.engine.generate(
            [TokensPrompt(prompt_token_ids=list(prompt)) for prompt in prompts],
            [self._sampling(seed) for seed in seeds],
            lora_request=self.loader.request,
            use_tqdm=False,
        )
        return Rollout([_completion(o.outputs[0]) for o in outputs], loaded, time.perf_counter() - start, swapped - start)

    def shutdown(self) -> None:
        """Stop the engine and take its temporary files away."""
        self.loader.close()
        self.engine.llm_engine.engine_core.shutdown()

    def _load(self, adapter: Sequence[AdapterPart]) -> tuple[str, ...]:
        wanted = [part.digest for part in adapter]
        if wanted != list(self.parts):
            parts = {part.digest: self.parts[part.digest] if part.digest in self.parts else ray.get(part.ref) for part in adapter}
            self.parts = {}
            self.loader.load(add(*parts.values()) if parts else None)
            self.parts = parts
        return tuple(digest(delta) for delta in self.parts.values())

    def _sampling(self, seed: int) -> Any:
        from vllm import SamplingParams

        rollout = self.settings.rollout
        return SamplingParams(
            temperature=rollout.temperature,
            top_p=1.0,
            top_k=0,
            max_tokens=rollout.max_new_tokens,
            logprobs=0,
            seed=seed,
            ignore_eos=rollout.ignore_eos,
        )

    def _resolve_mode(self) -> str:
        if self.settings.rollout.adapter != "auto":
            return self.settings.rollout.adapter
        return "lora" if self.settings.gpu and _supports_lora(self.settings) else "merged"

    def _engine_arguments(self) -> dict[str, Any]:
        settings, rollout = self.settings, self.settings.rollout
        arguments: dict[str, Any] = {
            "model": settings.model,
            "dtype": settings.dtype,
            "seed": settings.seed,
            "max_model_len": settings.max_model_len,
            "trust_remote_code": settings.trust_remote_code,
            "tensor_parallel_size": rollout.tensor_parallel_size,
            "logprobs_mode": "processed_logprobs",
            "enable_prefix_caching": False,  # new weights under an old prefix would reuse its stale KV blocks (vLLM 0.32)
            "disable_log_stats": True,
            "generation_config": "vllm",  # a model's own top_p or repetition penalty would change what log-probs mean
        }
        if settings.gpu:
            arguments |= {"gpu_memory_utilization": rollout.gpu_memory_utilization}
        else:
            arguments |= {"enforce_eager": True, "kv_cache_memory_bytes": int(rollout.kv_cache_gib * 2**30), "max_num_seqs": 128}
        if self.mode == "lora":
            arguments |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": lora_rank(settings.max_rank)}
        return arguments


class LoraLoader:
    """Adapters as vLLM's own LoRA: each version has a new id, name and path, since an old id or name would silently be the old adapter."""

    def __init__(self, engine: Any):
        self.engine, self.version = engine, 0
        self.request: Any = None
        self.folder = Path(tempfile.mkdtemp(prefix="raywarp-adapters-"))

    def load(self, delta: AdapterDelta | None) -> None:
        from vllm.lora.request import LoRARequest

        if self.request is not None:
            self.engine.llm_engine.remove_lora(self.request.lora_int_id)
            shutil.rmtree(self.request.lora_path)
            self.request = None
        if delta is None:
            return
        self.version += 1
        path = self.folder / f"v{self.version}"
        save_peft(delta, path)
        request = LoRARequest(f"v{self.version}", self.version, str(path))
        if not self.engine.llm_engine.add_lora(request):
            raise RolloutError(f"vLLM did not load adapter version {self.version}")
        self.request = request

    def close(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


class MergedLoader:
    """Adapters as new weights W + ΔW, from pristine W each time and summed in float32; on CPUs 5 times the speed of vLLM's LoRA kernels."""

    request = None

    def __init__(self, engine: Any, model: str):
        self.engine = engine
        self.files = checkpoint_files(model)

    def load(self, delta: AdapterDelta | None) -> None:
        weights = merged_weights(self.files, delta)
        self.engine.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        self.engine.reset_prefix_cache()

    def close(self) -> None:
        pass


def merged_weights(files: Sequence[Path], delta: AdapterDelta | None) -> Iterator[tuple[str, Tensor]]:
    """All weights of a checkpoint under their names, with W + ΔW in place of W where the adapter has a change.

    Raises:
        RolloutError: a module of the adapter has no weight in the checkpoint (nothing may be dropped in silence).
    """
    from safetensors import safe_open

    left = dict(delta.factors) if delta else {}
    for file in files:
        with safe_open(file, framework="pt") as checkpoint:
            for name in checkpoint.keys():  # noqa: SIM118 (not a dict)
                weight = checkpoint.get_tensor(name)
                module = _module_of(name, left)
                if module is not None and delta is not None:
                    weight = _add_change(weight, left.pop(module), delta.fan_in_fan_out)
                yield name, weight
    if left:
        raise RolloutError(f"the checkpoint has no weight for the adapted module {next(iter(left))}")


def checkpoint_files(model: str) -> list[Path]:
    """The safetensors files of a folder or hub id.

    Raises:
        ConfigError: there are none.
    """
    folder = Path(model)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(model, allow_patterns=["*.safetensors", "*.json"]))
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ConfigError(f"{model} has no *.safetensors weights; save it with save_pretrained, or use rollout.adapter=lora")
    return files


def lora_rank(rank: int) -> int:
    """The smallest rank that vLLM has slots for.

    Raises:
        ConfigError: it has none that large.
    """
    for allowed in LORA_RANKS:
        if rank <= allowed:
            return allowed
    raise ConfigError(
        f"adapters of rank {rank} (iterations x policies x lora.rank) exceed vLLM's {LORA_RANKS[-1]}; "
        "use rollout.adapter=merged or a smaller lora.rank"
    )


def submit(workers: Sequence[Any], prompts: Sequence[Sequence[int]], seeds: Sequence[int], adapter: Sequence[AdapterPart]) -> list[Any]:
    """Spread one batch evenly over the workers; the refs' Rollouts, one after another, are in the order of the prompts."""
    share = -(-len(prompts) // len(workers))
    starts = range(0, len(prompts), share)
    return [
        worker.generate.remote(prompts[start : start + share], seeds[start : start + share], adapter)
        for worker, start in zip(workers, starts, strict=False)
    ]


def join(rollouts: Sequence[Rollout], adapter: Sequence[AdapterPart]) -> list[Completion]:
    """All completions of a batch, after checking that every worker sampled from the adapter that was meant.

    Raises:
        RolloutError: a worker held another version.
    """
    wanted = tuple(part.digest for part in adapter)
    for index, rollout in enumerate(rollouts, start=1):
        if rollout.digests != wanted:
            raise RolloutError(f"rollout worker {index} sampled from adapter {_short(rollout.digests)} instead of {_short(wanted)}")
    return [completion for rollout in rollouts for completion in rollout.completions]


def _short(digests: Sequence[str]) -> str:
    return "+".join(d[:8] for d in digests) or "none"


def _completion(output: Any) -> Completion:
    logprobs = tuple(float(entry[token].logprob) for token, entry in zip(output.token_ids, output.logprobs, strict=True))
    return Completion(tuple(output.token_ids), logprobs, output.text, output.finish_reason == "stop")


def _module_of(name: str, modules: dict[str, Factors]) -> str | None:
    """The adapted module that a checkpoint's tensor belongs to; checkpoints of bare backbones lack the model's own prefix."""
    if not name.endswith(".weight"):
        return None
    module = name.removesuffix(".weight")
    if module in modules:
        return module
    return next((m for m in modules if m.partition(".")[2] == module), None)


def _add_change(weight: Tensor, factors: Factors, transposed: bool) -> Tensor:
    """W + ΔW in float32 (the engine rounds to its own dtype): a bfloat16 checkpoint may well run in a float32 engine."""
    change = factors.B.float() @ factors.A.float()
    return weight.float() + (change.T if transposed else change)


def _supports_lora(settings: EngineSettings) -> bool:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.models import ModelRegistry
    from vllm.model_executor.models.interfaces import supports_lora

    config = EngineArgs(model=settings.model, trust_remote_code=settings.trust_remote_code).create_model_config()
    model_class, _ = ModelRegistry.resolve_model_cls(config.architectures, config)
    return bool(supports_lora(model_class))
