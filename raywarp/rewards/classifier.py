"""A one-label sequence classifier and its tokenizer as a reward for a prompt and a completion."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import transformers  # not `from`: its parts take seconds to import, and a check need not wait
from torch import Tensor

from raywarp.cluster.device import supports_bf16
from raywarp.config.rewards import RewardConfig
from raywarp.config.schema import ConfigError
from raywarp.data.models import (
    check_one_label,
    check_tensors,
    load_model,
    read_model_config,
    read_tokenizer,
)
from raywarp.rewards.reading import LENGTH, Reading, positions


def encode(
    tokenizer: Any,
    prompts: Sequence[Any],
    completions: Sequence[Any],
    reading: Reading | int,
) -> Any:
    """Return token ids and attention mask of prompt with completion, (N, longest), right-padded.

    A text that is too long loses its beginning, so that the completion is kept. The special tokens
    before it are kept, too.

    Args:
        prompts: N texts, conversations, or lists of messages.
        completions: N texts, conversations, or lists of messages.
        reading: how they become one text; a number of tokens for prompt + completion as it is.
    """
    return _padded(tokenizer, *tokens_of(tokenizer, prompts, completions, reading))


def tokens_of(
    tokenizer: Any, prompts: Sequence[Any], completions: Sequence[Any], reading: Reading | int
) -> tuple[list[list[int]], list[list[int]] | None]:
    """Return the token ids of each text, and the ids of their types where the tokenizer has them.

    See encode for the arguments.
    """
    reading = Reading(reading) if isinstance(reading, int) else reading
    tokenizer.truncation_side, tokenizer.padding_side = "left", "right"
    length = min(reading.max_length, tokenizer.model_max_length)
    texts = reading.texts(tokenizer, prompts, completions)
    encoded = tokenizer(
        texts,
        # taken off again; a tokenizer's file keeps it, and so the fingerprint of a trained model
        padding=tokenizer.pad_token is not None,
        truncation=not reading.is_chat,
        max_length=None if reading.is_chat else length,
        add_special_tokens=not reading.is_chat,
        verbose=False,
    )
    rows = []
    for text, ids, mask in zip(texts, encoded["input_ids"], encoded["attention_mask"], strict=True):
        own = _with_one_bos(tokenizer, text, ids[: sum(mask)])
        rows.append(_fitted(tokenizer, own, length, reading.append_eos))
    if not all(rows):
        raise ConfigError("a text has no tokens at all, so a reward model cannot score it")
    return rows, encoded.get("token_type_ids")


def _with_one_bos(tokenizer: Any, text: str, ids: list[int]) -> list[int]:
    """Return the tokens without a second BOS that is not in the text.

    Some tokenizers add theirs to a chat template's even when they are told not to.
    """
    bos, token = tokenizer.bos_token, tokenizer.bos_token_id
    twice = bos and ids[:2] == [token, token] and not text.startswith(bos * 2)
    return ids[1:] if twice else ids


def _fitted(tokenizer: Any, ids: list[int], length: int, append_eos: bool) -> list[int]:
    """Return a text's tokens, EOS included, without so many of its first that they fit.

    A BOS at the beginning is kept.
    """
    if append_eos and ids[-1:] != [tokenizer.eos_token_id]:
        ids = [*ids, tokenizer.eos_token_id]
    if len(ids) <= length:
        return ids
    first = {tokenizer.bos_token_id, tokenizer.cls_token_id} - {None}
    head = ids[:1] if length > 1 and ids[0] in first else []
    return [*head, *ids[len(ids) - length + len(head) :]]


def _padded(
    tokenizer: Any, rows: list[list[int]], types: list[list[int]] | None
) -> transformers.BatchEncoding:
    """Return the rows as tensors, with the tokenizer's types of tokens where it has them."""
    longest, filler = max(map(len, rows)), tokenizer.pad_token_id or 0
    columns = {
        "input_ids": [ids + [filler] * (longest - len(ids)) for ids in rows],
        "attention_mask": [[1] * len(ids) + [0] * (longest - len(ids)) for ids in rows],
    }
    if types is not None:
        fill = tokenizer.pad_token_type_id
        own = [
            (kinds + kinds[-1:])[: len(ids)] for kinds, ids in zip(types, rows, strict=True)
        ]  # with the type of an EOS that was put behind
        columns["token_type_ids"] = [kinds + [fill] * (longest - len(kinds)) for kinds in own]
    return transformers.BatchEncoding(columns, tensor_type="pt")


def classify(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Any],
    completions: Sequence[Any],
    reading: Reading | int,
    batch_size: int,
) -> Tensor:
    """Return the classifier's scores, (N,) float32 on its device.

    Each is the score that the model gives to its text alone, without any padding. Training and
    scoring both call this. The scores have a gradient if autograd is on. Texts of similar length
    share a forward pass of at most batch_size, which saves most of the padding.

    Args:
        prompts, completions, reading: see encode.
        batch_size: texts per forward pass.
    """
    device = next(model.parameters()).device
    sizes = [_characters(p) + _characters(c) for p, c in zip(prompts, completions, strict=True)]
    order = sorted(range(len(completions)), key=sizes.__getitem__)
    ends = not isinstance(reading, int) and reading.ends
    parts = []
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = encode(
            tokenizer, [prompts[n] for n in chosen], [completions[n] for n in chosen], reading
        )
        with _padding(model, batch, ends):
            parts.append(model(**batch.to(device)).logits[:, 0].float())
    place = torch.empty(len(order), dtype=torch.long, device=device)
    place[torch.tensor(order, device=device)] = torch.arange(len(order), device=device)
    return torch.cat(parts)[place]


def _characters(part: Any) -> int:
    return len(part) if isinstance(part, str) else len(str(part))


@contextmanager
def _padding(model: Any, batch: Any, ends: bool) -> Iterator[None]:
    """Pad with the id that the model's configuration calls padding, and no other.

    A decoder's classifier (transformers 5.19) finds a text's end by that id: it reads the last
    token that differs from it. So padding with another id moves the end. Without such an id, the
    end is the last token: an id that ends no text of the batch then pads.

    Args:
        ends: each text's last token is its end, even if the configuration calls it padding.
    """
    inner = model.module if isinstance(model, torch.nn.parallel.DistributedDataParallel) else model
    settings, mask = inner.config.get_text_config(), batch["attention_mask"]
    before = settings.pad_token_id
    if ends or before is None or not 0 <= before < getattr(settings, "vocab_size", before + 1):
        last = batch["input_ids"][torch.arange(len(mask)), mask.sum(dim=1) - 1]
        settings.pad_token_id = next(n for n in range(len(last) + 1) if n not in last)
    batch["input_ids"] = batch["input_ids"].masked_fill(mask == 0, settings.pad_token_id)
    try:
        yield
    finally:
        settings.pad_token_id = before


def load_tokenizer(name: str, trust_remote_code: bool = False) -> Any:
    """Return a model's tokenizer, with a padding token.

    Where it has none (GPT-2's has none), its EOS token pads, behind the attention mask.

    Raises:
        ConfigError: it cannot be loaded, or has neither token.
    """
    tokenizer = read_tokenizer(name, trust_remote_code, f"the model {name}")
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ConfigError(
                f"the tokenizer of {name} has neither a padding nor an EOS token, so texts cannot"
                " be batched"
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def padding_token(tokenizer: Any) -> str:
    """Return the token that pads a training's texts: one that is no EOS, where there is one.

    Transformers finds the end of a text by it, so it must not be a text's last token. BOS stands
    in for a padding token, since it is never last.
    """
    named = [tokenizer.pad_token, *_named_padding(tokenizer), tokenizer.bos_token]
    other = [token for token in named if token and token != tokenizer.eos_token]
    return str(other[0] if other else tokenizer.pad_token)


def _named_padding(tokenizer: Any) -> list[str]:
    """Return special tokens such as Llama 3's <|finetune_right_pad_id|>."""
    added = tokenizer.added_tokens_decoder.values()
    return [token.content for token in added if token.special and "pad" in token.content.lower()]


def check_classifier(name: str, trust_remote_code: bool = False) -> None:
    """Raise ConfigError if the model cannot be read, is incomplete, or has not exactly one label.

    No weights are read. The name is a folder or hub id.
    """
    what = f"the reward model {name}"
    config = read_model_config(name, trust_remote_code, what)
    check_one_label(name, config, trust_remote_code, what)
    check_tensors(
        transformers.AutoModelForSequenceClassification,
        name,
        config,
        what,
        trust_remote_code=trust_remote_code,
    )


def read_tokens(config: RewardConfig, trust_remote_code: bool = False) -> int:
    """Return how many tokens the model of a configuration, which with_template decided, reads."""
    name = config.model or ""
    settings = read_model_config(name, trust_remote_code, f"the reward model {name}")
    most = positions(load_tokenizer(name, trust_remote_code), settings)
    return min(config.max_length or LENGTH, most)


class ClassifierReward:
    """A one-label AutoModelForSequenceClassification that scores a prompt with its completion.

    Args:
        name: folder or hub id, already resolved.
        reading: how it reads the two; a number of tokens for prompt + completion as one text.
        batch_size: texts per forward pass.
        chat: prompt and completion are turns of its chat template.

    Raises:
        ConfigError: the model cannot be loaded, or has not exactly one label.
    """

    def __init__(
        self,
        name: str,
        reading: Reading | int = LENGTH,
        batch_size: int = 64,
        trust_remote_code: bool = False,
        device: str = "cpu",
        chat: bool = False,
    ):
        check_classifier(name, trust_remote_code)
        self.reading = Reading(reading) if isinstance(reading, int) else reading
        if chat:
            self.reading = replace(self.reading, template="chat")
        self.batch_size = batch_size
        self.tokenizer = load_tokenizer(name, trust_remote_code)
        dtype = "auto" if supports_bf16(torch.device(device)) else torch.float32
        auto = transformers.AutoModelForSequenceClassification
        model = load_model(
            auto, name, f"the reward model {name}", dtype=dtype, trust_remote_code=trust_remote_code
        )
        most = positions(self.tokenizer, model.config)
        if self.reading.max_length > most:
            self.reading = replace(self.reading, max_length=most)
        self.model = model.to(device).eval()

    def score(
        self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any
    ) -> list[float]:
        """Return the raw scores, in the order of the completions.

        Args:
            prompts: N texts, conversations, or lists of messages.
            completions: N texts.
            columns: ignored.
        """
        if not completions:
            return []
        with torch.inference_mode():
            scores = classify(
                self.model, self.tokenizer, prompts, completions, self.reading, self.batch_size
            )
        return [float(score) for score in scores.tolist()]
