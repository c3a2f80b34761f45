"""The room that each actor has: a placement group of its own, waited for, asked for again, and
taken back from the dead.
"""

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

ACTORS_GROUP = re.compile(
    r"raywarp-.*\.(?P<actor>[0-9a-f]{32})"
)  # as group_name makes it; others' groups are none of our business


def await_plan(config: Config) -> Plan:
    """make_plan, after a wait of at most cluster.timeout_seconds if others have what the cluster
    would have for it.

    The actors of a driver that was killed are gone a little later than it is.
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
    """One ready placement group for each actor of a kind (None for one that asks for nothing).

    Raises:
        ConfigError: the cluster had no room for it within the time.
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
    """A group that asks for the same room as if for the first time, in the place of one that lost
    its node. For that one Ray (2.60) tries again without a pause, which takes a core of the head
    node, and half of another, for as long as there is no room.
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
    """Ray's options for an actor in its group. The strategy is explicit, so a Tune trial's own
    group does not capture the actor.
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
    """Whether a placement group is on a node. For one that waits, what dead trials still hold is
    taken back.
    """
    found = group is None or placement_group_table(group)["state"] == "CREATED"
    if not found:
        take_back()
    return found


def has_node(group: PlacementGroup | None) -> bool:
    """Whether it is on a node that lives, as far as that can be seen: Ray may still count on one
    that is gone.
    """
    return is_found(group) and not faults.unnoticed(node_of(group))


def take_back() -> None:
    """Remove the groups of actors that have died, a sweep's trials: Ray (2.60) keeps them until the
    actor's job is over, too, so that the other trials would never have their room.
    """
    for group in placement_group_table().values():
        asked = ACTORS_GROUP.fullmatch(group["name"])
        if asked and group["state"] != "REMOVED" and _is_dead(asked["actor"]):
            with contextlib.suppress(ValueError):  # somebody else was faster
                remove_placement_group(get_placement_group(group["name"]))


def lost_node(group: PlacementGroup | None) -> bool:
    """Whether Ray looks for a new node for it, since the one that it had is gone."""
    return group is not None and placement_group_table(group)["state"] == "RESCHEDULING"


def node_of(group: PlacementGroup | None) -> str:
    """The node that Ray has chosen for it; empty while there is none."""
    nodes: dict[int, str] = placement_group_table(group)["bundles_to_node_id"] if group else {}
    return next(iter(nodes.values()), "")


def lack() -> str:
    """What the cluster has free of what."""
    free, total = ray.available_resources(), ray.cluster_resources()
    return "the cluster has " + ", ".join(
        f"{free.get(name, 0):g} of {total.get(name, 0):g} {name}s free" for name in ("GPU", "CPU")
    )


def wait_until_free(before: dict[str, float], seconds: float = 15) -> None:
    """Ray gives a removed group's resources back a little later; a session that starts at once must
    not see them as taken.
    """
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        now, total = (
            ray.available_resources(),
            ray.cluster_resources(),
        )  # a node that has been lost does not come back
        if all(
            now.get(resource, 0.0) >= min(before.get(resource, 0.0), total.get(resource, 0.0))
            for resource in ("CPU", "GPU")
        ):
            return
        time.sleep(0.1)


def group_name(name: str, number: int | str) -> str:
    """A unique name, and after a full stop the actor that asks, if it is one:
    raywarp-policy-1-5f0c2a9b.9d607ad8…
    """
    actor = ray.get_runtime_context().get_actor_id()
    return unique_name(name, number) + (f".{actor}" if actor else "")


def unique_name(name: str, number: int | str) -> str:
    """As the dashboard shows it. Ray refuses a second group or actor of a name, and sessions may
    overlap: raywarp-policy-1-5f0c2a9b.
    """
    return f"{name}-{number}-{uuid.uuid4().hex[:8]}"


def _is_dead(actor: str) -> bool:
    from ray._private.state import state  # there is no public way without a dashboard (2.60)

    row: dict[str, Any] = state.actor_table(actor)
    return bool(row.get("State") == "DEAD")
