"""Prompts, completions, and which texts count as the same."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Completion:
    """What a rollout worker returns for one prompt.

    Attributes:
        token_ids: the sampled tokens, an emitted EOS included.
        logprobs: the sampler's log π of each token, at the sampling temperature.
        text: decoded without special tokens.
        finished: the completion ended by itself (False: truncated at max_new_tokens).
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    text: str
    finished: bool


@dataclass(frozen=True)
class Prompt:
    """One prompt of a dataset.

    Attributes:
        text: what a reward sees, without any template.
        token_ids: what the policy sees.
        columns: the row's other columns.
    """

    text: str
    token_ids: tuple[int, ...]
    columns: dict[str, Any]


@dataclass(frozen=True)
class PromptSplits:
    train: list[Prompt]
    held_out: list[Prompt]

    @property
    def longest(self) -> int:
        """Length of the longest prompt, in tokens."""
        return max(len(prompt.token_ids) for prompt in [*self.train, *self.held_out])

    def tracked(self, count: int) -> list[Prompt]:
        """Return the held-out prompts that policies are measured on while they train.

        They are the last ones. The front is measured on the first.
        """
        return self.held_out[-count:]


def text_key(text: str) -> str:
    """Return a key that is equal for texts that differ only in case, spaces and punctuation."""
    return "".join(c for c in text.casefold() if c.isalnum()) or text
