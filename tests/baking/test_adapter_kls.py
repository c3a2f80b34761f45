"""Tests of the KL cosine of adapters on texts, against PEFT's models and hand-worked cases."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from raywarp.cli.commands import main

TEXTS = ("the first text is short", "the second one is a little longer than the first")


def made(model: Path, folder: Path, seed: int, size: float) -> str:
    """An adapter by PEFT whose change of the model is small."""
    torch.manual_seed(seed)
    lora = LoraConfig(
        r=2,
        lora_alpha=3,
        target_modules="all-linear",
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(model), lora)
    for name, tensor in adapted.named_parameters():
        if "lora_B" in name:
            tensor.data *= size
    adapted.save_pretrained(str(folder))
    return str(folder)


def kls(model: Path, adapter: str, texts: tuple[str, ...]) -> list[float]:
    """KL to the base of each text, summed over its positions, by PEFT and torch's kl_div."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    base = AutoModelForCausalLM.from_pretrained(model).eval()
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), adapter).eval()
    found = []
    for text in texts:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        with torch.no_grad():
            p, q = (m(ids).logits[0, :-1].double().log_softmax(-1) for m in (adapted, base))
        found.append(float(torch.nn.functional.kl_div(q, p, reduction="sum", log_target=True)))
    return found


def test_inspect_measures_the_kl_cosine_on_a_base(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = (made(tiny_llama, tmp_path / name, n, 0.05) for n, name in enumerate("ab"))
    assert main(["merge", "lerp", a, b, "--out", str(tmp_path / "mean")]) == 0
    (tmp_path / "texts").write_text("\n".join(TEXTS))
    capsys.readouterr()
    words = ["merge", "inspect", a, b, "--base", str(tiny_llama)]
    assert main([*words, "--texts", str(tmp_path / "texts"), "--json"]) == 0
    kl = json.loads(capsys.readouterr().out)["kl"]
    one, two, mean = (
        sum(kls(tiny_llama, adapter, TEXTS)) / 2 for adapter in (a, b, str(tmp_path / "mean"))
    )
    assert [*kl["kl_policies"], kl["kl_lerp"]] == pytest.approx([one, two, mean], rel=1e-2)
    assert kl["kl_cosine"] == pytest.approx(2 * mean / ((one + two) / 2) - 1, abs=0.02)
    assert kl["prompts"] == 2
    assert main([*words[:2], a, a, *words[4:]]) == 0
    said = capsys.readouterr().out
    assert "KL cosine 1.00" in said
    assert "(8 texts)" in said


def test_a_base_that_does_not_fit_or_texts_that_are_none_are_refused(
    tiny_llama: Path, tiny_gpt2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a = made(tiny_llama, tmp_path / "a", 1, 0.05)
    (tmp_path / "empty").write_text("\n \n")
    for words, part in (
        ([a, a, "--base", tiny_gpt2], "has no weight model.layers.0"),
        ([a, a, "--texts", tmp_path / "empty"], "--texts goes with --base"),
        ([a, a, "--base", tiny_llama, "--texts", tmp_path / "empty"], "holds no text"),
        ([a, a, "--base", tiny_llama, "--texts", tmp_path / "no"], "cannot be read"),
        ([a, "--base", tiny_llama], "two adapters or more"),
    ):
        assert main(["merge", "inspect", *map(str, words)]) == 2
        assert part in capsys.readouterr().err
