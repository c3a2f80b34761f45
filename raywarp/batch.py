"""Prompts and their completions as padded tensors.

N completions, P longest prompt, T longest completion. Prompts are padded on the left and completions on the right, so that
every response starts in column P and a model is asked for the logits of the last T + 1 columns only.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Completion:
    """What a rollout worker returns for one prompt.

    token_ids: the sampled tokens, an emitted EOS included.
    logprobs: the sampler's log π of each, at the sampling temperature.
    text: decoded without special tokens.
    finished: it ended by itself (False: truncated at max_new_tokens).
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    text: str
    finished: bool


@dataclass(frozen=True)
class Batch:
    """Shapes: input_ids, attention_mask, position_ids (N, P + T); responses, mask, sampler_logprobs (N, T)."""

    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    responses: Tensor
    mask: Tensor
    sampler_logprobs: Tensor

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    def split(self, size: int) -> list["Batch"]:
        """Micro-batches of at most `size` completions, in order."""
        parts = [tensor.split(size) for tensor in self._tensors()]
        return [Batch(*tensors) for tensors in zip(*parts, strict=True)]

    def to(self, device: torch.device) -> "Batch":
        return Batch(*(tensor.to(device) for tensor in self._tensors()))

    def _tensors(self) -> tuple[Tensor, ...]:
        return (self.input_ids, self.attention_mask, self.position_ids, self.responses, self.mask, self.sampler_logprobs)


def collate(prompts: Sequence[Sequence[int]], completions: Sequence[Completion]) -> Batch:
    """Pad prompts (token ids) and their completions; masks follow from lengths, so the padding token does not matter (0 is used)."""
    left = max(len(prompt) for prompt in prompts)
    right = max(len(completion.token_ids) for completion in completions)
    rows, attention, responses, mask, logprobs = [], [], [], [], []
    for prompt, completion in zip(prompts, completions, strict=True):
        before, length = left - len(prompt), len(completion.token_ids)
        after = [0] * (right - length)
        rows.append([0] * before + list(prompt) + list(completion.token_ids) + after)
        attention.append([0] * before + [1] * (len(prompt) + length) + after)
        responses.append(list(completion.token_ids) + after)
        mask.append([1.0] * length + [0.0] * len(after))
        logprobs.append(list(completion.logprobs) + [0.0] * len(after))
    attention_mask = torch.tensor(attention)
    return Batch(
        input_ids=torch.tensor(rows),
        attention_mask=attention_mask,
        position_ids=(attention_mask.cumsum(1) - 1).clamp(min=0),
        responses=torch.tensor(responses),
        mask=torch.tensor(mask),
        sampler_logprobs=torch.tensor(logprobs),
    )
