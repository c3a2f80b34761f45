"""The vLLM worker for real, in both adapter modes, against transformers' own logits; and the checks around a swap."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import WORDS
from safetensors.torch import load_file

from raywarp import losses
from raywarp.adapted_model import AdaptedModel
from raywarp.adapters import AdapterDelta, Factors, dense
from raywarp.batch import Completion, collate
from raywarp.config import Config, ConfigError, LoraConfig, parse_config
from raywarp.rollout import AdapterPart, Rollout, RolloutError, checkpoint_files, join, lora_rank, merged_weights, submit
from raywarp.session import Session

PROMPT_TOKENS = 140  # longer than a block of vLLM's KV cache on CPUs (128), where stale prefixes would show


def trained_model(folder: Path, names: tuple[str, ...]) -> AdaptedModel:
    """Adapters with a change large enough to see."""
    model = AdaptedModel(str(folder), LoraConfig(rank=2, alpha=4.0), torch.float32, torch.device("cpu"))
    for n, name in enumerate(names):
        model.add_policy(name, seed=n)
        for key, tensor in model.tensors(name).items():
            if key.endswith(".B"):
                tensor.data.normal_(0, 0.3, generator=torch.Generator().manual_seed(n))
    return model


def config_for(folder: Path, mode: str) -> Config:
    return parse_config(
        {
            "model": str(folder),
            "dtype": "float32",
            "reward": {"function": "raywarp.embedded:vader"},
            "lora": {"rank": 2, "alpha": 4},
            "warp": {"iterations": 1, "policies": 2},
            "optim": {"batch_size": 8},
            "rollout": {"adapter": mode, "max_new_tokens": 12, "temperature": 0.8, "workers": 2},
            "cluster": {"threads": 1},
        }
    )


@pytest.mark.parametrize("mode", ["merged", "lora"])
def test_every_swap_samples_from_the_adapter_that_was_asked_for(ray_cluster: Any, tiny_llama: Path, mode: str) -> None:
    """SFT, one adapter, another under way, the first again, the sum of both: trainer and sampler agree each time, and nothing is stale."""
    model = trained_model(tiny_llama, ("one", "two"))
    parts = {name: AdapterPart.put(model.delta(name)) for name in ("one", "two")}
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, len(WORDS), (PROMPT_TOKENS if n else 3,), generator=generator).tolist() for n in range(8)]
    seeds = list(range(8))
    with Session(config_for(tiny_llama, mode), str(tiny_llama), PROMPT_TOKENS, policies=False) as session:
        texts = {}
        for names in ((), ("one",), ("two",), ("one",), ("one", "two"), ()):
            adapter = [parts[name] for name in names]
            refs = submit(session.workers, prompts, seeds, adapter)
            assert len(refs) == 2  # both workers take part
            completions = join(ray_cluster.get(refs), adapter)
            batch = collate(prompts, completions)
            own = losses.token_logprobs(model.logits(batch, list(names)), batch.responses, 0.8)
            assert losses.sampler_gap(own, batch.sampler_logprobs, batch.mask) < 1e-3, names
            other = losses.token_logprobs(model.logits(batch, ["two"] if names != ("two",) else []), batch.responses, 0.8)
            assert losses.sampler_gap(other, batch.sampler_logprobs, batch.mask) > 0.05, names
            tokens = [c.token_ids for c in completions]
            assert texts.setdefault(names, tokens) == tokens, names  # same seeds, same adapter, same tokens
            assert all(c.token_ids[-1] == 2 if c.finished else len(c.token_ids) == 12 for c in completions)  # an emitted EOS belongs to it
        assert len({str(t) for t in texts.values()}) == 4


def test_merged_weights_are_pristine_plus_change_in_float32(tiny_llama: Path, tiny_gpt2: Path) -> None:
    for folder, transposed in ((tiny_llama, False), (tiny_gpt2, True)):
        model = trained_model(folder, ("one",))
        delta = model.delta("one")
        assert delta.fan_in_fan_out == transposed
        pristine = load_file(folder / "model.safetensors")
        merged = dict(merged_weights(checkpoint_files(str(folder)), delta))
        assert merged.keys() == pristine.keys()
        for name, weight in pristine.items():
            module = next((m for m in delta.factors if name == f"{m}.weight"), None)
            change = dense(delta.factors[module]) if module else torch.zeros(())
            torch.testing.assert_close(merged[name], (weight.double() + (change.T if transposed else change)).float(), rtol=1e-5, atol=1e-6)


def test_a_module_without_a_weight_is_not_dropped_in_silence(tiny_llama: Path) -> None:
    delta = AdapterDelta({"model.layers.9.mlp.up_proj": Factors(torch.ones(4, 1), torch.ones(1, 4))})
    with pytest.raises(RolloutError, match=r"no weight for the adapted module model\.layers\.9"):
        list(merged_weights(checkpoint_files(str(tiny_llama)), delta))


def test_no_safetensors_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no \*\.safetensors"):
        checkpoint_files(str(tmp_path))


def test_a_mixed_up_swap_stops_with_worker_and_version() -> None:
    completion = Completion((3,), (-1.0,), "the", False)
    adapter = [AdapterPart("a" * 64, None)]
    good, stale = Rollout([completion], ("a" * 64,)), Rollout([completion], ("b" * 64,))
    assert join([good, good], adapter) == [completion, completion]
    with pytest.raises(RolloutError, match="rollout worker 2 sampled from adapter bbbbbbbb instead of aaaaaaaa"):
        join([good, stale], adapter)
    with pytest.raises(RolloutError, match="adapter none instead of aaaaaaaa"):
        join([Rollout([completion], ())], adapter)


def test_ranks_that_vllm_has_slots_for() -> None:
    assert [lora_rank(rank) for rank in (1, 8, 9, 65, 512)] == [8, 8, 16, 128, 512]
    with pytest.raises(ConfigError, match="rollout.adapter=merged"):
        lora_rank(513)
