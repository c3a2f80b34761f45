"""vLLM as the engine of a rollout worker."""

import contextlib
import gc
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from raywarp.adapters.weight_files import own_files_only
from raywarp.algorithm.deltas import AdapterDelta
from raywarp.cluster.turns import InTurns
from raywarp.config.schema import ConfigError
from raywarp.data.text import Completion
from raywarp.model.quantised import NF4
from raywarp.rollout.base_weights import (
    BaseWeights,
    checkpoint_files,
    read_files,
    weight_names,
)
from raywarp.rollout.engine import (
    NO_VLLM,
    SLOT,
    EngineSettings,
    Loader,
    adapter_mode,
)
from raywarp.rollout.loaders import LoraLoader, MergedLoader, UnmergedLoader
from raywarp.rollout.protocol import Request
from raywarp.rollout.quantised_files import as_held, loader_arguments, quantised_tensors
from raywarp.rollout.row_signatures import ModuleRows
from raywarp.rollout.vllm.models import (
    LoraNames,
    arguments,
    check_lora,
    hold_lora,
    inspect_here,
    leave_logits_alone,
    refusal,
)
from raywarp.storage import scratch

# The errors by which vLLM reports that it cannot run a model.
NOT_THIS_MODEL = (
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    NotImplementedError,
    AssertionError,
)


class VllmEngine:
    """An engine around one vLLM LLM.

    It runs in this process. With tensor_parallel_size > 1, it runs in one process per GPU.

    Raises:
        ConfigError: vLLM is not available, the weights cannot be read, or the KV cache is too small
            for one completion.
    """

    def __init__(self, settings: EngineSettings):
        LLM = _imported()
        self.settings, self.adapter_mode = settings, adapter_mode(settings.rollout, settings.gpu)
        # For adapters and for the sockets of vLLM's processes. Sockets outlive killed processes.
        self.folder = scratch.claim()
        os.environ["VLLM_RPC_BASE_PATH"] = str(self.folder)
        # On a GPU a RuntimeError may be a hardware fault, so it is no refusal there.
        refusals = NOT_THIS_MODEL if settings.gpu else (*NOT_THIS_MODEL, RuntimeError)
        quantised = settings.quantize == NF4
        own_code = settings.trust_remote_code
        self._quantised = quantised_tensors(settings.model, own_code) if quantised else {}
        try:
            if not settings.gpu:
                inspect_here(settings)
            if self.adapter_mode == "lora":
                check_lora(settings)
            loading = loader_arguments(self._quantised, self.adapter_mode == "unmerged")
            found = arguments(settings, self.adapter_mode, self._files()) | loading
            self.llm: Any = LLM(**found)
            self._try_out()
        except refusals as error:
            scratch.discard(self.folder)
            raise refusal(error, settings, self.adapter_mode) from None
        self._read = partial(read_files, checkpoint_files(settings.model))
        self.failed = False
        self.done: dict[str, Any] = {}  # request's name → vLLM's output that nobody has taken yet
        self._known: set[str] = set()  # adapted modules found among the engine's layers
        self.loader: Loader = self._loader()

    def _try_out(self) -> None:
        """Run one pass, so that what vLLM cannot compute here fails now.

        An example is a kernel that CPUs lack.
        """
        from vllm import SamplingParams, TokensPrompt

        self.llm.generate(
            [TokensPrompt(prompt_token_ids=[0, 0])], SamplingParams(max_tokens=1), use_tqdm=False
        )

    def sample(self, requests: Sequence[Request]) -> InTurns[list[list[Completion]]]:
        """Return the completions of each request, which vLLM computes together.

        The loader has loaded the requests' adapters.
        """
        asked = [
            (prompt, self._sampling(seed, request), request)
            for request in requests
            for prompt, seed in zip(request.prompts, request.seeds, strict=True)
        ]
        outputs = yield from self._run(asked)
        completions = iter([_completion(output.outputs[0]) for output in outputs])
        return [[next(completions) for _ in request.prompts] for request in requests]

    def logprobs(self, requests: Sequence[Request]) -> InTurns[list[list[tuple[float, ...]]]]:
        """Return log-probs as Engine.logprobs does.

        vLLM 0.32 scores prompts before it processes logits. So the temperature is 1 in each
        logprobs_mode.
        """
        if self.adapter_mode == "lora":
            self.llm.collective_rpc(leave_logits_alone)
        asked = [
            (prompt, self._scoring(request), request)
            for request in requests
            for prompt in request.prompts
        ]
        outputs = yield from self._run(asked)
        rows = iter([_prompt_logprobs(output) for output in outputs])
        return [[next(rows) for _ in request.prompts] for request in requests]

    def _run(self, asked: Sequence[tuple[Sequence[int], Any, Request]]) -> InTurns[list[Any]]:
        """Return vLLM's outputs for prompts, each with its SamplingParams and its request.

        Others may have their turn after each forward pass. vLLM computes their prompts together
        with these.

        Raises:
            RuntimeError: an earlier call has failed.
        """
        with self._working():
            if self.adapter_mode == "lora" and not self.llm.llm_engine.has_unfinished_requests():
                self.llm.reset_prefix_cache()  # a call's bits depend on no earlier call
            names = self._enqueue(asked)
        wanted = set(names)
        while not self.done.keys() >= wanted:
            with self._working():
                outputs = self.llm.llm_engine.step()
            self.done |= {output.request_id: output for output in outputs if output.finished}
            yield
        return [self.done.pop(name) for name in names]

    def _enqueue(self, asked: Sequence[tuple[Sequence[int], Any, Request]]) -> list[str]:
        from vllm import TokensPrompt

        loras = [self.loader.request(request.adapter) for _, _, request in asked]
        names: list[str] = self.llm.enqueue(
            [TokensPrompt(prompt_token_ids=list(prompt)) for prompt, _, _ in asked],
            [params for _, params, _ in asked],
            lora_request=loras if self.adapter_mode == "lora" else None,
            use_tqdm=False,
        )
        return [name.partition("-")[0] for name in names]  # vLLM makes names unique with a suffix

    @contextlib.contextmanager
    def _working(self) -> Iterator[None]:
        """Note whether the engine fails.

        After an error, vLLM 0.32 keeps the requests that were under way, and would return them
        in the next call.
        """
        if self.failed:
            raise RuntimeError("this engine has failed in an earlier call")
        self.failed = True
        yield
        self.failed = False

    def capacity(self) -> int:
        """Return how many completions of full length run at the same time; more have to wait."""
        config: Any = self.llm.llm_engine.vllm_config
        # vLLM keeps one block empty.
        block, blocks = config.cache_config.block_size, config.cache_config.num_gpu_blocks - 1
        at_once: int = min(
            config.scheduler_config.max_num_seqs, blocks // -(-self.settings.max_model_len // block)
        )
        return at_once

    def sleep(self) -> None:
        self.llm.sleep(level=1)

    def wake(self) -> None:
        self.llm.wake_up()

    def close(self) -> None:
        """Stop the engine's processes and remove its files.

        An engine in this process ends with it: vLLM 0.32 would collect garbage twice first, for a
        second. Processes that are killed leave shared memory behind.
        """
        scratch.discard(self.folder)  # first, since a slow stop may be interrupted
        if self.settings.rollout.tensor_parallel_size == 1:
            gc.unfreeze()  # what is never collected, libtriton calls leaked at the process's end
            return
        segments = _shared_memory_of(
            [
                worker.proc.pid
                for worker in getattr(self.llm.llm_engine.model_executor, "workers", [])
            ]
        )
        self.llm.llm_engine.engine_core.shutdown()
        # vLLM 0.32 leaves the segments behind through which its CPU processes communicate.
        for segment in segments:
            segment.unlink(missing_ok=True)

    def _sampling(self, seed: int, request: Request) -> Any:
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
            stop=rollout.stop,
            extra_args=self._slot(request),
        )

    def _scoring(self, request: Request) -> Any:
        from vllm import SamplingParams

        return SamplingParams(
            temperature=0.0,
            max_tokens=1,
            prompt_logprobs=0,
            detokenize=False,
            extra_args=self._slot(request),
        )

    def _slot(self, request: Request) -> dict[str, Any] | None:
        """Return the argument that tells the layers a request's unmerged adapter."""
        slot = self.loader.request(request.adapter)
        return {SLOT: slot} if self.adapter_mode == "unmerged" and slot is not None else None

    def _loader(self) -> Loader:
        if self.adapter_mode == "unmerged":
            return UnmergedLoader(self._take)
        if self.adapter_mode == "lora":
            return LoraLoader(
                self.llm, LoraNames(self.llm, self._read), hold_lora, zero=not self.settings.gpu
            )
        return MergedLoader(
            BaseWeights(
                self._read,
                getattr(torch, self.settings.dtype),
                partial(as_held, self._quantised),
            ),
            self._install,
        )

    def _take(
        self, new: Mapping[int, AdapterDelta], kept: Collection[int]
    ) -> dict[int, AdapterDelta]:
        """Give the model's layers new adapters, besides those in the slots that are kept.

        Returns:
            what the layers took.
        """
        modules = {module for delta in new.values() for module in delta.factors}
        if modules - self._known:
            transposed = next(iter(new.values())).fan_in_fan_out
            self._find(sorted(modules - self._known), transposed)
        taken, *_ = self.llm.collective_rpc(
            "take_adapters",
            args=({slot: dict(delta.factors) for slot, delta in new.items()}, kept),
        )
        return {
            slot: replace(
                delta, factors={module: f for module, f in delta.factors.items() if module in taken}
            )
            for slot, delta in new.items()
        }

    def _find(self, new: list[str], transposed: bool) -> None:
        """Let the layers look for the modules' rows.

        Raises:
            ConfigError: a module's rows are not all found.
        """
        dtype, parts = (
            getattr(torch, self.settings.dtype),
            self.settings.rollout.tensor_parallel_size,
        )
        known = self._known | set(new)
        modules = {
            name: module
            for module, name in weight_names(known, [name for name, _ in self._read()]).items()
        }
        weights = {
            modules[name]: as_held(self._quantised, name, weight).to(dtype)
            for name, weight in self._read()
            if name in modules
        }
        rows = {
            module: ModuleRows.of(weight.T if transposed else weight, parts)
            for module, weight in weights.items()
        }
        found = self.llm.collective_rpc("find_adapted", args=(rows,))
        for module in new:
            if not torch.stack([one[module] for one in found]).any(0).all():
                raise ConfigError(
                    f"model={self.settings.model}: vLLM has no linear layer with the weights of"
                    f" {module}, and would ignore its adapter; leave it out of lora.target_modules,"
                    " for example lora.target_modules=[q_proj, k_proj, v_proj, o_proj], or set"
                    " rollout.engine=transformers"
                )
        self._known = known

    def _files(self) -> str | Path:
        """Return what vLLM is to load: a folder with only the model's own files, or a hub id."""
        folder = Path(self.settings.model)
        return (
            own_files_only(folder, self.folder / "model")
            if folder.is_dir()
            else self.settings.model
        )

    def _install(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Replace the weights of these names.

        vLLM 0.32 keeps the weights that it is not given. So only the blocks that an adapter changes
        are passed; vLLM reports this at level WARNING.
        """
        if self.settings.rollout.tensor_parallel_size > 1:
            weights = list(weights)  # an iterator cannot be sent to other processes
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        self.llm.reset_prefix_cache()


def _shared_memory_of(processes: Sequence[int]) -> set[Path]:
    """Return vLLM's shared-memory segments that these processes have mapped."""
    found = set()
    for process in processes:
        with contextlib.suppress(OSError):
            lines = Path(f"/proc/{process}/maps").read_text().splitlines()
            found |= {Path(line.split()[5]) for line in lines if "/dev/shm/vllm" in line}
    return found


def _imported() -> Any:
    """Return vLLM's LLM.

    What an import makes is no garbage. To look for garbage in it takes 2.5 of the 9 s of CPU time
    that the import and the start of a small engine take, since vLLM asks for it, too.
    """
    gc.disable()
    try:
        from vllm import LLM
    except ImportError as error:
        raise ConfigError(NO_VLLM.format(problem=f"cannot be imported ({error})")) from None
    finally:
        gc.freeze()
        gc.enable()
    return LLM


def _completion(output: Any) -> Completion:
    logprobs = tuple(
        float(entry[token].logprob)
        for token, entry in zip(output.token_ids, output.logprobs, strict=True)
    )
    return Completion(
        tuple(output.token_ids), logprobs, output.text, output.finish_reason == "stop"
    )


def _prompt_logprobs(output: Any) -> tuple[float, ...]:
    """Return the log-probs of all tokens but the first.

    An entry holds the most likely token too.
    """
    entries = zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True)
    return tuple(float(entry[token].logprob) for token, entry in entries)
