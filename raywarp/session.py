"""The actors of one run: started, given policies to fine-tune and points to evaluate, and stopped."""

import contextlib
import logging
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import ray
import torch
from ray.exceptions import RayActorError, RayTaskError

from raywarp import placement
from raywarp.adapters import AdapterDelta
from raywarp.config import Config
from raywarp.data import Prompt
from raywarp.engines import EngineSettings, front_rank
from raywarp.hardware import cpu_environment, supports_bf16
from raywarp.policy_actor import Job, PolicyActor, task_name
from raywarp.reward_actor import RewardActor
from raywarp.rollout import SFT, Adapter, AdapterPart, PoolReport, Request, RolloutPool, join, submit
from raywarp.rollout_worker import RolloutWorker
from raywarp.seeding import derive_seed
from raywarp.timing import Timing, measure

VLLM_ENV = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the actor is the engine's process: no second one to lose, and a faster start
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",  # a warning for each weight that a swap leaves as it is (vLLM 0.32)
}
VLLM_CPU_ENV = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "TORCHDYNAMO_DISABLE": "1",  # else the first generate compiles a log-prob gather with a C++ compiler (vLLM 0.32)
}


def start_ray() -> None:
    """Join the cluster of RAY_ADDRESS (a job's) or the last `ray start`, or start one here for as long as this process lives.

    Not address="auto", which joins whatever Ray runs on this machine (2.60), another program's or another user's.
    """
    if ray.is_initialized():
        return
    try:
        ray.init(log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False)
    except ConnectionError:  # the last `ray start` is gone
        ray.init(address="local", log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False)


def cause_of(error: BaseException) -> BaseException:
    """What an actor raised, without Ray's wrapping."""
    while isinstance(error, RayTaskError) and isinstance(error.cause, BaseException):
        error = error.cause
    return error


WORKER_RESTARTS = 3  # of each rollout worker, in all; a call is repeated as often


@dataclass(frozen=True)
class Kinds:
    """The classes of the actors: a benchmark puts waits in the place of their work."""

    worker: type[RolloutWorker] = RolloutWorker
    policy: type[PolicyActor] = PolicyActor


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

    def __init__(self, config: Config, model: str, prompt_tokens: int, policies: bool = True, kinds: Kinds = Kinds()):
        self.config, self.model, self.prompt_tokens, self._trains, self._kinds = config, model, prompt_tokens, policies, kinds
        self._groups: list[Any] = []
        self.timing: Timing | None = None
        self._free_before: dict[str, float] = {}
        self.policies: list[Any] = []
        self.workers: list[Any] = []
        self.pool: Any = None
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
        """The settings that decide a result's bits, as they turned out here: dtype, threads, engine, adapter mode."""
        return {"dtype": self.dtype, "threads": self.plan.threads, **self.engine}

    def fine_tune(self, jobs: Sequence[Job], init: AdapterDelta, prompts: Sequence[Prompt]) -> Iterator[dict[str, Any]]:
        """Fine-tune all jobs on the policy actors, in turn and in parallel; yields their events as they happen.

        Raises:
            whatever a job raised, after the events before it.

        Afterwards `timing` says where the time went.
        """
        part, shared = AdapterPart.put(init), ray.put(list(prompts))
        ray.get(self.pool.reset.remote())
        start, before, rows = time.monotonic(), self._reward_seconds(), []
        streams: list[Any] = []
        for slot, actor in enumerate(self.policies):
            if own := list(jobs[slot :: len(self.policies)]):
                method = actor.fine_tune.options(num_returns="streaming", name=task_name(own))
                streams.append(method.remote(own, part, shared, self.pool, self.reward))
        trainers = len(streams)
        while streams:
            (stream,), _ = ray.wait(streams, num_returns=1, fetch_local=False)
            try:
                event: Any = ray.get(next(stream))  # type: ignore[arg-type]
                rows += [event] if event["event"] == "step" else []
                yield event
            except StopIteration:
                streams.remove(stream)
            except (RayTaskError, RayActorError) as error:
                raise cause_of(error) from None
        report: PoolReport = ray.get(self.pool.report.remote())
        self.timing = measure(rows, time.monotonic() - start, trainers, report, self._reward_seconds() - before)

    def sft_scores(self, prompts: Sequence[Prompt]) -> list[float]:
        """The reward of one SFT completion per prompt."""
        seeds = [derive_seed(self.config.seed, "standardise", n) for n in range(len(prompts))]
        request = Request([prompt.token_ids for prompt in prompts], seeds, SFT)
        (rollouts,) = submit(self.pool, [request], self._chunk)
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

    def submit_points(self, deltas: Sequence[AdapterDelta | None], prompts: Sequence[Prompt], seeds: Sequence[int]) -> list["PendingPoint"]:
        """Ask for completions, rewards, control scores and KL of base + delta for each; nothing is waited for.

        Where the engine can mix adapters, each of its calls has all of them and a share of the prompts; else a call has one.
        """
        token_ids = [prompt.token_ids for prompt in prompts]
        adapters = [Adapter(policy=AdapterPart.put(delta)) if delta is not None and delta.rank else SFT for delta in deltas]
        requests = [Request(token_ids, seeds, adapter) for adapter in adapters]
        mixes = self.engine["adapter"] == "lora"
        answers = submit(self.pool, requests, self._chunk if mixes else self.config.rollout.chunk_size, together=mixes)
        return [self._measure(adapter, prompts, rollouts) for adapter, rollouts in zip(adapters, answers, strict=True)]

    @property
    def _chunk(self) -> int:
        return self.config.rollout.chunk_size or self.config.optim.batch_size

    def _measure(self, adapter: Adapter, prompts: Sequence[Prompt], rollouts: list[Any]) -> "PendingPoint":
        rewards = self._score(self.reward, prompts, rollouts)
        control = self._score(self.control, prompts, rollouts) if self.control else None
        actor = self.policies[0]
        self.policies.append(self.policies.pop(0))
        kl = actor.kl_to_sft.remote(adapter, [prompt.token_ids for prompt in prompts], *rollouts)
        return PendingPoint(adapter, rollouts, rewards, control, kl)

    def _reward_seconds(self) -> float:
        seconds: float = ray.get(self.reward.seconds_of_work.remote())
        return seconds

    def _start(self) -> None:
        config = self.config
        self.plan = plan = placement.make_plan(config)
        self._free_before = ray.available_resources()
        device = torch.device("cuda" if plan.uses_gpus else "cpu")
        self.dtype = config.dtype
        if self.dtype == "auto":
            self.dtype = "bfloat16" if plan.uses_gpus or supports_bf16(device) else "float32"
        cpu_env = cpu_environment(plan.threads, plan.crowded) if plan.threads and not plan.uses_gpus else {}
        environment = {"TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": _python_path(), **cpu_env}
        settings = EngineSettings(
            model=self.model,
            dtype=self.dtype,
            max_model_len=self.prompt_tokens + config.rollout.max_new_tokens,
            lora_rank=front_rank(config),
            rollout=config.rollout,
            gpu=plan.rollout.gpus > 0,
            trust_remote_code=config.trust_remote_code,
            seed=config.seed,
        )
        vllm_env = environment | VLLM_ENV | ({} if settings.gpu else VLLM_CPU_ENV)
        self.workers = self._actors(
            self._kinds.worker, plan.rollout, "rollout", vllm_env, lambda n: (settings, n + 1), restarts=WORKER_RESTARTS
        )
        self.pool = ray.remote(RolloutPool).options(num_cpus=0, runtime_env={"env_vars": environment}).remote(self.workers)
        if self._trains:
            actor_arguments = (config, self.model, self.dtype, plan.threads)
            self.policies = self._actors(self._kinds.policy, plan.policy, "policy", environment, lambda _: actor_arguments)
        sources = [config.reward] + ([config.control] if config.control else [])
        scorers = self._actors(
            RewardActor, plan.reward, "reward", environment, lambda n: (sources[n], config.trust_remote_code, plan.threads)
        )
        self.reward, self.control = scorers[0], scorers[1] if config.control else None
        try:
            starting = [[actor.start.remote() for actor in kind] for kind in (self.workers, self.policies, scorers)]
            engines, zeros, _ = (ray.get(refs) for refs in starting)
            self.engine: dict[str, str] = engines[0]["numerics"]
            self._check_capacity(engines[0]["capacity"])
            if zeros:
                self.zero: AdapterDelta = zeros[0]
        except (RayTaskError, RayActorError) as error:
            raise cause_of(error) from None

    def _check_capacity(self, capacity: int) -> None:
        """A batch that an engine cannot hold at once is generated in several rounds: correct, but slow."""
        rollout, asked = self.config.rollout, self.config.rollout.chunk_size or self.config.optim.batch_size
        if capacity < asked:
            memory = f"rollout.kv_cache_gib={rollout.kv_cache_gib:g}" if not self.plan.rollout.gpus else "rollout.gpu_memory_utilization"
            logging.getLogger(__name__).warning(
                f"a rollout worker's KV cache holds {capacity} completions of {self.prompt_tokens} + {rollout.max_new_tokens} tokens "
                f"at once, a batch has {asked}: raise {memory}, or lower optim.batch_size, rollout.chunk_size or rollout.max_new_tokens"
            )

    def _actors(
        self, kind: type, need: placement.Need, name: str, environment: dict[str, str], arguments: Any, restarts: int = 0
    ) -> list[Any]:
        groups = placement.reserve(need, f"raywarp-{name}", self.config.cluster.timeout_seconds)
        self._groups += groups
        remote: Any = ray.remote(kind)
        return [
            remote.options(
                **placement.options(need, group),
                name=placement.unique_name(f"raywarp-{name}", n + 1),
                runtime_env={"env_vars": environment},
                max_restarts=restarts,
                max_task_retries=restarts,
            ).remote(*arguments(n))
            for n, group in enumerate(groups)
        ]

    def _stop(self) -> None:
        """Engines first and by themselves, since a killed one may leave shared memory behind; then everything else."""
        with contextlib.suppress(Exception):
            ray.get([worker.shutdown.remote() for worker in self.workers], timeout=20)
        for actor in [self.pool, *self.workers, *self.policies, self.reward, self.control]:
            if actor is not None:
                ray.kill(actor)
        placement.release(self._groups)
        placement.wait_until_free(self._free_before)


@dataclass(frozen=True)
class PendingPoint:
    """The refs behind one Scored."""

    adapter: Adapter
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
