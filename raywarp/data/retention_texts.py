"""The texts that show what a policy keeps, in the policy's tokens; see run/points.py."""

from collections.abc import Iterator
from itertools import islice
from typing import Any

from raywarp.config.datasets import EDITORIALS, SNIPPETS
from raywarp.config.schema import Config, ConfigError
from raywarp.data import embedded
from raywarp.data.rows import load_rows
from raywarp.data.text import own_tokens

Tokens = tuple[int, ...]


def retention_dataset(config: Config) -> str | None:
    """Return the dataset of the texts, or None where the run has no such texts.

    By default it is the editorials where the prompts are the embedded ones.
    """
    embedded_alone = config.prompts.dataset == SNIPPETS and not config.prompts.datasets
    default = EDITORIALS if embedded_alone else None
    return config.retention.dataset or default


def load_texts(config: Config, dataset: str, tokenizer: Any, context: int) -> list[Tokens]:
    """Return the tokens of the first texts of two tokens or more, cut to retention.max_tokens.

    Args:
        dataset: see retention_dataset.
        tokenizer: the policy's. It adds its default special tokens, but no EOS at the end.
        context: the most tokens that the model takes.

    Raises:
        ConfigError: the dataset cannot be read, lacks the column or has no usable text; or the
            model does not take so many tokens.
    """
    settings = config.retention
    if settings.max_tokens > context:
        raise ConfigError(
            f"retention.max_tokens={settings.max_tokens} is more than the model's context of"
            f" {context} tokens"
        )
    tokens = (_tokens(tokenizer, text)[: settings.max_tokens] for text in _texts(config, dataset))
    texts = list(islice((one for one in tokens if len(one) > 1), settings.texts))
    if not texts:
        raise ConfigError(
            f"retention.dataset={dataset} has no text of two tokens or more in its column"
            f" {settings.column}"
        )
    return texts


def _texts(config: Config, dataset: str) -> Iterator[str]:
    settings = config.retention
    if dataset == EDITORIALS:
        yield from embedded.editorials()
        return
    if dataset.startswith(embedded.EMBEDDED):
        raise ConfigError(f"retention.dataset={dataset} is not embedded; there is {EDITORIALS}")
    rows = load_rows(dataset, settings.name, settings.split)
    if settings.column not in rows.column_names:
        raise ConfigError(
            f"retention.column={settings.column}: the dataset's columns are"
            f" {', '.join(rows.column_names)}"
        )
    for row in rows:
        text = row[settings.column] or ""
        if not isinstance(text, str):
            raise ConfigError(
                f"retention.column={settings.column} holds a {type(text).__name__}; it must hold"
                " texts"
            )
        yield text


def _tokens(tokenizer: Any, text: str) -> Tokens:
    ((head, content),) = own_tokens(tokenizer, [text])
    return (*head, *content)
