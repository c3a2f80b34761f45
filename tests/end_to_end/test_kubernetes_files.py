"""Tests of the Kubernetes files in cluster/: every field, and what the resources add up to.

Kubernetes' own schemas check pods and the volume claim. For KubeRay's resources the fields are in
kuberay_fields.yaml. Both refuse a field that they do not know.
"""

import copy
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from ray.runtime_env import RuntimeEnv

import raywarp.cli.commands
from raywarp.config.load import load_config
from raywarp.planning.plan import plan

CLUSTER = Path(__file__).parents[2] / "cluster"
FILES = ("raycluster.yaml", "rayjob.yaml")
EXAMPLE = CLUSTER / "configs" / "llama-8b.yaml"
Node = dict[str, Any]


@cache
def kuberay_schema() -> Node:
    """Return kuberay_fields.yaml as a JSON schema with a definition for each kind."""
    kinds = yaml.safe_load(Path(__file__).with_name("kuberay_fields.yaml").read_text())
    return {"$defs": {kind: fields_schema(fields, kinds) for kind, fields in kinds.items()}}


def resource_schema(kind: str) -> Node:
    fields = ("apiVersion", "kind", "metadata", "spec")
    schema = fields_schema(dict.fromkeys(fields, "anything!"), {})
    schema["properties"]["spec"] = {"$ref": f"#/$defs/{kind}"}
    return schema


def fields_schema(fields: Node, kinds: Node) -> Node:
    return {
        "type": "object",
        "additionalProperties": False,
        "required": [name for name, kind in fields.items() if str(kind).endswith("!")],
        "properties": {name: type_schema(kind, kinds) for name, kind in fields.items()},
    }


def type_schema(kind: str | list[str], kinds: Node) -> Node:
    if isinstance(kind, list):
        return {"type": "array", "minItems": 1, "items": type_schema(kind[0], kinds)}
    kind = kind.removesuffix("!")
    if kind in kinds:
        return {"$ref": f"#/$defs/{kind}"}
    if "|" in kind:
        return {"enum": kind.split("|")}
    return {
        "text": {"type": "string"},
        "whole": {"type": "integer", "minimum": 0},
        "number": {"type": "number", "minimum": 0},
        "flag": {"type": "boolean"},
        "texts": {"type": "object", "additionalProperties": {"type": "string"}},
        "pod": {"type": "object", "required": ["spec"]},
        "container": {},
        "anything": {},
        "service": {"type": "object"},
    }[kind]


def check(document: Node) -> None:
    """Raise an error that names the field, if a Kubernetes resource has one that is wrong."""
    if document.get("apiVersion") != "ray.io/v1":
        return check_with_kubernetes(document)
    jsonschema.validate(document, kuberay_schema() | resource_schema(document["kind"]))
    empty = {"containers": [{"name": "none", "image": "none"}]}
    check_pod({"metadata": document["metadata"], "spec": empty})
    for template in pod_templates(document["spec"]):
        check_pod(template)
    autoscaler = cluster_of(document).get("autoscalerOptions", {})
    own = {"idleTimeoutSeconds", "upscalingMode", "version"}
    container = {name: value for name, value in autoscaler.items() if name not in own}
    check_pod({"spec": {"containers": [{"name": "autoscaler", **container}]}})


def check_pod(template: Node) -> None:
    check_with_kubernetes({"apiVersion": "v1", "kind": "Pod", **template})


def check_with_kubernetes(document: Node) -> None:
    kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)


def cluster_of(document: Node) -> Node:
    spec: Node = document["spec"]
    return spec.get("rayClusterSpec", spec)


def pod_templates(spec: Any) -> Iterator[Node]:
    """Yield the pod templates of a KubeRay resource: the head's, the workers', the submitter's."""
    for name, value in spec.items() if isinstance(spec, dict) else enumerate(spec):
        if name in ("template", "submitterPodTemplate"):
            yield value
        elif isinstance(value, dict | list):
            yield from pod_templates(value)


def documents(name: str) -> list[Node]:
    return list(yaml.safe_load_all((CLUSTER / name).read_text()))


def kuberay_resource(name: str) -> Node:
    (found,) = (each for each in documents(name) if each["apiVersion"] == "ray.io/v1")
    return found


def groups(document: Node) -> dict[str, Node]:
    return {group["groupName"]: group for group in cluster_of(document)["workerGroupSpecs"]}


def container_of(template: Node) -> Node:
    (container,) = template["spec"]["containers"]
    return container  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", FILES)
def test_every_field_is_known(name: str) -> None:
    for document in documents(name):
        check(document)


GPU_POD = ("workerGroupSpecs", 0, "template", "spec")


@pytest.mark.parametrize(
    "path",
    [
        ("authOptions",),
        ("authOptions", "mode"),
        ("headGroupSpec", "rayStartParams"),
        ("workerGroupSpecs", 0, "minReplicas"),
        ("workerGroupSpecs", 0, "template"),
        ("headGroupSpec", "template", "metadata", "labels"),
        (*GPU_POD, "nodeSelector"),
        (*GPU_POD, "securityContext", "runAsNonRoot"),
        (*GPU_POD, "tolerations", 0, "effect"),
        (*GPU_POD, "volumes", 1, "emptyDir", "sizeLimit"),
        (*GPU_POD, "containers", 0, "securityContext", "allowPrivilegeEscalation"),
        (*GPU_POD, "containers", 0, "resources", "limits"),
        (*GPU_POD, "containers", 0, "env", 1, "valueFrom", "secretKeyRef", "optional"),
    ],
    ids=lambda path: ".".join(map(str, path)),
)
@pytest.mark.parametrize("name", FILES)
def test_a_misspelt_field_is_found(name: str, path: tuple[str | int, ...]) -> None:
    document = copy.deepcopy(kuberay_resource(name))
    assert misspelt_is_named(document, cluster_of(document), path)


@pytest.mark.parametrize(
    "path",
    [
        ("metadata",),
        ("metadata", "name"),
        ("spec", "backoffLimit"),
        ("spec", "submitterPodTemplate"),
        ("spec", "submitterPodTemplate", "spec", "restartPolicy"),
        ("spec", "submitterPodTemplate", "spec", "containers", 0, "resources"),
    ],
    ids=lambda path: ".".join(map(str, path)),
)
def test_a_misspelt_field_of_the_job_is_found(path: tuple[str | int, ...]) -> None:
    document = copy.deepcopy(kuberay_resource("rayjob.yaml"))
    assert misspelt_is_named(document, document, path)


def test_a_misspelt_field_of_the_autoscaler_is_found() -> None:
    document = copy.deepcopy(kuberay_resource("raycluster.yaml"))
    path = ("spec", "autoscalerOptions", "securityContext", "capabilities")
    assert misspelt_is_named(document, document, path)


def misspelt_is_named(document: Node, node: Any, path: tuple[str | int, ...]) -> bool:
    """Misspell the field at a path below a node of the document, and return whether it is named."""
    *parents, field = path
    for parent in parents:
        node = node[parent]
    node[f"{field}x"] = node.pop(field)
    with pytest.raises(Exception, match=f"{field}x") as found:
        check(document)
    return isinstance(found.value, jsonschema.ValidationError)


@pytest.mark.parametrize("name", FILES)
def test_the_operator_and_all_pods_have_the_token(name: str) -> None:
    """KubeRay gives it to the pods itself. An entry of the file's own would be a second one."""
    document = kuberay_resource(name)
    assert cluster_of(document)["authOptions"] == {"mode": "token"}
    for template in pod_templates(document["spec"]):
        names = {entry["name"] for entry in container_of(template).get("env", [])}
        assert not names & {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN"}


@pytest.mark.parametrize("name", FILES)
def test_a_token_of_the_hub_may_be_there(name: str) -> None:
    head, gpu = cluster_of(kuberay_resource(name))["headGroupSpec"], groups(kuberay_resource(name))
    for group in (head, *gpu.values()):
        environment = {entry["name"]: entry for entry in container_of(group["template"])["env"]}
        secret = environment["HF_TOKEN"]["valueFrom"]["secretKeyRef"]
        assert secret == {"name": "raywarp-hub", "key": "token", "optional": True}
        assert f"secret generic {secret['name']} " in (CLUSTER / "raycluster.yaml").read_text()


@pytest.mark.parametrize("name", FILES)
def test_no_pod_is_root(name: str) -> None:
    document = kuberay_resource(name)
    user = re.search(r"^USER (\d+):(\d+)$", (CLUSTER / "Dockerfile").read_text(), re.MULTILINE)
    assert user
    for template in pod_templates(document["spec"]):
        pod, container = template["spec"]["securityContext"], container_of(template)
        assert pod["runAsNonRoot"] is True
        assert (pod["runAsUser"], pod["fsGroup"]) == tuple(map(int, user.groups()))
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
        }


@pytest.mark.parametrize("name", FILES)
def test_all_nodes_share_a_folder_and_have_the_image_of_their_kind(name: str) -> None:
    document = kuberay_resource(name)
    requirement = re.search(
        r'"ray\[.*\]>=([\d.]+)', (CLUSTER.parent / "pyproject.toml").read_text()
    )
    assert requirement
    assert cluster_of(document)["rayVersion"].startswith(requirement[1])
    (claim,) = (each for each in documents("raycluster.yaml") if "Claim" in each["kind"])
    shared = {"claimName": claim["metadata"]["name"]}
    head = cluster_of(document)["headGroupSpec"]
    images = {}
    for kind, group in {"head": head, **groups(document)}.items():
        spec, container = group["template"]["spec"], container_of(group["template"])
        volumes = {volume["name"]: volume for volume in spec["volumes"]}
        assert volumes["shared"]["persistentVolumeClaim"] == shared
        assert {mount["name"] for mount in container["volumeMounts"]} == set(volumes)
        images[kind] = container["image"], gpus(container)
    assert images == {
        "head": ("raywarp:cpu", 0),
        "gpu": ("raywarp:gpu", 4),
        "cpu": ("raywarp:cpu", 0),
    }


def gpus(container: Node) -> int:
    limits = container["resources"]["limits"]
    assert limits == container["resources"]["requests"]
    return int(limits.get("nvidia.com/gpu", 0))


def gibibytes(quantity: str) -> float:
    assert quantity.endswith("Gi")
    return float(quantity.removesuffix("Gi"))


@pytest.mark.parametrize("name", FILES)
def test_gpu_pods_hold_what_the_plan_of_the_example_says(name: str) -> None:
    """Any four of its processes and /dev/shm. Base weights are there twice while they are converted
    on their way to a GPU.
    """
    group = groups(kuberay_resource(name))["gpu"]
    container, found = container_of(group["template"]), plan(load_config(EXAMPLE), offline=True)
    base = max(each.components.get("base weights", 0) for each in found.processes)
    largest = max(2 * base + 2**30, *(each.bytes for each in found.processes if not each.on_gpu))
    (shm,) = (each for each in group["template"]["spec"]["volumes"] if each["name"] == "shm")
    needed = gpus(container) * largest / 2**30 + gibibytes(shm["emptyDir"]["sizeLimit"])
    assert base > 14 * 2**30
    assert needed <= gibibytes(container["resources"]["limits"]["memory"])
    count = sum(need.count * need.gpus for need in found.plan.needs)
    assert group["maxReplicas"] * gpus(container) >= count
    if name == "rayjob.yaml":
        assert group["replicas"] * gpus(container) == count


def test_rayjob_runs_a_command_of_raywarp_on_files_of_the_image() -> None:
    job = kuberay_resource("rayjob.yaml")["spec"]
    assert "COPY cluster /home/ray/cluster\n" in (CLUSTER / "Dockerfile").read_text()
    script, *arguments = job["entrypoint"].split()
    assert shlex.split(job["entrypoint"]) == [script, *arguments]  # KubeRay hands it to a shell
    assert script == "/home/ray/cluster/rayjob.sh"
    options = raywarp.cli.commands._parser().parse_args(arguments)
    assert str(options.config) == f"/home/ray/cluster/configs/{EXAMPLE.name}"
    assert options.overrides[0].startswith("out=/shared/")
    RuntimeEnv(**yaml.safe_load(job["runtimeEnvYAML"]))


@pytest.mark.parametrize("name", FILES)
def test_what_is_in_comments_is_valid_too(name: str) -> None:
    """The labels of queues, and the selectors of one kind of GPU."""
    text, count = re.subn(
        r"^( *)# (labels:|  \S+queue-name: |\S+/\S+: )",
        r"\1\2",
        (CLUSTER / name).read_text(),
        flags=re.MULTILINE,
    )
    assert count == 5
    for document in yaml.safe_load_all(text):
        check(document)
        if "labels" in document["metadata"]:
            assert len(document["metadata"]["labels"]) == 2
            selector = groups(document)["gpu"]["template"]["spec"]["nodeSelector"]
            assert len(selector) == 3
