"""Preferences: a better and a worse answer, split so that no prompt is in two splits."""

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from raywarp.data.embedded import Snippet
from raywarp.data.turns import ANSWER, Conversation, Part, plain
from raywarp.identity import derive_seed


@dataclass(frozen=True)
class Preference:
    """A human preferred `chosen` to `rejected`; the prompt, if any, stands before both.

    Attributes:
        turns: of conversations, the turns of the prompt, of the chosen and of the rejected answer.
            The texts are then their plain form.
        margin: by how much the chosen one is better, where that is known.
        row: its row in the dataset, for errors.
    """

    chosen: str
    rejected: str
    prompt: str = ""
    turns: tuple[Conversation, Conversation, Conversation] | None = None
    margin: float | None = field(default=None, compare=False)
    row: int | None = field(default=None, compare=False)

    @property
    def texts(self) -> tuple[tuple[Part, Part], tuple[Part, Part]]:
        """The prompt with its chosen and with its rejected answer."""
        if self.turns is None:
            return (self.prompt, self.chosen), (self.prompt, self.rejected)
        before, chosen, rejected = self.turns
        return (before, chosen), (before, rejected)


@dataclass(frozen=True)
class Rated(Snippet):
    """A rated answer to a prompt.

    Attributes:
        prompt: the prompt's text; "" where there is none.
        turns: of a conversation, the turns of the prompt and of the answer.
        row: its row in the dataset, for errors.
    """

    prompt: str = ""
    turns: tuple[Conversation, Conversation] | None = None
    row: int | None = field(default=None, compare=False)


@dataclass(frozen=True)
class PreferenceSplits:
    """Preferences for training, validation and test, disjoint by text.

    Attributes:
        rated: the texts that `train` was paired from, so that every pair in a batch of rated texts
            can be used. It is empty where the dataset holds pairs, or answers to prompts.
        left_out: why pairs were left out → how many.
        dialogues: the conversations were texts of the form "\\n\\nHuman: …\\n\\nAssistant: …".
    """

    train: list[Preference]
    validation: list[Preference]
    test: list[Preference]
    rated: list[Snippet] = field(default_factory=list)
    left_out: Mapping[str, int] = field(default_factory=dict)
    dialogues: bool = False


def of_turns(
    before: Conversation,
    chosen: Conversation,
    rejected: Conversation,
    margin: float | None = None,
    row: int | None = None,
) -> Preference:
    """Return a preference between two continuations of one conversation."""
    prompt, better, worse = plain(before), plain(chosen), plain(rejected)
    if before and better.startswith(ANSWER) and worse.startswith(ANSWER):
        prompt = prompt + ANSWER
        better, worse = better.removeprefix(ANSWER), worse.removeprefix(ANSWER)
    return Preference(better, worse, prompt, (before, chosen, rejected), margin, row)


def split_pairs(
    pairs: Sequence[Preference], fraction: float, seed: int
) -> tuple[list[Preference], list[Preference], list[Preference]]:
    """Split pairs into train, validation and test.

    Pairs linked by a prompt, or without one by a text, stay together.
    """
    groups = _groups(pairs)
    parts: tuple[list[Preference], list[Preference], list[Preference]] = ([], [], [])
    for key in shuffled(groups, derive_seed(seed, "preferences")):
        target = next((n for n in (2, 1) if len(parts[n]) < fraction * len(pairs)), 0)
        parts[target].extend(groups[key])
    return parts


def split_given(
    pairs: Sequence[Preference], held_out: Sequence[Preference], seed: int
) -> tuple[list[Preference], list[Preference], list[Preference]]:
    """Return the pairs for training, and the held-out ones in two halves.

    A pair that is linked to a held-out one is not trained on.
    """
    own, groups = {id(pair) for pair in held_out}, _groups([*pairs, *held_out])
    train: list[Preference] = []
    halves: tuple[list[Preference], list[Preference]] = ([], [])
    for key in shuffled(groups, derive_seed(seed, "preferences")):
        if kept := [pair for pair in groups[key] if id(pair) in own]:
            halves[len(halves[0]) > len(halves[1])].extend(kept)
        else:
            train.extend(groups[key])
    return train, *halves


def _groups(pairs: Iterable[Preference]) -> dict[str, list[Preference]]:
    """Group pairs that are linked by a prompt, or without one by a text (union-find)."""
    parent: dict[str, str] = {}

    def root(key: str) -> str:
        parent.setdefault(key, key)
        while parent[key] != key:
            parent[key] = key = parent[parent[key]]
        return key

    pairs = list(pairs)
    for pair in pairs:
        if not pair.prompt:
            parent[root(pair.chosen)] = root(pair.rejected)
    groups: dict[str, list[Preference]] = {}
    for pair in pairs:
        groups.setdefault(
            f"prompt:{pair.prompt}" if pair.prompt else f"text:{root(pair.chosen)}", []
        ).append(pair)
    return groups


def shuffled(keys: Iterable[str], seed: int) -> list[str]:
    """Return the keys in an order that depends on the seed, and not on their own order."""
    return random.Random(seed).sample(order := sorted(keys), len(order))
