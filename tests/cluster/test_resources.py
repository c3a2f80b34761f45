"""Tests of fitting a run into a cluster.

The cluster is simulated with logical GPUs, so that no hardware is needed.
"""

import os
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest
from killing import Patience
from ray.util.placement_group import placement_group, placement_group_table

from raywarp.cluster import health, placement_groups, resources, supervisor
from raywarp.cluster.supervisor import ActorSlot
from raywarp.config.load import parse_config
from raywarp.config.schema import Config, ConfigError
from raywarp.rewards.actor import RewardActor


def plan(
    monkeypatch: pytest.MonkeyPatch, config: Config, nodes: int = 1, **each: float
) -> resources.Plan:
    total = {name: amount * nodes for name, amount in each.items()}
    monkeypatch.setattr(resources.ray, "available_resources", lambda: total)
    monkeypatch.setattr(resources.ray, "cluster_resources", lambda: total)
    monkeypatch.setattr(
        resources.ray,
        "nodes",
        lambda: [{"Alive": True, "Resources": each} for _ in range(nodes)],
    )
    return resources.make_plan(config)


def test_two_cores_hold_two_trainers_and_one_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    found = plan(monkeypatch, parse_config({"warp": {"policies": 4}}), CPU=2)
    assert (found.policy.count, found.rollout.count, found.threads, found.uses_gpus) == (
        2,
        1,
        1,
        False,
    )


def test_every_policy_gets_its_gpu_where_there_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    config = parse_config({"warp": {"policies": 4}, "rollout": {"workers": 2}})
    found = plan(monkeypatch, config, CPU=32, GPU=8)
    assert (found.policy.count, found.policy.gpus, found.rollout.gpus, found.threads) == (
        4,
        1,
        1,
        None,
    )
    # two actors with two policies each
    assert plan(monkeypatch, config, CPU=32, GPU=4).policy.count == 2
    assert plan(monkeypatch, config, nodes=2, CPU=8, GPU=2).policy.count == 2


def test_too_few_gpus_are_named_with_the_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    config = parse_config(
        {"rollout": {"workers": 2, "tensor_parallel_size": 2}, "cluster": {"policy_actors": 2}}
    )
    with pytest.raises(ConfigError) as refusal:
        plan(monkeypatch, config, CPU=16, GPU=4)
    message = str(refusal.value)
    assert (
        "asks for 6 GPUs (2 policy x 1 + 2 rollout worker x 2), the cluster has 4 of 4 available"
        in message
    )
    assert "cluster.gpus_per_policy or cluster.gpus_per_rollout_worker" in message


def test_what_is_missing_and_what_would_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five nodes with a GPU each: enough GPUs, but none has two; then four, for six actors."""
    tree: dict[str, Any] = {
        "rollout": {"workers": 2, "tensor_parallel_size": 2},
        "cluster": {"gpus_per_policy": 0.5},
    }
    with pytest.raises(ConfigError) as refusal:
        plan(monkeypatch, parse_config(tree), nodes=5, CPU=4, GPU=1)
    assert (
        str(refusal.value)
        == "a rollout worker asks for 2 GPUs and 1 CPUs on one node, the most that a node has is 1"
        " GPUs, 4 CPUs: lower cluster.gpus_per_rollout_worker, cluster.cpus_per_rollout_worker"
        " or rollout.tensor_parallel_size, or add a larger node"
    )
    tree = {"warp": {"policies": 4}, "rollout": {"workers": 2}, "cluster": {"policy_actors": 4}}
    with pytest.raises(ConfigError) as refusal:
        plan(monkeypatch, parse_config(tree), nodes=4, CPU=4, GPU=1)
    assert (
        str(refusal.value)
        == "the run asks for 6 GPUs (4 policy x 1 + 2 rollout worker x 1), the cluster has 4 of 4"
        " available: 2 too few; add nodes, or lower cluster.gpus_per_policy or"
        " cluster.gpus_per_rollout_worker, or rollout.workers\nit would fit with"
        " cluster.policy_actors=3 rollout.workers=1"
    )


def test_shared_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    config = parse_config({"cluster": {"gpus_per_policy": 0.25, "gpus_per_rollout_worker": 0.5}})
    found = plan(monkeypatch, config, CPU=8, GPU=1)
    assert (found.policy.count, found.policy.total("GPU"), found.rollout.total("GPU")) == (
        2,
        0.5,
        0.5,
    )


def test_threads_are_shared_by_the_processes_that_work_at_the_same_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A policy's rollouts and updates take turns: M policies keep M processes at work, however many
    there are.
    """

    def threads(cpus: float, **tree: dict[str, int]) -> tuple[int | None, bool]:
        found = plan(monkeypatch, parse_config(tree), CPU=cpus)
        return found.threads, found.crowded

    # trainer and engine have both cores in turn
    assert threads(2, warp={"policies": 1}) == (
        2,
        False,
    )
    assert threads(2, warp={"policies": 2}) == (1, False)
    assert threads(8, warp={"policies": 2}) == (4, False)
    # one trainer and one engine
    assert threads(8, warp={"policies": 4}, cluster={"policy_actors": 1}) == (
        4,
        False,
    )
    assert threads(2, warp={"policies": 4}) == (1, True)
    assert threads(8, warp={"policies": 2}, cluster={"threads": 3}) == (3, False)
    assert threads(4, warp={"policies": 2}, cluster={"threads": 3}) == (3, True)


def test_threads_of_a_node_are_those_of_its_own_actors(monkeypatch: pytest.MonkeyPatch) -> None:
    found = plan(monkeypatch, parse_config({"warp": {"policies": 2}}), nodes=2, CPU=4)
    assert (found.threads, found.crowded) == (4, False)


def test_groups_are_reserved_and_released(ray_cluster: Any) -> None:
    free = ray_cluster.available_resources()["CPU"]
    need = resources.Need("policy", gpus=0, cpus=1, count=2)
    groups = placement_groups.reserve(need, "test", timeout=30)
    assert len(groups) == 2
    options = placement_groups.options(need, groups[0])
    assert options["scheduling_strategy"].placement_group == groups[0]
    placement_groups.release(groups)
    with pytest.raises(
        ConfigError, match=r"waited 1 s for 1 placement groups .*lower cluster\.\*_per_policy"
    ):
        placement_groups.reserve(
            resources.Need("policy", gpus=0, cpus=free + 1, count=1), "test", timeout=1
        )
    assert placement_groups.reserve(
        resources.Need("reward_worker", gpus=0, cpus=0, count=2), "test", timeout=1
    ) == [None, None]


def planned(need: resources.Need) -> None:
    """The wait that a run begins with."""
    patience = Patience(30)
    # Ray tells what is free a moment later
    while resources.ray.available_resources()["CPU"] >= need.cpus:
        assert patience.lasts()
    cluster = {
        "policy_actors": 1,
        "cpus_per_policy": 1,
        "cpus_per_rollout_worker": need.cpus - 1,
        "timeout_seconds": 30,
    }
    assert placement_groups.await_plan(parse_config({"cluster": cluster})).policy.count == 1


def reserved(need: resources.Need) -> None:
    """What follows it, should it have seen as free what is not."""
    placement_groups.release(placement_groups.reserve(need, "raywarp-policy", 30))


def regained(need: resources.Need) -> None:
    """A policy actor's, whose group looks for another node."""
    group = placement_group([need.bundle()], strategy="STRICT_PACK")
    place = ActorSlot("policy actor 1", make=lambda _: None, group=group, ask_again=lambda: None)
    assert place.await_room(time.monotonic() + 30)
    placement_groups.release([group])


def helped(need: resources.Need) -> None:
    """A reward worker's, which Ray starts again when its group has another node."""
    group = placement_group([need.bundle()], strategy="STRICT_PACK")
    kind = resources.ray.remote(concurrency_groups={health.GROUP: 1})(RewardActor)
    worker = kind.options(**placement_groups.options(need, group)).remote(
        None, False, None, "reward worker"
    )
    resources.ray.kill(worker)
    helper = supervisor.SupervisedActor(
        "reward worker", worker, 60, report=lambda event, **details: None, groups=[group]
    )
    patience = Patience(30)
    while placement_group_table(group)["state"] != "CREATED":
        helper.check()
        assert patience.lasts()
    placement_groups.release([group])


@pytest.mark.parametrize("wait", [planned, reserved, regained, helped])
def test_the_room_of_a_trial_that_was_killed_is_taken_back(
    ray_cluster: Any, wait: Callable[[resources.Need], None]
) -> None:
    """And no other: neither the driver's own nor a living trial's."""

    @ray_cluster.remote(num_cpus=0)
    class Trial:
        def take(self, cpus: float) -> int:
            placement_groups.reserve(resources.Need("policy", 0, cpus, 1), "raywarp-policy", 30)
            return os.getpid()

    def names() -> set[str]:
        return {
            group["name"]
            for group in placement_group_table().values()
            if group["state"] != "REMOVED"
        }

    before = names()
    mine = [placement_group([{"CPU": 0.1}], name="another.program")]
    living, dead = Trial.remote(), Trial.remote()
    try:
        mine += placement_groups.reserve(resources.Need("policy", 0, 0.5, 1), "raywarp-policy", 30)
        ray_cluster.get(living.take.remote(0.5))
        kept = names()
        os.kill(ray_cluster.get(dead.take.remote(2)), signal.SIGKILL)
        wait(resources.Need("policy", 0, 2, 1))
        assert names() == kept
    finally:
        ray_cluster.kill(living)
        ray_cluster.kill(dead)
        placement_groups.release(mine)
        patience = Patience(30)
        while names() != before:
            placement_groups.take_back()
            assert patience.lasts()
