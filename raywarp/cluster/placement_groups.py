"""Placement groups, one per actor: reserve, request again after a node loss, release."""

import contextlib
import re
import time
import uuid
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

from raywarp.cluster import faults
from raywarp.cluster.resources import Need, Plan, make_plan
from raywarp.config.schema import Config, ConfigError

# A name that group_name has made in an actor. Groups with other names are left alone.
ACTORS_GROUP = re.compile(r"raywarp-.*\.(?P<actor>[0-9a-f]{32})")


def await_plan(config: Config) -> Plan:
    """Return make_plan's result. Wait if the cluster is large enough but others hold its resources.

    The wait takes at most cluster.timeout_seconds. It is needed because the actors of a killed
    driver end a little later than the driver.

    Raises:
        ConfigError: the cluster is too small, or its resources did not become free in time.
    """
    deadline = time.monotonic() + config.cluster.timeout_seconds
    while True:
        try:
            return make_plan(config)
        except ConfigError:
            make_plan(config, ray.cluster_resources())
            if time.monotonic() > deadline:
                raise
        take_back()
        time.sleep(0.5)


def reserve(need: Need, name: str, timeout: float) -> list[PlacementGroup | None]:
    """Return one ready placement group for each actor of a kind.

    The group is None for an actor that needs no resources.

    Args:
        timeout: seconds to wait.

    Raises:
        ConfigError: the cluster had no room for them within that time.
    """
    if not need.bundle():
        return [None] * need.count
    groups = [
        placement_group([need.bundle()], strategy="STRICT_PACK", name=group_name(name, i + 1))
        for i in range(need.count)
    ]
    refs = [group.ready() for group in groups]
    deadline = time.monotonic() + timeout
    while (
        len(ready := ray.wait(refs, num_returns=len(refs), timeout=0.5)[0]) < len(refs)
        and time.monotonic() < deadline
    ):
        take_back()
    if len(ready) == len(refs):
        return list(groups)
    release(groups)
    raise ConfigError(
        f"waited {timeout:.0f} s for {need.count} placement groups of {need.bundle()} and got"
        f" {len(ready)}: {lack()}; lower cluster.*_per_{need.key} or add nodes"
    )


def ask_again(group: PlacementGroup | None) -> PlacementGroup | None:
    """Replace a group that lost its node by a new one that asks for the same resources.

    For the old group Ray (2.60) retries without a pause. While there is no room, that takes a core
    of the head node and half a core of another node.
    """
    if group is None:
        return None
    name, number, _ = placement_group_table(group)["name"].rsplit("-", 2)
    release([group])
    new: PlacementGroup = placement_group(
        group.bundle_specs, strategy="STRICT_PACK", name=group_name(name, number)
    )
    return new


def options(need: Need, group: PlacementGroup | None) -> dict[str, Any]:
    """Return Ray's options for an actor in its group.

    The strategy is explicit, so that a Tune trial's own group does not capture the actor.
    """
    chosen: dict[str, Any] = {"num_gpus": need.gpus, "num_cpus": need.cpus}
    if group is not None:
        chosen["scheduling_strategy"] = PlacementGroupSchedulingStrategy(
            group, placement_group_bundle_index=0
        )
    return chosen


def release(groups: list[PlacementGroup | None] | list[PlacementGroup]) -> None:
    for group in groups:
        if group is not None:
            remove_placement_group(group)


def is_found(group: PlacementGroup | None) -> bool:
    """Return whether a placement group is on a node.

    While it is not, the groups that dead trials still hold are removed.
    """
    found = group is None or placement_group_table(group)["state"] == "CREATED"
    if not found:
        take_back()
    return found


def has_node(group: PlacementGroup | None) -> bool:
    """Return whether the group is on a node that lives.

    Ray may still count on a node that is gone, so the node is asked too.
    """
    return is_found(group) and not faults.unnoticed(node_of(group))


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


def lost_node(group: PlacementGroup | None) -> bool:
    """Return whether Ray looks for a new node for the group, because its node is gone."""
    return group is not None and placement_group_table(group)["state"] == "RESCHEDULING"


def node_of(group: PlacementGroup | None) -> str:
    """Return the node that Ray has chosen for the group. It is empty while there is none."""
    nodes: dict[int, str] = placement_group_table(group)["bundles_to_node_id"] if group else {}
    return next(iter(nodes.values()), "")


def lack() -> str:
    """Return in words how many GPUs and CPUs of the cluster are free."""
    free, total = ray.available_resources(), ray.cluster_resources()
    return "the cluster has " + ", ".join(
        f"{free.get(name, 0):g} of {total.get(name, 0):g} {name}s free" for name in ("GPU", "CPU")
    )


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


def group_name(name: str, number: int | str) -> str:
    """Return a unique name, which ends in a full stop and the calling actor's id if there is one.

    For example raywarp-policy-1-5f0c2a9b.9d607ad8…
    """
    actor = ray.get_runtime_context().get_actor_id()
    return unique_name(name, number) + (f".{actor}" if actor else "")


def unique_name(name: str, number: int | str) -> str:
    """Return a unique name for a group or actor, as the dashboard shows it.

    Ray refuses a second group or actor of the same name, and sessions may overlap. For example
    raywarp-policy-1-5f0c2a9b.
    """
    return f"{name}-{number}-{uuid.uuid4().hex[:8]}"


def _is_dead(actor: str) -> bool:
    from ray._private.state import state  # Ray 2.60: no public way without a dashboard

    row: dict[str, Any] = state.actor_table(actor)
    return bool(row.get("State") == "DEAD")
