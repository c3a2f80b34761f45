"""Tests of the trainer's side of the proof by effect.

Its float32 passes are compared with a real float32 model. Its synthetic adapter must be large
enough.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import save_tiny_gpt2, save_tiny_llama

from raywarp.algorithm.deltas import add
from raywarp.algorithm.factors import norm
from raywarp.config.policies import LoraConfig
from raywarp.model.adapted import INIT, AdaptedModel
from raywarp.rollout.effect import EffectError, effect
from raywarp.rollout.effect_probe import logprobs, make_probe, reference, score


def test_probe_sequences() -> None:
    texts = [(11, 12, 13), (14, 15), (16,)]
    probe = make_probe(texts, 100, 40, 300, seed=1)
    assert probe == make_probe(texts, 100, 40, 300, seed=1)
    assert probe != make_probe(texts, 100, 40, 300, seed=2)
    lengths = [len(row) for row in probe.sequences]
    assert lengths[0] == max(lengths) == 40  # as long as a sequence of the run
    assert {token for row in probe.sequences for token in row} == set(range(11, 17))
    assert sum(lengths) - sum(probe.heads) >= 300
    for first, second, head in zip(
        probe.sequences[1::2], probe.sequences[2::2], probe.heads[1::2], strict=True
    ):
        assert first[:head] == second[:head]  # completions of one prompt
        assert first != second
    assert {row[0] for row in probe.sequences} <= {11, 14, 16}
    running = "".join(map(chr, probe.sequences[0]))
    assert any("".join(map(chr, text)) in running for text in texts)
    shortest = make_probe([], 3, 2, 5, seed=0)
    assert {len(row) for row in shortest.sequences} == {2}
    assert {token for row in shortest.sequences for token in row} == {0, 1, 2}


def load(folder: Path, dtype: torch.dtype, **lora: Any) -> AdaptedModel:
    return AdaptedModel(
        str(folder), LoraConfig(**{"rank": 2, "alpha": 4.0, **lora}), dtype, torch.device("cpu")
    )


@pytest.mark.parametrize("save", [save_tiny_llama, save_tiny_gpt2])
def test_float32_passes_of_a_bfloat16_model(save: Any, tmp_path: Path) -> None:
    """Equal those of the same weights in a model that is float32 throughout, with an adapter, too,
    and leave the weights as they were.
    """
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(save(tmp_path / "wide"), dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "narrow")
    narrow, wide = (load(tmp_path / "narrow", dtype) for dtype in (torch.bfloat16, torch.float32))
    before = {
        name: (tensor.data_ptr(), tensor.clone()) for name, tensor in narrow.base_parameters()
    }
    probe = make_probe([], narrow.vocabulary, 30, 100, seed=0)
    found = reference(narrow, probe, seed=0)
    wide.set_init(add(found.init, found.policy))
    for adapters, ours in (([], found.none), ([INIT], found.both)):
        exact = logprobs(wide, probe, adapters)
        assert max(abs(a - b) for a, b in zip(ours.exact, exact, strict=True)) < 1e-4
        assert 1e-3 < ours.noise < 0.2
    for name, tensor in narrow.base_parameters():
        assert tensor.dtype == torch.bfloat16
        assert tensor.data_ptr() == before[name][0]
        assert torch.equal(tensor, before[name][1])


def test_the_synthetic_adapter_is_large_enough(tiny_llama: Path) -> None:
    """Both halves have the run's rank and change every module alike; the policy alone is within the
    limits, measured again.
    """
    model = load(tiny_llama, torch.float32, target_modules=["q_proj", "down_proj"])
    found = reference(model, make_probe([], model.vocabulary, 20, 200, seed=0), seed=3)
    relative = {
        norm(f) / model.weight_norms()[module]
        for half in (found.init, found.policy)
        for module, f in half.factors.items()
    }
    assert len(found.init.factors) == 4
    assert max(relative) == pytest.approx(min(relative), rel=1e-3)
    assert all(f.rank == 2 for half in (found.init, found.policy) for f in half.factors.values())
    model.set_init(found.policy)
    alone = score(model, found.probe, [INIT])
    assert alone == found.alone
    assert 0.5 <= effect(found.none, alone, found.none.own, alone.own).rms <= 0.9
    # an init that is dropped would be seen
    assert effect(found.none, found.both, found.none.own, alone.own).slope < 0.8


def test_a_model_whose_log_probs_hardly_move_is_examined_all_the_same(tiny_llama: Path) -> None:
    """Logits scaled down as Cohere's are: the adapter grows as large as the weights."""
    model = load(tiny_llama, torch.float32)
    model._head = replace(model._head, scale=0.03)
    found = reference(model, make_probe([], model.vocabulary, 20, 100, seed=0), seed=0)
    assert max(
        norm(f) / model.weight_norms()[module] for module, f in found.policy.factors.items()
    ) == pytest.approx(1, rel=1e-3)
    assert 0.01 < effect(found.none, found.alone, found.none.own, found.alone.own).rms < 0.5


def test_modules_without_any_effect_are_refused(tiny_llama: Path) -> None:
    """As those of a vision tower: here, attention whose output is multiplied by zero."""
    model = load(tiny_llama, torch.float32, target_modules=["q_proj"])
    for name, tensor in model.base_parameters():
        if name.endswith("o_proj.weight"):
            tensor.data.zero_()
    with pytest.raises(
        EffectError,
        match=(
            r"no adapter on lora.target_modules=\['q_proj'\] could be found .* do these modules"
            r" take part"
        ),
    ):
        reference(model, make_probe([], model.vocabulary, 20, 50, seed=0), seed=0)
