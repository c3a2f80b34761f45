"""Checks of the cluster before a run starts its actors: files, versions, memory and disk."""

import logging
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raywarp.cluster import node_report, resources
from raywarp.cluster.node_report import NodeReport
from raywarp.cluster.resources import Plan
from raywarp.config.schema import Config, ConfigError
from raywarp.planning.memory import checkpoint_bytes, in_units
from raywarp.rollout.engine import check_mode
from raywarp.run.config_file import CONFIG_FILE
from raywarp.storage.location import Storage
from raywarp.storage.locks import made, writable

LEAST_CHECKPOINTS = 2  # checkpoints of each policy for which the disk must have room


def preflight(config: Config, forecast: Any, paths: Sequence[str]) -> None:
    """Check the cluster for a run. Ray must be running.

    Memory that may be too little, and GPUs that would be idle, are logged as warnings.

    Args:
        forecast: the run's forecast.Forecast, or None for a stage without policies.
        paths: local folders that the run's processes read.

    Raises:
        ConfigError: a node cannot see or write the run's folder, or has other versions; the disk
            lacks room; a GPU does not compute in the run's dtype; or the weights need more memory
            than any node has.
    """
    reports = node_reports(config, paths)
    problems = [*access_problems(reports, config), *version_problems(reports)]
    if forecast is not None:
        problems += disk_problems(config, checkpoint_bytes(forecast.shapes, config))
        problems += [*dtype_problems(reports, forecast.plan), *forecast.impossible(reports)]
    if problems:
        raise ConfigError("\n".join(problems))
    if forecast is not None:
        for warning in forecast.cautions(reports):
            logging.getLogger(__name__).warning(warning)


def check_sampler(config: Config) -> resources.Plan:
    """Check that rollout workers are exact where the cluster places them. Ray must be running.

    Returns:
        the plan of the run, or its wish where it does not fit now.

    Raises:
        ConfigError: see check_mode.
    """
    placed, _ = resources.plan_or_wish(config)
    check_mode(config, placed.rollout.gpus > 0, placed.dtype)
    return placed


def node_reports(config: Config, paths: Sequence[str] = ()) -> list[NodeReport]:
    """Return a report of every node on which a process of the run may be placed.

    On a cluster of one node this process makes the report, without a Ray task.
    """
    nodes = [
        node
        for node in ray.nodes()
        if node["Alive"] and any(node["Resources"].get(kind) for kind in ("CPU", "GPU"))
    ]
    with (
        _nonce("out", config.out) as out,
        _nonce("store", config.store) if config.store else nullcontext(out) as (folder, nonce),
    ):
        here = ray.get_runtime_context().get_node_id()
        if [node["NodeID"] for node in nodes] == [here]:
            return [node_report.check_node(nodes[0]["NodeManagerAddress"], folder, nonce, paths)]
        # By value, so that a node without raywarp does not answer with a ModuleNotFoundError.
        ray.cloudpickle.register_pickle_by_value(node_report)
        try:
            return _ask(nodes, folder, nonce, paths, config.cluster.timeout_seconds)
        finally:
            ray.cloudpickle.unregister_pickle_by_value(node_report)


def _ask(
    nodes: Sequence[Mapping[str, Any]],
    folder: str | None,
    nonce: str,
    paths: Sequence[str],
    timeout: float,
) -> list[NodeReport]:
    """Run check_node on every node, and return the reports.

    Args:
        timeout: the longest wait for all of them, in seconds.

    Raises:
        ConfigError: a node did not answer in time, or its check failed.
    """
    task = ray.remote(node_report.check_node)
    refs = {}
    for node in nodes:
        place = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        name = _name(node)
        refs[
            task.options(num_cpus=0, max_retries=1, scheduling_strategy=place).remote(
                name, folder, nonce, list(paths)
            )
        ] = name
    _, late = ray.wait(list(refs), num_returns=len(refs), timeout=timeout)
    if late:
        raise ConfigError(
            f"node {refs[late[0]]} did not answer within {timeout:.0f} s (cluster.timeout_seconds);"
            " is it alive?"
        )
    try:
        reports: list[NodeReport] = ray.get(list(refs))
    except ray.exceptions.RayError as error:
        raise ConfigError(
            f"a node could not be checked: {str(error).strip().splitlines()[-1]}"
        ) from None
    return reports


def workplace(config: Config) -> tuple[str, str]:
    """Return the key of the place where policy actors on any node write, and its value."""
    return ("store", config.store) if config.store else ("out", config.out)


def access_problems(reports: Sequence[NodeReport], config: Config) -> list[str]:
    """Return a message for each node that lacks files, or cannot use the run's folder."""
    problems, place = [], "=".join(workplace(config))
    for report in reports:
        if report.unwritable:
            shared = (
                "; several nodes need a shared folder, or a URI such as s3://bucket/prefix"
                if len(reports) > 1
                else ""
            )
            problems.append(
                f"node {report.address} cannot use {place}: it {report.unwritable}{shared}"
            )
        if report.missing:
            problems.append(
                f"node {report.address} has no {', '.join(report.missing)}; put it on every node,"
                " or on a shared folder"
            )
    return problems


def version_problems(reports: Sequence[NodeReport]) -> list[str]:
    """Return a message for each package whose versions differ between nodes.

    Builds of one version for CPU and GPU count as the same.
    """
    problems = []
    for package in dict.fromkeys(name for report in reports for name in report.versions):
        holders: dict[str, list[str]] = {}
        for report in reports:
            holders.setdefault(
                report.versions.get(package, "not installed").partition("+")[0], []
            ).append(report.address)
        if len(holders) > 1:
            found = ", ".join(
                f"{version} on {' and '.join(addresses)}" for version, addresses in holders.items()
            )
            problems.append(
                f"the nodes have different versions of {package}: {found}; install the same one"
                " everywhere"
            )
    return problems


def dtype_problems(reports: Sequence[NodeReport], plan: Plan) -> list[str]:
    """Return a message for each node with a GPU that does not compute in the run's bfloat16."""
    if plan.dtype != "bfloat16" or not (plan.policy.gpus or plan.rollout.gpus):
        return []
    return [
        f"node {report.address} has a GPU of compute capability {min(report.capabilities)}, which"
        " does not compute in bfloat16: set dtype=float16 or dtype=float32"
        for report in reports
        if report.capabilities and min(report.capabilities) < 8
    ]


def idle_gpus(reports: Sequence[NodeReport]) -> list[str]:
    """Return a message for each node whose GPUs are idle, because its torch is built for CPUs."""
    return [
        f"node {report.address} has GPUs, but torch {report.versions['torch']} was built without"
        " CUDA: its processes use the CPU; install the build for CUDA, or set"
        " cluster.gpus_per_policy=0 and cluster.gpus_per_rollout_worker=0"
        for report in reports
        if report.gpu_memory and report.versions.get("torch", "").endswith("+cpu")
    ]


def disk_problems(config: Config, bytes_each: int) -> list[str]:
    """Return a message if the disk lacks room for two checkpoints of every policy.

    A run that is continued is not checked, because it has checkpoints already.

    Args:
        bytes_each: bytes of one policy's checkpoint.
    """
    if (folder := Storage(config.out).folder) and (folder / CONFIG_FILE).is_file():
        return []
    needed = LEAST_CHECKPOINTS * config.warp.policies * bytes_each
    key, place = workplace(config)
    free = free_bytes(place)
    if free is None or free >= needed:
        return []
    return [
        f"too little room on the disk of {key}={place}: {in_units(free, more=1)} free,"
        f" {LEAST_CHECKPOINTS} checkpoints of each of {config.warp.policies} policies take"
        f" {in_units(needed, more=1)}; free some, or choose another {key}"
    ]


def free_bytes(place: str) -> int | None:
    """Return the free bytes on the disk where a folder is or would be; None for a URI."""
    folder = Storage(place).folder
    if folder is None:
        return None
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free


@contextmanager
def _nonce(key: str, place: str) -> Iterator[tuple[str | None, str]]:
    """Write a file that every node must see into a place, and yield the folder and file name.

    Afterwards the folder is as it was. For a URI no file is written, and the folder is None.

    Args:
        key: the configuration's key of the place, for messages.
    """
    nonce = f".preflight-{uuid.uuid4().hex}"
    folder = Storage(place).folder
    if folder is None:
        yield None, nonce
        return
    with made(key, place, folder):
        try:
            with writable(key, place):
                (folder / nonce).write_text(nonce)
            yield str(folder), nonce
        finally:
            with suppress(OSError):
                (folder / nonce).unlink()


def _name(node: Mapping[str, Any]) -> str:
    return f"{node['NodeManagerAddress']} ({node['NodeID'][:8]})"
