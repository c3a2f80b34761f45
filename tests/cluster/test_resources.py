"""Tests of fitting a run into a cluster.

The cluster is simulated with logical GPUs, so that no hardware is needed.
"""

import json
import os
import re
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from killing import Patience
from ray.util.placement_group import placement_group, placement_group_table

from raywarp.cluster import health, placement_groups, resources, supervisor
from raywarp.cluster.device import run_dtype
from raywarp.cluster.placement_groups import Bundle
from raywarp.cluster.supervisor import ActorSlot
from raywarp.config.cluster import ClusterConfig
from raywarp.config.load import parse_config
from raywarp.config.schema import Config, ConfigError
from raywarp.rewards.actor import RewardActor


def plan(config: Config, nodes: int = 1, **each: float) -> resources.Plan:
    return resources.make_plan(config, resources.Nodes.empty([each] * nodes))


def test_two_cores_hold_two_trainers_and_one_engine() -> None:
    found = plan(parse_config({"warp": {"policies": 4}}), CPU=2)
    assert (found.policy.count, found.rollout.count, found.threads, found.uses_gpus) == (
        2,
        1,
        1,
        False,
    )


def test_every_policy_gets_its_gpu_where_there_are_enough() -> None:
    config = parse_config({"warp": {"policies": 4}, "rollout": {"workers": 2}})
    found = plan(config, CPU=32, GPU=8)
    assert (found.policy.count, found.policy.gpus, found.rollout.gpus, found.threads) == (
        4,
        1,
        1,
        None,
    )
    assert found.beside_gpu == 5  # 32 cores for six processes
    # two actors with two policies each
    assert plan(config, CPU=32, GPU=4).policy.count == 2
    assert plan(config, nodes=2, CPU=8, GPU=2).policy.count == 2


def test_old_gpus_do_not_compute_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """By Ray's name for those of the cluster; this machine's own is asked."""

    def dtype(wanted: str, *kinds: str) -> str:
        whole = [{"CPU": 8, "GPU": 4, f"accelerator_type:{kind}": 1.0} for kind in kinds]
        config = parse_config({"dtype": wanted, "rollout": {"workers": 1}})
        return resources.make_plan(config, resources.Nodes.empty(whole)).dtype

    assert dtype("auto", "A100") == dtype("auto", "L4", "H100") == "bfloat16"
    assert dtype("auto", "T4") == dtype("auto", "A100", "V100-16GB") == "float32"
    assert [dtype(one, "T4") for one in ("float32", "float16")] == ["float32", "float16"]
    refusal = (
        "dtype=bfloat16: the cluster has a GPU, T4, that does not compute in it; set dtype=float16 "
        "or dtype=float32"
    )
    with pytest.raises(ConfigError, match=refusal):
        dtype("bfloat16", "T4")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda _: "Tesla V100-SXM2-16GB")
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda **_: False)
    assert run_dtype("auto", gpus=True) == "float32"
    with pytest.raises(ConfigError, match="a GPU, Tesla V100-SXM2-16GB, that does not"):
        run_dtype("bfloat16", gpus=True)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda **_: True)
    assert run_dtype("auto", gpus=True) == "bfloat16"


@pytest.mark.parametrize("has", [True, False])
def test_rollout_workers_on_gpus_need_bfloat16_there(
    has: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The policies are on CPUs, which may compute in it."""
    monkeypatch.setattr("raywarp.cluster.device.supports_bf16", lambda device: has)

    def dtype(wanted: str, kind: str, **shares: float) -> str:
        nodes = [{"CPU": 8, "GPU": 1, f"accelerator_type:{kind}": 1.0}]
        config = parse_config({"dtype": wanted, "rollout": {"workers": 1}, "cluster": shares})
        return resources.make_plan(config, resources.Nodes.empty(nodes)).dtype

    assert dtype("auto", "A100", gpus_per_policy=0) == ("bfloat16" if has else "float32")
    assert dtype("auto", "T4", gpus_per_policy=0) == "float32"
    with pytest.raises(ConfigError, match="dtype=bfloat16: the cluster has a GPU, T4"):
        dtype("bfloat16", "T4", gpus_per_policy=0)
    on_cpus = {"gpus_per_policy": 0, "gpus_per_rollout_worker": 0}
    assert dtype("bfloat16", "T4", **on_cpus) == "bfloat16"


@pytest.mark.parametrize(
    ("old", "kinds"),
    [
        (True, "T4 V100 V100-32 V100-16GB P100 P40 P4 M60 M40 K80 TITAN-V TITAN-RTX TITAN-Xp"),
        (True, "GeForce-RTX-2080-Ti GeForce-GTX-1080-Ti RTX-2080 GTX-1080 GeForce-GTX-1660-SUPER"),
        (True, "Quadro-RTX-6000 RTX-8000 Quadro-RTX-8000 P4000 M6000 GV100 T1000"),
        (False, "A100 A10G L4 L40S H100 H20 B200 GH200 A40 RTX-A6000 RTX-6000-Ada RTX-PRO-6000"),
        (False, "GeForce-RTX-3090 GeForce-RTX-4090 GeForce-RTX-2050 RTX3090 RTX4090 RTX-2000"),
        (False, "MI300X AMD-Instinct-MI300X-OAM AMD-Instinct-MI100 Intel-GPU-Max-1550 RTX-6000"),
    ],
)
def test_cards_without_bfloat16_are_known_by_rays_names(old: bool, kinds: str) -> None:
    """RTX-6000 is Ray's name of two cards, one of each kind; node reports tell them apart."""
    for kind in kinds.split():
        found = run_dtype("auto", gpus=True, accelerators=[kind])
        assert found == ("float32" if old else "bfloat16"), kind


def test_too_few_gpus_are_named_with_the_keys() -> None:
    config = parse_config(
        {"rollout": {"workers": 2, "tensor_parallel_size": 2}, "cluster": {"policy_actors": 2}}
    )
    with pytest.raises(ConfigError) as refusal:
        plan(config, CPU=16, GPU=4)
    message = str(refusal.value)
    assert (
        "asks for 6 GPUs (2 policy x 1 + 2 rollout worker x 2), the cluster has 4 of 4 available"
        in message
    )
    assert "cluster.gpus_per_policy or cluster.gpus_per_rollout_worker" in message


def test_what_is_missing_and_what_would_fit() -> None:
    """Five nodes with a GPU each: enough GPUs, but none has two; then four, for six actors."""
    tree: dict[str, Any] = {
        "rollout": {"workers": 2, "tensor_parallel_size": 2},
        "cluster": {"gpus_per_policy": 0.5},
    }
    with pytest.raises(ConfigError) as refusal:
        plan(parse_config(tree), nodes=5, CPU=4, GPU=1)
    assert (
        str(refusal.value)
        == "a rollout worker asks for 2 GPUs and 1 CPUs on one node, the most that a node has is 1"
        " GPUs, 4 CPUs: lower cluster.gpus_per_rollout_worker, cluster.cpus_per_rollout_worker"
        " or rollout.tensor_parallel_size, or add a larger node"
    )
    tree = {"warp": {"policies": 4}, "rollout": {"workers": 2}, "cluster": {"policy_actors": 4}}
    with pytest.raises(ConfigError) as refusal:
        plan(parse_config(tree), nodes=4, CPU=4, GPU=1)
    assert (
        str(refusal.value)
        == "the run asks for 6 GPUs (4 policy x 1 + 2 rollout worker x 1), the cluster has 4 of 4"
        " available: 2 too few; add nodes, or lower cluster.gpus_per_policy or"
        " cluster.gpus_per_rollout_worker, or rollout.workers\nit would fit with"
        " cluster.policy_actors=3 rollout.workers=1"
    )


def test_shared_gpus() -> None:
    config = parse_config({"cluster": {"gpus_per_policy": 0.25, "gpus_per_rollout_worker": 0.5}})
    found = plan(config, CPU=8, GPU=1)
    assert (found.policy.count, found.policy.total("GPU"), found.rollout.total("GPU")) == (
        2,
        0.5,
        0.5,
    )


def test_threads_are_shared_by_the_processes_that_work_at_the_same_time() -> None:
    """A policy's rollouts and updates take turns: M policies keep M processes at work, however many
    there are.
    """

    def threads(cpus: float, **tree: dict[str, int]) -> tuple[int | None, bool]:
        found = plan(parse_config(tree), CPU=cpus)
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


def test_threads_of_a_node_are_those_of_its_own_actors() -> None:
    found = plan(parse_config({"warp": {"policies": 2}}), nodes=2, CPU=4)
    assert (found.threads, found.crowded) == (4, False)


def test_actors_are_placed_on_nodes_and_gpus_not_in_their_sum() -> None:
    """Two nodes with three GPUs each hold two actors of two GPUs, not three; four GPUs hold four
    actors of .6 GPUs, not six.
    """
    tree: dict[str, Any] = {
        "warp": {"policies": 1},
        "rollout": {"workers": 3, "tensor_parallel_size": 2},
        "cluster": {"gpus_per_policy": 0, "cpus_per_policy": 1},
    }
    with pytest.raises(ConfigError) as refusal:
        plan(parse_config(tree), nodes=2, CPU=8, GPU=3)
    assert "no node has room for all of 3 x rollout worker with 2 GPU and 1 CPU" in str(
        refusal.value
    )
    assert "it would fit with rollout.workers=2" in str(refusal.value)
    assert plan(parse_config(tree), nodes=3, CPU=8, GPU=2).rollout.count == 3
    shares = {"gpus_per_policy": 0.6, "gpus_per_rollout_worker": 0.6, "cpus_per_policy": 0.1}
    config = parse_config({"warp": {"policies": 5}, "cluster": shares})
    assert plan(config, CPU=16, GPU=4).policy.count == 3
    thirds = {"gpus_per_policy": 0.3, "gpus_per_rollout_worker": 0.4, "cpus_per_policy": 0.1}
    assert plan(parse_config({"warp": {"policies": 9}, "cluster": thirds}), CPU=9, GPU=1) == (
        plan(parse_config({"warp": {"policies": 2}, "cluster": thirds}), CPU=9, GPU=1)
    )


def test_a_run_that_has_to_wait_asks_for_what_it_gets_on_the_empty_cluster(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def asks(free: list[dict[str, float]], **tree: Any) -> tuple[int, list[str]]:
        nodes = resources.Nodes([{"CPU": 4.0}], free)
        monkeypatch.setattr(resources.Nodes, "present", lambda: nodes)
        cluster = {"cpus_per_policy": 1, **tree}
        config = parse_config({"warp": {"policies": 5}, "cluster": cluster})
        found, reasons = resources.plan_to_ask(config)
        return found.policy.count, reasons

    assert asks([{"CPU": 4.0}]) == (3, [])
    assert asks([{"CPU": 2.0}]) == (1, [])  # beside others
    assert asks([{"CPU": 1.0}]) == (3, [])  # after others
    assert asks([{}], policy_actors=3) == (3, [])
    count, reasons = asks([{"CPU": 4.0}], policy_actors=4)
    assert count == 4
    assert "the run asks for 5 CPUs" in reasons[0]
    assert reasons[1] == "it would fit with cluster.policy_actors=3 rollout.workers=1"
    assert asks([{"CPU": 4.0}], cpus_per_policy=8)[0] == 5


def quietly(event: str, **details: Any) -> None:
    pass


def one(need: resources.Need) -> Bundle | None:
    """The bundle of one actor that needs this."""
    ((bundle,),) = placement_groups.reserve([need], ClusterConfig(), quietly)
    return bundle


def test_all_actors_have_bundles_of_one_group(ray_cluster: Any) -> None:
    needs = [
        resources.Need("rollout_worker", gpus=0, cpus=1, count=1),
        resources.Need("reward_worker", gpus=0, cpus=0, count=2),
        resources.Need("policy", gpus=0, cpus=0.5, count=2),
    ]
    (worker,), rewards, policies = placement_groups.reserve(needs, ClusterConfig(), quietly)
    assert worker is not None
    assert rewards == [None, None]
    assert [bundle and bundle.index for bundle in (worker, *policies)] == [0, 1, 2]
    assert {bundle.group for bundle in policies if bundle} == {worker.group}
    assert worker.resources == {"CPU": 1}
    assert worker.node == ray_cluster.nodes()[0]["NodeID"]
    chosen = placement_groups.options(needs[2], policies[1])
    assert chosen["scheduling_strategy"].placement_group == worker.group
    assert chosen["scheduling_strategy"].placement_group_bundle_index == 2
    placement_groups.release([[worker], rewards, policies])
    assert placement_group_table(worker.group)["state"] == "REMOVED"


def test_what_is_not_there_is_asked_for_and_told(
    ray_cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An autoscaler sees the whole demand, as does whoever waits."""
    needs = [resources.Need("policy", 1, 1, 2), resources.Need("rollout_worker", 2, 1, 1)]
    told: list[str] = []
    asked: list[Any] = []

    def listen(event: str, what: str, message: str) -> None:
        told.append(f"{event} {what} {message}")
        table = placement_group_table().values()
        asked.extend(
            bundle
            for row in table
            if row["state"] == "PENDING"
            for bundle in row["bundles"].values()
        )

    monkeypatch.setattr(placement_groups, "FIRST_WORD", 0.5)
    with pytest.raises(
        ConfigError, match=r"waited 2 s for 2 x policy .*raise cluster.wait_seconds"
    ):
        placement_groups.reserve(needs, ClusterConfig(wait_seconds=1.5), listen)
    (text,) = told
    assert "2 x policy with 1 GPU and 1 CPU, 1 x rollout worker with 2 GPU and 1 CPU" in text
    assert re.search(r"the cluster's nodes have [\d.]+ of 4 CPUs free", text)
    assert [bundle["GPU"] for bundle in asked] == [1, 1, 2]


def test_two_runs_that_wait_never_share_out_what_one_of_them_needs(ray_cluster: Any) -> None:
    """Each needs three of four CPUs, in two kinds of actors."""
    cluster = ClusterConfig(wait_seconds=30)
    needs = [resources.Need("rollout_worker", 0, 2, 1), resources.Need("policy", 0, 1, 1)]
    before = one(resources.Need("policy", 0, 3, 1))

    def run(number: int) -> int:
        bundles = placement_groups.reserve(needs, cluster, quietly)
        time.sleep(0.2)
        placement_groups.release(bundles)
        return number

    with ThreadPoolExecutor(3) as pool:
        runs = [pool.submit(run, number) for number in range(3)]
        time.sleep(1)
        assert not any(run.done() for run in runs)
        placement_groups.release([[before]])
        assert sorted(run.result() for run in runs) == [0, 1, 2]


def test_the_wait_is_endless_in_a_job(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = ClusterConfig(timeout_seconds=7)
    assert placement_groups.longest_wait(cluster) == 7
    job = json.dumps({"metadata": {"job_submission_id": "raysubmit_1"}})
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", job)
    assert placement_groups.longest_wait(cluster) is None
    assert placement_groups.longest_wait(ClusterConfig(wait_seconds=5)) == 5


def reserved(need: resources.Need) -> None:
    """The wait that a run begins with."""
    placement_groups.release([[one(need)]])


def regained(need: resources.Need) -> None:
    """A policy actor's, whose bundle looks for another node."""
    bundle = Bundle(placement_group([need.bundle()]), 0)
    slot = ActorSlot("policy actor 1", make=lambda: None, bundle=bundle)
    assert slot.await_room(time.monotonic() + 30)
    placement_groups.release([[bundle]])


def helped(need: resources.Need) -> None:
    """A reward worker's, which Ray starts again when its group has another node."""
    bundle = Bundle(placement_group([need.bundle()]), 0)
    kind = resources.ray.remote(concurrency_groups={health.WATCH: 1})(RewardActor)
    worker = kind.options(**placement_groups.options(need, bundle)).remote(
        None, False, None, "reward worker"
    )
    resources.ray.kill(worker)
    helper = supervisor.SupervisedActor(
        "reward worker", worker, 60, report=lambda event, **details: None, bundles=[bundle]
    )
    patience = Patience(30)
    while not bundle.node:
        helper.check()
        assert patience.lasts()
    placement_groups.release([[bundle]])


@pytest.mark.parametrize("wait", [reserved, regained, helped])
def test_the_room_of_a_trial_that_was_killed_is_taken_back(
    ray_cluster: Any, wait: Callable[[resources.Need], None]
) -> None:
    """And no other: neither the driver's own nor a living trial's."""

    @ray_cluster.remote(num_cpus=0)
    class Trial:
        def take(self, cpus: float) -> int:
            one(resources.Need("policy", 0, cpus, 1))
            return os.getpid()

    def names() -> set[str]:
        return {
            group["name"]
            for group in placement_group_table().values()
            if group["state"] != "REMOVED"
        }

    before = names()
    mine = [Bundle(placement_group([{"CPU": 0.1}], name="another.program"), 0)]
    living, dead = Trial.remote(), Trial.remote()
    try:
        mine += filter(None, [one(resources.Need("policy", 0, 0.5, 1))])
        ray_cluster.get(living.take.remote(0.5))
        kept = names()
        os.kill(ray_cluster.get(dead.take.remote(2)), signal.SIGKILL)
        wait(resources.Need("policy", 0, 2, 1))
        assert names() == kept
    finally:
        ray_cluster.kill(living)
        ray_cluster.kill(dead)
        placement_groups.release([[bundle] for bundle in mine])
        patience = Patience(30)
        while names() != before:
            placement_groups.take_back()
            assert patience.lasts()
