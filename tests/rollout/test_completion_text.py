"""Tests of a completion's text: it follows the prompt's, and a stop string ends it."""

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from raywarp.cluster.turns import finish
from raywarp.config.load import parse_config
from raywarp.data.text import Completion
from raywarp.rollout.engine import EngineSettings
from raywarp.rollout.protocol import SFT, Request
from raywarp.rollout.transformers_engine import TransformersEngine, following, stop_place

WORDS = [*(f"▁w{n}" for n in range(12)), *(f"x{n}" for n in range(3)), "▁st", "op"]
STOPS = (" stop", "x1x2", "2 w")


def save_spaced(folder: Path) -> PreTrainedTokenizerFast:
    """A model whose tokens begin with ▁ for a space, as Llama 2's, with an EOS that is a word."""
    vocabulary = {token: n for n, token in enumerate(["<unk>", "<s>", "</s>", "<end>", *WORDS])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Metaspace()
    raw.decoder = decoders.Metaspace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=raw, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 128}
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=len(vocabulary), bos_token_id=1, eos_token_id=2, **sizes, **heads)
    )
    model.generation_config = GenerationConfig(eos_token_id=[2, 3])
    model.save_pretrained(folder)
    return fast


def sample(folder: Path, prompt: list[int], count: int, **rollout: Any) -> list[Completion]:
    tree = {"engine": "transformers", "max_new_tokens": 8, "temperature": 1.0, **rollout}
    settings = parse_config({"rollout": tree}).rollout
    engine = TransformersEngine(EngineSettings(str(folder), "float32", 64, 2, settings, gpu=False))
    (completions,) = finish(engine.sample([Request([prompt] * count, list(range(count)), SFT)]))
    return completions


def sample_by_vllm(settings: EngineSettings, prompt: list[int]) -> list[Completion]:
    from raywarp.rollout.vllm.engine import VllmEngine

    engine = VllmEngine(settings)
    try:
        (found,) = finish(engine.sample([Request([prompt] * 64, list(range(64)), SFT)]))
    finally:
        engine.close()
    return found


def test_a_completion_keeps_its_first_space_and_shows_no_end(tmp_path: Path) -> None:
    tokenizer = save_spaced(tmp_path)
    prompt = tokenizer("w1 w2 w3").input_ids
    before = tokenizer.decode(prompt)
    spaces = ends = 0
    for completion in sample(tmp_path, prompt, 64):
        ended = completion.token_ids[-1] in (2, 3)
        body = completion.token_ids[: len(completion.token_ids) - ended]
        assert before + completion.text == tokenizer.decode(
            [*prompt, *body], skip_special_tokens=True
        )
        assert completion.finished == ended
        spaces += completion.text.startswith(" ")
        ends += ended
    assert spaces > 20
    assert ends > 5


def test_a_stop_string_ends_a_completion_as_finished(tmp_path: Path) -> None:
    """The string spans two tokens. Until it comes, the completions are those without it."""
    tokenizer = save_spaced(tmp_path)
    prompt = tokenizer("w1 w2 w3").input_ids
    free, stopped = (
        sample(tmp_path, prompt, 128, ignore_eos=True, max_new_tokens=16, stop=stop)
        for stop in (None, list(STOPS))
    )
    changed = 0
    for whole, cut in zip(free, stopped, strict=True):
        places = [place for place in map(whole.text.find, STOPS) if place >= 0]
        assert cut.text == whole.text[: min(places, default=len(whole.text))]
        assert cut.token_ids == whole.token_ids[: len(cut.token_ids)]
        assert cut.finished == bool(places)
        assert len(cut.logprobs) == len(cut.token_ids)
        if places:
            changed += 1
            texts = [
                following(tokenizer, prompt, cut.token_ids[:n])
                for n in range(len(cut.token_ids) + 1)
            ]
            assert [any(s in text for s in STOPS) for text in texts] == [
                *([False] * len(cut.token_ids)),
                True,
            ]
    assert changed > 5


def test_vllm_ends_a_completion_at_a_stop_string(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # as in a rollout worker
    pytest.importorskip("vllm")
    tokenizer = save_spaced(tmp_path)
    prompt = tokenizer("w1 w2 w3").input_ids
    settings: dict[str, Any] = {"max_new_tokens": 16, "temperature": 1.0, "stop": list(STOPS)}
    rollout = parse_config({"rollout": {**settings, "ignore_eos": True, "kv_cache_gib": 0.2}})
    engine = EngineSettings(str(tmp_path), "float32", 64, 2, rollout.rollout, gpu=False)
    # vLLM looks at every module of its process, and refuses some of other tests.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        found = process.submit(sample_by_vllm, engine, prompt).result()
    both = [found, sample(tmp_path, prompt, 64, ignore_eos=True, **settings)]
    for completions in both:
        assert 5 < sum(c.finished for c in completions) < 64
        for completion in completions:
            whole = following(tokenizer, prompt, completion.token_ids)
            places = [place for place in map(whole.find, STOPS) if place >= 0]
            assert completion.text == whole[: min(places, default=len(whole))]
            assert completion.finished == bool(places)
            assert completion.finished or len(completion.token_ids) == 16
            shorter = following(tokenizer, prompt, completion.token_ids[:-1])
            assert not any(stop in shorter for stop in STOPS)


@pytest.mark.parametrize(
    ("text", "stops", "place"),
    [("a b c", ["c", "b"], 2), ("a b c", ["d"], None), ("", ["a"], None), ("aab", ["ab"], 1)],
)
def test_the_first_stop_string_counts(text: str, stops: list[str], place: int | None) -> None:
    assert stop_place(text, stops) == place
