"""Tests that a plan names what a run's parts really take.

A run that does not fit is refused before anything starts.
"""

import os
import re
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from tiny_models import WORDS
from transformers import AutoConfig, AutoModelForCausalLM

from raywarp.cli.commands import main
from raywarp.cluster import resources
from raywarp.cluster.node_report import NodeReport, check_node
from raywarp.config.load import parse_config
from raywarp.config.policies import LoraConfig
from raywarp.config.schema import Config, ConfigError
from raywarp.data.text import Completion
from raywarp.model.adapted import INIT, AdaptedModel
from raywarp.model.batches import collate, micro_batches
from raywarp.model.checkpoint import state_of
from raywarp.model.policy import Policy
from raywarp.planning import memory, preflight
from raywarp.planning.forecast import Forecast, ProcessMemory
from raywarp.planning.model_shapes import model_shapes
from raywarp.planning.plan import plan

ROWS, PROMPT, NEW = 4, 5, 7
EXAMPLE = Path(__file__).parents[2] / "cluster" / "configs" / "llama-8b.yaml"


def settings(tiny_llama: Path, **sections: Any) -> Config:
    tree = {
        "model": str(tiny_llama),
        "dtype": "float32",
        "lora": {"rank": 3},
        "optim": {"batch_size": ROWS},
    }
    return parse_config(
        {**tree, "rollout": {"completions_per_prompt": 2, "max_new_tokens": NEW}, **sections}
    )


def bytes_of(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize("init", ["independent", "frozen"])
def test_the_exact_parts_are_the_tensors(tiny_llama: Path, init: str) -> None:
    config = settings(tiny_llama, lora={"rank": 3, "init": init})
    model = AdaptedModel(str(tiny_llama), config.lora, torch.float32, torch.device("cpu"))
    policy = Policy(model, config, iteration=1, index=1)
    completions = [Completion((3, 4, 5), (-1.0,) * 3, "", True)] * ROWS
    policy.update(
        collate([(1, 2)] * ROWS, completions),
        torch.arange(float(ROWS)),
        completions,
        with_sft_kl=False,
    )

    shapes = model_shapes(AutoConfig.from_pretrained(tiny_llama), config.lora, "float32")
    parts = memory.policy_process(shapes, config, "float32", policies=1, response_tokens=0)
    assert parts["base weights"] == bytes_of(dict(model.base_parameters()).values())
    assert parts["policy adapters"] == bytes_of(model.tensors(policy.name).values())
    assert parts["EMA adapters"] == bytes_of(model.tensors(policy.ema_name).values())
    assert parts["gradients"] == bytes_of(policy.trained)
    moments = [
        value
        for state in policy.optimiser.state.values()
        for name, value in state.items()
        if name != "step"
    ]
    assert parts["optimiser moments"] == bytes_of(moments)
    # the rest is 15 kB
    saved = [
        value
        for name, value in state_of(policy).items()
        if not name.endswith("step") and not name.startswith("rng/")
    ]
    assert memory.checkpoint_bytes(shapes, config) == bytes_of(saved)
    vector = policy.task_vector()
    assert memory.task_vector_bytes(shapes, config) == bytes_of(
        tensor for pair in vector.factors.values() for tensor in pair
    )


def test_float16_on_a_cpu_takes_one_weight_in_float32(tiny_llama: Path) -> None:
    """The largest, of 64 x 96 numbers of 4 bytes; the vocabulary has fewer than 96 words."""
    config = settings(tiny_llama)
    shapes = model_shapes(AutoConfig.from_pretrained(tiny_llama), config.lora, "float16")
    parts = memory.policy_process(shapes, config, "float16", policies=1, response_tokens=0)
    assert parts.pop("a weight in float32") == 64 * 96 * 4
    assert parts == memory.policy_process(shapes, config, "bfloat16", 1, 0)
    on_gpu = memory.policy_process(shapes, config, "float16", 1, 0, gpu=True)
    assert "a weight in float32" not in on_gpu


def test_the_kv_cache_is_what_the_model_keeps(tiny_llama: Path, tiny_gpt2: Path) -> None:
    for folder in (tiny_llama, tiny_gpt2):
        model = AutoModelForCausalLM.from_pretrained(folder)
        cache = model(torch.ones(2, 9, dtype=torch.long), use_cache=True).past_key_values
        held = bytes_of(tensor for layer in cache.layers for tensor in (layer.keys, layer.values))
        assert (
            model_shapes(AutoConfig.from_pretrained(folder), LoraConfig(), "float32").kv_numbers
            * 2
            * 9
            * 4
            == held
        )


def test_activations_are_counted_as_autograd_keeps_them(tiny_llama: Path) -> None:
    """The count without data against a real pass's: what the two keep differs by masks and other
    small things.
    """
    lora = LoraConfig(rank=3)
    model = AdaptedModel(str(tiny_llama), lora, torch.float32, torch.device("cpu"))
    model.add_policy("policy", seed=0)
    completions = [Completion(tuple(3 + n % 20 for n in range(60)), (-1.0,) * 60, "", False)] * 8
    (part,) = micro_batches(collate([tuple(range(1, 20))] * 8, completions))
    storages = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage().data_ptr()] = (tensor, tensor.untyped_storage().nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.states(part, [INIT, "policy"], "policy")
    weights = {parameter.untyped_storage().data_ptr() for _, parameter in model.base_parameters()}
    real = sum(size for pointer, (_, size) in storages.items() if pointer not in weights)
    rows, length = part.input_ids.shape
    counted = model_shapes(
        AutoConfig.from_pretrained(tiny_llama), lora, "float32", rows, length
    ).saved_bytes
    assert counted == pytest.approx(real, rel=0.1)


def test_results_are_the_files_that_a_run_leaves(tiny_llama: Path, tmp_path: Path) -> None:
    """I = 1, M = 2: two policies of rank r, an empty init (a column of zeros), a merge and the
    chosen adapter of rank 2r.
    """
    from raywarp.adapters.peft import save_peft

    config = settings(tiny_llama, warp={"iterations": 1, "policies": 2})
    model = AdaptedModel(str(tiny_llama), config.lora, torch.float32, torch.device("cpu"))
    shapes = model_shapes(AutoConfig.from_pretrained(tiny_llama), config.lora, "float32")
    sizes = []
    for rank in (3, 3, 6, 6):
        model.lora = LoraConfig(rank=rank)
        model.add_policy("policy", seed=0)
        save_peft(model.delta("policy"), tmp_path / "adapter")
        sizes.append((tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size)
    # but for the headers
    assert memory.result_bytes(shapes, config) == pytest.approx(sum(sizes), rel=0.1)


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        ({}, {}, None),
        ({"torch": "2.13.0+cpu"}, {"torch": "2.13.0+cu130"}, None),
        (
            {"torch": "2.13.0"},
            {"torch": "2.12.1"},
            "different versions of torch: 2.13.0 on a, 2.12.1 on b",
        ),
        ({"vllm": "0.32.0"}, {}, "different versions of vllm: 0.32.0 on a, not installed on b"),
        ({"python": "3.11.9"}, {"python": "3.12.1"}, "different versions of python"),
    ],
)
def test_versions_are_compared(
    first: dict[str, str], second: dict[str, str], words: str | None
) -> None:
    problems = preflight.version_problems([NodeReport("a", first, 0), NodeReport("b", second, 0)])
    assert problems == [] if words is None else words in problems[0]


@pytest.mark.parametrize(
    ("version", "gpus", "blind"),
    [("2.13.0+cpu", (80 << 30,), True), ("2.13.0", (80 << 30,), False), ("2.13.0+cpu", (), False)],
)
def test_gpus_that_torch_was_not_built_for_are_told(
    version: str, gpus: tuple[int, ...], blind: bool
) -> None:
    warnings = preflight.idle_gpus([NodeReport("a", {"torch": version}, 0, gpus)])
    assert bool(warnings) == blind
    assert (
        not blind or "node a has GPUs, but torch 2.13.0+cpu was built without CUDA" in warnings[0]
    )


def test_a_gpu_that_its_name_does_not_show_to_be_old_is_found_by_its_report() -> None:
    """Ray calls two cards RTX-6000: Quadro (7.5, without bfloat16) and Ada (8.9)."""
    reports = [NodeReport("a", {}, 0, capabilities=(8.9,)), NodeReport("b", {}, 0)]
    old = NodeReport("c", {}, 0, capabilities=(8.9, 7.5))
    needs = [resources.Need(key, gpus, 1, 1) for key, gpus in (("a", 0), ("b", 1), ("c", 0))]
    placed = resources.Plan(*needs, None, "bfloat16")
    assert preflight.dtype_problems(reports, placed) == []
    (problem,) = preflight.dtype_problems([*reports, old], placed)
    assert problem == (
        "node c has a GPU of compute capability 7.5, which does not compute in bfloat16: set"
        " dtype=float16 or dtype=float32"
    )
    assert preflight.dtype_problems([old], replace(placed, dtype="float16")) == []
    on_cpus = replace(placed, rollout=replace(placed.rollout, gpus=0))
    assert preflight.dtype_problems([old], on_cpus) == []


def test_what_nvidia_smi_says_of_the_gpus_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\ncase $1 in *memory*) echo 46068;; *) echo 8.9; echo '[N/A]';; esac")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    report = check_node("a", None, "", [])
    assert report.gpu_memory == (46068 << 20,)
    assert report.capabilities == (8.9,)


def test_access_is_compared() -> None:
    config, stored = (
        parse_config({"out": "runs/x"}),
        parse_config({"out": "runs/x", "store": "shared"}),
    )
    sound, blind = (
        NodeReport("a", {}, 0),
        NodeReport("b", {}, 0, missing=("/m/llama",), unwritable="does not see it"),
    )
    assert preflight.access_problems([sound], config) == []
    seen, missing = preflight.access_problems([sound, blind], config)
    assert (
        "node b cannot use out=runs/x: it does not see it; several nodes need a shared folder, or"
        " a URI" in seen
    )
    assert "node b has no /m/llama" in missing
    assert (
        "node b cannot use store=shared: it does not see it"
        in preflight.access_problems([blind], stored)[0]
    )


def test_a_full_disk_is_said_with_what_and_where(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(tiny_llama, warp={"policies": 3}, out="runs/x")
    assert preflight.disk_problems(config, 1 << 20) == []
    monkeypatch.setattr(preflight, "free_bytes", lambda place: 5 << 30)
    assert preflight.disk_problems(config, (5 << 30) // 6) == []
    (problem,) = preflight.disk_problems(config, 1 << 30)
    assert (
        "disk of out=runs/x: 5.00 GiB free, 2 checkpoints of each of 3 policies take 6.00 GiB"
        in problem
    )
    monkeypatch.setattr(
        preflight, "free_bytes", lambda place: 7 << 30 if place == "store" else 5 << 30
    )
    # that is where they go
    assert preflight.disk_problems(config.model_copy(update={"store": "store"}), 1 << 30) == []
    (problem,) = preflight.disk_problems(
        config.model_copy(update={"out": "store", "store": "full"}), 1 << 30
    )
    assert "disk of store=full: 5.00 GiB free" in problem


def test_free_room_is_that_of_the_nearest_folder(tmp_path: Path) -> None:
    assert preflight.free_bytes(str(tmp_path / "not" / "there")) == pytest.approx(
        preflight.free_bytes(str(tmp_path)), rel=0.05
    )
    assert preflight.free_bytes("s3://bucket/run") is None


def test_memory_is_compared_with_the_largest_node_and_gpu(tiny_llama: Path) -> None:
    need = resources.Need("policy", gpus=0, cpus=1, count=1)
    config = settings(tiny_llama)
    process = ProcessMemory(need, {"base weights": 6 << 30, "activations (estimate)": 4 << 30})
    found = Forecast(
        config, resources.wish(config, resources.Nodes.empty([])), None, [process], "float32"
    )
    sizes = {"small": 5 << 30, "middle": 8 << 30, "large": 16 << 30}
    reports = {name: [NodeReport(name, {}, size)] for name, size in sizes.items()}
    assert (
        "a policy needs 6.0 GiB (weights alone), the largest node has 5.0 GiB: set dtype="
        in found.impossible(reports["small"])[0]
    )
    assert found.impossible(reports["middle"]) == []
    assert (
        "a policy needs 10.0 GiB (estimate), the largest node has 8.0 GiB: lower optim.max_tok"
        in found.tight(reports["middle"])[0]
    )
    assert found.tight(reports["large"]) == []
    two = replace(found, processes=[replace(process, need=replace(need, count=2))])
    assert "all processes together may need 20.0 GiB" in two.tight(reports["large"])[0]
    beside = replace(found, processes=[replace(process, need=replace(need, gpus=1))])
    assert (
        "a policy needs 10.0 GiB (estimate) of its node while it loads, the largest node has 8.0"
        " GiB: take a larger node" in beside.tight(reports["middle"])[0]
    )
    on_gpu = replace(found, processes=[replace(process, on_gpu=True)])
    assert on_gpu.impossible(reports["small"]) == []  # a GPU whose memory nobody knows
    assert (
        "the largest GPU has 4.0 GiB"
        in on_gpu.impossible([NodeReport("a", {}, 0, gpu_memory=(4 << 30,))])[0]
    )


@pytest.fixture
def fitting_run(tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that fits anywhere, in the working directory."""
    rows = [f'{{"text": "{a} {b}"}}\n' for a in WORDS[:5] for b in WORDS[5:9]]
    (tmp_path / "prompts.jsonl").write_text("".join(rows))
    (tmp_path / "zero_reward.py").write_text(
        "def score(prompts, completions, **columns):\n    return [0.0] * len(completions)\n"
    )
    tree = {
        "model": str(tiny_llama),
        "prompts": {"dataset": "./prompts.jsonl"},
        "reward": {"function": "zero_reward:score"},
        "out": "run",
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_plan_on_a_cluster(
    fitting_run: Path, ray_cluster: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "config.yaml"]) == 0
    said = capsys.readouterr().out
    for words in (
        "policy",
        "rollout worker",
        "base weights",
        "optimiser moments",
        "KV cache",
        "disk of out=run",
        "per policy and step",
        "torch",
    ):
        assert words in said, words
    assert said.rstrip().endswith("it fits")
    assert main(["plan", "config.yaml", "cluster.gpus_per_policy=2"]) == 2
    said = " ".join(capsys.readouterr().out.split())
    assert (
        "a policy asks for 2 GPUs and 1 CPUs on one node, the most that a node has is 0 GPUs"
        in said
    )
    assert "asks for 2 GPUs (1 policy x 2), the cluster has 0 of 0 available: 2 too few" in said
    assert said.endswith("it does not fit")
    assert not (fitting_run / "run").exists()


EIGHT_BILLION = """
meta-llama/Llama-3.1-8B-Instruct, bfloat16
process        | count | GPUs each | CPUs each | memory each | on each GPU
policy         | 4     | 1         | 1         | 30.6 GiB    | 31.8 GiB
rollout worker | 3     | 1         | 1         | 1000 MiB    | 33.5 GiB (of 90%)
reward worker  | 1     | 1         | 0         | 2.9 GiB     | 2.3 GiB
what it holds
memory of one               | component                            | bytes
policy                      | base weights, while they load        | 15.0 GiB
policy                      | their file, mapped                   | 15.0 GiB
policy                      | Python, torch, Ray                   | 750 MiB
policy, on each GPU         | base weights                         | 15.0 GiB
policy, on each GPU         | init adapter                         | 7.5 GiB
policy, on each GPU         | policy adapters                      | 640 MiB
policy, on each GPU         | EMA adapters                         | 640 MiB
policy, on each GPU         | gradients                            | 640 MiB
policy, on each GPU         | optimiser moments                    | 1.2 GiB
policy, on each GPU         | activations (estimate)               | 4.7 GiB
policy, on each GPU         | logits in chunks                     | 768 MiB
policy, on each GPU         | Python, torch, Ray                   | 750 MiB
rollout worker              | Python, torch, vLLM, Ray             | 1000 MiB
rollout worker, on each GPU | base weights                         | 15.0 GiB
rollout worker, on each GPU | adapter slots                        | 2.5 GiB
rollout worker, on each GPU | KV cache of 128 completions          | 16.0 GiB
reward worker               | classifier weights                   | 2.3 GiB
reward worker               | Python, torch, Ray                   | 600 MiB
reward worker, on each GPU  | classifier weights                   | 2.3 GiB
"""
TRAFFIC = """
disk of out=s3://bucket/run: checkpoints 2.5 GiB x 3 x 4 policies = 30.0 GiB while they train, results 30.0 GiB
adapters on the network: 640 MiB per policy and step, 2.5 GiB for all 4, to each node with a rollout worker
and the init of an iteration once, to each node: at most 2.5 GiB
ceiling of the front: 12,800 SFT completions (front.ceiling_completions = 32 of each of up to 400 prompts), at most 6,553,600 tokens;
"""  # noqa: E501
PACE = """at 15,940 tokens/s of a rollout worker
(assumed: 1 TB/s of each of 1 GPUs; without the reward's time. A run in out gives a measured pace)
"""
FOUR_WORKERS, SEVEN_WORKERS = f"{TRAFFIC}about 2 min {PACE}", f"{TRAFFIC}about 59 s {PACE}"
OFFLINE = (
    "offline: GPUs are counted where the config names them; a policy actor is counted for each"
    " policy"
)
SHAPES = """prompts are taken to have at most 512 tokens
the config.json of model=meta-llama/Llama-3.1-8B-Instruct is not in reach: these are the shapes that it had when raywarp was written
"""  # noqa: E501
TOO_SMALL = """
the run asks for 12 GPUs (4 policy x 1 + 7 rollout worker x 1 + 1 reward worker x 1), the cluster has 8 of 8 available: 4 too few;
add nodes, or lower cluster.gpus_per_policy or cluster.gpus_per_rollout_worker or cluster.gpus_per_reward_worker, or rollout.workers
it would fit with cluster.policy_actors=4 rollout.workers=3
it does not fit
"""  # noqa: E501
TOO_SMALL_NODES = """
a rollout worker asks for 16 GPUs and 1 CPUs on one node, the most that a node has is 8 GPUs, 12 CPUs: lower
cluster.gpus_per_rollout_worker, cluster.cpus_per_rollout_worker or rollout.tensor_parallel_size, or add a larger node
the run asks for 21 GPUs (4 policy x 1 + 1 rollout worker x 16 + 1 reward worker x 1), the cluster has 8 of 8 available: 13 too few;
add nodes, or lower cluster.gpus_per_policy or cluster.gpus_per_rollout_worker or cluster.gpus_per_reward_worker, or rollout.workers
it does not fit
"""  # noqa: E501


def words(said: str) -> str:
    """What is said, without the frames of tables and however it was wrapped."""
    lines = [
        line.replace("│", "|").replace("┃", "|").strip(" |")
        for line in said.splitlines()
        if not set(line) & set("┏┡└")
    ]
    return " ".join(" ".join(lines).split())


def test_the_8b_example_offline(capsys: pytest.CaptureFixture[str]) -> None:
    """Its shapes are known where the hub is out of reach: 8.03e9 numbers; a task vector of rank 64
    has 64 x 32 x 81,920 of 4 bytes.
    """
    assert main(["plan", str(EXAMPLE), "out=s3://bucket/run", "--offline"]) == 0
    assert words(capsys.readouterr().out) == words(
        "\n".join([EIGHT_BILLION, FOUR_WORKERS, OFFLINE, SHAPES, "it fits"])
    )


CLUSTER = """
import sys
import ray
from raywarp.cli.commands import main

ray.init(address="local", num_cpus=12, num_gpus=8, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
for overrides in ([], ["rollout.workers=7"], ["rollout.workers=1", "rollout.tensor_parallel_size=16"]):
    code = main(["plan", sys.argv[1], "out=s3://bucket/run", *overrides])
    print("CODE", code, flush=True)
"""  # noqa: E501


@pytest.mark.slow
def test_the_8b_example_on_logical_gpus() -> None:
    """Eight are enough, but not for twelve actors, and an engine may be larger than a node. The
    model itself cannot be loaded here.
    """
    with tempfile.TemporaryDirectory(prefix="rw", ignore_cleanup_errors=True) as folder:
        own = {"RAY_TMPDIR": folder, "HOME": folder, "HF_HOME": folder}
        script = [sys.executable, "-c", CLUSTER, str(EXAMPLE)]
        done = subprocess.run(
            script, env={**os.environ, **own}, capture_output=True, text=True, timeout=300
        )
    assert re.findall("CODE (.*)", done.stdout) == ["0", "2", "2"], done.stdout + done.stderr
    enough, few, small, _ = map(words, re.split("CODE .*\n", done.stdout))
    assert enough.startswith(words(EIGHT_BILLION))
    # a policy reads 15 GiB of weights from 15 GiB of files, in this machine's memory
    fits = psutil.virtual_memory().total > 31 * 2**30
    judgement = "it fits" if fits else "by this estimate it does not fit: see the warnings"
    ends = (
        (words(FOUR_WORKERS + SHAPES), judgement),
        (words(SEVEN_WORKERS + SHAPES), words(TOO_SMALL)),
        ("", words(TOO_SMALL_NODES)),
    )
    for said, (figures, end) in zip((enough, few, small), ends, strict=True):
        assert re.search(r" node \S+: \d+\.\d GiB of memory; python 3\S+, torch \S+", said)
        warning = (
            "warning: a run from here ends at once: model=meta-llama/Llama-3.1-8B-Instruct cannot"
            " be loaded: "
        )
        assert figures + " " + warning in said if figures else warning in said
        assert said.endswith(" " + end)


def test_a_folder_with_nothing_but_config_json_has_a_plan(
    fitting_run: Path, ray_cluster: Any, tiny_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (fitting_run / "shapes").mkdir()
    (fitting_run / "shapes" / "config.json").write_text((tiny_llama / "config.json").read_text())
    assert main(["plan", "config.yaml", "--offline"]) == 0
    whole = capsys.readouterr().out
    assert main(["plan", "config.yaml", "model=shapes", "--offline"]) == 0
    only = capsys.readouterr().out
    assert "the weights of model=shapes are not here" in only
    assert "KV cache" in only
    assert main(["plan", "config.yaml", "model=shapes"]) == 0
    said = words(capsys.readouterr().out)
    assert "base weights" in said
    assert "warning: a run from here ends at once: model=shapes has no weights" in said
    assert said.endswith("it fits")
    assert len(whole.splitlines()) == len(only.splitlines()) - 1


def test_plan_offline_starts_and_reads_nothing(
    fitting_run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ray.init", lambda **_: pytest.fail("Ray would have started"))
    assert (
        main(["plan", "config.yaml", "prompts.dataset=nobody/nothing", "reward={}", "--offline"])
        == 0
    )
    assert "optimiser moments" in capsys.readouterr().out
    assert main(["plan", "config.yaml", "model=nobody/nothing", "--offline"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "memory is not known: the config.json of model=nobody/nothing is not in reach" in said
    assert main(["plan", "config.yaml", "warp.steps=x", "--offline"]) == 2


def test_a_config_that_is_too_large_for_every_disk_does_not_fit(
    fitting_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "free_bytes", lambda place: 1000)
    from raywarp.config.load import load_config

    found = plan(load_config("config.yaml"), offline=True)
    assert not found.fits
    assert "too little room on the disk of out=run: 0.0 MiB free" in found.problems[0]


def test_a_run_that_cannot_write_its_folder_is_refused(
    fitting_run: Path, ray_cluster: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    (fitting_run / "file").write_text("")
    assert main(["train", "config.yaml", "out=file/run"]) == 2
    assert "out=file/run cannot be written: Not a directory" in capsys.readouterr().err
    more = ["cluster.gpus_per_policy=9", "cluster.wait_seconds=1"]
    assert main(["train", "config.yaml", "out=new/run", *more]) == 2
    assert not (fitting_run / "new").exists()


def test_the_folder_is_as_it_was(fitting_run: Path, ray_cluster: Any) -> None:
    config = parse_config(yaml.safe_load((fitting_run / "config.yaml").read_text()))
    (report,) = preflight.node_reports(config, [str(fitting_run), str(fitting_run / "missing")])
    assert report.missing == (str(fitting_run / "missing"),)
    assert not report.unwritable
    assert report.memory > 1 << 30
    assert {"python", "torch", "transformers"} <= report.versions.keys()
    assert not (fitting_run / "run").exists()
    with pytest.raises(ConfigError, match="out=config.yaml cannot be written"):
        preflight.node_reports(config.model_copy(update={"out": "config.yaml"}))
    with pytest.raises(ConfigError, match="store=config.yaml cannot be written"):
        preflight.node_reports(config.model_copy(update={"store": "config.yaml"}))
