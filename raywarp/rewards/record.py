"""What a reward model's files say of its training: by raywarp, by TRL or by OpenRLHF.

Nothing in them is run: TRL's training_args.bin is a pickle, whose opcodes are only listed.
"""

import pickletools
import zipfile
from dataclasses import fields
from itertools import pairwise
from pathlib import Path
from typing import Any

from raywarp.config.datasets import PromptsConfig
from raywarp.config.field_types import LARGEST
from raywarp.config.rewards import RewardConfig
from raywarp.config.schema import ConfigError
from raywarp.rewards.reading import LENGTH, Reading, adds_bos
from raywarp.storage.sealed import read_record

REWARD_FILE = "reward.json"
TRL_ARGUMENTS = "training_args.bin"
TRL_CLASS = "trl.trainer.reward_config"


def stored_reading(name: str) -> Reading | None:
    """Return how a model was read in its training by raywarp; None for a model of others.

    Raises:
        DamagedError: the file that holds it is damaged.
    """
    stored = read_record(Path(name) / REWARD_FILE)
    if stored is None:
        return None
    if "reading" in stored:
        known = {field.name for field in fields(Reading)}
        return Reading(**{key: value for key, value in stored["reading"].items() if key in known})
    # Before there was a record, prompt and completion were one text.
    return Reading(stored.get("settings", {}).get("reward_training.max_length", LENGTH))


def reading_of(
    config: RewardConfig, prompts: PromptsConfig, tokenizer: Any, trust_remote_code: bool = False
) -> Reading:
    """Return how the model of a configuration reads texts: as it says, else as it was trained.

    Args:
        config: its model is resolved.
        prompts: a model of others reads turns where the policy answers in turns.
        tokenizer: the model's.

    Raises:
        ConfigError: template=chat without a chat template, a template that refuses an answer or
            leaves it out, or append_eos without an EOS.
    """
    from raywarp.data.models import read_model_config  # imports torch

    name = config.model or ""
    settings = read_model_config(name, trust_remote_code, f"the reward model {name}")
    own = stored_reading(name)
    known = own or _others(name, settings)
    template: str = config.template
    if template == "auto":
        chat = prompts.template == "chat" and tokenizer.chat_template and own is None
        template = "chat" if chat else known.template
    if template == "chat" and not (known.chat_template or tokenizer.chat_template):
        raise ConfigError(
            f"reward.template=chat, but the tokenizer of {name} has no chat template; use"
            " template=none"
        )
    append_eos = known.append_eos if config.append_eos is None else config.append_eos
    # TRL puts no EOS behind a template's text.
    if own is None and config.append_eos is None and template == "chat" and not known.ends:
        append_eos = False
    if append_eos and tokenizer.eos_token_id is None:
        raise ConfigError(f"reward.append_eos=true, but the tokenizer of {name} has no EOS token")
    reading = Reading(
        config.max_length or known.max_length,
        template,
        append_eos,
        known.chat_template if template == "chat" else None,
        known.dialogues,
        known.ends,
        adds_bos(tokenizer),
        tokenizer.pad_token_id,
    )
    if template == "chat":
        _check_answers_show(reading, tokenizer, name)
    return reading


def _check_answers_show(reading: Reading, tokenizer: Any, name: str) -> None:
    """Raise ConfigError if the chat template refuses an answer, or leaves it out."""
    one, other = reading.texts(tokenizer, ["Why?", "Why?"], ["Because.", "No idea."])
    if one == other:
        raise ConfigError(
            f"the chat template of {name} does not show the assistant's turn, so every answer would"
            " have the same score; use reward.template=plain or none"
        )


def _others(name: str, settings: Any) -> Reading:
    """Return what the files of a model that raywarp did not train say of its training."""
    if hasattr(settings, "normalize_reward") or hasattr(settings, "value_head_prefix"):
        # OpenRLHF sets the last token to EOS, and reads the last token that the mask keeps.
        return Reading(append_eos=True, ends=True)
    arguments = _trl_arguments(name)
    if arguments is None:
        return Reading()
    # Without a limit, TRL trains on whole texts.
    return Reading(arguments.get("max_length", LENGTH) or LARGEST, append_eos=True)


def _trl_arguments(name: str) -> dict[str, Any] | None:
    """Return the max_length of TRL's RewardTrainer, if it trained the model; else None."""
    from transformers.utils import cached_file

    try:
        path = cached_file(
            name,
            TRL_ARGUMENTS,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        listed = list(pickletools.genops(_pickled(Path(path)))) if path else []
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        return None
    values = [value for opcode, value, _ in listed if _is_value(opcode.name)]
    if TRL_CLASS not in " ".join(value for value in values if isinstance(value, str)):
        return None
    return {key: value for key, value in pairwise(values) if key == "max_length"}


def _pickled(path: Path) -> bytes:
    with zipfile.ZipFile(path) as archive:
        return archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))


def _is_value(opcode: str) -> bool:
    """Return whether an opcode pushes a value, rather than keeping or fetching one."""
    return not opcode.startswith(("MEMOIZE", "BINPUT", "PUT", "LONG_BINPUT"))
