"""Tests of W + ΔW from pristine W in float32.

Nothing more than that is handed out, and nothing is dropped in silence.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import trained_model

from raywarp.algorithm.deltas import AdapterDelta, zeros_like
from raywarp.algorithm.factors import Factors, dense
from raywarp.config.schema import ConfigError
from raywarp.rollout.base_weights import (
    BaseWeights,
    BaseWeightsError,
    checkpoint_files,
    match_names,
    read_files,
)

LAYER = "layers.3.self_attn.q_proj"


def checkpoint_of(folder: Path) -> BaseWeights:
    return BaseWeights(partial(read_files, checkpoint_files(str(folder))), torch.float32)


def test_weights_are_pristine_plus_change_in_float32(tiny_llama: Path, tiny_gpt2: Path) -> None:
    for folder, transposed in ((tiny_llama, False), (tiny_gpt2, True)):
        model = trained_model(folder, ("one", "two"))
        one, two = model.delta("one"), model.delta("two")
        assert one.fan_in_fan_out == transposed
        pristine = load_file(folder / "model.safetensors")
        checkpoint = checkpoint_of(folder)
        for delta in (one, two, one):
            taken: dict[str, Factors] = {}
            merged = dict(checkpoint.weights(delta, taken))
            assert taken == delta.factors
            for name in merged:
                module = name.removesuffix(".weight")
                change = (
                    dense(delta.factors[module]) if module in delta.factors else torch.zeros(())
                )
                expected = pristine[name].double() + (
                    change.T if transposed and change.ndim == 2 else change
                )
                torch.testing.assert_close(merged[name], expected.float(), rtol=1e-5, atol=1e-6)
        back = dict(checkpoint.weights(zeros_like(one), {}))
        assert all(torch.equal(weight, pristine[name]) for name, weight in back.items())


def test_what_an_adapter_changes_is_handed_out_with_what_may_be_fused_with_it_alone(
    tiny_llama: Path,
) -> None:
    """q with k, v and o; nothing of the MLP, where a model may have experts that an engine has
    packed.
    """
    delta = trained_model(tiny_llama, ("one",)).delta("one")
    module = "model.layers.1.self_attn.q_proj"
    handed = dict(
        checkpoint_of(tiny_llama).weights(
            replace(delta, factors={module: delta.factors[module]}), {}
        )
    )
    assert handed.keys() == {f"model.layers.1.self_attn.{name}_proj.weight" for name in "qkvo"}


def test_a_checkpoint_of_the_bare_backbone_is_matched_by_its_shorter_names(tiny_gpt2: Path) -> None:
    delta = trained_model(tiny_gpt2, ("one",)).delta("one")
    full = load_file(tiny_gpt2 / "model.safetensors")
    bare = {name.removeprefix("transformer."): weight for name, weight in full.items()}
    short, long = BaseWeights(bare.items, torch.float32), BaseWeights(full.items, torch.float32)
    found = {f"transformer.{name}": weight for name, weight in short.weights(delta, {})}
    expected = dict(long.weights(delta, {}))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_a_module_without_a_weight_is_not_dropped_in_silence(tiny_llama: Path) -> None:
    delta = AdapterDelta(
        {"model.layers.9.mlp.up_proj": Factors(torch.ones(4, 1), torch.ones(1, 4))}
    )
    with pytest.raises(
        BaseWeightsError, match=r"no weight for the adapted module model\.layers\.9"
    ):
        list(checkpoint_of(tiny_llama).weights(delta, {}))


def test_no_safetensors_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no \*\.safetensors"):
        checkpoint_files(str(tmp_path))


@pytest.mark.parametrize(
    ("module", "names", "found"),
    [
        (f"model.{LAYER}", [f"model.{LAYER}", f"mtp.{LAYER}"], f"model.{LAYER}"),
        (
            f"model.{LAYER}",
            [f"model.language_model.{LAYER}", f"mtp.{LAYER}"],
            f"model.language_model.{LAYER}",
        ),
        (
            f"model.language_model.{LAYER}",
            [f"vision_tower.encoder.{LAYER}", f"language_model.model.{LAYER}"],
            f"language_model.model.{LAYER}",
        ),
        (
            f"model.{LAYER}",
            [f"model.vision_tower.{LAYER}", f"model.language_model.{LAYER}"],
            f"model.language_model.{LAYER}",
        ),
        ("transformer.h.0.attn.c_attn", ["h.0.attn.c_attn", "h.1.attn.c_attn"], "h.0.attn.c_attn"),
        (f"model.{LAYER}", [LAYER.replace("3", "4")], None),
        (f"model.{LAYER}", [f"a.{LAYER}", f"b.{LAYER}"], None),  # which of the two is not known
    ],
)
def test_the_name_that_means_a_module(module: str, names: list[str], found: str | None) -> None:
    assert match_names([module], names) == ({module: found} if found else {})


def test_a_name_that_two_modules_would_share_is_neither_ones() -> None:
    assert match_names([f"a.{LAYER}", f"b.{LAYER}"], [LAYER]) == {}
