"""Prompts and their completions, as tensors padded on the right.

N completions, T the longest of them. How they are laid out for a model is packing.py's matter.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from raywarp.data.completion import Completion


@dataclass(frozen=True)
class Batch:
    """prompts: N sequences of token ids. responses, mask, sampler_logprobs: (N, T); a mask is 1 on response tokens."""

    prompts: tuple[tuple[int, ...], ...]
    responses: Tensor
    mask: Tensor
    sampler_logprobs: Tensor

    def __len__(self) -> int:
        return len(self.prompts)

    def to(self, device: torch.device) -> "Batch":
        return Batch(self.prompts, *(tensor.to(device) for tensor in (self.responses, self.mask, self.sampler_logprobs)))


def collate(prompts: Sequence[Sequence[int]], completions: Sequence[Completion]) -> Batch:
    """Pad completions; the mask follows from lengths, so the padding token does not matter (0 is used)."""
    longest = max(len(completion.token_ids) for completion in completions)
    responses, mask, logprobs = [], [], []
    for completion in completions:
        length = len(completion.token_ids)
        after = [0] * (longest - length)
        responses.append(list(completion.token_ids) + after)
        mask.append([1.0] * length + [0.0] * len(after))
        logprobs.append(list(completion.logprobs) + [0.0] * len(after))
    return Batch(tuple(tuple(p) for p in prompts), torch.tensor(responses), torch.tensor(mask), torch.tensor(logprobs))
