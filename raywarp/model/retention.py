"""What a model keeps: the cross-entropy of texts that have nothing to do with the reward."""

from collections.abc import Sequence

import torch

from raywarp.data.text import Completion
from raywarp.model.adapted import AdaptedModel
from raywarp.model.batches import Batch, collate, micro_batches


def text_losses(
    model: AdaptedModel, texts: Sequence[Sequence[int]], adapters: Sequence[str], max_tokens: int
) -> list[float]:
    """Return the cross-entropy of each text in nats, summed over its tokens after the first.

    It is that of the plain softmax, at temperature 1, whatever the temperature of the sampling.

    Args:
        texts: token ids, at least two of each.
        adapters: those that take part; none of them gives the SFT model.
        max_tokens: the most tokens of a forward pass, padding included.
    """
    batch = _as_completions(texts).to(model.device)
    losses = torch.zeros(len(batch), dtype=torch.float64)
    for part in micro_batches(batch, max_tokens):
        logprobs = model.logprobs(part, model.states(part, adapters), temperature=1.0)
        losses[part.completions.cpu()] = -logprobs.double().sum(-1).cpu()
    return losses.tolist()


def _as_completions(texts: Sequence[Sequence[int]]) -> Batch:
    """Return texts as completions of their own first token."""
    rest = [tuple(text[1:]) for text in texts]
    completions = [Completion(tokens, (0.0,) * len(tokens), "", True) for tokens in rest]
    return collate([text[:1] for text in texts], completions)
