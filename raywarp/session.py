"""The actors of one run: started, given policies to fine-tune and points to evaluate, and stopped."""

import contextlib
import importlib.util
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import ray
import torch
from ray.exceptions import RayActorError, RayTaskError

from raywarp import placement
from raywarp.adapters import AdapterDelta
from raywarp.config import Config, ConfigError
from raywarp.data import Prompt
from raywarp.hardware import SHARED_CPU_ENV, supports_bf16
from raywarp.policy_actor import Job, PolicyActor
from raywarp.reward_actor import RewardActor
from raywarp.rollout import AdapterPart, EngineSettings, RolloutWorker, join, submit
from raywarp.seeding import derive_seed

VLLM_ENV = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the actor is the engine's process: no second one to lose, and a faster start
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}
VLLM_CPU_ENV = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "TORCHDYNAMO_DISABLE": "1",  # else the first generate compiles a log-prob gather with a C++ compiler (vLLM 0.32)
}


def start_ray() -> None:
    """Join the Ray cluster that is there (a job's, `ray start`'s), or start one on this machine for as long as this process lives."""
    if ray.is_initialized():
        return
    try:
        ray.init(address="auto", log_to_driver=False, logging_level=logging.ERROR)
    except ConnectionError:
        ray.init(address="local", log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False)


def check_vllm() -> None:
    """Raises ConfigError where vLLM is not installed, before anything is started."""
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError("vLLM is not installed; pip install 'raywarp[cpu]' (or 'raywarp[gpu]' with a CUDA GPU)")


def cause_of(error: BaseException) -> BaseException:
    """What an actor raised, without Ray's wrapping."""
    while isinstance(error, RayTaskError) and isinstance(error.cause, BaseException):
        error = error.cause
    return error


@dataclass(frozen=True)
class Scored:
    """One adapter's completions of N prompts, with what was asked of them: each list has N entries."""

    texts: list[str]
    lengths: list[int]
    finished: list[bool]
    rewards: list[float]
    control: list[float] | None
    kl: list[float]


class Session:
    """A context manager: the actors live inside it.

    Args:
        model: folder or hub id, already resolved.
        prompt_tokens: the longest prompt, in tokens.
        policies: whether policy actors are wanted, too.
    """

    def __init__(self, config: Config, model: str, prompt_tokens: int, policies: bool = True):
        self.config, self.model, self.prompt_tokens, self._trains = config, model, prompt_tokens, policies
        self._groups: list[Any] = []
        self._free_before: dict[str, float] = {}
        self.policies: list[Any] = []
        self.workers: list[Any] = []
        self.reward: Any = None
        self.control: Any = None

    def __enter__(self) -> "Session":
        try:
            self._start()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop()

    def numerics(self) -> dict[str, Any]:
        """The settings that decide a result's bits, as they turned out here: dtype, threads, adapter mode."""
        return {"dtype": self.dtype, "threads": self.plan.threads, **self.engine}

    def fine_tune(self, jobs: Sequence[Job], init: AdapterDelta, prompts: Sequence[Prompt]) -> Iterator[dict[str, Any]]:
        """Fine-tune all jobs on the policy actors, in turn and in parallel; yields their events as they happen.

        Raises:
            whatever a job raised, after the events before it.
        """
        part, shared = AdapterPart.put(init), ray.put(list(prompts))
        streams: list[Any] = []
        for slot, actor in enumerate(self.policies):
            if own := list(jobs[slot :: len(self.policies)]):
                method = actor.fine_tune.options(num_returns="streaming")
                streams.append(method.remote(own, part, shared, self.workers, self.reward))
        while streams:
            (stream,), _ = ray.wait(streams, num_returns=1, fetch_local=False)
            try:
                event: Any = ray.get(next(stream))  # type: ignore[arg-type]
                yield event
            except StopIteration:
                streams.remove(stream)
            except (RayTaskError, RayActorError) as error:
                raise cause_of(error) from None

    def sft_scores(self, prompts: Sequence[Prompt]) -> list[float]:
        """The reward of one SFT completion per prompt."""
        seeds = [derive_seed(self.config.seed, "standardise", n) for n in range(len(prompts))]
        rollouts = submit(self.workers, [prompt.token_ids for prompt in prompts], seeds, [])
        try:
            scores: list[float] = ray.get(self._score(self.reward, prompts, rollouts))
        except (RayTaskError, RayActorError) as error:
            raise cause_of(error) from None
        return scores

    def set_reward_statistics(self, mean: float, deviation: float) -> None:
        """From now on a reward is (raw − mean) / deviation."""
        ray.get(self.reward.set_statistics.remote(mean, deviation))

    def _score(self, scorer: Any, prompts: Sequence[Prompt], rollouts: Sequence[Any]) -> Any:
        return scorer.score_rollouts.remote([p.text for p in prompts], [p.columns for p in prompts], *rollouts)

    def submit_point(self, delta: AdapterDelta | None, prompts: Sequence[Prompt], seeds: Sequence[int]) -> "PendingPoint":
        """Ask for completions, rewards, control scores and KL of base + delta; nothing is waited for."""
        adapter = [AdapterPart.put(delta)] if delta is not None and delta.rank else []
        token_ids = [prompt.token_ids for prompt in prompts]
        rollouts = submit(self.workers, token_ids, seeds, adapter)
        rewards = self._score(self.reward, prompts, rollouts)
        control = self._score(self.control, prompts, rollouts) if self.control else None
        actor = self.policies[0]
        self.policies.append(self.policies.pop(0))
        kl = actor.kl_to_sft.remote(adapter, token_ids, *rollouts)
        return PendingPoint(adapter, rollouts, rewards, control, kl)

    def _start(self) -> None:
        config = self.config
        self.plan = plan = placement.make_plan(config)
        self._free_before = ray.available_resources()
        device = torch.device("cuda" if plan.uses_gpus else "cpu")
        self.dtype = config.dtype
        if self.dtype == "auto":
            self.dtype = "bfloat16" if plan.uses_gpus or supports_bf16(device) else "float32"
        cpu_env = {} if plan.uses_gpus else SHARED_CPU_ENV | ({"OMP_NUM_THREADS": str(plan.threads)} if plan.threads else {})
        environment = {"TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": _python_path(), **cpu_env}
        settings = EngineSettings(
            model=self.model,
            dtype=self.dtype,
            max_model_len=self.prompt_tokens + config.rollout.max_new_tokens,
            max_rank=(config.warp.iterations * config.warp.policies + 1) * config.lora.rank,
            rollout=config.rollout,
            gpu=plan.rollout.gpus > 0,
            trust_remote_code=config.trust_remote_code,
            seed=config.seed,
        )
        vllm_env = environment | VLLM_ENV | ({} if settings.gpu else VLLM_CPU_ENV)
        self.workers = self._actors(RolloutWorker, plan.rollout, "rollout", vllm_env, lambda _: (settings,))
        if self._trains:
            actor_arguments = (config, self.model, self.dtype, plan.threads)
            self.policies = self._actors(PolicyActor, plan.policy, "policy", environment, lambda _: actor_arguments)
        sources = [config.reward] + ([config.control] if config.control else [])
        scorers = self._actors(
            RewardActor, plan.reward, "reward", environment, lambda n: (sources[n], config.trust_remote_code, plan.threads)
        )
        self.reward, self.control = scorers[0], scorers[1] if config.control else None
        try:
            starting = [[actor.start.remote() for actor in kind] for kind in (self.workers, self.policies, scorers)]
            engines, zeros, _ = (ray.get(refs) for refs in starting)
            self.engine: dict[str, str] = engines[0]
            if zeros:
                self.zero: AdapterDelta = zeros[0]
        except (RayTaskError, RayActorError) as error:
            raise cause_of(error) from None

    def _actors(self, kind: type, need: placement.Need, name: str, environment: dict[str, str], arguments: Any) -> list[Any]:
        groups = placement.reserve(need, f"raywarp-{name}", self.config.cluster.timeout_seconds)
        self._groups += groups
        remote: Any = ray.remote(kind)
        return [
            remote.options(**placement.options(need, group), runtime_env={"env_vars": environment}, max_restarts=0).remote(*arguments(n))
            for n, group in enumerate(groups)
        ]

    def _stop(self) -> None:
        """Engines first and by themselves, since a killed one may leave shared memory behind; then everything else."""
        with contextlib.suppress(Exception):
            ray.get([worker.shutdown.remote() for worker in self.workers], timeout=20)
        for actor in [*self.workers, *self.policies, self.reward, self.control]:
            if actor is not None:
                ray.kill(actor)
        placement.release(self._groups)
        placement.wait_until_free(self._free_before)


@dataclass(frozen=True)
class PendingPoint:
    """The refs behind one Scored."""

    adapter: list[AdapterPart]
    rollouts: list[Any]
    rewards: Any
    control: Any
    kl: Any

    def wait(self) -> Scored:
        try:
            completions = join(ray.get(self.rollouts), self.adapter)
            return Scored(
                texts=[c.text for c in completions],
                lengths=[len(c.token_ids) for c in completions],
                finished=[c.finished for c in completions],
                rewards=ray.get(self.rewards),
                control=ray.get(self.control) if self.control is not None else None,
                kl=ray.get(self.kl),
            )
        except (RayTaskError, RayActorError) as error:
            raise cause_of(error) from None


def _python_path() -> str:
    """The driver's folder first: a user's reward module lies there, and on a cluster's node the worker may start elsewhere."""
    return os.pathsep.join(part for part in (os.getcwd(), os.environ.get("PYTHONPATH", "")) if part)
