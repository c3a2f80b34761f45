r"""Rewards that check a completion, without a model: for `reward.function`.

A configuration names them, for example, as `raywarp.rewards.verifiable:math_answer`.
"""

import re
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

PROSE = 5  # a reference of so many words is a solution, and not an answer alone
_BOXED = "\\boxed{"
_AFTER = re.compile(r"(?:####|\banswer\s*(?:is|:|=))\s*:?\s*(.+)", re.IGNORECASE)
_NUMBER = re.compile(r"-?\$?\d[\d,]*(?:\.\d+)?(?:\s*/\s*\d+)?|-?\$?\.\d+")
_FRACTION = re.compile(r"(-?)\\[dt]?frac\{([^{}]+)\}\{([^{}]+)\}")
_WRAPPED = re.compile(r"\\(?:text|mathrm|mathbf|textbf|mbox)\{([^{}]*)\}")
_THINKING = re.compile(r"\s*<think>.+?</think>\s*<answer>.+?</answer>\s*", re.DOTALL)


def math_answer(
    completions: Sequence[str], answer: Sequence[Any], **columns: Any
) -> list[float | None]:
    r"""Return 1 where a completion's final answer equals the reference's, else 0.

    The final answer is the last \boxed{…}, else what follows the last "####" or "answer is", else
    the last number. Numbers are compared as numbers: 1/2, 0.5, \frac{1}{2} and 50/100 are equal,
    and so are 1,000 and $1000. Other answers are compared as text, without spaces and case.

    Args:
        completions: N texts.
        answer: N references: a final answer, or a solution that ends in one (as GSM8K's). None
            stands for a prompt that has none.
    """
    return [
        None if reference in (None, "") else float(is_equal(text, str(reference)))
        for text, reference in zip(completions, answer, strict=True)
    ]


def think_format(completions: Sequence[str], **columns: Any) -> list[float]:
    """Return 1 where a completion is <think>…</think><answer>…</answer> and nothing else."""
    return [
        float(
            bool(_THINKING.fullmatch(text))
            and all(
                text.count(tag) == 1 for tag in ("<think>", "</think>", "<answer>", "</answer>")
            )
        )
        for text in completions
    ]


def length(completion_ids: Sequence[Sequence[int]], **columns: Any) -> list[float]:
    """Return the length of each completion in hundreds of tokens; a negative weight shortens."""
    return [len(ids) / 100 for ids in completion_ids]


def is_equal(text: str, reference: str) -> bool:
    """Return whether two texts have the same final answer."""
    own, wanted = final_answer(text), _marked(reference)
    if wanted is None:  # an answer alone, unless it is prose
        wanted = reference if len(reference.split()) < PROSE else final_answer(reference)
    if own is None or wanted is None:
        return False
    numbers = _value(own), _value(wanted)
    if None not in numbers:
        return numbers[0] == numbers[1]
    return _plain(own) == _plain(wanted)


def final_answer(text: str) -> str | None:
    """Return the part of a text that is its final answer, or None."""
    text = text.rpartition("</think>")[2]
    if (marked := _marked(text)) is not None:
        return marked
    numbers = _NUMBER.findall(text)
    return numbers[-1] if numbers else None


def _marked(text: str) -> str | None:
    """Return what a box or a phrase marks as the final answer, or None."""
    if (boxed := _boxed(text)) is not None:
        return boxed
    if not (marked := _AFTER.findall(text)):
        return None
    line: str = marked[-1].strip()
    found = _NUMBER.search(line)
    return found[0] if found and not _FRACTION.search(line) else line.rstrip(". ")


def _boxed(text: str) -> str | None:
    """Return the content of the last whole \\boxed{…}, with the braces in it."""
    start = text.rfind(_BOXED)
    if start < 0:
        return None
    depth, begin = 1, start + len(_BOXED)
    for n, character in enumerate(text[begin:], begin):
        depth += (character == "{") - (character == "}")
        if not depth:
            return text[begin:n]
    return None


def _value(answer: str) -> Fraction | None:
    """Return an answer as an exact number, or None if it is none."""
    plain = _FRACTION.sub(r"\1\2/\3", _plain(answer))
    try:
        return Fraction(plain)
    except (ValueError, ZeroDivisionError):
        return None


def _plain(answer: str) -> str:
    text = _WRAPPED.sub(r"\1", answer)
    for noise in (
        "\\left",
        "\\right",
        "\\!",
        "\\,",
        "\\;",
        "\\ ",
        "\\$",
        "$",
        "\\%",
        "%",
        "^\\circ",
    ):
        text = text.replace(noise, "")
    text = re.sub(r"(?<=\d),(?=\d{3}\b)", "", text)
    return "".join(text.split()).rstrip(".").casefold()
