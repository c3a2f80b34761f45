"""Tests of what is refused as sft_adapter, before anything starts."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_run import tiny_config

from raywarp.adapters.peft import save_peft
from raywarp.algorithm.deltas import AdapterDelta
from raywarp.algorithm.factors import Factors
from raywarp.config.schema import ConfigError
from raywarp.planning.inputs import prepare
from raywarp.rollout.engine import largest_rank

MODULE = "model.layers.0.self_attn.q_proj"


def write(model: Path, folder: Path, size: int = 64, module: str = MODULE) -> Path:
    factors = {module: Factors(torch.ones(64, 2), torch.ones(2, size))}
    save_peft(AdapterDelta(factors, (module,), str(model)), folder)
    return folder


def name_another_base(folder: Path) -> None:
    path = folder / "adapter_config.json"
    told = json.loads(path.read_text())
    path.write_text(json.dumps({**told, "base_model_name_or_path": "org/another-model"}))


def use_dora(folder: Path) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "use_dora": True}))


def poison(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({name: tensor * float("nan") for name, tensor in tensors.items()}, path)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (name_another_base, "is an adapter of org/another-model, and model="),
        (use_dora, "DoRA"),
        (poison, f"of {MODULE} holds NaN"),
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), "adapter_model"),
    ],
)
def test_what_is_no_exact_adapter_of_the_model_is_refused(
    damage: Callable[[Path], None], reason: str, project: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    damage(folder := write(tiny_llama, tmp_path / "sft"))
    config = tiny_config(project, tiny_llama, tmp_path / "out", sft_adapter=str(folder))
    with pytest.raises(ConfigError, match=f"sft_adapter={folder}.*{reason}"):
        prepare(config)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("size", "module", "reason"),
    [
        (32, MODULE, rf"{MODULE} is \(64, 32\) in the adapter and \(64, 64\) in the model"),
        (64, "model.layers.7.self_attn.q_proj", "does not fit model="),
    ],
)
def test_an_adapter_of_other_weights_is_refused(
    size: int, module: str, reason: str, project: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    folder = write(tiny_llama, tmp_path / "sft", size, module)
    config = tiny_config(project, tiny_llama, tmp_path / "out", sft_adapter=str(folder))
    with pytest.raises(ConfigError, match=reason):
        prepare(config)


def test_its_rank_counts_where_vllm_has_slots_for_so_much(
    project: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    """512 is the most: 2 policies of rank 128 in 2 iterations, and 2 of the SFT adapter."""
    sections = {
        "lora": {"rank": 128},
        "rollout": {"engine": "vllm", "adapter": "lora"},
    }
    config = tiny_config(project, tiny_llama, tmp_path / "out", **sections)
    assert largest_rank(config) == 512
    prepare(config)
    folder = write(tiny_llama, tmp_path / "sft")
    more = tiny_config(project, tiny_llama, tmp_path / "out", sft_adapter=str(folder), **sections)
    with pytest.raises(ConfigError, match="reach rank 514 .* on top of sft_adapter"):
        prepare(more)


def test_the_name_of_the_model_is_its_last_part(
    project: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    """Of a hub id, of another folder, and of a hub's cache; a name may be missing."""
    for name in (f"org/{tiny_llama.name}", f"/elsewhere/{tiny_llama.name.upper()}/", ""):
        folder = write(Path(name) if name else Path(), tmp_path / f"sft-{len(name)}")
        path = folder / "adapter_config.json"
        told = {**json.loads(path.read_text()), "base_model_name_or_path": name or None}
        path.write_text(json.dumps(told))
        config = tiny_config(project, tiny_llama, tmp_path / "out", sft_adapter=str(folder))
        inputs = prepare(config)
        assert inputs.fingerprints()["sft_adapter"]
        assert inputs.shapes.start_numbers == 2 * (64 + 64)
