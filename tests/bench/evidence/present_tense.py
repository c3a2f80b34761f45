"""The second task's reward: a continuation stays in the present tense. By rules that anybody can
read; nothing about it is learnt.
"""

import re
from collections.abc import Sequence
from typing import Any


def words_of(text: str) -> list[str]:
    """In lower case, with their apostrophes."""
    return re.findall(r"[a-z']+", text.lower().replace("’", "'"))


PRESENT = frozenset(
    words_of(
        "is are has have does do makes make takes take gets get gives give goes go comes come seems"
        " seem feels feel looks look keeps keep says say knows know thinks think works work plays"
        " play tells tell shows show finds find leaves leave offers offer isn't aren't doesn't"
        " don't hasn't haven't it's that's there's he's she's they're we're you're i'm can can't"
        " wants want needs need"
    )
)
PAST = frozenset(
    words_of(
        "was were had did made took got gave went came felt kept said knew thought told found left"
        " became began saw wasn't weren't hadn't didn't could couldn't would wouldn't brought lost"
        " wrote ran fell held stood sat spoke broke grew meant spent sent built"
    )
)
# on -ed
NO_PAST = frozenset(
    words_of(
        "need indeed feed speed seed deed weed breed bleed greed hundred red bed naked sacred"
        " wicked"
    )
)


def score(prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float]:
    """Different verb forms of the present, less all those of the past: saying one form again earns
    nothing.
    """
    return [
        float(len(set(words) & PRESENT) - sum(map(is_past, words)))
        for words in map(words_of, completions)
    ]


def is_past(word: str) -> bool:
    """Listed, or regular: on -ed."""
    return word in PAST or (word.endswith("ed") and word not in NO_PAST and len(word) > 3)
