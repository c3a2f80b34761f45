"""Conversations: turns of any role, read from a dataset's values and shown as plain text."""

import json
import re
from typing import Any, NamedTuple

from raywarp.config.schema import ConfigError
from raywarp.data.conversations import Message, content_text, conversation

# "\n\nHuman: … \n\nAssistant: …", the form of Anthropic's HH-RLHF.
_SPEAKER = re.compile(r"(?:\A|\n\n)(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}
_LABELS = {role: label for label, role in _ROLES.items()}
ANSWER = "\n\nAssistant: "  # what stands before an answer in plain text


class Turn(NamedTuple):
    """One message.

    Attributes:
        more: the message's other keys (such as tool_calls) as JSON; "" where it has none.
    """

    role: str
    content: str
    more: str = ""


Conversation = tuple[Turn, ...]
Part = str | Conversation  # a prompt, or what follows it


def read_messages(value: Any, where: str) -> Conversation:
    """Return a list of messages as a conversation.

    Args:
        where: names the value in errors, such as "preferences: row 3, column chosen".

    Raises:
        ConfigError: it is no list of messages with a role and text.
    """
    try:
        found = conversation(list(value) if isinstance(value, tuple) else value)
    except ValueError as error:
        raise ConfigError(f"{where}{error}") from None
    return tuple(_turn(message) for message in found)


def _turn(message: Message) -> Turn:
    kept = {key: value for key, value in message.items() if key not in ("role", "content")}
    more = json.dumps(kept, sort_keys=True, ensure_ascii=False, default=str) if kept else ""
    content = content_text(message) if message["content"] is not None else ""
    return Turn(message["role"], content, more)


def is_dialogue(value: Any) -> bool:
    """Return whether a value is a text of the form "\\n\\nHuman: …\\n\\nAssistant: …"."""
    return (
        isinstance(value, str) and value.lstrip().startswith("Human:") and "\n\nAssistant:" in value
    )


def is_conversation(prompt: Part) -> bool:
    """Return whether a prompt is made of turns, as messages or as a dialogue's text."""
    return not isinstance(prompt, str) or is_dialogue(prompt)


def read_dialogue(text: str) -> Conversation:
    """Return the turns of a text for which is_dialogue holds, without the spaces around them."""
    _, *parts = _SPEAKER.split(text.strip())
    return tuple(
        Turn(_ROLES[label], content.strip())
        for label, content in zip(parts[::2], parts[1::2], strict=True)
    )


def asked(prompt: Part, dialogues: bool = False) -> Conversation:
    """Return a prompt as turns: a text is the user's.

    Args:
        dialogues: a text of the form "\\n\\nHuman: …\\n\\nAssistant:" is several turns.
    """
    if not isinstance(prompt, str):
        if not (len(prompt) == 1 and prompt[0].role == "user" and dialogues):
            return prompt
        prompt = prompt[0].content
    if not (dialogues and is_dialogue(prompt)):
        return (Turn("user", prompt),) if prompt else ()
    turns = read_dialogue(prompt)
    return turns[:-1] if turns[-1] == Turn("assistant", "") else turns


def answered(completion: Part) -> Conversation:
    """Return a completion as turns: a text is the assistant's."""
    return (Turn("assistant", completion),) if isinstance(completion, str) else completion


def messages(conversation: Conversation) -> list[dict[str, Any]]:
    """Return the messages of a conversation, for a chat template."""
    return [
        {"role": turn.role, "content": turn.content} | (json.loads(turn.more) if turn.more else {})
        for turn in conversation
    ]


def plain(conversation: Conversation) -> str:
    """Return a conversation as a text that loses no turn, in the form of HH-RLHF."""
    return "".join(
        f"\n\n{_LABELS.get(turn.role, turn.role.capitalize())}: {turn.content}"
        + (f" {turn.more}" if turn.more else "")
        for turn in conversation
    )
