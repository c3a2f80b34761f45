"""Prompts from datasets, or the embedded ratings (embedded.py), in the policy's tokens.

Everything random here is a function of the seed, and no prompt is in two splits.
"""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from raywarp.config.datasets import SNIPPETS, PromptsConfig, PromptSource
from raywarp.config.schema import ConfigError
from raywarp.data import embedded
from raywarp.data.prompt_set.order import (
    Grouped,
    Split,
    distinct,
    held_back,
    mixed,
    of_two,
    seed_of,
    without_evaluated,
)
from raywarp.data.prompt_set.rendering import EMPTY, KEPT, LONG, PromptRenderer
from raywarp.data.prompt_set.table import Part, Prompts, PromptSplits
from raywarp.data.prompt_set.tokenising import rendered
from raywarp.data.rows import is_path, load_rows, with_values
from raywarp.data.text import Prompt

if TYPE_CHECKING:
    import datasets


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
    if is_path(name):
        raise ConfigError(f"{what} folder {name} does not exist (in {os.getcwd()})")
    return name


def load_prompts(
    config: PromptsConfig,
    tokenizer: Any,
    seed: int,
    max_prompt_tokens: int,
    say: Callable[[str], None] = lambda line: None,
    moment: Callable[[], datetime | None] = lambda: None,
) -> PromptSplits:
    """Load prompts: cut, rendered and tokenized once.

    No prompt is in both splits. Empty ones are dropped, and rows that are equal in tokens and
    columns count once.

    Args:
        tokenizer: the policy's. With template=none it adds its default special tokens, but no EOS
            at the end.
        seed: of the split, and of the lengths that prompts are cut to.
        max_prompt_tokens: the longest prompt that leaves room for a completion, template included.
        say: gets a line now and then, while many rows are tokenised.
        moment: gives the time for a template that asks for the date; None stands for now.

    Raises:
        ConfigError: see load_rows; a missing column, a row that is neither text nor messages, a
            prompt that is too long or that the template refuses, or nothing left in a split.
    """
    loaded, rendered_at = list[list[Part]](), None
    for source in config.sources:
        own = config.model_copy(
            update={
                "dataset": source.dataset,
                "column": source.column or config.column,
                "where": source.where,
            }
        )
        renderer = PromptRenderer(own, tokenizer, seed, max_prompt_tokens)
        if renderer.is_dated:
            rendered_at = rendered_at or (moment() or datetime.now()).replace(microsecond=0)
            renderer.moment = rendered_at
        loaded.append([_part(rows, own, renderer, say) for rows in _rows(source, own.column, seed)])
    splits = _split(config, loaded, seed)
    if not (len(splits.train) and len(splits.held_out)):
        sizes = f"{len(splits.train)} for training, {len(splits.held_out)} held out"
        named = ", ".join(source.dataset for source in config.sources)
        raise ConfigError(
            f"prompts.dataset={named} has too few prompts, once empty and repeated ones"
            f" are dropped: {sizes}"
        )
    return replace(splits, rendered_at=rendered_at.isoformat() if rendered_at else None)


def _rows(source: PromptSource, column: str, seed: int) -> list["datasets.Dataset"]:
    """Return the rows of a dataset: those to train on and those held out, or both as one."""
    if source.dataset == SNIPPETS:
        import datasets

        parts = embedded.split_snippets(seed)
        return [
            datasets.Dataset.from_dict({column: [snippet.text for snippet in part]})
            for part in (parts.rl_prompts, parts.held_out)
        ]
    splits = [source.split, *([source.held_out_split] if source.held_out_split else [])]
    return [load_rows(source.dataset, source.name, split) for split in splits]


def _part(
    rows: "datasets.Dataset",
    config: PromptsConfig,
    renderer: PromptRenderer,
    say: Callable[[str], None],
) -> Part:
    """Return the prompts of one split.

    Raises:
        ConfigError: it lacks the column; or see with_values and PromptRenderer.drafts.
    """
    if config.column not in rows.column_names:
        raise ConfigError(
            f"prompts.column={config.column}: the dataset's columns are"
            f" {', '.join(rows.column_names)}"
        )
    rows = with_values(rows, config.where, config.dataset)
    others = tuple(name for name in rows.column_names if name != config.column)
    return Part(rows, config.column, rendered(rows, renderer, say), config, others)


def _split(config: PromptsConfig, loaded: Sequence[Sequence[Part]], seed: int) -> PromptSplits:
    """Return the prompts of all datasets in their splits, mixed by weight."""
    parts = [part for of_source in loaded for part in of_source]
    names = dict.fromkeys(name for part in parts for name in part.columns)
    parts = [replace(part, columns=tuple(names)) for part in parts]
    groups, same = (
        np.unique(np.concatenate([part.digests(name) for part in parts]), return_inverse=True)[1]
        for name in ("group", "same")
    )
    starts = np.cumsum([0, *(len(part.found) for part in parts)])
    grouped = iter(
        Grouped.of(distinct(start + np.flatnonzero(part.numbers("state") == KEPT), same), groups)
        for part, start in zip(parts, starts, strict=False)
    )
    splits = [
        _split_source(config, source, number, [next(grouped) for _ in of_source], seed)
        for number, (source, of_source) in enumerate(zip(config.sources, loaded, strict=True))
    ]
    evaluated = np.unique(groups[np.concatenate([split.held_out for split in splits])])
    splits = [without_evaluated(split, groups, evaluated) for split in splits]
    final = mixed(splits, [source.weight for source in config.sources])
    train, held_out, sampled = (
        Prompts(parts, order) for order in (final.train, final.held_out, final.sampled)
    )
    train.release()
    return PromptSplits(train, held_out, sampled, notes=_notes(parts))


def _split_source(
    config: PromptsConfig, source: PromptSource, number: int, parts: Sequence[Grouped], seed: int
) -> Split:
    if len(parts) == 1:
        return held_back(parts[0], config.held_out_fraction, seed_of(seed, number, "prompts"))
    train, held_out = parts
    if source.dataset == SNIPPETS:  # its parts are in a random order
        return of_two(train, held_out, None)
    seeds = seed_of(seed, number, "held out"), seed_of(seed, number, "sample")
    return of_two(train, held_out, seeds)


def _notes(parts: Sequence[Part]) -> tuple[str, ...]:
    """Return a line for each part that rows were left out of, because of what they hold."""
    notes = []
    for part in parts:
        states = part.numbers("state")
        for state, what in ((EMPTY, "empty"), (LONG, "too long (prompts.too_long=drop)")):
            if count := int((states == state).sum()):
                notes.append(
                    f"prompts: {count:,} of {len(states):,} rows of {part.config.dataset} left"
                    f" out: {what}"
                )
    return tuple(notes)


def prompts_fingerprint(prompts: Sequence[Prompt]) -> str:
    """Return the sha256, in hex, of every prompt's text, token ids, columns and turns, in order.

    Where a template asks for the date, the tokens are those of a fixed one.
    """
    digest = hashlib.sha256()
    for prompt in prompts:
        told = [prompt.text, prompt.undated or prompt.token_ids, prompt.columns]
        # Messages came later. A single user turn says no more than the text.
        if prompt.messages and prompt.messages != [{"role": "user", "content": prompt.text}]:
            told.append(prompt.messages)
        digest.update(json.dumps(told, sort_keys=True, default=str).encode() + b"\n")
    return digest.hexdigest()
