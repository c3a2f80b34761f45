"""What a run is said to need is what its parts really take; what does not fit is said before anything starts."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import WORDS
from transformers import AutoConfig, AutoModelForCausalLM

from raywarp import memory, placement, preflight
from raywarp.adapted_model import INIT, AdaptedModel
from raywarp.batch import Completion, collate
from raywarp.cli import main
from raywarp.config import Config, ConfigError, LoraConfig, parse_config
from raywarp.model_shapes import model_shapes
from raywarp.node_check import NodeReport
from raywarp.packing import micro_batches
from raywarp.planning import Forecast, Process, plan
from raywarp.policy import Policy

ROWS, PROMPT, NEW = 4, 5, 7


def settings(tiny_llama: Path, **sections: Any) -> Config:
    tree = {"model": str(tiny_llama), "dtype": "float32", "lora": {"rank": 3}, "optim": {"batch_size": ROWS}}
    return parse_config({**tree, "rollout": {"completions_per_prompt": 2, "max_new_tokens": NEW}, **sections})


def bytes_of(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize("init", ["independent", "frozen"])
def test_the_exact_parts_are_the_tensors(tiny_llama: Path, init: str) -> None:
    config = settings(tiny_llama, lora={"rank": 3, "init": init})
    model = AdaptedModel(str(tiny_llama), config.lora, torch.float32, torch.device("cpu"))
    policy = Policy(model, config, iteration=1, index=1)
    completions = [Completion((3, 4, 5), (-1.0,) * 3, "", True)] * ROWS
    policy.update(collate([(1, 2)] * ROWS, completions), torch.arange(float(ROWS)), completions, with_sft_kl=False)

    shapes = model_shapes(AutoConfig.from_pretrained(tiny_llama), config.lora, "float32")
    parts = memory.policy_process(shapes, config, "float32", policies=1, response_tokens=0)
    assert parts["base weights"] == bytes_of(dict(model.base_parameters()).values())
    assert parts["policy adapters"] == bytes_of(model.tensors(policy.name).values())
    assert parts["EMA adapters"] == bytes_of(model.tensors(policy.ema_name).values())
    assert parts["gradients"] == bytes_of(policy.trained)
    moments = [value for state in policy.optimiser.state.values() for name, value in state.items() if name != "step"]
    assert parts["optimiser moments"] == bytes_of(moments)
    saved = [
        value for name, value in policy.state().items() if not name.endswith("step") and not name.startswith("rng/")
    ]  # the rest is 15 kB
    assert memory.checkpoint_bytes(shapes, config) == bytes_of(saved)
    vector = policy.task_vector()
    assert memory.task_vector_bytes(shapes, config) == bytes_of(tensor for pair in vector.factors.values() for tensor in pair)


def test_the_kv_cache_is_what_the_model_keeps(tiny_llama: Path, tiny_gpt2: Path) -> None:
    for folder in (tiny_llama, tiny_gpt2):
        model = AutoModelForCausalLM.from_pretrained(folder)
        cache = model(torch.ones(2, 9, dtype=torch.long), use_cache=True).past_key_values
        held = bytes_of(tensor for layer in cache.layers for tensor in (layer.keys, layer.values))
        assert model_shapes(AutoConfig.from_pretrained(folder), LoraConfig(), "float32").kv_numbers * 2 * 9 * 4 == held


def test_activations_are_counted_as_autograd_keeps_them(tiny_llama: Path) -> None:
    """The count without data against a real pass's: what the two keep differs by masks and other small things."""
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
    counted = model_shapes(AutoConfig.from_pretrained(tiny_llama), lora, "float32", rows, length).saved_bytes
    assert counted == pytest.approx(real, rel=0.1)


def test_results_are_the_files_that_a_run_leaves(tiny_llama: Path, tmp_path: Path) -> None:
    """I = 1, M = 2: two policies of rank r, an empty init (a column of zeros), a merge and the chosen adapter of rank 2r."""
    from raywarp.peft_files import save_peft

    config = settings(tiny_llama, warp={"iterations": 1, "policies": 2})
    model = AdaptedModel(str(tiny_llama), config.lora, torch.float32, torch.device("cpu"))
    shapes = model_shapes(AutoConfig.from_pretrained(tiny_llama), config.lora, "float32")
    sizes = []
    for rank in (3, 3, 6, 6):
        model.lora = LoraConfig(rank=rank)
        model.add_policy("policy", seed=0)
        save_peft(model.delta("policy"), tmp_path / "adapter")
        sizes.append((tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size)
    assert memory.result_bytes(shapes, config) == pytest.approx(sum(sizes), rel=0.1)  # but for the headers


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        ({}, {}, None),
        ({"torch": "2.13.0+cpu"}, {"torch": "2.13.0+cu130"}, None),
        ({"torch": "2.13.0"}, {"torch": "2.12.1"}, "different versions of torch: 2.13.0 on a, 2.12.1 on b"),
        ({"vllm": "0.32.0"}, {}, "different versions of vllm: 0.32.0 on a, not installed on b"),
        ({"python": "3.11.9"}, {"python": "3.12.1"}, "different versions of python"),
    ],
)
def test_versions_are_compared(first: dict[str, str], second: dict[str, str], words: str | None) -> None:
    problems = preflight.version_problems([NodeReport("a", first, 0), NodeReport("b", second, 0)])
    assert problems == [] if words is None else words in problems[0]


def test_access_is_compared() -> None:
    sound, blind = NodeReport("a", {}, 0), NodeReport("b", {}, 0, missing=("/m/llama",), unwritable="does not see it")
    assert preflight.access_problems([sound], "runs/x") == []
    seen, missing = preflight.access_problems([sound, blind], "runs/x")
    assert "node b cannot use out=runs/x: it does not see it; several nodes need a shared folder, or a URI" in seen
    assert "node b has no /m/llama" in missing


def test_a_full_disk_is_said_with_what_and_where(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = settings(tiny_llama, warp={"policies": 3}, out="runs/x")
    assert preflight.disk_problems(config, 1 << 20) == []
    monkeypatch.setattr(preflight, "free_bytes", lambda place: 5 << 30)
    assert preflight.disk_problems(config, (5 << 30) // 6) == []
    (problem,) = preflight.disk_problems(config, 1 << 30)
    assert "disk of out=runs/x: 5.00 GiB free, 2 checkpoints of each of 3 policies take 6.00 GiB" in problem


def test_free_room_is_that_of_the_nearest_folder(tmp_path: Path) -> None:
    assert preflight.free_bytes(str(tmp_path / "not" / "there")) == pytest.approx(preflight.free_bytes(str(tmp_path)), rel=0.05)
    assert preflight.free_bytes("s3://bucket/run") is None


def test_memory_is_compared_with_the_largest_node_and_gpu(tiny_llama: Path) -> None:
    need = placement.Need("policy", gpus=1, cpus=1, count=1)
    config = settings(tiny_llama)
    process = Process(need, {"base weights": 6 << 30, "activations (estimate)": 4 << 30})
    found = Forecast(config, placement.wish(config, 0), None, [process], "float32")
    sizes = {"small": 5 << 30, "middle": 8 << 30, "large": 16 << 30}
    reports = {name: [NodeReport(name, {}, size)] for name, size in sizes.items()}
    assert "a policy needs 6.0 GiB (weights alone), the largest node has 5.0 GiB: lower" in found.impossible(reports["small"])[0]
    assert found.impossible(reports["middle"]) == []
    assert "a policy needs 10.0 GiB (estimate), the largest node has 8.0 GiB: lower optim.max_tok" in found.tight(reports["middle"])[0]
    assert found.tight(reports["large"]) == []
    two = replace(found, processes=[replace(process, need=replace(need, count=2))])
    assert "all processes together may need 20.0 GiB" in two.tight(reports["large"])[0]
    on_gpu = replace(found, processes=[replace(process, on_gpu=True)])
    assert on_gpu.impossible(reports["small"]) == []  # a GPU whose memory nobody knows
    assert "the largest GPU has 4.0 GiB" in on_gpu.impossible([NodeReport("a", {}, 0, gpu_memory=(4 << 30,))])[0]


@pytest.fixture
def project(tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that fits anywhere, in the working directory."""
    rows = [f'{{"text": "{a} {b}"}}\n' for a in WORDS[:5] for b in WORDS[5:9]]
    (tmp_path / "prompts.jsonl").write_text("".join(rows))
    (tmp_path / "zero_reward.py").write_text("def score(prompts, completions, **columns):\n    return [0.0] * len(completions)\n")
    tree = {"model": str(tiny_llama), "prompts": {"dataset": "./prompts.jsonl"}, "reward": {"function": "zero_reward:score"}, "out": "run"}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_plan_on_a_cluster(project: Path, ray_cluster: Any, capsys: pytest.CaptureFixture[str]) -> None:
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
    assert "asks for 2 GPUs (1 policy x 2), the cluster has 0 of 0 available; lower cluster.gpus_per_policy" in said
    assert said.endswith("it does not fit")
    assert not (project / "run").exists()


def test_plan_offline_starts_and_reads_nothing(project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.init", lambda **_: pytest.fail("Ray would have started"))
    assert main(["plan", "config.yaml", "prompts.dataset=nobody/nothing", "reward={}", "--offline"]) == 0
    assert "optimiser moments" in capsys.readouterr().out
    assert main(["plan", "config.yaml", "model=nobody/nothing", "--offline"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "memory is not known: the config.json of model=nobody/nothing is not in reach" in said
    assert main(["plan", "config.yaml", "warp.steps=x", "--offline"]) == 2


def test_a_config_that_is_too_large_for_every_disk_does_not_fit(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "free_bytes", lambda place: 1000)
    from raywarp.config import load_config

    found = plan(load_config("config.yaml"), offline=True)
    assert not found.fits
    assert "too little room on the disk of out=run: 0.0 MiB free" in found.problems[0]


def test_a_run_that_cannot_write_its_folder_is_refused(project: Path, ray_cluster: Any, capsys: pytest.CaptureFixture[str]) -> None:
    (project / "file").write_text("")
    assert main(["train", "config.yaml", "out=file/run"]) == 2
    assert "out=file/run cannot be written: Not a directory" in capsys.readouterr().err


def test_the_folder_is_as_it_was(project: Path, ray_cluster: Any) -> None:
    config = parse_config(yaml.safe_load((project / "config.yaml").read_text()))
    (report,) = preflight.node_reports(config, [str(project), str(project / "missing")])
    assert report.missing == (str(project / "missing"),)
    assert not report.unwritable
    assert report.memory > 1 << 30
    assert {"python", "torch", "transformers"} <= report.versions.keys()
    assert not (project / "run").exists()
    with pytest.raises(ConfigError, match="cannot be written"):
        preflight.node_reports(config.model_copy(update={"out": "config.yaml"}))
