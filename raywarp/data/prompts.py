"""Prompts from the hub, a local folder or file, or the embedded ratings (embedded.py).

Everything random here is a function of the seed, and no prompt is in two splits.
"""

import hashlib
import json
import os
import random
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raywarp.config.datasets import SNIPPETS, PromptsConfig
from raywarp.config.schema import ConfigError
from raywarp.data import embedded
from raywarp.data.text import Prompt, PromptSplits
from raywarp.identity import derive_seed

if TYPE_CHECKING:
    import datasets

FORMATS = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".csv": "csv"}
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def resolve_model(name: str, what: str = "model") -> str:
    """Return a local folder's absolute path, or a hub id unchanged; fetch an embedded model.

    Args:
        what: names the thing in messages.

    Raises:
        ConfigError: a folder that does not exist or holds no model.
    """
    name = embedded.resolve(name)
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ConfigError(f"{what} folder {name} has no config.json; it does not hold a model")
        return os.path.abspath(folder)
    if folder.is_file():
        raise ConfigError(
            f"{what} {name} is a file; it must be a folder with config.json and weights, or a"
            " hub id"
        )
    if _is_path(name):
        raise ConfigError(f"{what} folder {name} does not exist (in {os.getcwd()})")
    return name


def _is_path(name: str) -> bool:
    """Return whether a name that does not exist here is a path rather than a hub id.

    It is one if its first folder exists here, or if it cannot be an id.
    """
    first = name.partition("/")[0]
    return (
        not HUB_ID.fullmatch(name)
        or first in (".", "..", "~", "runs")
        or ("/" in name and Path(first).is_dir())
    )


def load_rows(dataset: str, name: str | None = None, split: str = "train") -> "datasets.Dataset":
    """Load one split of a dataset.

    Args:
        dataset: a hub id, a local folder, or a local parquet, JSONL, JSON or CSV file, whose only
            split is train.
        name: the dataset's configuration (subset).

    Raises:
        ConfigError: it does not exist, cannot be reached or read, has no such subset or split, or
            is empty.
    """
    import datasets  # here, so that a Ray actor that only needs Prompt starts faster

    datasets.disable_progress_bars()
    # The library logs what it raises, with a traceback.
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    if dataset.startswith(embedded.EMBEDDED):
        raise ConfigError(f"unknown embedded dataset '{dataset}'; there is {SNIPPETS}")
    path = Path(dataset).expanduser()
    kind = FORMATS.get(path.suffix)
    if path.is_file() and kind is None:
        raise ConfigError(f"dataset file {dataset} is none of {', '.join(FORMATS)}")
    if not path.exists() and (kind or _is_path(dataset)):
        raise ConfigError(f"dataset {dataset} does not exist (in {os.getcwd()})")
    source = (
        {"path": kind, "data_files": str(path)}
        if path.is_file()
        else {"path": str(path) if path.is_dir() else dataset, "name": name}
    )
    try:
        rows = datasets.load_dataset(split=split, **source)
    # datasets passes errors of pyarrow, pandas, httpx and the hub through unchanged
    except Exception as error:
        reason = " ".join(str(error.__cause__ or error).split())[:400]
        raise ConfigError(f"cannot load split '{split}' of dataset {dataset}: {reason}") from None
    if not len(rows):
        raise ConfigError(f"split '{split}' of dataset {dataset} is empty")
    return rows


def load_prompts(
    config: PromptsConfig, tokenizer: Any, seed: int, max_prompt_tokens: int
) -> PromptSplits:
    """Load prompts: cut, rendered and tokenized once, each token sequence once.

    No prompt is in both splits. Empty ones are dropped.

    Args:
        tokenizer: the policy's. With template=none it adds its default special tokens, but no EOS
            at the end.
        seed: of the split, and of the lengths that prompts are cut to.
        max_prompt_tokens: the longest prompt that leaves room for a completion, template included.

    Raises:
        ConfigError: see load_rows; a missing column, a prompt that is too long, or nothing left in
            a split.
    """
    render = _PromptRenderer(config, tokenizer, seed, max_prompt_tokens)
    if config.dataset == SNIPPETS:
        parts = embedded.split_snippets(seed)
        train, held_out = (
            render([{config.column: s.text} for s in part])
            for part in (parts.rl_prompts, parts.held_out)
        )
    else:
        train = render(load_rows(config.dataset, config.name, config.split))
        if config.held_out_split is not None:
            held_out = render(load_rows(config.dataset, config.name, config.held_out_split))
        else:
            random.Random(derive_seed(seed, "prompts")).shuffle(train)
            count = max(1, round(len(train) * config.held_out_fraction))
            train, held_out = train[count:], train[:count]
    evaluated = {prompt.token_ids for prompt in held_out}
    splits = PromptSplits(
        [prompt for prompt in train if prompt.token_ids not in evaluated], held_out
    )
    if not (splits.train and splits.held_out):
        sizes = f"{len(splits.train)} for training, {len(splits.held_out)} held out"
        raise ConfigError(
            f"prompts.dataset={config.dataset} has too few prompts, once empty and repeated ones"
            f" are dropped: {sizes}"
        )
    return splits


class _PromptRenderer:
    """Turn rows into prompts, in the rows' order, each token sequence once."""

    def __init__(
        self, config: PromptsConfig, tokenizer: Any, seed: int, max_prompt_tokens: int
    ) -> None:
        self.config, self.tokenizer, self.seed, self.max_prompt_tokens = (
            config,
            tokenizer,
            seed,
            max_prompt_tokens,
        )
        if config.template == "chat" and not tokenizer.chat_template:
            raise ConfigError(
                "prompts.template=chat, but the model's tokenizer has no chat template; use"
                " prompts.template=none"
            )

    def __call__(self, rows: Iterable[dict[str, Any]]) -> list[Prompt]:
        prompts: dict[tuple[int, ...], Prompt] = {}
        for row in rows:
            if self.config.column not in row:
                raise ConfigError(
                    f"prompts.column={self.config.column}: the dataset's columns are"
                    f" {', '.join(row)}"
                )
            prompt = self.render(row)
            if prompt is not None and prompt.text.strip():
                prompts.setdefault(prompt.token_ids, prompt)
        return list(prompts.values())

    def render(self, row: dict[str, Any]) -> Prompt | None:
        """Return a row's prompt, or None where the text has fewer than min_tokens."""
        text = row[self.config.column] or ""
        if not isinstance(text, str):
            raise ConfigError(
                f"prompts.column={self.config.column} holds a {type(text).__name__}; it must hold"
                " texts"
            )
        if self.config.max_words is not None:
            text = " ".join(text.split()[: self.config.max_words])
        head, content = own_tokens(self.tokenizer, text)
        if len(content) < (self.config.min_tokens or 0):
            return None
        longest = self.longest(text)
        if longest is not None and len(content) > longest:
            content, text = self.cut(content[:longest])
        token_ids = self.chat(text) if self.config.template == "chat" else (*head, *content)
        if len(token_ids) > self.max_prompt_tokens:
            raise ConfigError(
                f"the prompt '{text[:60]}' has {len(token_ids)} tokens, the limit is"
                f" {self.max_prompt_tokens}; set prompts.max_tokens"
            )
        return Prompt(
            text, token_ids, {key: value for key, value in row.items() if key != self.config.column}
        )

    def longest(self, text: str) -> int | None:
        """Return how many tokens the text keeps; None stands for all.

        With both limits, the number depends on the seed and the text alone.
        """
        shortest, longest = self.config.min_tokens, self.config.max_tokens
        if shortest is None or longest is None:
            return longest
        return shortest + derive_seed(self.seed, "prompt length", text) % (longest - shortest + 1)

    def cut(self, content: list[int]) -> tuple[list[int], str]:
        """Return tokens and their text, without the bytes of a character that was cut in two."""
        text = self.tokenizer.decode(content, clean_up_tokenization_spaces=False)
        return self.cut(content[:-1]) if text.endswith("\ufffd") else (content, text)

    def chat(self, text: str) -> tuple[int, ...]:
        turns = [{"role": "user", "content": text}]
        rendered = self.tokenizer.apply_chat_template(
            turns, add_generation_prompt=True, tokenize=False
        )
        return tuple(self.tokenizer(rendered, add_special_tokens=False, verbose=False)["input_ids"])


def own_tokens(tokenizer: Any, text: str) -> tuple[list[int], list[int]]:
    """Return the special tokens before a text, and the text's own tokens.

    A BOS that the text already had is dropped.
    """
    encoded = tokenizer(text, return_special_tokens_mask=True, verbose=False)
    ids, special = encoded["input_ids"], encoded["special_tokens_mask"]
    start = special.index(0) if 0 in special else len(ids)
    head, content = (
        ids[:start],
        [token for token, added in zip(ids[start:], special[start:], strict=True) if not added],
    )
    return head, content[1:] if head and content[:1] == [tokenizer.bos_token_id] else content


def prompts_fingerprint(prompts: Sequence[Prompt]) -> str:
    """Return the sha256, in hex, of every prompt's text, token ids and columns, in order."""
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(
            json.dumps(
                [prompt.text, prompt.token_ids, prompt.columns], sort_keys=True, default=str
            ).encode()
            + b"\n"
        )
    return digest.hexdigest()
