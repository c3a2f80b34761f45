"""Trainer against the model's own eager code, for every family of the table in docs/architectures.md."""

from pathlib import Path

import pytest
import torch
from architectures import FAMILIES, Family, compare, mixed_batch, save_model, trainer

from raywarp.adapted_model import AdaptedModel
from raywarp.completion import Completion
from raywarp.config import ConfigError, LoraConfig, parse_config
from raywarp.model_shapes import model_shapes
from raywarp.policy import Policy

RIGHT = [family for family in FAMILIES.values() if not family.refused]
REFUSED = [family for family in FAMILIES.values() if family.refused]
FOUR = ((5, (4, 2)), (40, (3, 6)))


@pytest.mark.parametrize("family", RIGHT, ids=lambda family: family.name)
def test_the_trainer_is_the_model(family: Family, tmp_path: Path) -> None:
    """Log-probs with an adapter and without, and gradients; and planning counts the same modules."""
    save_model(family, tmp_path)
    model = trainer(tmp_path, family)
    found = compare(model, tmp_path, mixed_batch())
    assert found.is_right, found
    shapes = model_shapes(family.build(), LoraConfig(rank=2, target_modules=family.targets), rows=2, length=12)
    assert shapes.adapted == {name: tuple(layer.weight.shape) for name, layer in model._layers.items()}
    assert shapes.left == model.targets.left
    assert shapes.saved_bytes > 0


@pytest.mark.parametrize("family", REFUSED, ids=lambda family: family.name)
def test_what_is_not_right_is_refused(family: Family, tmp_path: Path) -> None:
    save_model(family, tmp_path)
    with pytest.raises(ConfigError, match=family.refused):
        AdaptedModel(str(tmp_path), LoraConfig(rank=2), torch.float32, torch.device("cpu"))


@pytest.mark.parametrize("family", RIGHT, ids=lambda family: family.name)
def test_a_resumed_policy_goes_on_as_it_would_have(family: Family, tmp_path: Path) -> None:
    """Bit for bit, also where some adapters never have a gradient (DeepSeek-V3.2's indexer)."""
    save_model(family, tmp_path)
    whole, first, second = (_policy(tmp_path, family) for _ in range(3))
    for _ in range(2):
        _step(whole)
    _step(first)
    second.load_state(first.state())
    _step(second)
    assert second.step == 2
    states = whole.state(), second.state()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


def _policy(folder: Path, family: Family) -> Policy:
    settings = {"lora": {"rank": 2, "target_modules": family.targets}, "optim": {"batch_size": 4, "lr": 0.01, "warmup_steps": 0}}
    config = parse_config({**settings, "rollout": {"completions_per_prompt": 2}})
    return Policy(AdaptedModel(str(folder), config.lora, torch.float32, torch.device("cpu")), config, 1, 1)


def _step(policy: Policy) -> None:
    batch = mixed_batch(FOUR)
    completions = [Completion((), (), "", True)] * len(batch)
    policy.update(batch, torch.tensor([1.0, -1.0, 0.5, 2.0]), completions, with_sft_kl=False)
