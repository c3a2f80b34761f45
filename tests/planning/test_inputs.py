"""Tests of what a run reads, before anything starts."""

import pytest
from transformers import BloomConfig, GPT2Config, LlamaConfig, MptConfig, PreTrainedConfig

from raywarp.planning.inputs import most_tokens


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
