"""How a reward model reads a prompt and its completion. Training and scoring share it.

A trained model keeps its reading in reward.json. This module needs neither torch nor transformers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any

from raywarp.config.schema import ConfigError
from raywarp.data.turns import (
    Conversation,
    Part,
    answered,
    asked,
    messages,
    plain,
    read_messages,
)

# The day for templates that ask for it, so that a score does not depend on the day. It is that of
# Llama 3's own template.
TODAY = date(2024, 7, 26)
LENGTH = 256  # tokens per text where nothing says otherwise
# Their positions begin behind the padding id (create_position_ids_from_input_ids).
_OFFSET_POSITIONS = {
    *("roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "roberta-prelayernorm"),
    *("data2vec-text", "ibert", "longformer", "luke", "mpnet", "xmod", "esm", "markuplm"),
}


@dataclass(frozen=True)
class Reading:
    """What a reward model reads.

    Attributes:
        max_length: tokens of a text. A longer one loses its beginning.
        template: none (prompt + completion), chat (turns in a chat template), or plain (turns as
            plain text).
        append_eos: an EOS token stands behind each text that does not end with one.
        chat_template: the chat template, where it is not the tokenizer's own.
        dialogues: a prompt of the form "\\n\\nHuman: …\\n\\nAssistant:" is several turns.
        ends: the score is read at the last token, whatever the model's configuration says of it.
        adds_bos: the tokenizer's own BOS stands before each text. It is for the record.
        pad_token_id: what pads. It is for the record.
    """

    max_length: int = LENGTH
    template: str = "none"
    append_eos: bool = False
    chat_template: str | None = None
    dialogues: bool = False
    ends: bool = False
    adds_bos: bool | None = None
    pad_token_id: int | None = None

    @property
    def is_chat(self) -> bool:
        return self.template == "chat"

    def texts(
        self, tokenizer: Any, prompts: Sequence[Any], completions: Sequence[Any]
    ) -> list[str]:
        """Return the text of each prompt with its completion, before it is tokenized.

        Args:
            prompts: N texts, conversations, or lists of messages.
            completions: N texts, conversations, or lists of messages.
        """
        pairs = zip(map(_part, prompts), map(_part, completions), strict=True)
        if self.template == "none":
            return [
                _without_bos(tokenizer, _as_text(prompt) + _as_text(completion, prompt))
                for prompt, completion in pairs
            ]
        turns = [(*asked(p, self.dialogues), *self._trimmed(answered(c))) for p, c in pairs]
        if self.template == "plain":
            return [plain(own) for own in turns]
        return [self._rendered(tokenizer, messages(own)) for own in turns]

    def _trimmed(self, answer: Conversation) -> Conversation:
        """Return an answer as a dialogue's turns were trained on: without spaces around it."""
        if not self.dialogues:
            return answer
        return tuple(turn._replace(content=turn.content.strip()) for turn in answer)

    def _rendered(self, tokenizer: Any, turns: list[dict[str, Any]]) -> str:
        own: dict[str, Any] = {"chat_template": self.chat_template} if self.chat_template else {}
        if "strftime_now" in (self.chat_template or str(tokenizer.chat_template)):
            own["strftime_now"] = TODAY.strftime
        try:
            text: str = tokenizer.apply_chat_template(turns, tokenize=False, **own)
        # A template is a program, which can raise anything.
        except Exception as error:
            said = "; ".join(f"{turn['role']}: {turn['content'][:60]!r}" for turn in turns)
            raise ConfigError(
                f"the reward model's chat template refuses a conversation ({error}): {said}; set"
                " template=none to read it as plain text, or take it out of the dataset"
            ) from None
        return text


def _part(value: Any) -> Part:
    """Return a prompt or completion as a text or conversation; lists of messages are read."""
    if isinstance(value, str) or (value and isinstance(value[0], tuple)):
        return value
    return read_messages(list(value), "a reward's conversation")


def _as_text(part: Part, before: Part = "") -> str:
    if isinstance(part, str):
        return part if isinstance(before, str) else plain(answered(part))
    return plain(part)


def _without_bos(tokenizer: Any, text: str) -> str:
    """Return a text without the BOS that the tokenizer is going to put before it."""
    bos = tokenizer.bos_token or tokenizer.cls_token
    return text.removeprefix(bos) if bos and text.startswith(bos) and adds_bos(tokenizer) else text


def adds_bos(tokenizer: Any) -> bool:
    """Return whether the tokenizer puts a BOS (or CLS) token before a text."""
    ids = tokenizer("")["input_ids"]
    first = {tokenizer.bos_token_id, tokenizer.cls_token_id} - {None}
    return bool(ids) and ids[0] in first


def positions(tokenizer: Any, settings: Any) -> int:
    """Return the most tokens that a model and its tokenizer take.

    Args:
        settings: the model's transformers configuration.
    """
    text = settings.get_text_config()
    most = getattr(text, "max_position_embeddings", None) or tokenizer.model_max_length
    if text.model_type in _OFFSET_POSITIONS:
        most -= (text.pad_token_id or 0) + 1
    return int(min(most, tokenizer.model_max_length))


def cut_warning(key: str, max_length: int, prompt_tokens: int, new_tokens: int) -> str | None:
    """Return a warning where completions, or else prompts, may exceed what a reward model reads.

    Args:
        key: reward or control.
        max_length: tokens that it reads.
        prompt_tokens: tokens of the longest prompt, in the policy's tokens.
        new_tokens: rollout.max_new_tokens.
    """
    if new_tokens > max_length:
        lost = (
            f"completions have up to rollout.max_new_tokens={new_tokens} tokens, of which the"
            f" beginning is not scored, nor is the prompt: raise {key}.max_length if the model can"
            " read more, or lower rollout.max_new_tokens"
        )
    elif prompt_tokens + new_tokens > max_length:
        lost = (
            f"the longest prompt has {prompt_tokens} tokens and completions up to {new_tokens}, so"
            f" prompts may lose their beginning: raise {key}.max_length if the model can read more"
        )
    else:
        return None
    return f"the model of {key} reads {max_length} tokens ({key}.max_length), and {lost}"
