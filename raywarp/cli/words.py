"""The words of a command, brought into the order that argparse reads.

argparse reads the words that are no options only as long as they stand together. Of `merge` it
takes every word after `--weights` for a weight and `-0.5,1` for an option, and knows no option of a
method before the method.
"""

from collections.abc import Sequence
from typing import Any

from raywarp.config.schema import ConfigError

_FLAGS = (
    "--overwrite",
    "--allow-different-bases",
    "--per-module-ranks",
    "--json",
    "-v",
    "--verbose",
)


def arranged(words: Sequence[str]) -> list[str]:
    """Return a command's words; of `merge` the method first, and the weights as one word.

    Raises:
        ConfigError: the method averages nothing that an adapter can hold.
    """
    if words[:1] != ["merge"]:
        return list(words)
    rest = _with_joined_weights(words[1:])
    place = _method_place(rest)
    if place is None:
        return ["merge", *rest]
    from raywarp.adapters.recipe import why_not

    if reason := why_not(rest[place]):
        raise ConfigError(reason)
    return ["merge", rest[place], *rest[:place], *rest[place + 1 :]]


def together(parser: Any, words: Sequence[str]) -> list[str]:
    """Return a command's words with those that are no options behind the command, in their order.

    Args:
        parser: that of all commands.
        words: the command's name, and its words.
    """
    commands = next(action.choices for action in parser._actions if action.choices)
    command = commands.get(words[0]) if words else None
    if command is None or words[0] == "merge":
        return list(words)
    plain, options, rest = list[str](), list[str](), list(words[1:])
    while rest:
        word = rest.pop(0)
        (options if word.startswith("-") else plain).append(word)
        if _takes_value(command, word, rest[:1]):
            options.append(rest.pop(0))
    return [words[0], *plain, *options]


def _takes_value(command: Any, word: str, following: Sequence[str]) -> bool:
    """Return whether the word after an option is its value."""
    action = command._option_string_actions.get(word)
    if action is None or not following:
        return False
    return action.nargs is None or (action.nargs == "?" and not following[0].startswith("-"))


def _with_joined_weights(words: Sequence[str]) -> list[str]:
    """Return the words with the numbers after `--weights` as one, `--weights=1,-0.5`."""
    result, rest = list[str](), list(words)
    while rest:
        word, numbers = rest.pop(0), list[str]()
        while word == "--weights" and rest and _are_numbers(rest[0]):
            numbers.append(rest.pop(0))
        result.append(f"{word}={','.join(numbers)}" if numbers else word)
    return result


def _are_numbers(word: str) -> bool:
    """Return whether a word is a number, or numbers with commas between."""
    try:
        return bool([float(number) for number in word.replace(",", " ").split()])
    except ValueError:
        return False


def _method_place(words: Sequence[str]) -> int | None:
    """Return the place of the first word that is neither an option nor an option's value."""
    place = 0
    while place < len(words) and words[place] not in ("-h", "--help"):
        word = words[place]
        if not word.startswith("-"):
            return place
        place += 1 if word in _FLAGS or "=" in word else 2
    return None
