"""Preferences from any source that prompts.py reads: given pairs, or rated texts to be paired.

Everything random here is a function of the seed, and no text is in two splits.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any

from raywarp.config.datasets import SNIPPETS, PreferencesConfig
from raywarp.config.schema import ConfigError
from raywarp.data import embedded
from raywarp.data.pairs import Preference, PreferenceSplits, of_turns, split_given, split_pairs
from raywarp.data.ratings import TWICE, averaged, pair_splits, read_rated, split_rated
from raywarp.data.rows import load_rows
from raywarp.data.turns import (
    Conversation,
    Part,
    Turn,
    asked,
    is_conversation,
    is_dialogue,
    read_dialogue,
    read_messages,
)

PROMPT, MARGIN = "prompt", "margin"  # columns that TRL's formats name
EQUAL = "pairs of equal answers"


def load_preferences(config: PreferencesConfig, seed: int) -> PreferenceSplits:
    """Load preferences, from columns chosen/rejected or from rated texts.

    The columns hold texts, chat messages, or texts of the form "\\n\\nHuman: …\\n\\nAssistant: …".
    Rated texts are paired where their ratings differ by the margin.

    Rated texts are split before they are paired: about 20,000 pairs for training, 4,000 each for
    validation and test, fewer where there are few texts. Answers to a prompt are paired with other
    answers to it. Given pairs are split so that no prompt is in two splits; without prompts, no
    text is.

    Raises:
        ConfigError: see load_rows; columns that are missing or of the wrong type, or nothing left
            in a split.
    """
    splits = _embedded(config, seed) if config.dataset == SNIPPETS else _from_rows(config, seed)
    if not (splits.train and splits.validation and splits.test):
        sizes = (
            f"{len(splits.train)} for training, {len(splits.validation)} for validation,"
            f" {len(splits.test)} for the test"
        )
        left_out = "".join(f"; left out: {n} {why}" for why, n in splits.left_out.items())
        raise ConfigError(
            f"preferences.dataset={config.dataset} gives too few preferences: {sizes}{left_out}"
        )
    return splits


def _embedded(config: PreferencesConfig, seed: int) -> PreferenceSplits:
    parts = embedded.split_snippets(seed)
    return pair_splits(
        (parts.reward_train, parts.reward_validation, parts.reward_test), config.margin, seed, {}
    )


def _from_rows(config: PreferencesConfig, seed: int) -> PreferenceSplits:
    rows = load_rows(config.dataset, config.name, config.split)
    columns = rows.column_names
    prompt = _prompt_column(config, columns)
    held_out = config.held_out_split and load_rows(
        config.dataset, config.name, config.held_out_split
    )
    if {config.chosen, config.rejected} <= set(columns):
        read = _PairReader(config.chosen, config.rejected, prompt)
        return _given(read, rows, held_out or (), config, seed)
    if {config.text, config.rating} <= set(columns):
        rated, other = (
            read_rated(part, config.text, config.rating, prompt) for part in (rows, held_out or ())
        )
        (rated, repeated), (other, more) = averaged(rated), averaged(other)
        parts = split_rated(rated, config.held_out_fraction, seed, other)
        splits = pair_splits(parts, config.margin, seed, {TWICE: repeated + more})
        return replace(splits, dialogues=prompt is not None and is_dialogue(rows[0][prompt]))
    wanted = f"{config.chosen} and {config.rejected}, or {config.text} and {config.rating}"
    raise ConfigError(
        f"preferences.dataset={config.dataset} needs columns {wanted}; it has {', '.join(columns)}"
    )


def _prompt_column(config: PreferencesConfig, columns: Sequence[str]) -> str | None:
    if config.prompt is not None and config.prompt not in columns:
        raise ConfigError(
            f"preferences.prompt={config.prompt}: the dataset's columns are {', '.join(columns)}"
        )
    named = (config.chosen, config.rejected, config.text, config.rating)
    if config.prompt in set(named) & set(columns):
        raise ConfigError(
            f"preferences.prompt={config.prompt} is also the column of the texts or ratings; name"
            " the prompt's own column"
        )
    return config.prompt or (PROMPT if PROMPT in columns and PROMPT not in named else None)


def _given(
    read: "_PairReader", rows: Any, held_out: Any, config: PreferencesConfig, seed: int
) -> PreferenceSplits:
    pairs, others = read.pairs(rows), read.pairs(held_out)
    parts = (
        split_given(pairs, others, seed)
        if config.held_out_split
        else split_pairs(pairs, config.held_out_fraction, seed)
    )
    left_out = {EQUAL: read.equal} if read.equal else {}
    return PreferenceSplits(*parts, left_out=left_out, dialogues=read.dialogues)


@dataclass
class _PairReader:
    """Reads given pairs from their columns, and remembers what they are.

    Attributes:
        equal: how many rows had two equal answers.
        dialogues: conversations were texts of the form "\\n\\nHuman: …\\n\\nAssistant: …".
        kind: what the rows hold, text or conversations.
    """

    chosen: str
    rejected: str
    prompt: str | None
    equal: int = 0
    dialogues: bool = False
    kind: str = ""

    def pairs(self, rows: Any) -> list[Preference]:
        """Return the pairs of all rows but those whose two answers are equal.

        Raises:
            ConfigError: a row holds no pair, or answers to two prompts. The message names the row.
        """
        found = []
        for number, row in enumerate(rows):
            pair = self._pair(row, number)
            kind = "texts" if pair.turns is None else "conversations"
            if (self.kind or kind) != kind:
                raise ConfigError(
                    f"preferences: row {number} holds {kind}, and the rows before it"
                    f" {self.kind}; they must be of one form"
                )
            self.kind = kind
            found.append(pair)
        found = _without_the_prompt(found)
        kept = [pair for pair in found if pair.chosen != pair.rejected]
        self.equal += len(found) - len(kept)
        return kept

    def _pair(self, row: Mapping[str, Any], number: int) -> Preference:
        where = f"preferences: row {number}, column"
        chosen, rejected = (
            self._answer(row[column], number, column) for column in (self.chosen, self.rejected)
        )
        prompt: Part = "" if self.prompt is None else self._prompt(row, f"{where} {self.prompt}")
        margin = row.get(MARGIN)
        margin = float(margin) if isinstance(margin, Real) else None
        if isinstance(chosen, str) and isinstance(rejected, str):
            if isinstance(prompt, str) and not is_conversation(prompt):
                return Preference(chosen, rejected, prompt, None, margin, number)
            self.dialogues |= isinstance(prompt, str)
            better, worse = (Turn("assistant", text.strip()) for text in (chosen, rejected))
            return of_turns(asked(prompt, True), (better,), (worse,), margin, number)
        if isinstance(chosen, str) or isinstance(rejected, str):
            raise ConfigError(
                f"preferences: row {number}: one of {self.chosen} and {self.rejected} is a"
                " conversation, the other is not"
            )
        before = asked(prompt, True)
        whole = [
            _with_prompt(before, said, f"preferences: row {number}") for said in (chosen, rejected)
        ]
        return of_turns(*self._divided(whole[0], whole[1], number), margin, number)

    def _answer(self, value: Any, row: int, column: str) -> Part:
        if is_dialogue(value):
            self.dialogues = True
            turns = read_dialogue(value)
        elif isinstance(value, str):
            return value
        else:
            turns = read_messages(value, f"preferences: row {row}, column {column}")
        if not turns or turns[-1].role != "assistant":
            raise ConfigError(
                f"preferences: row {row}: a conversation in column {column} has no assistant turn"
                f" at its end: {str(value)[-100:]}"
            )
        return turns

    def _prompt(self, row: Mapping[str, Any], where: str) -> Part:
        value = row[self.prompt or ""]
        return value if isinstance(value, str) else read_messages(value, where)

    def _divided(
        self, chosen: Conversation, rejected: Conversation, row: int
    ) -> tuple[Conversation, Conversation, Conversation]:
        """Return the turns that two conversations share, and what follows in each.

        Raises:
            ConfigError: they part at another turn than the assistant's.
        """
        shared = 0
        # Of two equal conversations, the last turn is the answer.
        most = min(len(chosen), len(rejected)) - 1
        while shared < most and chosen[shared] == rejected[shared]:
            shared += 1
        if chosen[shared].role != "assistant" or rejected[shared].role != "assistant":
            raise ConfigError(
                f"preferences: row {row}: {self.chosen} and {self.rejected} answer different"
                f" prompts; their turn {shared + 1} is {str(chosen[shared])[:80]} and"
                f" {str(rejected[shared])[:80]}; both must be one conversation up to an"
                " assistant's turn"
            )
        return chosen[:shared], chosen[shared:], rejected[shared:]


def _with_prompt(before: Conversation, said: Conversation, where: str) -> Conversation:
    """Return the conversation with its prompt, which it may hold already.

    Raises:
        ConfigError: it begins with another prompt.
    """
    if not before:
        return said
    plainly = [(turn.role, turn.content.strip()) for turn in said]
    wanted = [(turn.role, turn.content.strip()) for turn in before]
    if any(plainly[n : n + len(wanted)] == wanted for n in range(len(said) - len(wanted))):
        return said
    if said[0].role != "assistant":
        raise ConfigError(
            f"{where}: the conversation begins with another prompt, {said[0].content[:60]!r}, than"
            f" the prompt's column, {before[-1].content[:60]!r}; take one of the two out of the"
            " dataset"
        )
    return (*before, *said)


def _without_the_prompt(pairs: list[Preference]) -> list[Preference]:
    """Take the prompt out of the answers where every answer of the dataset begins with it."""
    texts = [pair for pair in pairs if pair.turns is None and pair.prompt]
    if not texts or not all(
        text.startswith(pair.prompt) for pair in texts for text in (pair.chosen, pair.rejected)
    ):
        return pairs
    return [
        replace(
            pair,
            chosen=pair.chosen.removeprefix(pair.prompt),
            rejected=pair.rejected.removeprefix(pair.prompt),
        )
        for pair in pairs
    ]
