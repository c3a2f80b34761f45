"""Resources of a run: its actors with their GPUs and CPUs, fitted to the cluster at the start."""

import math
from dataclasses import dataclass, replace

import ray

from raywarp.config.schema import Config, ConfigError


@dataclass(frozen=True)
class Need:
    """The resources of one kind of actor.

    Attributes:
        key: name of the kind in the config, as in cluster.gpus_per_<key>.
        gpus: GPUs per actor.
        cpus: CPUs per actor.
        count: number of actors.
    """

    key: str
    gpus: float
    cpus: float
    count: int

    def bundle(self) -> dict[str, float]:
        """Return one actor's resources as Ray names them, without those of which it needs none."""
        return {
            name: amount for name, amount in (("GPU", self.gpus), ("CPU", self.cpus)) if amount > 0
        }

    def total(self, resource: str) -> float:
        """Return how much of a resource, "GPU" or "CPU", all actors of this kind take together."""
        return self.count * self.bundle().get(resource, 0.0)


@dataclass(frozen=True)
class Plan:
    """The actors of a run, with the resources and threads of each.

    Attributes:
        policy, rollout, reward: resources of each kind of actor.
        threads: threads of each CPU process; None where GPUs do the work.
        dtype: dtype of the base model, float32 or bfloat16.
        crowded: whether some node has more busy threads at one time than cores.
    """

    policy: Need
    rollout: Need
    reward: Need
    threads: int | None
    dtype: str
    crowded: bool = False

    @property
    def uses_gpus(self) -> bool:
        return self.policy.gpus > 0

    @property
    def needs(self) -> list[Need]:
        return [self.policy, self.rollout, self.reward]


def make_plan(config: Config, available: dict[str, float] | None = None) -> Plan:
    """Fit the run into the running cluster.

    There are as many policy actors as fit, at most M. An actor holds several policies if there are
    fewer actors than policies.

    Args:
        available: free resources, by default those of the cluster at present.

    Raises:
        ConfigError: not even one policy actor and the rollout workers fit. The message says what
            was asked, what is there, and which keys to change.
    """
    cluster, gpus = config.cluster, cluster_gpus()
    available = ray.available_resources() if available is None else available
    most = min(cluster.policy_actors or config.warp.policies, config.warp.policies)
    fewest = most if cluster.policy_actors else 1
    for actors in range(most, fewest - 1, -1):
        plan = wish(config, gpus, actors)
        if not (shortages := [*_too_large(plan.needs), *_shortages(plan.needs, available)]):
            threads, crowded = _threads(config, plan.policy, plan.rollout)
            return replace(plan, threads=threads, crowded=crowded)
    raise ConfigError("\n".join([*shortages, *_what_would_fit(config, gpus, most, available)]))


def fit_several(config: Config, most: int) -> tuple[Plan, int]:
    """Return a run's plan and how many such runs fit into the whole cluster, at most `most`.

    Raises:
        ConfigError: not even one fits.
    """
    total = ray.cluster_resources()
    plan = make_plan(config, total)
    asked = {
        resource: sum(need.total(resource) for need in plan.needs) for resource in ("GPU", "CPU")
    }
    room = [
        int((total.get(resource, 0.0) + 1e-9) // amount)
        for resource, amount in asked.items()
        if amount
    ]
    runs = max(1, min([most, *room]))
    threads, crowded = _threads(config, plan.policy, plan.rollout, runs)
    return replace(plan, threads=threads, crowded=crowded), runs


def plan_or_wish(config: Config) -> tuple[Plan, list[str]]:
    """Return make_plan's result, or, if the run does not fit now, its wish and the reasons."""
    try:
        return make_plan(config), []
    except ConfigError as error:
        return wish(config, cluster_gpus()), str(error).splitlines()


def wish(config: Config, cluster_gpus: float, actors: int | None = None) -> Plan:
    """Return the plan that the run would ask for, whether the cluster has the resources or not.

    Args:
        cluster_gpus: GPUs of the whole cluster. If it has any, an actor gets one unless the config
            says otherwise.
        actors: number of policy actors, by default as many as the run can use.
    """
    from raywarp.cluster.device import run_dtype

    cluster, default = config.cluster, 1.0 if cluster_gpus else 0.0
    per_policy = cluster.gpus_per_policy if cluster.gpus_per_policy is not None else default
    per_rollout = (
        cluster.gpus_per_rollout_worker if cluster.gpus_per_rollout_worker is not None else default
    )
    per_rollout *= config.rollout.tensor_parallel_size
    cpus_per_policy = (
        cluster.cpus_per_policy
        if cluster.cpus_per_policy is not None
        else 1.0
        if per_policy
        else 0.5
    )
    actors = actors or min(cluster.policy_actors or config.warp.policies, config.warp.policies)
    return Plan(
        Need("policy", per_policy, cpus_per_policy, actors),
        Need(
            "rollout_worker", per_rollout, cluster.cpus_per_rollout_worker, config.rollout.workers
        ),
        Need(
            "reward_worker",
            cluster.gpus_per_reward_worker,
            cluster.cpus_per_reward_worker,
            len(config.scorers),
        ),
        None,
        run_dtype(config.dtype, per_policy > 0),
    )


def cluster_gpus() -> float:
    """Return the number of GPUs in the running cluster, free or not."""
    gpus: float = ray.cluster_resources().get("GPU", 0)
    return gpus


def _too_large(needs: list[Need]) -> list[str]:
    """Return a message for each kind of actor that is too large for every node, even a free one."""
    nodes, messages = [node["Resources"] for node in ray.nodes() if node["Alive"]], []
    for need in needs:
        bundle = need.bundle()
        if any(
            all(node.get(name, 0.0) >= amount for name, amount in bundle.items()) for node in nodes
        ):
            continue
        asked = " and ".join(f"{amount:g} {name}s" for name, amount in bundle.items())
        largest = ", ".join(
            f"{max((node.get(name, 0.0) for node in nodes), default=0.0):g} {name}s"
            for name in bundle
        )
        factor = " or rollout.tensor_parallel_size" if need.key == "rollout_worker" else ""
        messages.append(
            f"a {need.key.replace('_', ' ')} asks for {asked} on one node, the most that a node has"
            f" is {largest}: lower cluster.gpus_per_{need.key},"
            f" cluster.cpus_per_{need.key}{factor}, or add a larger node"
        )
    return messages


def _what_would_fit(
    config: Config, gpus: float, most: int, available: dict[str, float]
) -> list[str]:
    """Return a message with the most policy actors and rollout workers that fit, if any do."""
    counts = [
        (actors, workers)
        for actors in range(1, most + 1)
        for workers in range(1, config.rollout.workers + 1)
    ]
    for actors, workers in sorted(counts, key=lambda pair: (sum(pair), pair), reverse=True):
        fewer = wish(
            config.model_copy(
                update={"rollout": config.rollout.model_copy(update={"workers": workers})}
            ),
            gpus,
            actors,
        )
        if not _too_large(fewer.needs) and not _shortages(fewer.needs, available):
            keys = [f"cluster.policy_actors={actors}"] if config.cluster.policy_actors else []
            return ["it would fit with " + " ".join([*keys, f"rollout.workers={workers}"])]
    return []


def _shortages(needs: list[Need], available: dict[str, float]) -> list[str]:
    """Return a message for each resource of which all actors together ask more than is free."""
    messages = []
    for resource, prefix in (("GPU", "gpus"), ("CPU", "cpus")):
        asked, free = sum(need.total(resource) for need in needs), available.get(resource, 0.0)
        if asked > free + 1e-9:
            parts = " + ".join(
                f"{n.count} {n.key.replace('_', ' ')} x {n.bundle()[resource]:g}"
                for n in needs
                if n.total(resource)
            )
            keys = " or ".join(f"cluster.{prefix}_per_{n.key}" for n in needs if n.total(resource))
            messages.append(
                f"the run asks for {asked:g} {resource}s ({parts}), the cluster has {free:g} of"
                f" {ray.cluster_resources().get(resource, 0.0):g} available: {asked - free:g} too"
                f" few; add nodes, or lower {keys}, or rollout.workers"
            )
    return messages


def _threads(config: Config, policy: Need, rollout: Need, runs: int = 1) -> tuple[int | None, bool]:
    """Return the threads per process, and whether a node's busy threads exceed its cores.

    The threads are the cores of the smallest node, divided by its processes that work at one time.
    A policy's rollouts and updates alternate, so no more processes than policies work at one time.
    Where GPUs do the work, the threads are cluster.threads.

    Args:
        runs: number of such runs that share the cluster.
    """
    if policy.gpus or rollout.gpus:
        return config.cluster.threads, False
    nodes = [node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]]
    nodes = [cpus for cpus in nodes if cpus] or [1]
    at_work = math.ceil(runs * min(policy.count + rollout.count, config.warp.policies) / len(nodes))
    threads = config.cluster.threads or max(1, int(min(nodes) // at_work))
    return threads, threads * at_work > min(nodes)
