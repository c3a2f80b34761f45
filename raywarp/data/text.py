"""Prompts, completions, and which texts count as the same."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Completion:
    """What a rollout worker returns for one prompt.

    Attributes:
        token_ids: the sampled tokens, an emitted EOS included.
        logprobs: the sampler's log π of each token, at the sampling temperature.
        text: what follows the prompt's text, without special tokens, up to a stop string.
        finished: the completion ended by itself, at an EOS or a stop string (False: truncated at
            max_new_tokens).
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    text: str
    finished: bool


@dataclass(frozen=True)
class Prompt:
    """One prompt of a dataset.

    Attributes:
        text: what a reward sees, without any template; of a conversation with several turns, all of
            them as plain text.
        token_ids: what the policy sees.
        columns: the row's other columns.
        messages: the conversation that the chat template rendered; None without a template.
        undated: token_ids with a fixed date, which keys are made of; None where the template does
            not ask for the date.
    """

    text: str
    token_ids: tuple[int, ...]
    columns: dict[str, Any]
    messages: list[dict[str, Any]] | None = None
    undated: tuple[int, ...] | None = None


def text_key(text: str) -> str:
    """Return a key that is equal for texts that differ only in case, spaces and punctuation."""
    return "".join(c for c in text.casefold() if c.isalnum()) or text


def own_tokens(tokenizer: Any, texts: Sequence[str]) -> list[tuple[list[int], list[int]]]:
    """Return, for each text, the special tokens before it and the text's own tokens.

    A BOS that the text already had is dropped, and so is an EOS that the tokenizer appends.
    """
    encoded = tokenizer(list(texts), return_special_tokens_mask=True, verbose=False)
    rows = zip(encoded["input_ids"], encoded["special_tokens_mask"], strict=True)
    return [_own_tokens(list(ids), list(mask), tokenizer.bos_token_id) for ids, mask in rows]


def _own_tokens(ids: list[int], mask: list[int], bos: int | None) -> tuple[list[int], list[int]]:
    start = mask.index(0) if 0 in mask else len(ids)
    head, content = (
        ids[:start],
        [token for token, added in zip(ids[start:], mask[start:], strict=True) if not added],
    )
    return head, content[1:] if head and content[:1] == [bos] else content
