"""Inputs of a reward model's training, and the check whether its folder already holds a model."""

import shutil
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from math import isfinite
from pathlib import Path
from statistics import fmean
from typing import Any

from raywarp.config.schema import Config, ConfigError
from raywarp.data.embedded import Snippet
from raywarp.data.models import check_tensors, check_weights, read_model_config
from raywarp.data.pairs import Preference, PreferenceSplits
from raywarp.data.preferences import load_preferences
from raywarp.data.prompts import resolve_model
from raywarp.data.turns import Part
from raywarp.rewards.classifier import load_tokenizer, padding_token, tokens_of
from raywarp.rewards.reading import Reading, adds_bos, positions
from raywarp.rewards.score import REWARD_FILE, check_trained
from raywarp.storage.location import Storage
from raywarp.storage.sealed import MANIFEST, DamagedError, read_record

SETTINGS_FILE = "settings.json"
READING = "reading"  # in that file, beside the settings
WORK = ".ray_train"  # a folder inside the model's folder, removed at success
# Keys that may change without making it another model.
FREE_KEYS = {
    "reward_training.num_workers",
    "reward_training.use_gpu",
    "reward_training.sft_completions",
}
# Keys that are newer than the first models, which lack them, with what these models had.
NEW_KEYS = {
    "preferences.held_out_split": None,
    "reward_training.template": "auto",
    "reward_training.append_eos": False,
    "reward_training.margin_loss": False,
    "reward_training.center_rewards_coefficient": 0.0,
}
CUT_EQUAL = "pairs of answers that are equal in the tokens that the model reads"
CUT_TWICE = "rated texts that equal another in the tokens that the model reads, averaged"
TOKENIZED = 64  # texts at a time, padded to the longest of them


@dataclass(frozen=True)
class RewardInputs:
    """The checked inputs of a reward model's training.

    Attributes:
        backbone: a hub id or an absolute folder, since Ray Train's workers run in their own folder.
        splits: the preference pairs.
        reading: how a prompt and an answer become the text that the model reads.
    """

    backbone: str
    splits: PreferenceSplits
    reading: Reading

    def notes(self) -> list[str]:
        """Return, in words, what the model reads and which pairs were left out."""
        how = {
            "none": "prompt and answer as one text",
            "plain": "conversations as plain text",
            "chat": "the backbone's chat template",
        }[self.reading.template]
        eos = ", with EOS behind it" if self.reading.append_eos else ""
        left_out = [f"{count} {why}" for why, count in self.splits.left_out.items() if count]
        return [
            f"reward model: reads {how}{eos}, at most {self.reading.max_length} tokens",
            *([f"reward model: left out: {'; '.join(left_out)}"] if left_out else []),
        ]


def prepare_reward(config: Config) -> RewardInputs | None:
    """Check all inputs of the training. Return None where config.out holds the finished model.

    Raises:
        ConfigError: an input is wrong, or the folder holds another model.
    """
    out, settings, training = (
        Storage(config.out).folder,
        settings_of(config),
        config.reward_training,
    )
    if out is None:
        raise ConfigError(
            f"out={config.out}: a reward model is trained into a folder, which every node must"
            " reach; set out to one"
        )
    if (stored := _finished(out)) is not None:
        _refuse_other(out, stored["settings"], settings)
        return None
    if out.exists() and not out.is_dir():
        raise ConfigError(f"out={config.out} is a file; it must be a folder")
    if (begun := _begun(out)) is not None:
        _refuse_other(out, begun, settings)
    elif (out / "config.json").exists():
        raise ConfigError(
            f"out={config.out} holds a model that raywarp did not train; choose another folder"
        )
    if training.batch_size % training.num_workers:
        raise ConfigError(
            f"reward_training.batch_size={training.batch_size} is not a multiple of"
            f" reward_training.num_workers={training.num_workers}"
        )
    backbone, tokenizer = _check_backbone(config)
    splits = load_preferences(config.preferences, config.seed)
    if training.margin_loss:
        _check_margins(splits)
    reading = training_reading(config, tokenizer, splits)
    _drop_other_reading(out, begun, reading)
    return RewardInputs(backbone, without_equal(splits, tokenizer, reading), reading)


def settings_of(config: Config) -> dict[str, Any]:
    """Return the settings that decide the trained weights, by dotted key, as JSON values."""
    sections = {"preferences": config.preferences, "reward_training": config.reward_training}
    flat = {
        f"{name}.{key}": value
        for name, section in sections.items()
        for key, value in section.model_dump(mode="json").items()
    }
    new = {key for key, default in NEW_KEYS.items() if flat[key] == default}
    return {"seed": config.seed} | {
        key: value for key, value in flat.items() if key not in FREE_KEYS | new
    }


def _refuse_other(out: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    for key in sorted((old.keys() | new.keys()) - {READING}):
        if old.get(key) != new.get(key):
            raise ConfigError(
                f"{out} holds a reward model trained with {key}={old.get(key)}, and now"
                f" {key}={new.get(key)}; set out to another folder, or delete this one"
            )


def _finished(out: Path) -> dict[str, Any] | None:
    """Return reward.json of a finished model, or None.

    A damaged model is reported, and loses the files that mark it as finished.
    """
    try:
        return check_trained(out)
    except DamagedError as error:
        print(f"reward model: {error}; trained again", flush=True)
        for name in (MANIFEST, REWARD_FILE, "config.json"):
            (out / name).unlink(missing_ok=True)
        return None


def _begun(out: Path) -> dict[str, Any] | None:
    """Return the settings of a training that has begun. Without them it starts over."""
    path = out / WORK / SETTINGS_FILE
    try:
        if (settings := read_record(path)) or not (out / WORK / "run").is_dir():
            return settings
        problem = f"{path} is missing"
    except DamagedError as error:
        problem = str(error)
    print(f"reward model: {problem}; its training starts over", flush=True)
    shutil.rmtree(out / WORK)
    return None


def training_reading(config: Config, tokenizer: Any, splits: PreferenceSplits) -> Reading:
    """Return how the reward model reads the preferences that it is trained on.

    Raises:
        ConfigError: template=chat without a chat template or prompts, append_eos without an EOS, or
            more tokens than the backbone takes.
    """
    training, pair = config.reward_training, splits.train[0]
    talks, has_template = pair.turns is not None, bool(tokenizer.chat_template)
    what = f"the tokenizer of reward_training.backbone={training.backbone}"
    if training.template == "chat" and not has_template:
        raise ConfigError(
            f"reward_training.template=chat, but {what} has no chat template; use template=none"
        )
    if training.template == "chat" and not (talks or pair.prompt):
        raise ConfigError(
            "reward_training.template=chat, but the preferences are texts without a prompt; use"
            " template=none, or name the prompt's column with preferences.prompt"
        )
    if training.append_eos and tokenizer.eos_token_id is None:
        raise ConfigError(f"reward_training.append_eos=true, but {what} has no EOS token")
    is_chat = has_template and training.template != "none" and bool(talks or pair.prompt)
    return Reading(
        training.max_length,
        "chat" if is_chat else "plain" if talks else "none",
        training.append_eos,
        tokenizer.get_chat_template() if is_chat else None,
        splits.dialogues,
        adds_bos=adds_bos(tokenizer),
        pad_token_id=tokenizer.convert_tokens_to_ids(padding_token(tokenizer)),
    )


def without_equal(splits: PreferenceSplits, tokenizer: Any, reading: Reading) -> PreferenceSplits:
    """Return the splits without the pairs whose texts are equal in the tokens that are read.

    Rated texts that are equal in them are one text, with the mean of their ratings.

    Raises:
        ConfigError: nothing is left in a split, or a chat template refuses a conversation.
    """
    digests = _Digests(tokenizer, reading)
    parts = [digests.of(part) for part in (splits.train, splits.validation, splits.test)]
    kept = [[pair for pair, same in part if not same] for part in parts]
    equal = sum(same for part in parts for _, same in part)
    if not all(kept):
        raise ConfigError(
            f"preferences: {equal} pairs are equal in the {reading.max_length} tokens that the"
            " reward model reads, and a split has no other; raise reward_training.max_length"
        )
    rated = digests.merged(splits.rated)
    left_out = dict(splits.left_out) | {CUT_EQUAL: equal, CUT_TWICE: len(splits.rated) - len(rated)}
    return replace(
        splits,
        train=kept[0],
        validation=kept[1],
        test=kept[2],
        rated=rated,
        left_out={why: count for why, count in left_out.items() if count},
    )


class _Digests:
    """Tells by their tokens which texts are equal to the model."""

    def __init__(self, tokenizer: Any, reading: Reading):
        self.tokenizer, self.reading = tokenizer, reading
        self.known: dict[tuple[Part, Part], bytes] = {}

    def of(self, pairs: Sequence[Preference]) -> list[tuple[Preference, bool]]:
        """Return each pair with whether its two texts are equal."""
        try:
            self._read([text for pair in pairs for text in pair.texts])
        except ConfigError:
            self._name_row(pairs)
            raise
        return [(pair, self.known[pair.texts[0]] == self.known[pair.texts[1]]) for pair in pairs]

    def merged(self, rated: Sequence[Snippet]) -> list[Snippet]:
        """Return the rated texts, equal ones as one with the mean of their ratings."""
        self._read([("", one.text) for one in rated])
        same: dict[bytes, list[Snippet]] = {}
        for one in rated:
            same.setdefault(self.known["", one.text], []).append(one)
        return [
            own[0] if len(own) == 1 else replace(own[0], rating=fmean(one.rating for one in own))
            for own in same.values()
        ]

    def _name_row(self, pairs: Sequence[Preference]) -> None:
        """Raise the error of the first pair that cannot be read, with its row."""
        for pair in pairs:
            try:
                self._read(pair.texts)
            except ConfigError as error:
                raise ConfigError(f"preferences: row {pair.row}: {error}") from None

    def _read(self, texts: Sequence[tuple[Part, Part]]) -> None:
        new = [text for text in dict.fromkeys(texts) if text not in self.known]
        for start in range(0, len(new), TOKENIZED):
            chunk = new[start : start + TOKENIZED]
            prompts, completions = [text for text, _ in chunk], [text for _, text in chunk]
            tokens = tokens_of(self.tokenizer, prompts, completions, self.reading)[0]
            found = (array("q", ids).tobytes() for ids in tokens)
            self.known |= zip(chunk, (sha256(ids).digest() for ids in found), strict=True)


def _check_margins(splits: PreferenceSplits) -> None:
    for pair in [*splits.train, *splits.validation, *splits.test]:
        if pair.margin is None or not isfinite(pair.margin):
            raise ConfigError(
                f"reward_training.margin_loss=true, but row {pair.row} of the preferences has no"
                " number in the column margin; add it, or set margin_loss=false"
            )


def _drop_other_reading(out: Path, begun: dict[str, Any] | None, reading: Reading) -> None:
    """Delete checkpoints of a training that read its texts in another way.

    Before readings were kept, prompt and answer were one text.
    """
    if begun is not None and begun.get(READING, "none") != reading.template:
        print(f"reward model: {out / WORK} was trained on texts of another form; it starts over")
        shutil.rmtree(out / WORK)


def _check_backbone(config: Config) -> tuple[str, Any]:
    """Return the backbone's folder or hub id, and its tokenizer."""
    training, what = (
        config.reward_training,
        f"reward_training.backbone={config.reward_training.backbone}",
    )
    name = resolve_model(training.backbone, what="reward_training.backbone")
    settings = read_model_config(name, config.trust_remote_code, what)
    check_weights(name, what)
    from transformers import AutoModelForSequenceClassification

    auto, options = (
        AutoModelForSequenceClassification,
        {"num_labels": 1, "trust_remote_code": config.trust_remote_code},
    )
    check_tensors(auto, name, settings, what, new_head=True, **options)
    tokenizer = load_tokenizer(name, config.trust_remote_code)
    if training.max_length > (most := positions(tokenizer, settings)):
        raise ConfigError(
            f"reward_training.max_length={training.max_length}, but {what} reads at most {most}"
            f" tokens; set reward_training.max_length to at most {most}"
        )
    return name, tokenizer
