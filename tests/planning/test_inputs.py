"""Tests of what a run reads, before anything starts."""

import itertools
import json
from pathlib import Path

import pytest
from tiny_models import WORDS
from tiny_run import tiny_config
from transformers import BloomConfig, GPT2Config, LlamaConfig, MptConfig, PreTrainedConfig

from raywarp.planning.inputs import most_tokens, prepare


@pytest.mark.parametrize(
    ("settings", "most"),
    [
        (LlamaConfig(max_position_embeddings=77), 77),
        (GPT2Config(n_positions=78), 78),
        (MptConfig(max_seq_len=79), 79),
        (BloomConfig(), 1 << 30),  # positions by distance alone
    ],
)
def test_a_models_context_by_each_familys_name_for_it(
    settings: PreTrainedConfig, most: int
) -> None:
    assert most_tokens(settings) == most


def test_no_policy_trains_on_what_the_run_holds_out(
    project: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    words = sorted({*WORDS})[:6]
    texts = [" ".join(own) for own in itertools.product(words, repeat=3)]
    rows = [{"text": text, "language": ["de", "en"][n % 2]} for n, text in enumerate(texts)]
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    changes = [
        {},
        {"where": {"language": "de"}},
        {"where": {"language": "en"}, "seed": 5},
        {"max_words": 2},
        {"min_tokens": 1, "max_tokens": 2, "seed": 7},
    ]
    prompts = {"dataset": str(tmp_path / "rows.jsonl"), "held_out_fraction": 0.1}
    warp = {"policies": len(changes), "each": changes}
    config = tiny_config(project, tiny_llama, tmp_path / "out", prompts=prompts, warp=warp)
    inputs = prepare(config)
    held_out = {prompt.text for prompt in inputs.prompts.held_out}
    assert len(held_out) == 22
    for own in inputs.each:
        known = {prompt.text for prompt in (*own.prompts.train, *own.prompts.sampled)}
        assert known
        assert not known & held_out
    first, _, _, cut, _ = inputs.each
    assert first.prompts is inputs.prompts
    assert not {*cut.prompts.train.order.tolist()} & {texts.index(text) for text in held_out}
