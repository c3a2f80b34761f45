"""The placement group of a run, with one bundle per actor: ask, wait, release.

It is one group, so that autoscalers and queues see the whole demand, and so that of two waiting
runs none holds a part of what the other needs.
"""

import contextlib
import re
import time
import uuid
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.placement_group import (
    PlacementGroup,
    get_placement_group,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from raywarp.cluster import faults, runtime
from raywarp.cluster.health import Report
from raywarp.cluster.resources import Need, Nodes, in_words
from raywarp.config.cluster import ClusterConfig
from raywarp.config.schema import ConfigError

# A name that group_name has made in an actor. Groups with other names are left alone.
ACTORS_GROUP = re.compile(r"raywarp-.*\.(?P<actor>[0-9a-f]{32})")
FIRST_WORD, NEXT_WORD = 5.0, 60.0  # seconds of waiting until the first line, and between lines


@dataclass(frozen=True)
class Bundle:
    """One actor's part of its run's placement group.

    When its node is lost, Ray (2.60) asks for the bundle again. It retries without a pause: while
    there is no room, its control server takes a core of the head, and the count of the attempts
    in the metrics takes another one.
    """

    group: PlacementGroup
    index: int

    @property
    def node(self) -> str:
        """The node that Ray has chosen for the bundle. It is empty while there is none."""
        nodes: dict[int, str] = placement_group_table(self.group)["bundles_to_node_id"]
        return nodes.get(self.index, "")

    @property
    def resources(self) -> dict[str, float]:
        found: dict[str, float] = self.group.bundle_specs[self.index]
        return found


def reserve(
    needs: Sequence[Need], cluster: ClusterConfig, report: Report
) -> list[list[Bundle | None]]:
    """Return a bundle for each actor of each kind, all in one group that is ready.

    The bundle is None for an actor that needs no resources.

    Args:
        report: gets what is missing, now and then.

    Raises:
        ConfigError: the cluster had no room for them within longest_wait.
    """
    asked = [need.bundle() for need in needs for _ in range(need.count) if need.bundle()]
    if not asked:
        return [[None] * need.count for need in needs]
    group = placement_group(asked, strategy="PACK", name=group_name("raywarp"))
    try:
        _await(group, needs, longest_wait(cluster), report)
    except BaseException:
        remove_placement_group(group)
        raise
    indices = iter(range(len(asked)))
    return [
        [Bundle(group, next(indices)) if need.bundle() else None for _ in range(need.count)]
        for need in needs
    ]


def longest_wait(cluster: ClusterConfig) -> float | None:
    """Return for how many seconds a run waits for its room when it starts; None: without end."""
    if cluster.wait_seconds is not None:
        return cluster.wait_seconds
    return None if runtime.submission_id() else cluster.timeout_seconds


def _await(
    group: PlacementGroup, needs: Sequence[Need], longest: float | None, report: Report
) -> None:
    ready, start, word = group.ready(), time.monotonic(), FIRST_WORD
    while not ray.wait([ready], timeout=0.5)[0]:
        runtime.check()
        take_back()
        waited = time.monotonic() - start
        if longest is not None and waited > longest:
            keys = " or ".join(f"cluster.*_per_{need.key}" for need in needs if need.bundle())
            raise ConfigError(
                f"waited {waited:.0f} s for {in_words(needs)}, all at one time: {lack()}; add"
                f" nodes, lower {keys}, or raise cluster.wait_seconds"
            )
        if waited > word:
            text = f"{waited:.0f} s for {in_words(needs)}, all at one time: {lack()}"
            report("waiting", what="the run", message=text)
            word = waited + NEXT_WORD


def options(need: Need, bundle: Bundle | None) -> dict[str, Any]:
    """Return Ray's options for an actor in its bundle.

    The strategy is explicit, so that a Tune trial's own group does not capture the actor.
    """
    chosen: dict[str, Any] = {"num_gpus": need.gpus, "num_cpus": need.cpus}
    if bundle is not None:
        chosen["scheduling_strategy"] = PlacementGroupSchedulingStrategy(
            bundle.group, placement_group_bundle_index=bundle.index
        )
    return chosen


def release(bundles: Sequence[Sequence[Bundle | None]]) -> None:
    """Remove the group of these bundles, if there is one."""
    for group in {bundle.group for own in bundles for bundle in own if bundle}:
        remove_placement_group(group)


def nodes_of(bundles: Sequence[Sequence[Bundle | None]]) -> set[str]:
    """Return the nodes that these bundles are on."""
    return {bundle.node for own in bundles for bundle in own if bundle}


def is_found(bundle: Bundle | None) -> bool:
    """Return whether a bundle is on a node.

    While it is not, the groups that dead trials still hold are removed.
    """
    found = bundle is None or bool(bundle.node)
    if not found:
        take_back()
    return found


def has_node(bundle: Bundle | None) -> bool:
    """Return whether the bundle is on a node that lives.

    Ray may still count on a node that is gone, so the node is asked too.
    """
    return is_found(bundle) and not (bundle and faults.unnoticed(bundle.node))


def take_back() -> None:
    """Remove the placement groups of dead actors, which are a sweep's trials.

    Ray (2.60) keeps these groups until the actor's job ends. The other trials would never get their
    resources.
    """
    for group in placement_group_table().values():
        asked = ACTORS_GROUP.fullmatch(group["name"])
        if asked and group["state"] != "REMOVED" and _is_dead(asked["actor"]):
            with contextlib.suppress(ValueError):  # another process has removed it already
                remove_placement_group(get_placement_group(group["name"]))


def lack() -> str:
    """Return in words what the nodes of the cluster have free, the same nodes in one part."""
    nodes = Nodes.present()
    parts = Counter(
        ", ".join(
            f"{free.get(name, 0):g} of {whole[name]:g} {name}s"
            for name in ("GPU", "CPU")
            if whole.get(name)
        )
        for whole, free in zip(nodes.whole, nodes.free, strict=True)
    )
    parts.pop("", None)  # a head without resources of its own
    told = [f"{count} with {own}" if count > 1 else own for own, count in parts.items()]
    return f"the cluster's nodes have {'; '.join(told) or 'no GPUs and no CPUs'} free"


def wait_until_free(before: dict[str, float], seconds: float = 15) -> None:
    """Wait until a removed group's resources are free again, at most `seconds`.

    Ray returns them a little later. A session that starts at once must not see them as taken.

    Args:
        before: resources that were free before the group was made.
    """
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        # The total is read each time, because a lost node does not come back.
        now, total = ray.available_resources(), ray.cluster_resources()
        if all(
            now.get(resource, 0.0) >= min(before.get(resource, 0.0), total.get(resource, 0.0))
            for resource in ("CPU", "GPU")
        ):
            return
        time.sleep(0.1)


def group_name(name: str) -> str:
    """Return a unique name, which ends in a full stop and the calling actor's id if there is one.

    For example raywarp-5f0c2a9b.9d607ad8…
    """
    actor = ray.get_runtime_context().get_actor_id()
    return f"{name}-{uuid.uuid4().hex[:8]}" + (f".{actor}" if actor else "")


def unique_name(name: str, number: int) -> str:
    """Return a unique name for an actor, as the dashboard shows it.

    Ray refuses a second actor of the same name, and sessions may overlap. For example
    raywarp-policy-1-5f0c2a9b.
    """
    return f"{name}-{number}-{uuid.uuid4().hex[:8]}"


def _is_dead(actor: str) -> bool:
    from ray._private.state import state  # Ray 2.60: no public way without a dashboard

    row: dict[str, Any] = state.actor_table(actor)
    return bool(row.get("State") == "DEAD")
