"""One sampled text, as it travels between processes that need not know tensors."""

from dataclasses import dataclass


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
