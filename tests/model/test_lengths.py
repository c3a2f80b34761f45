"""Tests of how sequences are divided into forward passes.

Sequences of different kinds never share a pass. Each pass is as wide as if its longest sequence
were alone.
"""

from typing import Any

import pytest
import torch
import transformers
from architectures import DENSE, LIMIT, LONGROPE, mixed_batch

from raywarp.model.batches import micro_batches
from raywarp.model.lengths import LengthLimits, Lengths, length_limits


@pytest.mark.parametrize(
    ("name", "settings", "limits"),
    [
        ("Llama", {}, LengthLimits()),
        (
            "Llama",
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}},
            LengthLimits(),
        ),
        (
            "Llama",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}},
            LengthLimits(growing=512),
        ),
        ("Llama", {"rope_parameters": LONGROPE}, LengthLimits((LIMIT,))),
        (
            "Phi3",
            {"rope_parameters": LONGROPE, "original_max_position_embeddings": 64},
            LengthLimits((64,)),
        ),
        ("DeepseekV32", {"index_topk": 16}, LengthLimits(growing=16)),
        ("Doge", {"keep_window_size": 2048}, LengthLimits(growing=2048)),
        ("Mistral", {"sliding_window": 16}, LengthLimits()),  # a window depends on distances only
    ],
)
def test_limits_are_read_off_the_configuration(
    name: str, settings: dict[str, Any], limits: LengthLimits
) -> None:
    assert length_limits(getattr(transformers, f"{name}Config")(**{**DENSE, **settings})) == limits


def test_kinds() -> None:
    both = LengthLimits((8, 20), growing=30)
    assert both.lowest == 8
    assert [both.kind(length) for length in (8, 9, 20, 21, 30, 31, 32)] == [
        (0, 0, 0), (1, 0, 0), (1, 0, 0), (1, 1, 0), (1, 1, 0), (1, 1, 31), (1, 1, 32),
    ]  # fmt: skip
    assert LengthLimits().lowest is None


def test_passes_cut_a_micro_batch_by_kind() -> None:
    """Sequences of 6, 8, 9 and 12 tokens, last ones included, with a limit of 8: the first two
    without their last token, as wide as the longer; the others with a column for it.
    """
    config = transformers.LlamaConfig(
        **{**DENSE, "max_position_embeddings": 8},
        rope_parameters={"rope_type": "dynamic", "factor": 2.0},
    )
    lengths = Lengths(transformers.AutoModelForCausalLM.from_config(config))
    (part,) = micro_batches(mixed_batch(((4, (2, 4)), (7, (2, 5)))))
    passes = lengths.passes(part)
    assert sorted(piece.input_ids.shape for _, piece in passes) == [(1, 9), (1, 12), (2, 7)]
    assert sorted(torch.cat([tokens for tokens, _ in passes]).tolist()) == list(
        range(len(part.sources))
    )
    for tokens, piece in passes:
        assert torch.equal(
            piece.input_ids.flatten()[piece.sources], part.input_ids.flatten()[part.sources[tokens]]
        )
