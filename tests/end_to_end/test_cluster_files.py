"""Tests of the files in cluster/, as far as they can be checked without the clouds they are for.

The checks are Ray's own validators, the fields of KubeRay's v1 resources, shellcheck, hadolint,
and raywarp itself.
"""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.providers import _get_node_provider_cls
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.runtime_env import RuntimeEnv

import raywarp.cli.commands
from raywarp.config.load import load_config

CLUSTER = Path(__file__).parents[2] / "cluster"
CONFIGS = sorted((CLUSTER / "configs").glob("*.yaml"))
SCRIPTS = [*sorted(CLUSTER.glob("*.sh")), CLUSTER / "slurm.sbatch"]


def strict(required: dict[str, Any], optional: dict[str, Any] | None = None) -> dict[str, Any]:
    """JSON schema of an object with these fields and no others."""
    return {
        "type": "object",
        "properties": {**required, **(optional or {})},
        "required": list(required),
        "additionalProperties": False,
    }


def a_list(item: Any) -> dict[str, Any]:
    return {"type": "array", "minItems": 1, "items": item}


# The fields that these files use, with types and necessity as KubeRay's and Kubernetes' API have
# them: a misspelt or misplaced one fails.
TEXT: dict[str, Any] = {"type": "string"}
COUNT: dict[str, Any] = {"type": "integer", "minimum": 0}
FLAG: dict[str, Any] = {"type": "boolean"}
QUANTITY: dict[str, Any] = {"type": "string", "pattern": r"^\d+(m|[KMGT]i?)?$"}
TEXTS: dict[str, Any] = {"type": "object", "additionalProperties": TEXT}
METADATA = strict(
    {}, {"name": {"type": "string", "pattern": "^[a-z]([a-z0-9-]*[a-z0-9])?$"}, "labels": TEXTS}
)
QUANTITIES = {"type": "object", "additionalProperties": QUANTITY}
ENV = a_list(
    strict(
        {"name": TEXT},
        {"value": TEXT, "valueFrom": strict({"secretKeyRef": strict({"name": TEXT, "key": TEXT})})},
    )
)
CONTAINER = strict(
    {
        "name": TEXT,
        "image": TEXT,
        "resources": strict({"requests": QUANTITIES, "limits": QUANTITIES}),
    },
    {
        "env": ENV,
        "ports": a_list(strict({"containerPort": COUNT}, {"name": TEXT})),
        "volumeMounts": a_list(strict({"name": TEXT, "mountPath": TEXT})),
    },
)
VOLUME = strict(
    {"name": TEXT},
    {
        "persistentVolumeClaim": strict({"claimName": TEXT}),
        "emptyDir": strict({}, {"medium": TEXT, "sizeLimit": QUANTITY}),
    },
)
POD = strict(
    {"containers": a_list(CONTAINER)},
    {
        "volumes": a_list(VOLUME),
        "tolerations": a_list(
            strict({"key": TEXT, "operator": {"enum": ["Exists", "Equal"]}, "effect": TEXT})
        ),
        "terminationGracePeriodSeconds": COUNT,
        "restartPolicy": {"enum": ["Never", "OnFailure"]},
    },
)
TEMPLATE = strict({"spec": POD}, {"metadata": METADATA})
HEAD = strict({"rayStartParams": TEXTS, "template": TEMPLATE})
WORKERS = strict(
    {
        "groupName": TEXT,
        "minReplicas": COUNT,
        "maxReplicas": COUNT,
        "rayStartParams": TEXTS,
        "template": TEMPLATE,
    },
    {"replicas": COUNT},
)
CLUSTER_SPEC = strict(
    {"headGroupSpec": HEAD, "workerGroupSpecs": a_list(WORKERS)},
    {
        "rayVersion": TEXT,
        "enableInTreeAutoscaling": FLAG,
        "autoscalerOptions": strict({}, {"idleTimeoutSeconds": COUNT, "env": ENV}),
    },
)
JOB_SPEC = strict(
    {"entrypoint": TEXT, "rayClusterSpec": CLUSTER_SPEC},
    {
        "submissionMode": {"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode"]},
        "shutdownAfterJobFinishes": FLAG,
        "ttlSecondsAfterFinished": COUNT,
        "backoffLimit": COUNT,
        "runtimeEnvYAML": TEXT,
        "submitterPodTemplate": TEMPLATE,
    },
)
CLAIM_SPEC = strict(
    {
        "accessModes": a_list({"enum": ["ReadWriteMany"]}),
        "resources": strict({"requests": QUANTITIES}),
    }
)
KINDS = {
    ("ray.io/v1", "RayCluster"): CLUSTER_SPEC,
    ("ray.io/v1", "RayJob"): JOB_SPEC,
    ("v1", "PersistentVolumeClaim"): CLAIM_SPEC,
}


def resources(name: str) -> dict[str, dict[str, Any]]:
    """kind → spec, of a Kubernetes file."""
    specs = {}
    for document in yaml.safe_load_all((CLUSTER / name).read_text()):
        schema = strict(
            {
                "apiVersion": TEXT,
                "kind": TEXT,
                "metadata": METADATA,
                "spec": KINDS[document["apiVersion"], document["kind"]],
            }
        )
        jsonschema.validate(document, schema)
        specs[document["kind"]] = document["spec"]
    return specs


def ray_version() -> str:
    match = re.search(r'"ray\[.*\]>=([\d.]+)', (CLUSTER.parent / "pyproject.toml").read_text())
    assert match
    return match[1]


@pytest.mark.parametrize("name", ["raycluster.yaml", "rayjob.yaml"])
def test_kuberay_resources(name: str) -> None:
    specs = resources(name)
    spec = specs.get("RayCluster") or specs["RayJob"]["rayClusterSpec"]
    assert spec["rayVersion"].startswith(ray_version())
    groups = {group["groupName"]: group for group in spec["workerGroupSpecs"]}
    assert set(groups) == {"gpu", "cpu"}
    templates = [
        spec["headGroupSpec"]["template"],
        *(group["template"] for group in groups.values()),
    ]
    pods = [template["spec"] for template in templates]
    assert [
        int(pod["containers"][0]["resources"]["limits"].get("nvidia.com/gpu", 0)) for pod in pods
    ] == [0, 4, 0]
    # vLLM differs
    assert [pod["containers"][0]["image"] for pod in pods] == [
        "raywarp:cpu",
        "raywarp:gpu",
        "raywarp:cpu",
    ]
    for pod in pods:  # all of them share a file system, and none runs without the token
        assert {"name": "shared", "persistentVolumeClaim": {"claimName": "raywarp-shared"}} in pod[
            "volumes"
        ]
        volumes = {volume["name"] for volume in pod["volumes"]}
        assert {mount["name"] for mount in pod["containers"][0]["volumeMounts"]} == volumes
    submitters = [specs["RayJob"]["submitterPodTemplate"]["spec"]] if "RayJob" in specs else []
    for pod in [*pods, *submitters]:
        environment = {entry["name"]: entry for entry in pod["containers"][0]["env"]}
        assert environment["RAY_AUTH_MODE"]["value"] == "token"
        assert environment["RAY_AUTH_TOKEN"]["valueFrom"]["secretKeyRef"] == {
            "name": "raywarp-token",
            "key": "auth_token",
        }


def test_a_misspelt_field_is_noticed() -> None:
    spec = yaml.safe_load((CLUSTER / "rayjob.yaml").read_text())["spec"]
    spec["rayClusterSpec"]["workerGroupSpecs"][0]["minReplica"] = spec["rayClusterSpec"][
        "workerGroupSpecs"
    ][0].pop("minReplicas")
    with pytest.raises(jsonschema.ValidationError, match="minReplica"):
        jsonschema.validate(spec, JOB_SPEC)


def test_rayjob_runs_a_command_of_raywarp_outside_the_pod() -> None:
    job = resources("rayjob.yaml")["RayJob"]
    program, *arguments = job["entrypoint"].split()
    assert program == "raywarp"
    options = raywarp.cli.commands._parser().parse_args(arguments)
    assert str(options.config).startswith("/shared/")
    assert options.overrides[0].startswith("out=/shared/")
    RuntimeEnv(**yaml.safe_load(job["runtimeEnvYAML"]))


def test_ray_up_takes_cluster_yaml() -> None:
    written = yaml.safe_load((CLUSTER / "cluster.yaml").read_text())
    config = prepare_config(written)
    validate_config(config)
    assert _get_node_provider_cls(config["provider"])
    nodes = config["available_node_types"]
    assert set(nodes) == {"head", "gpu", "cpu"}
    assert {
        name
        for name, node in nodes.items()
        if node["node_config"].get("InstanceMarketOptions") == {"MarketType": "spot"}
    } == {
        "gpu",
        "cpu",
    }
    for command in (*config["head_start_ray_commands"], *config["worker_start_ray_commands"]):
        assert command == "ray stop" or command.startswith("RAY_AUTH_MODE=token ")
    assert "--dashboard-host=127.0.0.1" in config["head_start_ray_commands"][-1]


def test_aws_knows_the_fields_of_the_nodes() -> None:
    """boto3's own model of RunInstances checks each node type's fields and their types."""
    loaders, model, validate = (
        pytest.importorskip(f"botocore.{name}") for name in ("loaders", "model", "validate")
    )
    service = model.ServiceModel(loaders.Loader().load_service_model("ec2", "service-2"))
    shape = service.operation_model("RunInstances").input_shape
    for node in yaml.safe_load((CLUSTER / "cluster.yaml").read_text())[
        "available_node_types"
    ].values():
        parameters = {**node["node_config"], "MinCount": 1, "MaxCount": 1}
        report = validate.ParamValidator().validate(parameters, shape)
        assert not report.has_errors(), report.generate_report()
        assert parameters["InstanceType"] in shape.members["InstanceType"].enum


def test_runtime_env() -> None:
    environment = RuntimeEnv(**yaml.safe_load((CLUSTER / "runtime_env.yaml").read_text()))
    assert ".venv" in environment["excludes"]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck(path: Path) -> None:
    run_tool("shellcheck", "--severity=style", path)


def test_hadolint() -> None:
    run_tool("hadolint", CLUSTER / "Dockerfile")


def run_tool(name: str, *words: str | Path) -> None:
    """Raise an error with what a tool of this environment finds."""
    tool = Path(sys.executable).with_name(name)
    result = subprocess.run([tool, *words], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_image_has_no_root_and_no_sudo() -> None:
    text = (CLUSTER / "Dockerfile").read_text()
    assert re.findall(r"^USER (.+)$", text, re.MULTILINE) == ["1000:1000"]
    assert "useradd --uid 1000 --gid 1000 " in text
    assert not re.findall(r"^[^#]*sudo", text, re.MULTILINE)


def test_dockerfile_copies_what_is_there_and_installs_an_extra() -> None:
    text = (CLUSTER / "Dockerfile").read_text()
    copied = [
        word for line in re.findall(r"^COPY (.+) \S+$", text, re.MULTILINE) for word in line.split()
    ]
    assert copied
    assert all((CLUSTER.parent / path).exists() for path in copied)
    (default,) = re.findall(r"^ARG EXTRA=(\w+)$", text, re.MULTILINE)
    extras = re.findall(
        r"^(\w+) = \[", (CLUSTER.parent / "pyproject.toml").read_text(), re.MULTILINE
    )
    assert {default, "cpu"} <= set(extras)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_example_configs(path: Path) -> None:
    config = load_config(path)
    for name in re.findall(r"cluster/configs/[\w-]+\.yaml", path.read_text()):
        assert (CLUSTER.parent / name).is_file()
    for command in re.findall(
        r"^# +raywarp (?:train|reward|tune) \S+ (.+)$", path.read_text(), re.MULTILINE
    ):
        load_config(path, command.split())
    assert config.out


def test_the_imdb_configs_are_the_papers() -> None:
    reward, policy = (
        load_config(CLUSTER / "configs" / name) for name in ("imdb-reward.yaml", "imdb.yaml")
    )
    assert reward.reward_training.lora
    assert reward.reward_training.lora.target_modules == ["q_lin", "k_lin", "v_lin", "out_lin"]
    assert policy.reward.model == reward.out
    assert (policy.lora.rank, policy.lora.alpha) == (5, 16)
    assert (policy.prompts.min_tokens, policy.prompts.max_tokens) == (8, 15)
    assert (policy.rollout.max_new_tokens, policy.optim.batch_size, policy.rollout.temperature) == (
        80,
        64,
        1.0,
    )
    assert policy.prompts == reward.prompts


@pytest.mark.skipif(
    "plan" not in raywarp.cli.commands._parser().format_help(), reason="`raywarp plan` is not there"
)
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_example_configs_have_a_plan(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert raywarp.cli.commands.main(["plan", str(path), "--offline"]) == 0
    assert load_config(path).model in capsys.readouterr().out
