"""What a policy does to texts: its KL to another policy, and its cross-entropy on given texts."""

from collections.abc import Sequence

import torch

from raywarp.config.schema import Config
from raywarp.data.text import Completion
from raywarp.model.adapted import AdaptedModel
from raywarp.model.batches import Batch, collate, micro_batches


def completion_kls(
    model: AdaptedModel,
    batch: Batch,
    config: Config,
    adapters: Sequence[str],
    reference: Sequence[str] = (),
) -> list[float]:
    """Return the full-vocabulary KL(π ‖ π_ref) of each completion, in nats.

    Args:
        batch: N completions, sampled from π.
        config: its sampling temperature and size of micro-batches are used.
        adapters: the base with these adapters is π.
        reference: the base with these adapters is π_ref; none of them is the SFT model.
    """
    batch = batch.to(model.device)
    kl = torch.zeros(len(batch), device=model.device)
    most = config.optim.max_tokens_per_microbatch
    for part in micro_batches(batch, most, model.pairs_per_token):
        policy, other = model.states(part, list(adapters)), model.states(part, list(reference))
        kl[part.completions] = model.completion_kl(part, policy, other, config.rollout.temperature)
    values: list[float] = kl.tolist()
    return values


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
