"""A reward for the present tense, by rules that anybody can read: for `reward.function`.

A configuration names it as `raywarp.rewards.tense:present`.
"""

import re
from collections.abc import Sequence
from typing import Any


def words_of(text: str) -> list[str]:
    """Return the words in lower case, with their apostrophes."""
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
# Words in -ed that are no past forms.
NO_PAST = frozenset(
    words_of(
        "need indeed feed speed seed deed weed breed bleed greed hundred red bed naked sacred"
        " wicked"
    )
)


def present(completions: Sequence[str], **columns: Any) -> list[float]:
    """Return the number of different present forms of verbs, minus the number of past forms.

    Saying one form again earns nothing.
    """
    return [
        float(len(set(words) & PRESENT) - sum(map(is_past, words)))
        for words in map(words_of, completions)
    ]


def is_past(word: str) -> bool:
    """Return whether a word is a listed past form, or ends in -ed."""
    return word in PAST or (word.endswith("ed") and word not in NO_PAST and len(word) > 3)
