"""Sources of scores for completions: a one-label sequence classifier, or a user's Python function.

A function is called by the names of its parameters (functions.py). It returns a number for each
completion, or None where it does not apply.

A function needs neither torch nor transformers, whose import takes two seconds and 270 MB in each
process. So the code that needs them is in classifier.py, and is imported only where it is called.
"""

import inspect
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from raywarp.config import callables
from raywarp.config.datasets import PromptsConfig
from raywarp.config.rewards import RewardConfig
from raywarp.config.schema import Config, ConfigError
from raywarp.identity import content_key, folder_fingerprint
from raywarp.rewards import functions
from raywarp.rewards.functions import Score, load_function
from raywarp.rewards.reading import Reading
from raywarp.rewards.record import REWARD_FILE as REWARD_FILE
from raywarp.rewards.record import reading_of, stored_reading
from raywarp.rewards.reward import Reward
from raywarp.storage.sealed import DamagedError, check_sealed, is_sealed, read_record

MODEL_FILES = ["*.safetensors", "*.bin", "*.json", "*.model", "*.jinja", "*.txt", "*.py"]
# Kept from the time when the module's source was hashed, since the function is still the same.
_KNOWN = {
    "raywarp.embedded:vader": "7f7a66ec6e713b0d",
    # Raise the number when the same completion no longer has the same score.
    "raywarp.rewards.verifiable:math_answer": "verifiable.math_answer.1",
    "raywarp.rewards.verifiable:think_format": "verifiable.think_format.1",
    "raywarp.rewards.verifiable:length": "verifiable.length.1",
}


def check_call(path: str, function: Score, columns: Iterable[str] = ()) -> None:
    """Raise ConfigError if a reward function cannot be called by the names of its parameters."""
    functions.call_of(path, function, columns)


def load_reward(
    config: RewardConfig, trust_remote_code: bool = False, device: str = "cpu"
) -> Reward:
    """Return the reward that a configuration names, standardised where it says so.

    The configuration is a resolved one: its model is a folder or hub id.

    Raises:
        ConfigError: there is neither model nor function, it cannot be loaded, or standardise=true
            where no statistics are stored.
    """
    if config.function:
        function = load_function(config.function)
        return Reward(
            config.function,
            function,
            source=_source_file(function),
            messages=config.messages,
            retry_on=functions.load_exceptions(config.retry_on),
            retries=config.retries,
        )
    if not config.model:
        raise ConfigError("there is no reward: set reward.model or reward.function")
    from raywarp.rewards.classifier import ClassifierReward

    stored = statistics(config.model)
    if config.standardise and stored is None:
        raise ConfigError(
            f"reward.standardise=true: {config.model} has no {REWARD_FILE} with score_mean and"
            " score_std"
        )
    mean, std = stored if stored and config.standardise is not False else (0.0, 1.0)
    reading = _reading(config, PromptsConfig(), trust_remote_code)
    classifier = ClassifierReward(
        config.model,
        reading,
        config.batch_size,
        trust_remote_code,
        device,
    )
    turns = reading.template != "none"
    return Reward(config.model, classifier.score, mean, std, messages=turns)


def with_template(
    config: RewardConfig, prompts: PromptsConfig, trust_remote_code: bool = False
) -> RewardConfig:
    """Return the configuration with all that decides how its model, which is resolved, reads texts.

    These are `template` (none, plain or chat), `max_length` and `append_eos`.

    Raises:
        ConfigError: see reading_of.
    """
    if not config.model:
        return config.model_copy(update={"template": "none"})
    reading = _reading(config, prompts, trust_remote_code)
    decided = {
        "template": reading.template,
        "max_length": reading.max_length,
        "append_eos": reading.append_eos,
    }
    return config.model_copy(update=decided)


def _reading(config: RewardConfig, prompts: PromptsConfig, trust_remote_code: bool) -> Reading:
    from raywarp.rewards.classifier import load_tokenizer

    assert config.model
    tokenizer = load_tokenizer(config.model, trust_remote_code)
    return reading_of(config, prompts, tokenizer, trust_remote_code)


def reward_fingerprint(config: RewardConfig) -> str:
    """Return a hash of what decides a raw score by a configuration whose model is resolved.

    That is a folder's files, a hub id's commit, or the source of a function's module, and the
    version. The statistics are left out, since they may be added later from SFT completions.
    """
    settings: dict[str, Any] = {"version": config.version}
    if config.function in _KNOWN:
        return (
            content_key([_KNOWN[config.function], config.version])
            if config.version
            else _KNOWN[config.function]
        )
    if config.function:
        settings |= {"function": config.function, "source": _source_of(config.function)}
        settings |= {"messages": config.messages} if config.messages is not None else {}
    elif config.model:
        settings |= {
            "max_length": config.max_length
            or (stored_reading(config.model) or Reading()).max_length,
            "standardise": config.standardise,
            "model": _model_fingerprint(config.model),
        }
        settings |= {"template": config.template} if config.template in ("chat", "plain") else {}
        settings |= {"append_eos": True} if config.append_eos else {}
    return content_key(settings)


def rewards_fingerprint(config: Config) -> str:
    """Return a hash of what decides the total of a run's rewards before they are standardised."""
    if not config.rewards:
        return reward_fingerprint(config.reward)
    return content_key(
        [[entry.name, entry.weight, reward_fingerprint(entry)] for entry in config.rewards]
    )


def _source_of(path: str) -> str | None:
    """Return the text of a function's module, or the hash of one that no module holds."""
    if path.startswith((callables.PREFIX, "__main__:")):
        try:
            return callables.fingerprint(load_function(path))
        except ValueError as error:
            raise ConfigError(f"the reward function '{path}' {error}") from None
    module = functions.load_module(*path.split(":", 1))
    source = inspect.getsourcefile(module) if getattr(module, "__file__", None) else None
    return Path(source).read_text() if source else None


def _model_fingerprint(name: str) -> str:
    if Path(name).is_dir():
        return folder_fingerprint(Path(name), MODEL_FILES, without=REWARD_FILE)
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(name, "config.json")
    return f"{name}@{Path(cached).parent.name}" if isinstance(cached, str) else name


def statistics(name: str) -> tuple[float, float] | None:
    """Return the mean and standard deviation of the score over SFT completions.

    The result is None where the folder has none.

    Raises:
        DamagedError: the file that holds them is damaged.
    """
    stored = read_record(Path(name) / REWARD_FILE) or {}
    return (stored["score_mean"], stored["score_std"]) if "score_mean" in stored else None


def check_trained(folder: Path) -> dict[str, Any] | None:
    """Return reward.json of a model that raywarp trained, or None for any other model.

    Raises:
        DamagedError: raywarp trained it, and its files are not what was written.
    """
    stored = read_record(folder / REWARD_FILE)
    if stored is not None and "settings" in stored:
        check_sealed(folder)
        return stored
    if is_sealed(folder):
        raise DamagedError(f"{folder / REWARD_FILE} is missing")
    return None


def own_file(path: str) -> str | None:
    """Return the file of a reward function in the working directory, which other nodes need too.

    The result is None for an installed function.
    """
    if path.startswith((callables.PREFIX, "__main__:")):
        return None  # it is sent to the workers
    file = getattr(functions.load_module(path.partition(":")[0]), "__file__", None)
    # Ray copies a submitted job's folder to every node itself.
    in_job = "working_dir_files" in os.getcwd()
    return file if file and not in_job and Path(file).is_relative_to(os.getcwd()) else None


def _source_file(function: Score) -> str | None:
    try:
        return inspect.getsourcefile(inspect.unwrap(function))
    except TypeError:
        return None
