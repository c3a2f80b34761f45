"""Batches of completions, padded on the right, and micro-batches: rows for one forward pass each.

A row is a prompt followed by one completion or by several. With several, the prompt is computed
once, and a completion's tokens attend only to the prompt and to their own completion. A response's
last token is left out of the row, since nothing is predicted from it.

R rows, L tokens in a row, C completions, n response tokens, T the longest completion of the batch.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from raywarp.data.text import Completion


@dataclass(frozen=True)
class Batch:
    """N completions with their prompts.

    Attributes:
        prompts: N sequences of token ids.
        responses: (N, T) token ids.
        mask: (N, T), 1 on response tokens.
        sampler_logprobs: (N, T).
    """

    prompts: tuple[tuple[int, ...], ...]
    responses: Tensor
    mask: Tensor
    sampler_logprobs: Tensor

    def __len__(self) -> int:
        return len(self.prompts)

    def to(self, device: torch.device) -> "Batch":
        return Batch(
            self.prompts,
            *(tensor.to(device) for tensor in (self.responses, self.mask, self.sampler_logprobs)),
        )


def collate(prompts: Sequence[Sequence[int]], completions: Sequence[Completion]) -> Batch:
    """Pad completions to a Batch.

    The mask follows from the lengths, so the padding token (0) does not matter.
    """
    longest = max(len(completion.token_ids) for completion in completions)
    responses, mask, logprobs = [], [], []
    for completion in completions:
        length = len(completion.token_ids)
        after = [0] * (longest - length)
        responses.append(list(completion.token_ids) + after)
        mask.append([1.0] * length + [0.0] * len(after))
        logprobs.append(list(completion.logprobs) + [0.0] * len(after))
    return Batch(
        tuple(tuple(p) for p in prompts),
        torch.tensor(responses),
        torch.tensor(mask),
        torch.tensor(logprobs),
    )


@dataclass(frozen=True)
class MicroBatch:
    """One forward pass's share of a batch.

    Attributes:
        shape: (C, T).
        segments: (R, L): 0 in the prompt, k in its k-th completion, −1 on padding. A token attends
            to those before it in its own segment and in the prompt. None where each row is one
            sequence and attention is plainly causal.
        completions: (C,) indices into the batch.
        input_ids: (R, L).
        positions: (R, L).
        sources: (n,) indices into the R·L tokens: the token whose state predicts each response
            token.
        tokens: (n,) the response tokens.
        places: (n,) index of each in (C, T), flattened.
    """

    shape: tuple[int, int]
    segments: Tensor | None
    completions: Tensor
    input_ids: Tensor
    positions: Tensor
    sources: Tensor
    tokens: Tensor
    places: Tensor

    def padded(self, values: Tensor) -> Tensor:
        """Return (C, T) from (n,), zero on padding; differentiable."""
        return (
            values.new_zeros(self.shape[0] * self.shape[1])
            .index_put((self.places,), values)
            .view(self.shape)
        )


@dataclass(frozen=True)
class _Row:
    """A prompt and the completions after it.

    Attributes:
        completions: indices into the batch.
        length: in tokens.
    """

    completions: tuple[int, ...]
    length: int


def micro_batches(
    batch: Batch, max_tokens: int | None = None, pairs_per_token: float | None = None
) -> list[MicroBatch]:
    """Lay a batch out in micro-batches, with rows of similar length together.

    Args:
        batch: N completions.
        max_tokens: the most tokens of a micro-batch, padding included; None for no limit. A longer
            single row gets a micro-batch of its own.
        pairs_per_token: how many query–key pairs of attention cost as much as a token elsewhere in
            the model. Completions share a row with their prompt where that is cheaper. None forbids
            sharing, for a model that does not support it.
    """
    lengths = [int(length) for length in batch.mask.sum(-1).tolist()]
    units = list(_units(batch, lengths, max_tokens, pairs_per_token))
    return [_lay_out(batch, lengths, rows) for rows in _fill(units, max_tokens)]


def is_whole(completions: Tensor, size: int) -> bool:
    """Return whether these indices are groups of `size`, each complete and in order."""
    if len(completions) % size:
        return False
    groups = completions.view(-1, size)
    wanted = groups[:, :1] + torch.arange(size, device=groups.device)
    return bool((groups == wanted).all() and (groups[:, 0] % size == 0).all())


def _units(
    batch: Batch, lengths: Sequence[int], max_tokens: int | None, pairs_per_token: float | None
) -> Iterator[list[_Row]]:
    """Yield the rows of each prompt's completions. They stay together where the budget allows."""
    for _, run in groupby(range(len(batch)), key=batch.prompts.__getitem__):
        indices = tuple(run)
        prompt = len(batch.prompts[indices[0]])
        separate = [_Row((n,), prompt + lengths[n] - 1) for n in indices]
        shared = _Row(indices, prompt + sum(lengths[n] - 1 for n in indices))
        fits = max_tokens is None or shared.length <= max_tokens
        if (
            pairs_per_token is not None
            and fits
            and _cost([shared], pairs_per_token) < _cost(separate, pairs_per_token)
        ):
            yield [shared]
        elif (
            max_tokens is None or len(separate) * max(row.length for row in separate) <= max_tokens
        ):
            yield separate
        else:
            yield from ([row] for row in separate)


def _cost(rows: Sequence[_Row], pairs_per_token: float) -> float:
    return sum(row.length * pairs_per_token + row.length**2 for row in rows)


def _fill(units: list[list[_Row]], max_tokens: int | None) -> Iterator[list[_Row]]:
    """Yield groups of rows, the longest first, as many as the budget allows."""
    rows: list[_Row] = []
    for unit in sorted(units, key=lambda unit: -max(row.length for row in unit)):
        longest = max(row.length for row in rows + unit)
        if rows and max_tokens is not None and (len(rows) + len(unit)) * longest > max_tokens:
            yield rows
            rows = []
        rows = rows + unit
    yield rows


def _lay_out(batch: Batch, lengths: Sequence[int], rows: Sequence[_Row]) -> MicroBatch:
    width, longest = max(row.length for row in rows), batch.responses.shape[1]
    responses = batch.responses.cpu()
    completions = [n for row in rows for n in row.completions]
    input_ids = torch.zeros(len(rows), width, dtype=torch.long)
    positions = torch.arange(width).repeat(len(rows), 1)
    segments = torch.full((len(rows), width), -1)
    sources: list[int] = []
    for r, row in enumerate(rows):
        prompt = batch.prompts[row.completions[0]]
        start = first = len(prompt)
        input_ids[r, :first], segments[r, :first] = torch.tensor(prompt), 0
        for k, n in enumerate(row.completions, start=1):
            end = start + lengths[n] - 1
            input_ids[r, start:end] = responses[n, : end - start]
            positions[r, start:end] = torch.arange(first, first + end - start)
            segments[r, start:end] = k
            sources += [r * width + p for p in (first - 1, *range(start, end))]
            start = end
    shared = segments.to(batch.mask.device) if len(rows) < len(completions) else None
    chosen = torch.tensor(completions)
    places = batch.mask.cpu()[chosen].flatten().nonzero().squeeze(-1)
    tensors = (
        chosen,
        input_ids,
        positions,
        torch.tensor(sources),
        responses[chosen].flatten()[places],
        places,
    )
    on_device = [tensor.to(batch.mask.device) for tensor in tensors]
    return MicroBatch((len(completions), longest), shared, *on_device)
