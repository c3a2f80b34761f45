"""Tests of runs on three nodes with two logical GPUs each.

They check where the actors go, and what it costs when nodes are lost, replaced or not.
"""

import json
import os
import select
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import pytest
from killing import Command, adapters, make_project, missing_lines, own_home, set_pace, told

POLICIES, STEPS, EVERY = 4, 16, 2

# In a process of its own, since the Ray of the other tests lives in this one. Each answer is a line
# of JSON, in a pipe of its own: Ray says things on the standard output, and not always whole lines.
NODES = """
import json
import sys

import ray
from ray.cluster_utils import Cluster

ROOM = {"num_cpus": 4, "num_gpus": 2}
answers = open(int(sys.argv[1]), "w")
cluster = Cluster(initialize_head=True, head_node_args={**ROOM, "include_dashboard": False})
nodes = {node.node_id: node for node in (cluster.add_node(**ROOM) for _ in range(2))}
ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")


def places():
    found = {}
    for actor in ray.util.list_named_actors(all_namespaces=True):
        handle = ray.get_actor(**actor)
        group = {"concurrency_group": "watch"} if "policy" in actor["name"] or "reward" in actor["name"] else {}
        where = lambda self: (ray.get_runtime_context().get_node_id(), ray.get_runtime_context().get_accelerator_ids()["GPU"])
        found[actor["name"].rpartition("-")[0]] = ray.get(handle.__ray_call__.options(**group).remote(where))
    return found


def groups():
    return [row["state"] for row in ray.util.placement_group_table().values() if row["state"] != "REMOVED"]


print(json.dumps([cluster.address, ray.get_runtime_context().get_node_id(), *nodes]), file=answers, flush=True)
for line in sys.stdin:
    command, *arguments = line.split()
    if command == "end":
        break
    if command == "lose":
        cluster.remove_node(nodes.pop(arguments[0]), allow_graceful=False)
    if command == "add":
        node = cluster.add_node(**ROOM)
        nodes[node.node_id] = node
    answer = {"places": places, "groups": groups, "lose": list, "add": lambda: [*nodes][-1]}[command]()
    print(json.dumps(answer), file=answers, flush=True)
ray.shutdown()
cluster.shutdown()
"""  # noqa: E501


@dataclass
class Nodes:
    """nodes: ids, the head's first."""

    process: "subprocess.Popen[str]"
    answers: IO[str]
    address: str = ""
    nodes: list[str] = field(default_factory=list)

    def ask(self, *words: str) -> Any:
        assert self.process.stdin is not None
        self.process.stdin.write(" ".join(words) + "\n")
        self.process.stdin.flush()
        return self.answer()

    def answer(self, seconds: float = 240) -> Any:
        ready, _, _ = select.select([self.answers], [], [], seconds)
        assert ready, f"no answer for {seconds} s"
        return json.loads(self.answers.readline())


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    before = {name: os.environ.get(name) for name in ("RAY_TMPDIR", "HOME")}
    # a loss is noticed after 5 s, not after 15
    slow = {
        "RAY_health_check_period_ms": "1000",
        "RAY_health_check_initial_delay_ms": "1000",
        # Ray asks for lost bundles without a pause, and would count that in another process
        "RAY_enable_metrics_collection": "0",
    }
    with tempfile.TemporaryDirectory(prefix="rw", ignore_cleanup_errors=True) as folder:
        own_home(Path(folder))
        ours, theirs = os.pipe()
        command = [sys.executable, "-c", NODES, str(theirs)]
        process = subprocess.Popen(
            command, env={**os.environ, **slow}, stdin=subprocess.PIPE, pass_fds=[theirs], text=True
        )
        os.close(theirs)
        with open(ours) as answers:
            there = Nodes(process, answers)
            there.address, *there.nodes = there.answer()
            yield there
        with suppress(OSError):
            process.communicate("end\n", timeout=60)
        process.kill()
    for name, value in before.items():
        os.environ.pop(name, None) if value is None else os.environ.update({name: value})


def test_four_policies_and_two_engines_survive_the_loss_of_nodes(
    nodes: Nodes, tmp_path: Path
) -> None:
    """A node is drained, as before a preemption, and lost, and another one joins; then one is lost
    for good without a word, and four GPUs go on with what six had.
    """
    project = make_project(
        tmp_path,
        warp={"policies": POLICIES, "steps": STEPS},
        rollout={"workers": 2},
        cluster={
            "policy_actors": None,
            "cpus_per_policy": None,
            "cpus_per_rollout_worker": 1,
            "timeout_seconds": 15,
        },
        checkpoint_every=EVERY,
    )
    set_pace(project, 0.2)
    command = Command(project, "lost", address=nodes.address)
    command.wait_for_steps(POLICIES * 3)
    places = nodes.ask("places")
    working = {
        name: place for name, place in places.items() if "policy" in name or "rollout" in name
    }
    assert sorted(working) == [
        *(f"raywarp-policy-{n}" for n in range(1, 5)),
        "raywarp-rollout-1",
        "raywarp-rollout-2",
    ]
    # the driver's, which is not lost
    assert next(node for name, (node, _) in places.items() if "pool" in name) == nodes.nodes[0]
    assert sorted((node, *gpus) for node, gpus in working.values()) == sorted(
        (node, gpu) for node in nodes.nodes for gpu in "01"
    )

    # so that nobody is at the end before a lost policy is back, however busy the machine
    set_pace(project, 4)
    lost = lose_one(nodes, places, drained=True)
    nodes.nodes.append(nodes.ask("add"))
    command.wait_until(
        lambda: {row["policy"] for row in told(command.run, "recovered") if "policy" in row} == lost
    )
    faults = [row for row in told(command.run, "fault") if "policy" in row]
    assert sorted((row["policy"], row["cause"]) for row in faults) == [
        (policy, "node lost") for policy in sorted(lost)
    ]
    again = told(command.run, "continued")
    assert {row["policy"] for row in again} == lost
    assert all(row["steps_repeated"] <= EVERY for row in again)

    moved = lose_one(nodes, nodes.ask("places"))
    command.wait_until(lambda: {row["policy"] for row in told(command.run, "moved")} == moved)
    assert nodes.ask("groups") == ["RESCHEDULING"]  # what was lost is still asked for
    set_pace(project, 0)
    assert command.end() == 0, command.tail()
    assert {row["policy"] for row in told(command.run, "continued")[len(again) :]} == moved
    faults = told(command.run, "fault")
    assert {row["cause"] for row in faults} == {"node lost"}
    # no second one for a node that Ray still counted on
    assert sum("policy" in row for row in faults) == len(lost) + len(moved)
    assert missing_lines(command.run, 1, POLICIES, STEPS) == 0

    # than policies: four GPUs, of which the engines have two
    undisturbed = Command(project, "fewer", address=nodes.address)
    undisturbed.wait_for_steps(1)
    places = nodes.ask("places")
    assert sorted(name for name in places if "policy" in name) == [
        "raywarp-policy-1",
        "raywarp-policy-2",
    ]
    assert len({(node, *gpus) for node, gpus in places.values() if gpus}) == 4
    assert undisturbed.end() == 0, undisturbed.tail()
    assert adapters(undisturbed.run) == adapters(command.run)


def drain(nodes: Nodes, node: str) -> None:
    """What a provider's node agent does before it takes the node away."""
    ray = Path(sys.executable).with_name("ray")
    subprocess.run(
        [
            *(ray, "drain-node", f"--address={nodes.address}", f"--node-id={node}"),
            *("--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=spot"),
            "--deadline-remaining-seconds=300",
        ],
        check=True,
        capture_output=True,
    )


def lose_one(nodes: Nodes, places: dict[str, Any], drained: bool = False) -> set[int]:
    """One that is not the head and has a policy; the policies that it had."""
    policies = {name: node for name, (node, _) in places.items() if "policy" in name}
    node = next(node for node in nodes.nodes[1:] if node in policies.values())
    if drained:
        drain(nodes, node)
    nodes.ask("lose", node)
    nodes.nodes.remove(node)
    return {int(name[-1]) for name, where in policies.items() if where == node}
