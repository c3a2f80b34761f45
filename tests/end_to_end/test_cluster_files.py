"""Tests of the files in cluster/, as far as they can be checked without the clouds they are for.

The checks are Ray's own validators, boto3's model of EC2, shellcheck, hadolint, and raywarp itself.
Those of Kubernetes and Slurm are in test_kubernetes_files.py and test_slurm_file.py.
"""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from botocore.loaders import Loader
from botocore.model import ServiceModel
from botocore.validate import ParamValidator
from ray.autoscaler._private.aws.config import _check_ami
from ray.autoscaler._private.providers import _get_node_provider_cls
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.runtime_env import RuntimeEnv

import raywarp.cli.commands
from raywarp.config.load import load_config

CLUSTER = Path(__file__).parents[2] / "cluster"
CONFIGS = sorted((CLUSTER / "configs").glob("*.yaml"))
SCRIPTS = [*sorted(CLUSTER.glob("*.sh")), CLUSTER / "slurm.sbatch"]


AMI = "ami-0123456789abcdef0"


def filled_in() -> dict[str, Any]:
    """cluster.yaml as the command in its comment fills it in, for AMI and a registry."""
    text = (CLUSTER / "cluster.yaml").read_text()
    (command,) = re.findall(r"^#   (sed .*) >aws\.yaml$", text, re.MULTILINE)
    result = subprocess.run(
        ["bash", "-euc", f"ami={AMI} registry=registry.example/me; {command}"],
        cwd=CLUSTER.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    config: dict[str, Any] = yaml.safe_load(result.stdout)
    return config


def test_ray_up_takes_cluster_yaml() -> None:
    config = prepare_config(filled_in())
    validate_config(config)
    assert _get_node_provider_cls(config["provider"])
    nodes = config["available_node_types"]
    assert set(nodes) == {"head", "gpu", "cpu"}
    assert {
        name
        for name, node in nodes.items()
        if node["node_config"].get("InstanceMarketOptions") == {"MarketType": "spot"}
    } == {"gpu", "cpu"}
    for command in (*config["head_start_ray_commands"], *config["worker_start_ray_commands"]):
        assert command == "ray stop" or command.startswith("RAY_AUTH_MODE=token ")
    assert "--dashboard-host=127.0.0.1" in config["head_start_ray_commands"][-1]
    images = config["docker"] | {"cpu": nodes["cpu"]["docker"]["worker_image"]}
    assert (images["head_image"], images["worker_image"], images["cpu"]) == (
        "registry.example/me/raywarp:cpu",
        "registry.example/me/raywarp:gpu",
        "registry.example/me/raywarp:cpu",
    )


def test_the_image_of_aws_has_to_be_filled_in() -> None:
    """Ray would replace `latest_dlami`, or none, by an image of 2023."""
    written = yaml.safe_load((CLUSTER / "cluster.yaml").read_text())["available_node_types"]
    assert {node["node_config"]["ImageId"] for node in written.values()} == {"AMI_ID"}
    _check_ami(config := filled_in())
    filled = config["available_node_types"]
    assert {node["node_config"]["ImageId"] for node in filled.values()} == {AMI}


def test_aws_knows_the_fields_of_the_nodes() -> None:
    """boto3's own model of RunInstances checks each node type's fields and their types."""
    service = ServiceModel(Loader().load_service_model("ec2", "service-2"))
    shape = service.operation_model("RunInstances").input_shape
    for node in filled_in()["available_node_types"].values():
        parameters = {**node["node_config"], "MinCount": 1, "MaxCount": 1}
        report = ParamValidator().validate(parameters, shape)
        assert not report.has_errors(), report.generate_report()
        assert parameters["InstanceType"] in shape.members["InstanceType"].enum


def test_the_head_may_give_workers_their_role() -> None:
    text = (CLUSTER / "cluster.yaml").read_text()
    (policy,) = re.findall(r"^#     '(.*)'$", text, re.MULTILINE)
    (statement,) = json.loads(policy)["Statement"]
    assert (statement["Effect"], statement["Action"]) == ("Allow", "iam:PassRole")
    for node in filled_in()["available_node_types"].values():
        profile = node["node_config"].get("IamInstanceProfile", {"Name": "ray-autoscaler-v1"})
        assert statement["Resource"].endswith(f":role/{profile['Name']}")


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
