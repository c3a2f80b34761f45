"""Creation of a run's Ray actors: their classes, resources, environment and arguments."""

import contextlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raywarp.cluster import health, placement_groups, resources, runtime
from raywarp.cluster.device import SPIN, SPIN_LONGER, cpu_environment
from raywarp.cluster.placement_groups import Bundle
from raywarp.cluster.supervisor import ActorSlot
from raywarp.config.schema import Config, ConfigError
from raywarp.rewards.actor import RewardActor
from raywarp.rewards.process import Source, calls_at_once
from raywarp.rollout.engine import EngineSettings, largest_rank
from raywarp.rollout.pool import RolloutPool
from raywarp.rollout.worker import RolloutWorker
from raywarp.training.policy_actor import PolicyActor

VLLM_ENV = {
    # The engine runs in the actor's process: no second one can be lost, and it starts faster.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    # vLLM 0.32 warns of each weight that a swap does not change.
    "VLLM_LOGGING_LEVEL": "ERROR",
}
VLLM_CPU_ENV = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    # Otherwise the first generate compiles a log-prob gather with a C++ compiler (vLLM 0.32).
    "TORCHDYNAMO_DISABLE": "1",
}
# torch's allocator then joins free memory of batches of other lengths. vLLM's sleep mode has an
# allocator of its own, so rollout workers keep the default.
ALLOCATOR = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
FEWEST_TOKENS = 8  # lowest max_model_len, so that the engines of shorter runs can be proven too


def reward_titles(config: Config) -> list[str]:
    """Return the names of the reward workers in a run's time line."""
    titles = {"reward": "reward worker", "control": "control worker"}
    return [titles.get(key) or f"reward worker {key.partition('.')[2]}" for key in config.scorers]


@dataclass(frozen=True)
class Kinds:
    """The classes of the actors. A benchmark replaces their work by waits."""

    worker: type[RolloutWorker] = RolloutWorker
    policy: type[PolicyActor] = PolicyActor
    pool: type[RolloutPool] = RolloutPool


REAL = Kinds()


def find_room(
    config: Config, trains: bool, report: health.Report, check: Callable[[], None]
) -> tuple[resources.Plan, list[list[Bundle | None]]]:
    """Return a run's plan, and the bundles of its rollout, reward and policy actors.

    Args:
        trains: whether the run has policy actors.
        report: see placement_groups.reserve.
        check: checks the cluster's nodes; called if others have come.

    Raises:
        ConfigError: there is no room, or a node that has come cannot be used.
    """
    plan, reasons = resources.plan_to_ask(config)
    if reasons and runtime.owns_ray():
        raise ConfigError("\n".join(reasons))
    if reasons:
        report("waiting", what="the run", message=f"for nodes: {'; '.join(reasons)}")
    needs = [plan.rollout, plan.reward, *([plan.policy] if trains else [])]
    known = {node["NodeID"] for node in ray.nodes()}
    try:
        bundles = placement_groups.reserve(needs, config.cluster, report)
    except ConfigError as error:
        raise ConfigError("\n".join([str(error), *reasons])) from None
    try:
        if not placement_groups.nodes_of(bundles) <= known:
            check()
    except BaseException:
        placement_groups.release(bundles)
        raise
    return plan, bundles


class Actors:
    """Creates all actors of a run. `stop` removes them and their placement group.

    Args:
        model: folder or hub id.
        prompt_tokens: length of the longest prompt, in tokens.
        bundles: of the rollout workers, the reward workers and the policy actors.
    """

    def __init__(
        self,
        config: Config,
        plan: resources.Plan,
        model: str,
        prompt_tokens: int,
        kinds: Kinds,
        bundles: Sequence[list[Bundle | None]],
    ):
        self.config, self.plan, self.model, self.kinds = config, plan, model, kinds
        cpu_env = (
            cpu_environment(plan.threads, plan.crowded)
            if plan.threads and not plan.uses_gpus
            else {"OMP_NUM_THREADS": str(plan.beside_gpu)}
        )
        self.environment = {
            "TOKENIZERS_PARALLELISM": "false",
            "PYTHONPATH": _python_path(),
            **cpu_env,
        }
        self.settings = EngineSettings(
            model=model,
            dtype=plan.dtype,
            max_model_len=max(prompt_tokens + config.rollout.max_new_tokens, FEWEST_TOKENS),
            lora_rank=largest_rank(config),
            rollout=config.rollout,
            gpu=plan.rollout.gpus > 0,
            trust_remote_code=config.trust_remote_code,
            seed=config.seed,
            sft_adapter=config.sft_adapter,
            quantize=config.base.quantize,
        )
        self.at_once = config.rollout.concurrency
        self.bundles = dict(zip(("rollout", "reward", "policy"), bundles, strict=False))
        self.made: list[Any] = []
        self.slots: list[ActorSlot] = []
        self.worker_names: list[str] = []

    def workers(self) -> list[Any]:
        """Return the rollout workers.

        Ray restarts a worker as often as it dies. The pool counts its deaths.
        """
        environment = self.environment | VLLM_ENV | ({} if self.settings.gpu else VLLM_CPU_ENV)
        numbered = list(enumerate(self.bundles["rollout"], 1))
        self.worker_names = [
            placement_groups.unique_name("raywarp-rollout", n) for n, _ in numbered
        ]
        return [
            self._make(
                self.kinds.worker,
                self.plan.rollout,
                bundle,
                environment,
                {"max_restarts": -1, "name": name, "max_concurrency": self.at_once},
                self.settings,
                n,
                watched=True,
            )
            for (n, bundle), name in zip(numbered, self.worker_names, strict=True)
        ]

    def pool(self) -> Any:
        """Return the rollout pool, which is placed on the driver's node.

        No run survives the loss of the driver's node. Otherwise Ray places an actor without
        resources on any node, also under a soft affinity (Ray 2.60). The loss of that node would
        end the pool.
        """
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        name = placement_groups.unique_name("raywarp-pool", 1)
        options = {
            "max_restarts": -1,
            "max_task_retries": -1,
            "scheduling_strategy": here,
            "name": name,
        }
        return self._make(
            self.kinds.pool,
            None,
            None,
            self.environment,
            options,
            self.worker_names,
            self.config.cluster.max_failures,
            self.at_once,
        )

    def policies(self) -> list[ActorSlot]:
        need = self.plan.policy
        arguments = (self.config, self.model, self.plan.dtype, self.plan.threads)
        environment = self.environment | ({} if _sets_allocator() or not need.gpus else ALLOCATOR)
        if environment.items() >= SPIN.items():
            environment |= SPIN_LONGER

        def maker(n: int, bundle: Bundle | None) -> Callable[[], Any]:
            def make() -> Any:
                options = {"name": placement_groups.unique_name("raywarp-policy", n)}
                return self._make(
                    self.kinds.policy,
                    need,
                    bundle,
                    environment,
                    options,
                    *arguments,
                    watched=True,
                )

            return make

        self.slots = [
            ActorSlot(f"policy actor {n}", maker(n, bundle), bundle)
            for n, bundle in enumerate(self.bundles["policy"], 1)
        ]
        for slot in self.slots:
            slot.renew()
        return self.slots

    def rewards(self) -> list[Any]:
        """Return the reward worker, and the worker of the control score if there is one.

        Ray restarts them and repeats their calls.
        """
        sources = list(self.config.scorers.values())
        bundles, need = self.bundles["reward"], self.plan.reward
        # Retries are unlimited, because Ray 2.60 also counts one for a worker that is restarting.
        restart = {"max_restarts": -1, "max_task_retries": -1}
        common = (self.config.trust_remote_code, self.plan.threads)
        return [
            self._make(
                RewardActor,
                need,
                bundle,
                self.environment,
                restart
                | {"name": placement_groups.unique_name("raywarp-reward", n)}
                | {"max_concurrency": calls_at_once(source)},
                source,
                *common,
                title,
                Source.here(source),
                watched=True,
            )
            for n, (source, bundle, title) in enumerate(
                zip(sources, bundles, reward_titles(self.config), strict=True), 1
            )
        ]

    def stop(self) -> None:
        for actor in self.made:
            with contextlib.suppress(RayError, ValueError):
                ray.kill(actor)
        placement_groups.release(list(self.bundles.values()))

    def _make(
        self,
        kind: type,
        need: resources.Need | None,
        bundle: Bundle | None,
        environment: dict[str, str],
        options: dict[str, Any],
        *arguments: Any,
        watched: bool = False,
    ) -> Any:
        """Create an actor.

        Args:
            watched: it answers in a thread of its own while it works (health.WATCH). It also
                answers while calls wait for others' results, behind which Ray would hold the
                question back.
        """
        also: dict[str, Any] = (
            {"concurrency_groups": {health.WATCH: 1}, "allow_out_of_order_execution": True}
            if watched
            else {}
        )
        remote: Any = ray.remote(**also)(kind) if also else ray.remote(kind)
        where = placement_groups.options(need, bundle) if need else {"num_cpus": 0}
        actor = remote.options(**where, runtime_env={"env_vars": environment}, **options).remote(
            *arguments
        )
        self.made.append(actor)
        return actor


def _sets_allocator() -> bool:
    """Return whether the user has set torch's allocator, also by its older name."""
    return any(name in os.environ for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"))


def _python_path() -> str:
    """Return the PYTHONPATH of the actors, with the driver's folder first.

    A user's reward module is in that folder, and on another node the worker may start elsewhere.
    """
    return os.pathsep.join(part for part in (os.getcwd(), os.environ.get("PYTHONPATH", "")) if part)
