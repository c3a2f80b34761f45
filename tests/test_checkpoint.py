"""W + ΔW from pristine W, in float32, block by block; folding; nothing dropped in silence."""

from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_rollout import trained_model

from raywarp.adapters import AdapterDelta, Factors, dense, zeros_like
from raywarp.checkpoint import Checkpoint, CheckpointError, checkpoint_files, read_files
from raywarp.config import ConfigError


def checkpoint_of(folder: Path) -> Checkpoint:
    return Checkpoint(partial(read_files, checkpoint_files(str(folder))), torch.float32)


def test_weights_are_pristine_plus_folded_plus_change_in_float32(tiny_llama: Path, tiny_gpt2: Path) -> None:
    for folder, transposed in ((tiny_llama, False), (tiny_gpt2, True)):
        model = trained_model(folder, ("one", "two"))
        one, two = model.delta("one"), model.delta("two")
        assert one.fan_in_fan_out == transposed
        pristine = load_file(folder / "model.safetensors")
        in_blocks = {name for name in pristine if ".layers." in name or ".h." in name}
        checkpoint = checkpoint_of(folder)
        for fold, changes in ((None, [one]), (two, [two, one]), (one, [one, one]), (None, [one])):
            checkpoint.fold(fold)
            taken: dict[str, Factors] = {}
            merged = dict(checkpoint.weights(one, taken))
            assert taken == one.factors
            assert merged.keys() == in_blocks  # embeddings and the last norm stay as they are
            for name in merged:
                module = name.removesuffix(".weight")
                change = sum(dense(delta.factors[module]) for delta in changes) if module in one.factors else torch.zeros(())
                expected = pristine[name].double() + (change.T if transposed and change.ndim == 2 else change)
                torch.testing.assert_close(merged[name], expected.float(), rtol=1e-5, atol=1e-6)
        back = dict(checkpoint.weights(zeros_like(one), {}))
        assert all(torch.equal(weight, pristine[name]) for name, weight in back.items())


def test_a_checkpoint_of_the_bare_backbone_is_matched_by_its_shorter_names(tiny_gpt2: Path) -> None:
    delta = trained_model(tiny_gpt2, ("one",)).delta("one")
    full = load_file(tiny_gpt2 / "model.safetensors")
    bare = {name.removeprefix("transformer."): weight for name, weight in full.items()}
    short, long = Checkpoint(bare.items, torch.float32), Checkpoint(full.items, torch.float32)
    found = {f"transformer.{name}": weight for name, weight in short.weights(delta, {})}
    expected = dict(long.weights(delta, {}))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_a_module_without_a_weight_is_not_dropped_in_silence(tiny_llama: Path) -> None:
    delta = AdapterDelta({"model.layers.9.mlp.up_proj": Factors(torch.ones(4, 1), torch.ones(1, 4))})
    with pytest.raises(CheckpointError, match=r"no weight for the adapted module model\.layers\.9"):
        list(checkpoint_of(tiny_llama).weights(delta, {}))


def test_no_safetensors_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no \*\.safetensors"):
        checkpoint_files(str(tmp_path))
