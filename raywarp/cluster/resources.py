"""Resources of a run: its actors with their GPUs and CPUs, fitted to the cluster at the start."""

import contextlib
import itertools
import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import ray

from raywarp.config.schema import Config, ConfigError

MOST_BESIDE_GPU = 16  # threads; more make nothing there faster
_EPSILON = 1e-9


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
        dtype: dtype of the base model: float32, bfloat16 or float16.
        crowded: whether some node has more busy threads at one time than cores.
        beside_gpu: threads of each process that has a GPU, for what its CPU does.
    """

    policy: Need
    rollout: Need
    reward: Need
    threads: int | None
    dtype: str
    crowded: bool = False
    beside_gpu: int = 1

    @property
    def uses_gpus(self) -> bool:
        return self.policy.gpus > 0

    @property
    def shares_gpus(self) -> bool:
        """Whether a rollout worker and a policy actor may be on the same GPU."""
        return any(policies and engines for policies, engines, _ in self.together)

    @cached_property
    def together(self) -> list[tuple[int, ...]]:
        """How many policy actors, rollout workers and reward workers may be on one GPU together.

        Their shares sum to at most 1, and no further actor has room there.
        """
        shares = [min(need.gpus, 1.0) for need in self.needs]

        def fits(counts: tuple[int, ...]) -> bool:
            asked = sum(n * share for n, share in zip(counts, shares, strict=True))
            return asked <= 1 + _EPSILON

        most = [
            min(need.count, int(1 / share + _EPSILON)) if share else 0
            for need, share in zip(self.needs, shares, strict=True)
        ]
        found = list(filter(fits, itertools.product(*(range(n + 1) for n in most))))
        return [
            counts
            for counts in found
            if not any(other != counts and all(map(operator.ge, other, counts)) for other in found)
        ]

    @property
    def needs(self) -> list[Need]:
        return [self.policy, self.rollout, self.reward]


@dataclass(frozen=True)
class Nodes:
    """The GPUs and CPUs of a cluster's nodes, one mapping "GPU", "CPU" → amount per node.

    Attributes:
        whole: of the nodes with nothing on them.
        free: of the same nodes at present.
    """

    whole: Sequence[Mapping[str, float]]
    free: Sequence[Mapping[str, float]]

    @classmethod
    def present(cls) -> "Nodes":
        """Return the living nodes of the running cluster."""
        alive = [node for node in ray.nodes() if node["Alive"]]
        free = ray._private.state.available_resources_per_node()
        return cls(
            [node["Resources"] for node in alive], [free.get(node["NodeID"], {}) for node in alive]
        )

    @classmethod
    def empty(cls, nodes: Sequence[Mapping[str, float]]) -> "Nodes":
        """Return nodes with nothing on them."""
        return cls(nodes, nodes)

    @property
    def accelerators(self) -> list[str]:
        """Ray's types of the GPUs, such as "H100"."""
        prefix = "accelerator_type:"
        keys = {key for node in self.whole for key in node if key.startswith(prefix)}
        return sorted(key.removeprefix(prefix) for key in keys)

    def total(self, resource: str) -> float:
        """Return the amount of "GPU" or "CPU" on all nodes, free or not."""
        return sum(node.get(resource, 0.0) for node in self.whole)


def make_plan(config: Config, nodes: Nodes | None = None) -> Plan:
    """Fit the run into the free part of a cluster.

    There are as many policy actors as fit, at most M. An actor holds several policies if there are
    fewer actors than policies.

    Args:
        nodes: by default those of the running cluster.

    Raises:
        ConfigError: not even one policy actor and the rollout workers fit. The message says what
            was asked, what is there, and which keys to change.
    """
    nodes = nodes or Nodes.present()
    most = min(config.cluster.policy_actors or config.warp.policies, config.warp.policies)
    fewest = most if config.cluster.policy_actors else 1
    for actors in range(most, fewest - 1, -1):
        plan = wish(config, nodes, actors)
        if not (misfits := _misfits(plan.needs, nodes)):
            return _with_threads(config, plan, nodes)
    raise ConfigError("\n".join([*misfits, *_what_would_fit(config, most, nodes)]))


def plan_to_ask(config: Config) -> tuple[Plan, list[str]]:
    """Return the plan for which a run that starts asks the cluster, and why it cannot have it.

    It is made for what is free. If the run does not fit there, it is made for the whole cluster,
    and the run waits for others to end. If it does not fit there either, it is what the run can
    use, and the reasons are returned: the run waits for nodes, if any can come.
    """
    nodes = Nodes.present()
    with contextlib.suppress(ConfigError):
        return make_plan(config, nodes), []
    empty = Nodes.empty(nodes.whole)
    plan, reasons = plan_or_wish(config, empty)
    return _with_threads(config, plan, empty), reasons


def fit_several(config: Config, most: int) -> tuple[Plan, int]:
    """Return a run's plan and how many such runs fit into the whole cluster, at most `most`.

    Raises:
        ConfigError: not even one fits.
    """
    whole = Nodes.present().whole
    plan, runs = make_plan(config, Nodes.empty(whole)), 1
    while runs < most and not unplaced(plan.needs * (runs + 1), whole):
        runs += 1
    return _with_threads(config, plan, Nodes.empty(whole), runs), runs


def plan_or_wish(config: Config, nodes: Nodes | None = None) -> tuple[Plan, list[str]]:
    """Return make_plan's result, or, if the run does not fit now, its wish and the reasons."""
    nodes = nodes or Nodes.present()
    try:
        return make_plan(config, nodes), []
    except ConfigError as error:
        return wish(config, nodes), str(error).splitlines()


def wish(config: Config, nodes: Nodes, actors: int | None = None) -> Plan:
    """Return the plan that the run would ask for, whether the cluster has the resources or not.

    Args:
        nodes: of the whole cluster. If they have any GPU, an actor gets one unless the config says
            otherwise.
        actors: number of policy actors, by default as many as the run can use.
    """
    from raywarp.cluster.device import run_dtype

    cluster, default = config.cluster, 1.0 if nodes.total("GPU") else 0.0
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
        run_dtype(config.dtype, per_policy > 0, nodes.accelerators, per_rollout > 0),
    )


def in_words(needs: Sequence[Need]) -> str:
    """Return what all actors ask for, for example "2 x policy with 1 GPU and 1 CPU"."""
    asked = [need for need in needs if need.count and need.bundle()]
    return ", ".join(
        f"{need.count} x {need.key.replace('_', ' ')} with"
        f" {' and '.join(f'{amount:g} {name}' for name, amount in need.bundle().items())}"
        for need in asked
    )


def unplaced(needs: Sequence[Need], nodes: Sequence[Mapping[str, float]]) -> list[Need]:
    """Return the kinds of actors of which some find no room, the largest being placed first.

    An actor is on one node, and a share of a GPU on one GPU.
    """
    rooms = [_Room.of(node) for node in nodes]
    actors = [need for need in needs for _ in range(need.count) if need.bundle()]
    actors.sort(key=lambda need: (need.gpus, need.cpus), reverse=True)
    left = [need for need in actors if not any(room.take(need) for room in rooms)]
    return list(dict.fromkeys(left))


@dataclass
class _Room:
    """What is left of a node: CPUs, and the free part of each GPU."""

    cpus: float
    gpus: list[float]

    @classmethod
    def of(cls, node: Mapping[str, float]) -> "_Room":
        gpus, share = divmod(node.get("GPU", 0.0) + _EPSILON, 1)
        return cls(node.get("CPU", 0.0), [1.0] * int(gpus) + [share] * (share > 2 * _EPSILON))

    def take(self, need: Need) -> bool:
        """Take an actor's part, if it fits. Shares go to the fullest GPU that has room."""
        whole = max(1, round(need.gpus)) if need.gpus else 0
        each = min(need.gpus, 1.0)
        fitting = sorted(
            (n for n, free in enumerate(self.gpus) if free + _EPSILON >= each),
            key=lambda n: self.gpus[n],
        )
        if len(fitting) < whole or self.cpus + _EPSILON < need.cpus:
            return False
        for n in fitting[:whole]:
            self.gpus[n] -= each
        self.cpus -= need.cpus
        return True


def _misfits(needs: Sequence[Need], nodes: Nodes) -> list[str]:
    """Return why these actors do not fit into the free part of a cluster."""
    found = [*_too_large(needs, nodes), *_shortages(needs, nodes)]
    if found or not (left := unplaced(needs, nodes.free)):
        return found
    free = "; ".join(
        ", ".join(f"{node.get(name, 0.0):g} {name}s" for name in ("GPU", "CPU") if node.get(name))
        or "nothing"
        for node in nodes.free
    )
    return [
        f"no node has room for all of {in_words(left)}: an actor is on one node, and a share of a"
        f" GPU on one GPU. Free on the nodes: {free}. Change"
        f" {' or '.join(f'cluster.*_per_{need.key}' for need in left)}, or add nodes"
    ]


def _too_large(needs: Sequence[Need], nodes: Nodes) -> list[str]:
    """Return a message for each kind of actor that is too large for every node, even a free one."""
    messages = []
    for need in needs:
        bundle = need.bundle()
        if not unplaced([replace(need, count=1)], nodes.whole):
            continue
        asked = " and ".join(f"{amount:g} {name}s" for name, amount in bundle.items())
        largest = ", ".join(
            f"{max((node.get(name, 0.0) for node in nodes.whole), default=0.0):g} {name}s"
            for name in bundle
        )
        factor = " or rollout.tensor_parallel_size" if need.key == "rollout_worker" else ""
        messages.append(
            f"a {need.key.replace('_', ' ')} asks for {asked} on one node, the most that a node has"
            f" is {largest}: lower cluster.gpus_per_{need.key},"
            f" cluster.cpus_per_{need.key}{factor}, or add a larger node"
        )
    return messages


def _what_would_fit(config: Config, most: int, nodes: Nodes) -> list[str]:
    """Return a message with the most policy actors and rollout workers that fit, if any do."""
    counts = [
        (actors, workers)
        for actors in range(1, most + 1)
        for workers in range(1, config.rollout.workers + 1)
    ]
    for actors, workers in sorted(counts, key=lambda pair: (sum(pair), pair), reverse=True):
        rollout = config.rollout.model_copy(update={"workers": workers})
        fewer = wish(config.model_copy(update={"rollout": rollout}), nodes, actors)
        if not _misfits(fewer.needs, nodes):
            keys = [f"cluster.policy_actors={actors}"] if config.cluster.policy_actors else []
            return ["it would fit with " + " ".join([*keys, f"rollout.workers={workers}"])]
    return []


def _shortages(needs: Sequence[Need], nodes: Nodes) -> list[str]:
    """Return a message for each resource of which all actors together ask more than is free."""
    messages = []
    for resource, prefix in (("GPU", "gpus"), ("CPU", "cpus")):
        asked = sum(need.total(resource) for need in needs)
        free = sum(node.get(resource, 0.0) for node in nodes.free)
        if asked > free + _EPSILON:
            parts = " + ".join(
                f"{n.count} {n.key.replace('_', ' ')} x {n.bundle()[resource]:g}"
                for n in needs
                if n.total(resource)
            )
            keys = " or ".join(f"cluster.{prefix}_per_{n.key}" for n in needs if n.total(resource))
            messages.append(
                f"the run asks for {asked:g} {resource}s ({parts}), the cluster has {free:g} of"
                f" {nodes.total(resource):g} available: {asked - free:g} too"
                f" few; add nodes, or lower {keys}, or rollout.workers"
            )
    return messages


def _with_threads(config: Config, plan: Plan, nodes: Nodes, runs: int = 1) -> Plan:
    """Return the plan with threads per process, and whether a node's busy threads exceed its cores.

    The threads are the cores of the smallest node, divided by its processes that work at one time.
    A policy's rollouts and updates alternate, so no more processes than policies work at one time.
    Where GPUs do the work, the threads are cluster.threads. Beside the GPUs a node's cores are
    shared by its processes: Ray would give each one thread, and adapters are folded and compressed
    there.

    Args:
        runs: number of such runs that share the cluster.
    """
    policy, rollout = plan.policy, plan.rollout
    if policy.gpus or rollout.gpus:
        with_gpus = [node.get("CPU", 0) for node in nodes.whole if node.get("GPU")] or [1]
        processes = math.ceil(runs * (policy.count + rollout.count) / len(with_gpus))
        each = min(MOST_BESIDE_GPU, max(1, int(min(with_gpus) // processes)))
        return replace(plan, threads=config.cluster.threads, beside_gpu=each)
    cores = [cpus for node in nodes.whole if (cpus := node.get("CPU", 0))] or [1]
    at_work = math.ceil(runs * min(policy.count + rollout.count, config.warp.policies) / len(cores))
    threads = config.cluster.threads or max(1, int(min(cores) // at_work))
    return replace(plan, threads=threads, crowded=threads * at_work > min(cores))
