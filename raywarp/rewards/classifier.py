"""A one-label sequence classifier and its tokenizer as a reward for a prompt and a completion."""

from collections.abc import Sequence
from typing import Any

import torch
import transformers  # not `from`: its parts take seconds to import, and a check need not wait
from torch import Tensor

from raywarp.cluster.device import supports_bf16
from raywarp.config.schema import ConfigError
from raywarp.data.models import (
    check_one_label,
    check_tensors,
    load_model,
    read_model_config,
    read_tokenizer,
)


def encode(
    tokenizer: Any,
    prompts: Sequence[str],
    completions: Sequence[str],
    max_length: int,
    chat: bool = False,
) -> Any:
    """Return token ids and attention mask of prompt + completion, (N, longest), right-padded.

    A text of more than max_length tokens loses its beginning, so that the completion is kept. The
    same holds above the limit that the tokenizer gives for its model.

    Args:
        prompts: N texts.
        completions: N texts.
        max_length: tokens per text.
        chat: encode prompt and completion as two turns of a chat.
    """
    tokenizer.truncation_side, tokenizer.padding_side = "left", "right"
    pairs = list(zip(prompts, completions, strict=True))
    texts = (
        [_as_turns(tokenizer, *pair) for pair in pairs]
        if chat
        else [prompt + completion for prompt, completion in pairs]
    )
    length = min(max_length, tokenizer.model_max_length)
    return tokenizer(
        texts,
        padding=True,
        truncation=True,
        max_length=length,
        add_special_tokens=not chat,
        return_tensors="pt",
    )


def _as_turns(tokenizer: Any, prompt: str, completion: str) -> str:
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
    text: str = tokenizer.apply_chat_template(turns, tokenize=False)
    return text


def classify(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    completions: Sequence[str],
    max_length: int,
    batch_size: int,
    chat: bool = False,
) -> Tensor:
    """Return the classifier's scores, (N,) float32 on its device.

    Training and scoring both call this. The scores have a gradient if autograd is on. Texts of
    similar length share a forward pass of at most batch_size, which saves most of the padding.

    Args:
        prompts: N texts.
        completions: N texts.
        max_length: tokens per text, see encode.
        batch_size: texts per forward pass.
        chat: see encode.
    """
    device = next(model.parameters()).device
    order = sorted(range(len(completions)), key=lambda n: len(prompts[n]) + len(completions[n]))
    parts = []
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = encode(
            tokenizer,
            [prompts[n] for n in chosen],
            [completions[n] for n in chosen],
            max_length,
            chat,
        )
        parts.append(model(**batch.to(device)).logits[:, 0].float())
    place = torch.empty(len(order), dtype=torch.long, device=device)
    place[torch.tensor(order, device=device)] = torch.arange(len(order), device=device)
    return torch.cat(parts)[place]


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


class ClassifierReward:
    """A one-label AutoModelForSequenceClassification that scores prompt + completion.

    Args:
        name: folder or hub id, already resolved.
        max_length: tokens per text, see encode.
        batch_size: texts per forward pass.
        chat: prompt and completion are turns of its chat template.

    Raises:
        ConfigError: the model cannot be loaded, or has not exactly one label.
    """

    def __init__(
        self,
        name: str,
        max_length: int = 256,
        batch_size: int = 64,
        trust_remote_code: bool = False,
        device: str = "cpu",
        chat: bool = False,
    ):
        check_classifier(name, trust_remote_code)
        self.max_length, self.batch_size, self.chat = max_length, batch_size, chat
        self.tokenizer = load_tokenizer(name, trust_remote_code)
        dtype = "auto" if supports_bf16(torch.device(device)) else torch.float32
        auto = transformers.AutoModelForSequenceClassification
        model = load_model(
            auto, name, f"the reward model {name}", dtype=dtype, trust_remote_code=trust_remote_code
        )
        # A decoder's classifier reads the last token that is not the padding token.
        if model.config.pad_token_id is None:
            model.config.pad_token_id = self.tokenizer.pad_token_id
        self.model = model.to(device).eval()

    def score(
        self, prompts: Sequence[str], completions: Sequence[str], **columns: Any
    ) -> list[float]:
        """Return the raw scores, in the order of the completions."""
        if not completions:
            return []
        with torch.inference_mode():
            scores = classify(
                self.model,
                self.tokenizer,
                prompts,
                completions,
                self.max_length,
                self.batch_size,
                self.chat,
            )
        return [float(score) for score in scores.tolist()]
