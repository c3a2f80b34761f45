"""Rows in the policy's tokens: cut, put through the chat template, and tokenised once."""

import hashlib
import json
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from raywarp.config.datasets import PromptsConfig
from raywarp.config.schema import ConfigError
from raywarp.data.conversations import (
    FIXED_MOMENT,
    ChatTemplate,
    Message,
    content_text,
    conversation,
    plain_text,
)
from raywarp.data.text import own_tokens
from raywarp.data.turns import ANSWER, asked, is_dialogue, read_dialogue
from raywarp.data.turns import messages as messages_of
from raywarp.identity import derive_seed

_ANSWERED = (
    "the last message is the assistant's; set prompts.last_answer=drop to have it answered anew, or"
    " continue"
)
KEPT, EMPTY, SHORT, LONG = range(4)  # what became of a row


@dataclass(frozen=True)
class Draft:
    """A row on its way to a prompt.

    Attributes:
        text: what a reward sees.
        messages: the conversation, system turn included; None without a chat template.
        token_ids: what the policy sees.
        undated: the same at FIXED_MOMENT; None where the template does not ask for the date.
        own: the row itself holds the messages, or they were cut.
        altered: the messages are not those of the row with the system turn.
        state: KEPT, or why it is left out.
    """

    text: str = ""
    messages: list[Message] | None = None
    token_ids: Sequence[int] = ()
    undated: Sequence[int] | None = None
    own: bool = False
    altered: bool = False
    state: int = KEPT


class PromptRenderer:
    """Turn rows into prompts, each from its own row alone."""

    def __init__(
        self,
        config: PromptsConfig,
        tokenizer: Any,
        seed: int,
        max_prompt_tokens: int,
        moment: datetime = FIXED_MOMENT,
    ) -> None:
        self.config, self.tokenizer, self.seed, self.moment = config, tokenizer, seed, moment
        self.max_prompt_tokens = max_prompt_tokens
        self.template: ChatTemplate | None = None
        if config.template == "chat":
            self.template = ChatTemplate(tokenizer, config.template_kwargs)

    @property
    def is_dated(self) -> bool:
        """Whether the template asks for the date."""
        return self.template is not None and self.template.uses_clock

    def __call__(
        self, batch: Mapping[str, Sequence[Any]], indices: Sequence[int], first: int = 0
    ) -> dict[str, list[Any]]:
        """Return the columns of FEATURES for rows of a dataset.

        Args:
            batch: the rows' columns.
            indices: the rows' numbers, less `first`.
        """
        rows = [first + index for index in indices]
        drafts = self.drafts(batch[self.config.column], rows)
        others = [name for name in batch if name != self.config.column]
        groups = [digest(array("q", d.undated or d.token_ids).tobytes()) for d in drafts]
        columns = (
            [
                digest(group + as_json(values))
                for group, *values in zip(groups, *(batch[name] for name in others), strict=True)
            ]
            if others
            else groups
        )
        told = list(zip(drafts, batch[self.config.column], strict=True))
        return {
            "row": rows,
            "state": [d.state for d in drafts],
            "text": [None if (d.own and not d.altered) or d.text == v else d.text for d, v in told],
            "messages": [as_json(d.messages).decode() if d.altered else None for d in drafts],
            "token_ids": [list(d.token_ids) for d in drafts],
            "undated": [None if d.undated is None else list(d.undated) for d in drafts],
            "group": groups,
            "same": columns,
        }

    def drafts(self, values: Sequence[Any], rows: Sequence[int]) -> list[Draft]:
        """Return the prompts of rows, in order.

        Raises:
            ConfigError: a row is neither text nor messages, is too long, or the template refuses
                it. The message names the row, counted from 1.
        """
        try:
            drafts = [self._read(value, row) for value, row in zip(values, rows, strict=True)]
            drafts = self._cut_texts(drafts)
            drafts = self._tokenised(drafts, rows)
            return [self._fitting(draft, row) for draft, row in zip(drafts, rows, strict=True)]
        except _BadRow as error:
            kept = f", of those of prompts.where={self.config.where}" if self.config.where else ""
            raise ConfigError(
                f"row {error.row + 1} of prompts.dataset={self.config.dataset}{kept}: {error}"
            ) from None

    def _read(self, value: Any, row: int) -> Draft:
        column = f"prompts.column={self.config.column}"
        if value is None:
            return Draft(state=EMPTY)
        if isinstance(value, str):
            return self._dialogue(value, row) if is_dialogue(value) else self._text(value)
        try:
            messages = conversation(value)
        except ValueError as error:
            raise _BadRow(row, f"{column}{error}") from None
        if self.template is None:
            raise _BadRow(row, f"{column} holds messages; set prompts.template=chat")
        for key in ("max_words", "min_tokens"):
            if getattr(self.config, key) is not None:
                raise _BadRow(
                    row, f"{column} holds messages, and prompts.{key} is for texts; leave it out"
                )
        return self._turns(messages, row)

    def _dialogue(self, text: str, row: int) -> Draft:
        """Return the prompt of a text of the form "\\n\\nHuman: …\\n\\nAssistant: …": its turns.

        Without a template it stays a text, up to where the answer begins.
        """
        if self.template:
            return replace(self._turns(messages_of(asked(text, True)), row), altered=True)
        end, rule = read_dialogue(text)[-1], self.config.last_answer
        if end.role != "assistant" or not end.content or rule == "continue":
            return self._text(text)
        if rule == "refuse":
            raise _BadRow(row, _ANSWERED)
        return self._text(text[: text.rindex(ANSWER.rstrip())] + ANSWER.rstrip())

    def _text(self, text: str) -> Draft:
        if self.config.max_words is not None:
            text = " ".join(text.split()[: self.config.max_words])
        return Draft(text, state=KEPT if text.strip() else EMPTY)

    def _turns(self, messages: list[Message], row: int) -> Draft:
        """Return a conversation's prompt: all turns, and the system turn if it has none."""
        altered = False
        if messages[-1]["role"] == "assistant" and self.config.last_answer != "continue":
            if self.config.last_answer == "refuse":
                raise _BadRow(row, _ANSWERED)
            messages, altered = messages[:-1], True
        if not any(message["role"] != "system" for message in messages):
            raise _BadRow(row, "it has no turn to answer")
        text = plain_text(messages)
        return Draft(
            text,
            self._with_system(messages),
            own=True,
            altered=altered,
            state=KEPT if text.strip() else EMPTY,
        )

    def _with_system(self, messages: list[Message]) -> list[Message]:
        return with_system(messages, self.config.system)

    def _cut_texts(self, drafts: list[Draft]) -> list[Draft]:
        """Apply the limits on a text's own tokens; without a template, these are the prompt."""
        limited = self.config.min_tokens is not None or self.config.max_tokens is not None
        chosen = [n for n, d in enumerate(drafts) if d.state == KEPT and d.messages is None]
        if not chosen or (self.template and not limited):
            return drafts
        found = own_tokens(self.tokenizer, [drafts[n].text for n in chosen])
        for n, (head, content) in zip(chosen, found, strict=True):
            drafts[n] = self._cut_text(drafts[n].text, head, content)
        return drafts

    def _cut_text(self, text: str, head: list[int], content: list[int]) -> Draft:
        if len(content) < (self.config.min_tokens or 0):
            return Draft(state=SHORT)
        longest = self._longest(text)
        if longest is not None and len(content) > longest:
            if self.config.too_long == "drop":
                return Draft(state=LONG)
            content, text = self.cut(content[:longest])
        elif not self.template and self.config.too_long == "cut":
            room = self.max_prompt_tokens - len(head)
            content, text = self.cut(content[:room]) if len(content) > room else (content, text)
        state = KEPT if text.strip() else EMPTY
        return Draft(text, token_ids=() if self.template else (*head, *content), state=state)

    def _longest(self, text: str) -> int | None:
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

    def _tokenised(self, drafts: list[Draft], rows: Sequence[int]) -> list[Draft]:
        """Put the conversations through the template."""
        if self.template is None:
            return drafts
        drafts = [
            replace(d, messages=self._with_system([{"role": "user", "content": d.text}]))
            if d.messages is None
            else d
            for d in drafts
        ]
        chosen = [n for n, draft in enumerate(drafts) if draft.state == KEPT]
        dated, undated = (
            self._tokens([(drafts[n].messages or [], rows[n]) for n in chosen], moment)
            for moment in (self.moment, FIXED_MOMENT)
        )
        for n, ids, fixed in zip(chosen, dated, undated, strict=True):
            fixed_or_none = fixed if self.template.uses_clock else None
            drafts[n] = replace(drafts[n], token_ids=ids, undated=fixed_or_none)
        return drafts

    def _tokens(
        self, conversations: Sequence[tuple[list[Message], int]], moment: datetime
    ) -> Sequence[list[int]]:
        template = self.template
        assert template
        if moment == FIXED_MOMENT != self.moment and not template.uses_clock:
            return [[]] * len(conversations)  # nobody reads them
        texts = []
        for messages, row in conversations:
            try:
                continued = messages[-1]["role"] == "assistant"
                texts.append(template.render(messages, moment, continued))
            except ValueError as error:
                raise _BadRow(row, str(error)) from None
        return template.tokens(texts) if texts else []

    def _fitting(self, draft: Draft, row: int) -> Draft:
        """Return a prompt that leaves room for a completion.

        Raises:
            _BadRow: it is too long, and prompts.too_long says to refuse it.
        """
        limit = self.max_prompt_tokens
        if draft.own and self.config.max_tokens is not None:
            limit = min(limit, self.config.max_tokens)
        if draft.state != KEPT or len(draft.token_ids) <= limit:
            return draft
        if self.config.too_long == "drop":
            return Draft(state=LONG)
        if self.config.too_long == "cut" and draft.messages:
            return self._cut_turns(draft, row, limit)
        raise _BadRow(
            row,
            f"the prompt '{draft.text[:60]}' has {len(draft.token_ids)} tokens, the limit is"
            f" {limit}; set prompts.max_tokens, or prompts.too_long=drop or cut",
        )

    def _cut_turns(self, draft: Draft, row: int, limit: int) -> Draft:
        """Cut the end of the last turn's text, so that the template's own tokens stay whole."""
        *before, last = draft.messages or []
        ((_, content),) = own_tokens(self.tokenizer, [content_text(last)])
        excess = len(draft.token_ids) - limit
        while (keep := len(content) - excess) > 0:
            content, text = self.cut(content[:keep])
            messages = [*before, {**last, "content": text}]
            (ids,) = self._tokens([(messages, row)], self.moment)
            if len(ids) <= limit:
                (fixed,) = self._tokens([(messages, row)], FIXED_MOMENT)
                own = conversation_of(messages, self.config.system)
                return replace(
                    draft,
                    text=plain_text(own) if draft.own else text,
                    messages=messages,
                    token_ids=ids,
                    undated=None if draft.undated is None else fixed,
                    own=True,
                    altered=True,
                )
            excess = max(1, len(ids) - limit)
        raise _BadRow(
            row,
            f"without its last turn's text the prompt still has more than {limit} tokens, so it"
            " cannot be cut; prompts.too_long=drop leaves it out",
        )


def with_system(messages: list[Message], system: str | None) -> list[Message]:
    """Return messages with a system turn before them, unless they have one."""
    if system is None or messages[0]["role"] in ("system", "developer"):
        return messages
    return [{"role": "system", "content": system}, *messages]


def conversation_of(messages: list[Message], system: str | None) -> list[Message]:
    """Return messages without the system turn that the configuration has put before them."""
    added = system is not None and messages[0] == {"role": "system", "content": system}
    return messages[1:] if added else messages


class _BadRow(ValueError):
    def __init__(self, row: int, text: str):
        super().__init__(text)
        self.row = row


def digest(data: bytes) -> bytes:
    """Return a digest of 16 bytes."""
    return hashlib.blake2b(data, digest_size=16).digest()


def as_json(value: Any) -> bytes:
    """Return a value as JSON, equal for equal values."""
    return json.dumps(value, sort_keys=True, default=str, ensure_ascii=False).encode()
