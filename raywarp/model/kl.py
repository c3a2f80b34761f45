"""The KL between two policies on one base, over completions that the first has sampled."""

from collections.abc import Sequence

import torch

from raywarp.config.schema import Config
from raywarp.model.adapted import AdaptedModel
from raywarp.model.batches import Batch, micro_batches


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
