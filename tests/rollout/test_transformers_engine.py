"""Tests of the transformers engine against the trainer.

It caches and pads where that gives the model's own logits. Otherwise it runs whole sequences alone.
"""

from pathlib import Path

import pytest
import torch
from architectures import FAMILIES, engine_prompts, save_model, trainer

from raywarp.cluster.turns import finish
from raywarp.config.load import parse_config
from raywarp.model.batches import collate, micro_batches
from raywarp.rollout.engine import EngineSettings
from raywarp.rollout.protocol import SFT, Request
from raywarp.rollout.transformers_engine import TransformersEngine


@pytest.mark.parametrize(
    ("name", "cached"),
    [
        ("Llama", True),
        ("Mistral, window", True),
        ("Gemma-2", True),
        ("Phi-3, longrope", False),  # the probe passes its limit, which a run must not
        ("DeepSeek-V3.2", True),
        ("Doge", True),
        ("Jamba", True),
        ("Mamba", False),
        ("RWKV", False),
    ],
)
def test_sampled_and_scored_logprobs_are_the_trainers(
    name: str, cached: bool, tmp_path: Path
) -> None:
    family = FAMILIES[name]
    save_model(family, tmp_path)
    tree = {"engine": "transformers", "max_new_tokens": 12, "temperature": 1.0, "ignore_eos": True}
    engine = TransformersEngine(
        EngineSettings(
            str(tmp_path), "float32", 92, 2, parse_config({"rollout": tree}).rollout, gpu=False
        )
    )
    assert engine.cached == cached
    prompts = engine_prompts(family.build(), 12)
    (completions,) = finish(engine.sample([Request(prompts, list(range(len(prompts))), SFT)]))
    batch, model = collate(prompts, completions), trainer(tmp_path, family)
    (part,) = micro_batches(batch, pairs_per_token=model.pairs_per_token)
    own = model.logprobs(part, model.states(part, []), 1.0)[part.completions.argsort()]
    torch.testing.assert_close(batch.sampler_logprobs, own, rtol=0, atol=1e-4)
    whole = [
        [*prompt, *completion.token_ids]
        for prompt, completion in zip(prompts, completions, strict=True)
    ]
    (scored,) = finish(engine.logprobs([Request(whole, [0] * len(whole), SFT)]))
    torch.testing.assert_close(torch.tensor([row[-12:] for row in scored]), own, rtol=0, atol=1e-4)
