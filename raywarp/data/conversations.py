"""Conversations as datasets hold them, and the model's chat template that renders them."""

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from raywarp.config.schema import ConfigError

Message = dict[str, Any]
# Where a template asks for the date, keys are made from prompts of this one. So a policy's key does
# not depend on the day.
FIXED_MOMENT = datetime(2000, 1, 1)
_CLOCK = "strftime_now"  # what templates call
_GIVEN = ("messages", "conversation", "tools", "documents", "tokenize", "chat_template")
_OWN = (*_GIVEN, "add_generation_prompt", "continue_final_message", _CLOCK)


def conversation(value: Any) -> list[Message]:
    """Return a row's messages, with what the dataset's format has added taken out.

    Arrow gives every message the keys of all others, as None. Such keys are dropped, but not the
    empty content of a tool call.

    Raises:
        ValueError: it is no list of messages with roles and texts; the text says which.
    """
    if not isinstance(value, list) or not value:
        what = "an empty list" if value == [] else f"a {type(value).__name__}"
        raise ValueError(
            f" holds {what}; it must hold text, or a list of messages with role and content"
        )
    return [_message(number, one) for number, one in enumerate(value, 1)]


def _message(number: int, value: Any) -> Message:
    if not isinstance(value, Mapping) or not isinstance(value.get("role"), str):
        known = f" (it has {', '.join(value)})" if isinstance(value, Mapping) else ""
        raise ValueError(f": message {number} has no role{known}; it needs role and content")
    role, content = value["role"], value.get("content")
    message = {key: without_none(part) for key, part in value.items() if part is not None}
    if content is None:
        if not message.get("tool_calls"):
            raise ValueError(f": message {number} ({role}) has no content")
        return {**message, "content": None}
    if isinstance(content, list):
        return {**message, "content": [_part(number, role, part) for part in content]}
    if not isinstance(content, str):
        raise ValueError(
            f": message {number} ({role}) has content of type {type(content).__name__}; it must be"
            " text"
        )
    return message


def _part(number: int, role: str, part: Any) -> dict[str, str]:
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    if kind != "text" or not isinstance(part.get("text"), str):
        raise ValueError(
            f": message {number} ({role}) has a content part of type {kind}; only text is read"
        )
    return {"type": "text", "text": part["text"]}


def without_none(value: Any) -> Any:
    """Return nested lists and mappings without the keys that are None."""
    if isinstance(value, Mapping):
        return {key: without_none(part) for key, part in value.items() if part is not None}
    return [without_none(part) for part in value] if isinstance(value, list) else value


def content_text(message: Message) -> str:
    """Return a message's text: its parts joined; of a message without text, its tool calls."""
    content = message["content"]
    if content is None:
        return json.dumps(message["tool_calls"], ensure_ascii=False)
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def plain_text(messages: Sequence[Message]) -> str:
    """Return a conversation as plain text: a single message's text, else every turn by its role."""
    if len(messages) == 1:
        return content_text(messages[0])
    return "\n\n".join(f"{message['role']}: {content_text(message)}" for message in messages)


class ChatTemplate:
    """A tokenizer's chat template, with what the configuration passes to it.

    Attributes:
        uses_clock: the template asks for the date.
    """

    def __init__(self, tokenizer: Any, arguments: Mapping[str, Any]):
        if not tokenizer.chat_template:
            raise ConfigError(
                "prompts.template=chat, but the model's tokenizer has no chat template; use"
                " prompts.template=none"
            )
        self.tokenizer, self.arguments = tokenizer, dict(arguments)
        self.source = str(tokenizer.get_chat_template())
        self.uses_clock = self._names(_CLOCK)
        if re.search(r"\|\s*random\b", self.source):
            raise ConfigError(
                "the model's chat template draws at random, so the same prompt differs each time;"
                " use prompts.template=none, or a tokenizer whose template does not"
            )
        for name in arguments:
            if name in _OWN:
                raise ConfigError(f"prompts.template_kwargs.{name} is set by raywarp; leave it out")
            if not self._names(name):
                raise ConfigError(
                    f"prompts.template_kwargs.{name}: the model's chat template does not read"
                    f" '{name}'"
                )
        self.takes_parts = self._takes_parts()

    def _names(self, name: str) -> bool:
        return bool(re.search(rf"\b{re.escape(name)}\b", self.source))

    def _takes_parts(self) -> bool:
        """Return whether the template renders a list of text parts as it does their text."""
        probe = "what 7 parts are"
        try:
            whole, parts = (
                self.render([{"role": "user", "content": content}], FIXED_MOMENT)
                for content in (probe, [{"type": "text", "text": probe}])
            )
        except ValueError:
            return False
        return whole == parts

    def render(self, messages: Sequence[Message], moment: datetime, continued: bool = False) -> str:
        """Return the conversation as text, up to where the answer begins.

        Args:
            moment: what the template takes for the present time.
            continued: the last message is the beginning of the answer.

        Raises:
            ValueError: the template refuses the conversation; the text says why.
        """
        clock = {_CLOCK: moment.strftime} if self.uses_clock else {}
        try:
            text = self.tokenizer.apply_chat_template(
                [self._fitting(message) for message in messages],
                add_generation_prompt=not continued,
                continue_final_message=continued,
                tokenize=False,
                **self.arguments,
                **clock,
            )
        # A template may raise what it likes.
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise ValueError(f"the model's chat template does not take it ({reason})") from None
        return str(text)

    def _fitting(self, message: Message) -> Message:
        """Return a message with its text parts joined, where the template wants plain text."""
        if isinstance(message["content"], str | None) or self.takes_parts:
            return message
        return {**message, "content": content_text(message)}

    def tokens(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the tokens of rendered conversations, with one BOS at most.

        The template writes the special tokens. Some tokenizers add a BOS of their own even so.
        """
        bos, token = self.tokenizer.bos_token, self.tokenizer.bos_token_id
        rows = self.tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        return [
            list(ids[1:])
            if bos and list(ids[:2]) == [token] * 2 and not text.startswith(bos * 2)
            else list(ids)
            for text, ids in zip(texts, rows, strict=True)
        ]
