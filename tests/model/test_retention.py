"""Tests of the cross-entropy of texts against transformers' own, on densely merged weights."""

from pathlib import Path

import pytest
import torch
from tiny_models import trained_model
from transformers import AutoModelForCausalLM

from raywarp.algorithm.factors import dense
from raywarp.model.adapted import AdaptedModel, text_losses


def sampled_texts(folder: Path, count: int = 24) -> list[list[int]]:
    """Texts of 2 to 12 tokens that the model itself has sampled, at temperature 1."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(3)
    texts = []
    for n in range(count):
        length = 2 + n % 11
        ids = model.generate(
            torch.tensor([[1]]), do_sample=True, top_k=0, min_length=length, max_length=length
        )
        texts.append(ids[0].tolist())
    return texts


def transformers_losses(
    folder: Path, texts: list[list[int]], adapter: str | None, model: AdaptedModel
) -> list[float]:
    """The loss of labels, text by text, of the plain model with the adapter's ΔW added."""
    plain = AutoModelForCausalLM.from_pretrained(folder).float().eval()
    if adapter:
        delta = model.delta(adapter)
        for module, f in delta.factors.items():
            change = dense(f).T if delta.fan_in_fan_out else dense(f)
            plain.get_submodule(module).weight.data += change
    found = []
    for text in texts:
        ids = torch.tensor([text])
        with torch.no_grad():
            found.append(float(plain(ids, labels=ids).loss) * (len(text) - 1))
    return found


@pytest.mark.parametrize("kind", ["tiny_llama", "tiny_gpt2"])
def test_losses_are_those_of_transformers(kind: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(kind)
    model, texts = trained_model(folder, ("one",)), sampled_texts(folder)
    found = {}
    for adapter in (None, "one"):
        found[adapter] = text_losses(model, texts, [adapter] if adapter else [], 64)
        theirs = transformers_losses(folder, texts, adapter, model)
        assert found[adapter] == pytest.approx(theirs, rel=1e-4, abs=1e-4)
    # nothing predicts a model's own texts better than the model
    tokens = sum(len(text) - 1 for text in texts)
    assert (sum(found["one"]) - sum(found[None])) / tokens > 0.05


def test_losses_do_not_depend_on_the_size_of_a_pass(tiny_llama: Path) -> None:
    model, texts = trained_model(tiny_llama, ("one",)), sampled_texts(tiny_llama)
    whole = text_losses(model, texts, ["one"], 4096)
    assert text_losses(model, texts, ["one"], 8) == pytest.approx(whole, rel=1e-5)
    assert text_losses(model, texts[::-1], ["one"], 64) == pytest.approx(whole[::-1], rel=1e-5)
    alone = [text_losses(model, [text], ["one"], 64)[0] for text in texts[:3]]
    assert alone == pytest.approx(whole[:3], rel=1e-5)
