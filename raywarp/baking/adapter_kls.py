"""How far adapters change what a base model says about given texts, as KLs."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from raywarp.adapters.peft_config import BASE_QUANTIZE
from raywarp.algorithm.deltas import AdapterDelta
from raywarp.algorithm.factors import dense
from raywarp.config.schema import ConfigError
from raywarp.data.models import load_model, read_tokenizer
from raywarp.model.quantised import NF4, round_layers

TEXTS = (
    "The committee postponed its decision until the auditors had read the second report.",
    "To make the dough, mix flour, water, salt and yeast, and let it rest for an hour.",
    "I liked the first half of the film, but the ending felt rushed and left me cold.",
    "Question: Why is the sky blue? Answer: Because air scatters short wavelengths more.",
    "def mean(values):\n    return sum(values) / len(values)",
    "Dear Ms Lindqvist, thank you for your letter of 3 March about the damaged parcel.",
    "In 1969 two astronauts walked on the moon while a third kept watch above them.",
    "She said that prices would rise again in the autumn, and nobody at the table agreed.",
)


@torch.no_grad()
def text_kls(
    base: str, deltas: Sequence[AdapterDelta], texts: Sequence[str], init: AdapterDelta | None
) -> list[list[float]]:
    """Return KL(base + δ ‖ base + init) of every text in nats, for each adapter δ.

    A text's KL is the sum of the full-vocabulary KLs of the next token, over its positions.

    Args:
        base: a folder or hub id of a causal language model, which is read in float32.
        texts: N texts; those of one token or none count as 0.
        init: by default no change.

    Raises:
        ConfigError: the base cannot be read, or lacks a module of an adapter.
    """
    what = f"--base {base}"
    tokenizer = read_tokenizer(base, False, what)
    ids = [torch.tensor(tokenizer(text)["input_ids"], dtype=torch.long)[None] for text in texts]
    model = load_model(AutoModelForCausalLM, base, what, dtype=torch.float32).eval()
    if any(delta.peft.get(BASE_QUANTIZE) == NF4 for delta in deltas):
        round_layers(model)
    with _changed(model, init, what):
        references = [_logprobs(model, own) for own in ids]
    kls = []
    for delta in deltas:
        with _changed(model, delta, what):
            pairs = zip((_logprobs(model, own) for own in ids), references, strict=True)
            kls.append([float((p.exp() * (p - q)).sum()) for p, q in pairs])
    return kls


def _logprobs(model: Any, ids: Tensor) -> Tensor:
    """Return the (T − 1, V) float64 log-probs of the tokens after the first."""
    if ids.shape[1] < 2:
        return torch.zeros(0, 1, dtype=torch.float64)
    logits: Tensor = model(ids).logits[0, :-1]
    return logits.double().log_softmax(-1)


@contextmanager
def _changed(model: Any, delta: AdapterDelta | None, what: str) -> Iterator[None]:
    """Add an adapter's ΔW to the weights for the body."""
    before: list[tuple[Tensor, Tensor]] = []
    try:
        for name, factors in (delta.factors if delta else {}).items():
            try:
                module = model.get_submodule(name)
                change = dense(factors).T if isinstance(module, Conv1D) else dense(factors)
                weight: Tensor = module.weight.data
            except AttributeError:
                raise ConfigError(
                    f"{what} has no weight {name}, which an adapter changes"
                ) from None
            if weight.shape != change.shape:
                raise ConfigError(
                    f"{what}: {name} is {tuple(weight.shape)}, and an adapter changes"
                    f" {tuple(change.shape)}"
                )
            before.append((weight, weight.clone()))
            weight += change
        yield
    finally:
        for weight, old in before:
            weight.copy_(old)
